"""Links between the workers of different machines: TCP with TLS 1.3, both sides showing a certificate.

Plain sockets and not the bus, because a worker is one blocking thread: a round trip of 2.3 kB takes half the
time that it takes through zenoh. The frames on a link are those of `cordee.worker.frames`.

    connect -> TLS handshake -> the listener checks that the client is a member -> WELCOME -> frames
                                |no: the link closes, and `connect` says so

Only the cluster's authority is trusted here, for servers and for clients. Host names prove nothing and are
not verified: what counts is a certificate of this cluster whose node was not removed. A certificate's
alternative name holds the node's id: who connects says which node it expects, and who listens learns which
node came, so that no member can stand in for another. The files are read for each link, so renewals and
removals need no restart; they are read without `cryptography`, which would make workers start a tenth of a
second later.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.errors import BadRequest
from cordee.net import address
from cordee.worker.frames import SOCKET_SECONDS, DoorClosed, LinkClosed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from cordee.net.doors import Connection, Door

WELCOME = b"\x01"  # a client of TLS 1.3 is done before the server has looked at its certificate
HANDSHAKE_SECONDS = 10.0  # to connect, shake hands and get WELCOME; the other worker may be in a decode
SILENCE_SECONDS = 3  # until a cable that was cut ends an idle link: as fast as the bus notices
# For TCP alone, which its system answers whatever the other worker does: an address may be one that the
# machine had before, or one that cannot be reached from here.
CONNECT_SECONDS = 2.0
BACKLOG = 512  # links that are opened during a decode wait there, and connections that nobody wanted
HANDSHAKES_MAX = (64, 16)  # with an event loop, in all and of one address: each has 370 kB
LINKS_MAX = (1024, 32)  # in all and of one node: one for its questions, one for each stage that brings tokens
NOT_LET_IN = "the other side does not let this node in: is a clock wrong?"
NODE_SUFFIX = ".cordee"  # of the alternative name that holds the node's id


class Handshake:
    """A connection whose handshake is under way, without blocking; it becomes a link or is closed.

    `address` is where it comes from. While it is `silent` it costs no more than its socket.
    """

    def __init__(self, folder: Path, plain: socket.socket, where: str) -> None:
        self.address = where
        self.silent = True
        self._folder = folder
        _tune(plain)
        plain.setblocking(False)
        self._link = plain

    def fileno(self) -> int:
        """For a selector; when it is readable, call `proceed`."""
        return self._link.fileno()

    def proceed(self) -> tuple[str, ssl.SSLSocket] | None:
        """Go on with the handshake: gives the member's id and the link, None while more has to arrive.

        Raises:
            LinkClosed: the other side is no member, was removed, or closed it; the connection is closed.
        """
        self.silent = False
        try:
            link = self._secured()
            link.do_handshake()
            node = check_member(self._folder, link.getpeercert())
            link.send(WELCOME)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (OSError, LinkClosed) as error:  # ssl.SSLError is an OSError
            self._link.close()
            raise LinkClosed(str(error)) from error
        link.settimeout(SOCKET_SECONDS)
        return node, link

    def _secured(self) -> ssl.SSLSocket:
        if not isinstance(self._link, ssl.SSLSocket):
            context = _context(self._folder, server=True)
            self._link = context.wrap_socket(self._link, server_side=True, do_handshake_on_connect=False)
        return self._link

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


class TlsListener:
    """Where a worker listens for links of other machines; `host` empty: on all interfaces.

    Raises:
        OSError: the address is not this machine's.
    """

    def __init__(self, folder: Path, host: str) -> None:
        self._folder = folder
        self._listener = address.listener_in_range(host)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self.endpoint = ",".join(address.own(host, self._listener.getsockname()[1]))

    def fileno(self) -> int:
        """For a selector; when it is readable, call `accept`."""
        return self._listener.fileno()

    def accept(self) -> Handshake | None:
        """The next connection; None if it was closed again."""
        try:
            plain, (host, *_) = self._listener.accept()
        except OSError:
            return None
        return Handshake(self._folder, plain, str(address.number(host)))

    def close(self) -> None:
        """Stop listening; links that were accepted stay."""
        self._listener.close()


def connect(folder: Path, endpoint: str, node: str) -> ssl.SSLSocket:
    """A link to the `TlsListener` of a node by its endpoint: after WELCOME, blocking, with SOCKET_SECONDS for
    each call.

    What becomes readable on it later is its end: listeners send nothing but WELCOME.

    Raises:
        DoorClosed: the node cannot be reached, or one side does not accept the other's certificate.
        LinkClosed: none of the endpoint's addresses answers as that node, and lets this one in.
    """
    until = time.monotonic() + HANDSHAKE_SECONDS
    errors: dict[str, Exception] = {}
    for each in endpoint.split(",")[: address.ADDRESSES_MAX]:
        try:
            return _connect(folder, each, node, until)
        except (OSError, LinkClosed, BadRequest) as error:
            errors[each] = error
    raise _explained(errors)


def _connect(folder: Path, where: str, node: str, until: float) -> ssl.SSLSocket:
    try:
        plain = socket.create_connection(_dialled(folder, where), min(CONNECT_SECONDS, _left(until)))
    except TimeoutError as error:
        raise DoorClosed(_unanswered(where, CONNECT_SECONDS)) from error
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(plain.close)
        _tune(plain)
        link = _context(folder, server=False).wrap_socket(plain, do_handshake_on_connect=False)
        on_failure.callback(link.close)
        link.settimeout(_left(until))
        link.do_handshake()
        _expect(folder, link.getpeercert(), node)
        if link.recv(1) != WELCOME:
            raise LinkClosed(NOT_LET_IN)
        link.settimeout(SOCKET_SECONDS)
        on_failure.pop_all()
    return link


def _dialled(folder: Path, where: str) -> tuple[str, int]:
    """Host and port of an address that another node named, if it is one to connect to.

    Those are the addresses in this machine's networks, and those at which nodes were seen on the bus, which a
    person gave.

    Raises:
        BadRequest: it is no address.
        LinkClosed: it is outside.
    """
    host, port = address.parse(where, 0)
    if not address.is_near(host):
        remembered = ""
        with contextlib.suppress(OSError):
            remembered = (folder / "peers").read_text(encoding="ascii", errors="replace")
        if not any(host in address.hosts(each) for each in remembered.split()):
            raise LinkClosed(
                f"{host} is in none of this machine's networks; if it is a node's, `cordee up --peer {host}` "
                "allows it"
            )
    return host, port


async def node_behind(folder: Path, host: str, port: int) -> str:
    """The id of the member that listens there, on a port of the bus or of links; the connection is closed.

    Raises:
        OSError: nothing answers, or not with a certificate of this cluster.
        LinkClosed: what answers was removed from it, or this node has no valid identity.
    """
    import asyncio  # here, because workers do without it

    _, writer = await asyncio.open_connection(host, port, ssl=_context(folder, server=False))
    try:
        return check_member(folder, writer.get_extra_info("peercert"))
    finally:
        writer.transport.abort()


async def open_stream(
    folder: Path, endpoint: str, node: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`connect` for an event loop.

    Raises:
        DoorClosed, LinkClosed: as `connect`.
    """
    import asyncio  # here, because workers do without it

    errors: dict[str, Exception] = {}
    for each in endpoint.split(",")[: address.ADDRESSES_MAX]:
        writer = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                reader, writer = await _open(folder, each)
                _tune(writer.get_extra_info("socket"))
                _expect(folder, writer.get_extra_info("peercert"), node)
                if await reader.read(1) != WELCOME:
                    raise LinkClosed(NOT_LET_IN)
                return reader, writer
        except (OSError, LinkClosed, BadRequest) as error:  # TimeoutError is an OSError
            if writer is not None:
                writer.close()
            errors[each] = error
    raise _explained(errors)


async def _open(folder: Path, where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect with TCP, within CONNECT_SECONDS, and shake hands."""
    import asyncio

    host, port = _dialled(folder, where)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            loop = asyncio.get_running_loop()
            family, kind, *_, target = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            plain = socket.socket(family, kind)
            plain.setblocking(False)
            try:
                await loop.sock_connect(plain, target)
            except BaseException:
                plain.close()
                raise
    except TimeoutError as error:
        raise DoorClosed(_unanswered(where, CONNECT_SECONDS)) from error
    return await asyncio.open_connection(sock=plain, ssl=_context(folder, server=False), server_hostname="")


async def open_listener(
    folder: Path,
    host: str,
    on_link: Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> tuple[Door, str]:
    """A `TlsListener` for an event loop, and its endpoint; `on_link` gets each member's id and its link.

    It shows the node's certificate of the moment, whatever that was when it was opened. What connects and
    proves nothing is bounded (net/doors.py).

    Raises:
        LinkClosed: this node has no valid identity.
        OSError: the address is not this machine's.
    """
    from cordee.net.doors import Places, open_streams  # here, because workers do without it

    async def welcome(
        connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            node = check_member(folder, writer.get_extra_info("peercert"))
        except LinkClosed:
            writer.close()
            return
        _tune(writer.get_extra_info("socket"))
        writer.write(WELCOME)
        connection.admit(node)
        await on_link(node, reader, writer)

    def renewed(link: ssl.SSLObject, _name: str | None, _context_of_start: ssl.SSLContext) -> None:
        link.context = _context(folder, server=True)

    context = _context(folder, server=True)
    context.sni_callback = renewed  # called in each handshake, with a name or without one
    listener = address.listener_in_range(host)
    door = open_streams(listener, welcome, Places(HANDSHAKES_MAX, LINKS_MAX), context)
    return door, ",".join(address.own(host, listener.getsockname()[1]))


def check_member(folder: Path, certificate: Mapping[str, Any] | None) -> str:
    """The id of the node behind a certificate that TLS has verified (`getpeercert`).

    Raises:
        LinkClosed: it is no node's, or the node was removed.
    """
    alternatives: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    names = [name for kind, name in alternatives if kind == "DNS"]
    node = names[0].removesuffix(NODE_SUFFIX) if names and names[0].endswith(NODE_SUFFIX) else ""
    if not node:
        raise LinkClosed("the certificate is no node's")
    revoked = (folder / "revoked").read_text(encoding="ascii", errors="replace")
    if any(line.startswith(node) for line in revoked.splitlines()):
        raise LinkClosed(f"node {node} was removed from the cluster")
    return node


def _explained(errors: Mapping[str, Exception]) -> LinkClosed:
    """What to say of addresses none of which could be used; one that was refused says the most.

    A machine has addresses that cannot be reached from everywhere. So only if none answers at all, or if a
    certificate is the reason, can the node not be reached from here.
    """
    untrusted = [error for error in errors.values() if isinstance(error, ssl.SSLError)]
    if untrusted:
        return DoorClosed(
            f"its certificate or ours is not accepted ({_told(untrusted[0])}): is a clock wrong?"
        )
    said = "; ".join(f"{where}: {error}" for where, error in errors.items())
    closed = all(isinstance(error, DoorClosed) or _is_unreachable(error) for error in errors.values())
    return DoorClosed(said) if closed and errors else LinkClosed(said)


def _told(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or str(error)).replace("_", " ").lower()


def _unanswered(where: str, seconds: float) -> str:
    return f"no connection to {where} in {seconds:.0f} s (a firewall?)"


def _is_unreachable(error: Exception) -> bool:
    """Whether no packet came back, or a router said that none would."""
    return isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)


def _expect(folder: Path, certificate: Mapping[str, Any] | None, node: str) -> None:
    found = check_member(folder, certificate)
    if found != node:
        raise LinkClosed(f"node {found} answers there, not {node}")


def _context(folder: Path, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    except OSError as error:
        raise LinkClosed(f"the identity in {folder} cannot be used: {error}") from error
    if server:
        context.num_tickets = 0  # they would make a link readable without a frame
    return context


def _tune(plain: socket.socket) -> None:
    """Send small frames at once, and notice when the network falls silent under an idle link.

    Under data in flight the system alone would notice after minutes; TCP_USER_TIMEOUT would also end links to
    workers that do not read because they compute. There the bus notices, and the stages are wired again.
    """
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": SILENCE_SECONDS - 1}
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has them all, others some
            plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _left(until: float) -> float:
    """Seconds until then; never 0, which would mean not to block."""
    return max(until - time.monotonic(), 0.001)
