"""How a certificate is renewed that is not valid now: it ran out while its machine was off, or a clock was
wrong when it was made. Such a node cannot enter the bus, where all other certificates are renewed.

    node                                        admin (RenewalEndpoint, open as long as the admin runs)
      |---- TLS 1.3, certificates on both sides --->|   made by the cluster's authority? its key held? the
      |                                             |   dates alone are not looked at; not removed?
      |---- REQUEST, one fixed word --------------->|
      |<--- a fresh certificate, the time ----------|   and the link closes

The handshake says all: the admin reads nothing of the node but that word, and signs nothing but the key that
the handshake has proved. A recorded link is of no use to anybody: a handshake cannot be repeated without
the key, and the certificate in it is not a secret. There is no bound on how long a certificate may have run
out. What ends a membership is `cordee remove`: a removed node gets the proof of its removal instead.

The address of each admin's endpoint is in its heartbeats, and remembered by all members (members.py). Its
port is chosen once and kept, so that it is the same after the holidays.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from cryptography import x509

from cordee import files
from cordee.errors import BadRequest, JoinFailed, StorageFailed
from cordee.net import address, enrolment, identity, scouting
from cordee.net.doors import Connection, Door, Places, open_streams
from cordee.net.identity import Identity
from cordee.net.members import KnownMember, Members
from cordee.net.peers import Peers

REQUEST = b"renew"  # whoever only listens learns nothing
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for
CONNECTIONS_MAX = (32, 8)  # at once, in all and of one address: each has 370 kB
REACH_SECONDS = 3.0  # for each address of an admin
ANSWER_BYTES_MAX = 16 << 10  # a certificate takes 1 kB
ADMINS_MAX = 8  # that are asked, those heard last first
ROUND_SECONDS = 30.0  # for all of them: whoever answers a multicast may name any number of hosts
RETRY_SECONDS = 3.0  # until all admins are asked again
FAULTS_SHOWN = 4
SCOUT_SECONDS = 1.0  # for nodes to answer a multicast

log = logging.getLogger(__name__)


class RenewalAnswer(msgspec.Struct, frozen=True):
    """`now` is the admin's clock. A `certificate` (PEM), or for a node that was removed the `revocation`."""

    now: float
    certificate: bytes = b""
    revocation: bytes = b""


class RenewalEndpoint:
    """Where an admin renews the certificates of nodes that cannot enter the bus. Close it."""

    def __init__(self, member: Identity, host: str, clock: Callable[[], float]) -> None:
        self._identity = member
        self._host = host
        self._clock = clock
        self._port = 0
        self._door: Door | None = None

    @classmethod
    async def open(
        cls, member: Identity, host: str, clock: Callable[[], float] = time.time
    ) -> "RenewalEndpoint":
        """`host` is where it listens: empty means all interfaces.

        Raises:
            OSError: the address is not this machine's.
        """
        endpoint = cls(member, host, clock)
        listener = _kept_listener(member.folder / "renewal-port", host)
        endpoint._port = listener.getsockname()[1]
        places = Places(CONNECTIONS_MAX, admitted=None)
        endpoint._door = open_streams(listener, endpoint._serve, places, _context(member, server=True))
        return endpoint

    @property
    def addresses(self) -> str:
        """Where it is reached, joined by commas."""
        return ",".join(address.own(self._host, self._port))

    def close(self) -> None:
        """Listen no longer."""
        if self._door is not None:
            self._door.close()

    async def _serve(self, _: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readexactly(len(REQUEST)) == REQUEST:
                link: ssl.SSLObject = writer.get_extra_info("ssl_object")
                writer.write(msgspec.msgpack.encode(self._answer(link.getpeercert(binary_form=True))))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, ValueError):  # it went or says nothing, or its certificate is no node's
            pass
        finally:
            writer.transport.abort()

    def _answer(self, shown: bytes | None) -> RenewalAnswer:
        """To a peer that holds the key of this certificate (DER), as TLS has seen; its dates do not count.

        Raises:
            ValueError: it is no node's certificate.
        """
        certificate = x509.load_der_x509_certificate(shown or b"")
        now, node = self._clock(), identity.certified_node(certificate)
        removals = {identity.revoked_node(entry): entry for entry in self._identity.revocations}
        if node in removals:
            return RenewalAnswer(now, revocation=removals[node])
        log.info("node %s renews its certificate", node)
        return RenewalAnswer(now, self._identity.sign_for(certificate, certificate.public_key(), now))


async def until_valid(
    member: Identity,
    interface: str,
    report: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> None:
    """Wait until a member's certificate is valid now: an admin's own is renewed at once, others by an admin.

    Admins that moved are found by multicast on `interface` (see BusOptions.scouting). `report` is told once
    why it takes long; this machine's clock, which is often wrong just after it was switched on, may also be
    set meanwhile.

    Raises:
        JoinFailed: the node was removed, or no admin is known.
    """
    hosts: list[str] = []
    said = False
    while True:
        now = clock()
        if member.is_admin and member.renewal_due(now):
            member.renew_self(now)
        if member.is_valid(now) or member.node in member.revoked or not Members(member).admins:
            enrolment.check(member, now)
            return
        fault = await asyncio.to_thread(renew, member, clock, hosts)
        if fault:
            if not said:
                state = enrolment.when_valid(member, now)
                report(
                    f"This node's certificate {state}, and no admin has renewed it yet ({fault}). It is "
                    "renewed as soon as one of them runs and can be reached. Is this machine's clock right?"
                )
            said = True
            hosts = await scouting.hosts(member.cluster, interface, SCOUT_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)


def renew(member: Identity, clock: Callable[[], float] = time.time, hosts: Iterable[str] = ()) -> str:
    """Have a member's certificate renewed by some admin; gives why not, or nothing if it was. Blocks.

    Admins are also looked for at `hosts`.

    Raises:
        JoinFailed: the node was removed.
    """
    faults: list[str] = []
    ends = time.monotonic() + ROUND_SECONDS
    for admin, where in _endpoints(member, hosts):
        if time.monotonic() > ends:
            break
        try:
            answer = _ask(member, where)
            if answer.certificate:
                _take(member, answer, clock())
                return ""
            member.admit([answer.revocation])
            fault = "it refuses"
        except (OSError, ValueError, msgspec.MsgspecError, BadRequest) as error:
            fault = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if member.node in member.revoked:
            raise JoinFailed(enrolment.REFUSALS["removed"])
        faults.append(f"{admin.name} at {where}: {fault}")
    return "; ".join(faults[:FAULTS_SHOWN]) or "none is known"


def reachable(member: Identity) -> KnownMember | None:
    """An admin that answers where it renews certificates; None if none does. Blocks."""
    for admin, where in _endpoints(member):
        with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError, BadRequest):
            _ask(member, where)
            return admin
    return None


def _take(member: Identity, answer: RenewalAnswer, now: float) -> None:
    """Store what an admin answered.

    Raises:
        ValueError: its clock and ours disagree, or the certificate is not ours.
    """
    off_seconds = now - answer.now
    if abs(off_seconds) > enrolment.CLOCK_SECONDS_MAX:
        raise ValueError(f"{enrolment.clock_fault(off_seconds)}, so set whichever of the two is wrong")
    member.renew(answer.certificate, now)


def _endpoints(member: Identity, hosts: Iterable[str] = ()) -> list[tuple[KnownMember, str]]:
    """Where admins renew: where each was last; then at its port on `hosts`, for it may have moved.

    Where they were is what they said: only addresses in this machine's networks are asked, and hosts at which
    nodes were seen on the bus, which a person gave.
    """
    seen = {host for addresses in Peers(member).known.values() for host in address.hosts(addresses)}
    found: dict[str, KnownMember] = {}
    for admin in Members(member).admins[:ADMINS_MAX]:
        for where in admin.renewals.split(",")[: address.ADDRESSES_MAX]:
            with contextlib.suppress(BadRequest):
                own_host, port = address.parse(where, 0)
                if address.is_near(own_host) or own_host in seen:
                    found.setdefault(where, admin)
                for host in hosts:
                    found.setdefault(address.text(host, port), admin)
    return [(admin, where) for where, admin in found.items()]


def _ask(member: Identity, where: str) -> RenewalAnswer:
    host, port = address.parse(where, 0)
    with (
        socket.create_connection((host, port), REACH_SECONDS) as plain,
        _context(member, server=False).wrap_socket(plain) as link,
    ):
        shown = x509.load_der_x509_certificate(link.getpeercert(binary_form=True) or b"")
        if identity.certified_node(shown) in member.revoked:
            raise ValueError("it was removed from the cluster")
        link.sendall(REQUEST)
        data = b""
        while len(data) <= ANSWER_BYTES_MAX and (piece := link.recv(ANSWER_BYTES_MAX)):
            data += piece
    return msgspec.msgpack.decode(data, type=RenewalAnswer)


def _context(member: Identity, *, server: bool) -> ssl.SSLContext:
    """TLS that trusts this cluster's authority alone, and does not look at dates on either side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= NO_CHECK_TIME
    context.load_verify_locations(member.folder / "ca.pem")
    context.load_cert_chain(member.folder / "node.pem", member.folder / "node.key")
    if server:
        context.num_tickets = 0
    return context


def _kept_listener(path: Path, host: str) -> socket.socket:
    """A listener on the port that the file names; if that is taken on another, which it names then."""
    kept, listener = 0, None
    with contextlib.suppress(OSError, ValueError):
        kept = min(max(int(path.read_text(encoding="ascii")[:8]), 0), address.PORT_MAX)
    if kept:
        with contextlib.suppress(OSError):
            listener = address.listener(host, kept)
    if listener is None:
        listener = address.listener_in_range(host)
    port = listener.getsockname()[1]
    if port != kept:
        with contextlib.suppress(StorageFailed), files.atomic_file(path) as file:
            files.write_all(file, str(port).encode())
    return listener
