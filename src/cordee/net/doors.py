"""Doors: where this process listens for connections, from other machines or from programs of this one.

Everybody can connect, so a connection costs little until it has shown what it is good for, and how many there
are is bounded at each step. Whoever is one too many goes, and crowd.py says who that is:

    silent ---the first byte---> opening ---admit---> admitted ---rest---> resting
    a socket, and nothing else   TLS, first message   a link, a request    HTTP between two requests

A silent connection has neither a task nor a buffer, so that thousands cost nothing: asyncio alone gives each
the 256 KiB of a TLS connection before it has said a word. From the beginning until it is admitted it has one
deadline, for the handshake and the first message together. What it may do then is its server's to bound.

A door leaves DESCRIPTORS_RESERVED to the rest of the process: files, the bus, and the sockets of a worker
that takes the place of a dead one. The system hands out the lowest free descriptor, so a high one shows that
few are left.
"""

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast
from weakref import WeakSet

from cordee.net import address
from cordee.net.crowd import Crowd
from cordee.system import events
from cordee.system.links import LocalListener

BACKLOG = 512  # connections that the system keeps while the event loop is busy
ACCEPTED_AT_ONCE = 32  # then others have their turn
ARRIVAL_SECONDS = 10.0  # from the first packet until it is admitted; the machine may be busy with a model
GOODBYE_SECONDS = 1.0  # for the other side to agree that a TLS connection ends
PAUSE_SECONDS = 0.5  # after the system had no descriptor left
SILENT_MAX = 128  # of other machines: those that want something say so at once
TLS_HANDSHAKE = b"\x16"  # the type of the first record of TLS (RFC 8446, section 5.1)
# A thousand clients at once need more than the 1,024 open files that many systems start with.
DESCRIPTORS = 16_384
DESCRIPTORS_RESERVED = 256  # workers take five each, the bus two for each node, each file that is read one


@dataclass(frozen=True)
class Places:
    """How many connections a door has at each step: in all, and of one address (or, once admitted, of one
    owner).

    None for `admitted`: what comes is so short that the deadline is for all of it.
    """

    opening: tuple[int, int]
    admitted: tuple[int, int] | None
    silent: int = SILENT_MAX
    resting: int = 0
    resting_seconds: float = 0.0


class Connection:
    """A connection at a door. `address` is where it comes from; empty: from this machine by a local link."""

    def __init__(self, door: "Door", link: socket.socket, where: str) -> None:
        self.address = where
        self.link = link
        self.transport: asyncio.BaseTransport | None = None
        self.task: asyncio.Task[None] | None = None
        self.step = "silent"
        self.stop_waiting: Callable[[], object] = lambda: None  # for its first bytes
        self.is_gone = False
        self._door = door
        self._deadline: asyncio.TimerHandle | None = None

    def admit(self, owner: str = "") -> None:
        """It has shown what it came for, and has no deadline from now on; admitting twice is harmless."""
        self._door.move(self, "admitted", owner or self.address)

    def rest(self) -> None:
        """It is between two requests."""
        self._door.move(self, "resting", self.address)

    def reopen(self) -> None:
        """It begins another request."""
        self._door.move(self, "opening", self.address)

    def due(self, seconds: float | None) -> None:
        """End it after so long, instead of when it was to end before; None: not by itself."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.end)

    def end(self) -> None:
        """Close it at once."""
        self.leave()
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()
        elif self.task is not None:
            self.task.cancel()  # in the handshake, which closes it
        else:
            self.stop_waiting()
            self.link.close()

    def leave(self) -> None:
        """It is closed: its place is free. Leaving twice is harmless."""
        self.is_gone = True
        self.due(None)
        self._door.forget(self)


class Door:
    """Accepts connections on a socket until it is closed; see the module's docstring.

    `make` gives the protocol of each connection, which has to call `Connection.leave` when the connection is
    lost, and `Connection.admit` as soon as it can. With `tls`, whatever begins as something else is sent
    `refusal`, and closed.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[Connection], asyncio.Protocol],
        places: Places,
        tls: ssl.SSLContext | None = None,
        refusal: bytes = b"",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make = make
        self._places = places
        self._tls = tls
        self._refusal = refusal
        self._crowds = {
            "silent": Crowd[Connection](places.silent, places.silent),
            "opening": Crowd[Connection](*places.opening),
            "admitted": Crowd[Connection](*(places.admitted or (0, 0))),
            "resting": Crowd[Connection](places.resting, places.resting),
        }
        # Only this user comes through a local link: to see what is wrong, and to mend it.
        self._admits = listener.admits if isinstance(listener, LocalListener) else None
        is_local, most = self._admits is not None, _descriptors()
        self._highest = most if is_local else most - min(DESCRIPTORS_RESERVED, most // 2)
        _doors.add(self)
        self._pause: asyncio.TimerHandle | None = None
        self._pause_listening: Callable[[], object] = lambda: None
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listen()

    def close(self) -> None:
        """Listen no longer, and end what is not admitted; closing twice is harmless."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener.fileno() >= 0:
            self._pause_listening()
            self._listener.close()
        for step in ("silent", "opening", "resting"):
            for connection in self._crowds[step]:
                connection.end()

    async def wait_closed(self) -> None:
        """As that of asyncio.Server; there is nothing to wait for."""

    def move(self, connection: Connection, step: str, owner: str) -> None:
        """A connection comes to another step; nothing happens where all of it is one step."""
        if connection.is_gone or connection.step == step or self._places.admitted is None:
            return
        seconds = {"opening": ARRIVAL_SECONDS, "admitted": None, "resting": self._places.resting_seconds}
        connection.due(seconds[step])
        self._put(connection, step, owner)

    def _put(self, connection: Connection, step: str, owner: str) -> None:
        self.forget(connection)
        connection.step = step
        out = self._crowds[step].add(connection, owner)
        if out is not None:
            out.end()

    def forget(self, connection: Connection) -> None:
        """A connection is at no step any more."""
        for crowd in self._crowds.values():
            crowd.discard(connection)

    def _listen(self) -> None:
        self._pause = None
        self._pause_listening = events.on_connection(self._loop, self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                link, whence = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # the system has no descriptor left
                if not _make_room():
                    self._pause_listening()
                    self._pause = self._loop.call_later(PAUSE_SECONDS, self._listen)
                return
            is_high = link.fileno() >= self._highest
            if is_high and not _make_room():
                link.close()
            else:
                if is_high:
                    _make_room()  # for one that is there already, so that there are fewer
                self._begin(link, "" if self._admits else whence[0])

    def _begin(self, link: socket.socket, host: str) -> None:
        link.setblocking(False)
        if self._admits is None:
            # asyncio does so only for sockets that name their protocol, as accepted ones do not. Without it
            # the second of two small writes waits 40 ms for the other side to acknowledge the first.
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(self, link, str(address.number(host) or ""))
        connection.due(ARRIVAL_SECONDS)
        self._put(connection, "silent", connection.address)
        connection.stop_waiting = events.on_data(self._loop, link, lambda: self._open(connection))

    def _open(self, connection: Connection) -> None:
        """It sent something, or it is gone."""
        if self._admits is not None and not self._admits(connection.link):
            connection.end()
            return
        connection.task = self._loop.create_task(self._serve(connection))
        self._put(connection, "opening", connection.address)

    async def _serve(self, connection: Connection) -> None:
        try:
            tls = self._tls
            if tls is not None and self._refusal and not _begins_tls(connection.link):
                tls, make = None, self._refuse
            else:
                make = self._make
            connection.transport, _ = await self._loop.connect_accepted_socket(
                lambda: make(connection),
                connection.link,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else ARRIVAL_SECONDS,
                ssl_shutdown_timeout=None if tls is None else GOODBYE_SECONDS,
            )
        except BaseException as error:
            connection.leave()
            if not isinstance(error, OSError | asyncio.CancelledError):  # no TLS, or gone; it is one too many
                raise

    def _refuse(self, connection: Connection) -> asyncio.Protocol:
        return _Refusal(connection, self._refusal)

    def at_step(self, step: str) -> Crowd[Connection]:
        """The connections at a step."""
        return self._crowds[step]


_doors: WeakSet[Door] = WeakSet()  # all of this process


def _make_room() -> bool:
    """End a connection, at any door, that nobody would miss; False if there is none."""
    for step in ("silent", "opening", "resting"):
        connection = max((door.at_step(step) for door in _doors), key=len).heaviest()
        if connection is not None:
            connection.end()
            return True
    return False


def _begins_tls(link: socket.socket) -> bool:
    """Whether what came first may be TLS; a connection that is gone already may be, too."""
    try:
        return link.recv(1, socket.MSG_PEEK) in (TLS_HANDSHAKE, b"")
    except OSError:
        return True


class _Refusal(asyncio.Protocol):
    """Reads something, so that the answer is not lost with what was not read; answers, and ends."""

    def __init__(self, connection: Connection, text: bytes) -> None:
        self._connection = connection
        self._text = text
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(self._text)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.leave()


class _Streams(asyncio.StreamReaderProtocol):
    def __init__(
        self,
        connection: Connection,
        serve: Callable[[Connection, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    ) -> None:
        async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await serve(connection, reader, writer)

        super().__init__(asyncio.StreamReader(), begin)
        self._connection = connection

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.leave()


def open_streams(
    listener: socket.socket,
    serve: Callable[[Connection, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    places: Places,
    tls: ssl.SSLContext,
) -> Door:
    """A door for streams over TLS: `serve` is called, as by asyncio.start_server, after the handshake."""
    return Door(listener, lambda connection: _Streams(connection, serve), places, tls)


def allow_descriptors() -> None:
    """Raise this process's limit of open files, sockets among them, to DESCRIPTORS if the system lets it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _descriptors() -> int:
    """How many this process may have."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
