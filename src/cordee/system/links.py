"""Links between processes of one account on one machine, by the path of a file.

On POSIX that file is a Unix socket, which the system lets only its account open. Python has none on Windows:
there the listener is a TCP socket on 127.0.0.1, and the file, which only its account can read, says its port
and two secrets. Every account can connect to the port. So whoever connects first sends one secret, and gets
the other back: a stranger is not admitted, and a stranger's listener, on the port of a process that has
ended, is told nothing that is of use. Both secrets go with the listener.
"""

import asyncio
import hmac
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path

SECRET_BYTES = 32
# A secret goes in one packet of the loopback; the other side may be computing before it answers.
PROOF_SECONDS = 10.0
UNPROVEN_MAX = 64  # callers of a server who have not sent their secret; one more is hung up on
NAME_BYTES_MAX = 103  # of a Unix socket, as systems allow without the null at its end: macOS the least
FILE_BYTES_MAX = 256  # of what a listener writes down

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class LocalListener(socket.socket):
    """Where processes of this account reach this one. `listen` has not been called yet."""

    def admits(self, link: socket.socket) -> bool:
        """Whether an accepted link comes from this account; to be asked when it first is readable.

        Where the system looks after who may open the listener, whoever could is.
        """
        return True


class UnixListener(LocalListener):
    """A Unix socket; the system looks after who may open it."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX)
        try:
            with _short_name(path) as name:
                self.bind(name)
            path.chmod(0o600)  # whoever serves on it listens: until then nobody waits in vain
        except BaseException:
            self.close()
            raise


class LoopbackListener(LocalListener):
    """A port of 127.0.0.1, and the file that says which, with the secrets."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_INET)
        self.theirs, self.ours = secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        try:
            if sys.platform == "win32":  # else another account could listen on the same port, too
                self.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            self.bind(("127.0.0.1", 0))
            text = f"{self.getsockname()[1]} {self.theirs.hex()} {self.ours.hex()}\n"
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
        except BaseException:
            self.close()
            raise

    def admits(self, link: socket.socket) -> bool:
        """Whether its first bytes are the secret; it is answered."""
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = link.gettimeout()
        link.setblocking(False)  # a secret that came in pieces is none of ours
        try:
            if not hmac.compare_digest(link.recv(SECRET_BYTES), self.theirs):
                return False
            link.send(self.ours)
        except OSError:
            return False
        link.settimeout(before)
        return True


@contextmanager
def _short_name(path: Path) -> Generator[str]:
    """A name for a socket, short enough for the system: if need be through a descriptor of its folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if len(os.fsencode(path)) <= NAME_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect_unix(path: Path, seconds: float | None) -> socket.socket:
    """See `connect`."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(seconds)
        with _short_name(path) as name:
            link.connect(name)
    except BaseException:
        link.close()
        raise
    return link


def connect_loopback(path: Path, seconds: float | None) -> socket.socket:
    """See `connect`."""
    port, theirs, ours = _noted(path)
    link = socket.create_connection(("127.0.0.1", port), PROOF_SECONDS if seconds is None else seconds)
    try:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sendall(theirs)
        answer = b""
        while len(answer) < SECRET_BYTES and (piece := link.recv(SECRET_BYTES - len(answer))):
            answer += piece
        if not hmac.compare_digest(answer, ours):
            raise ConnectionRefusedError(f"what listens on the port of {path} is not what wrote it")
        link.settimeout(seconds)
    except BaseException:
        link.close()
        raise
    return link


def _noted(path: Path) -> tuple[int, bytes, bytes]:
    """The port and the secrets in a listener's file."""
    try:
        with path.open("rb") as file:
            port, theirs, ours = file.read(FILE_BYTES_MAX).decode("ascii").split()
        return int(port), bytes.fromhex(theirs), bytes.fromhex(ours)
    except ValueError as error:
        raise ConnectionRefusedError(f"{path} is not what a process of ours wrote") from error


async def serve_unix(path: Path, accept: Accept) -> asyncio.Server:
    """See `serve`."""
    return await asyncio.start_unix_server(accept, path)


async def serve_loopback(path: Path, accept: Accept) -> asyncio.Server:
    """See `serve`."""
    listener, unproven = LoopbackListener(path), set[asyncio.StreamWriter]()

    async def accept_ours(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(unproven) >= UNPROVEN_MAX or not await is_ours(reader, writer):
            writer.transport.abort()
        else:
            await accept(reader, writer)

    async def is_ours(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        unproven.add(writer)
        try:
            async with asyncio.timeout(PROOF_SECONDS):
                secret = await reader.readexactly(SECRET_BYTES)
        except (EOFError, OSError):  # TimeoutError among them
            return False
        finally:
            unproven.discard(writer)
        if not hmac.compare_digest(secret, listener.theirs):
            return False
        writer.write(listener.ours)
        return True

    return await asyncio.start_server(accept_ours, sock=listener)


async def open_unix(path: Path) -> Streams:
    """See `open_streams`."""
    return await asyncio.open_unix_connection(path)


async def open_loopback(path: Path) -> Streams:
    """See `open_streams`."""
    port, theirs, ours = _noted(path)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(theirs)
        async with asyncio.timeout(PROOF_SECONDS):
            answer = await reader.readexactly(SECRET_BYTES)
    except (EOFError, OSError) as error:
        writer.transport.abort()
        raise ConnectionRefusedError(f"what listens on the port of {path} does not answer") from error
    if not hmac.compare_digest(answer, ours):
        writer.transport.abort()
        raise ConnectionRefusedError(f"what listens on the port of {path} is not what wrote it")
    return reader, writer


def is_path(target: str) -> bool:
    """Whether an address is the path of a link on this machine, and not a host and a port."""
    return Path(target).is_absolute()


# `local_listener(path)` begins to be reachable at a path. `connect(path, seconds)` reaches a listener, with
# so much patience for each of its steps and for what is done with the link later. `serve(path, accept)` and
# `open_streams(path)` are the same for asyncio. All of them raise OSError.
NAMES_ARE_SHORT = sys.platform != "win32"  # else a path may be as long as that of any file
local_listener = UnixListener if NAMES_ARE_SHORT else LoopbackListener
connect = connect_unix if NAMES_ARE_SHORT else connect_loopback
serve = serve_unix if NAMES_ARE_SHORT else serve_loopback
open_streams = open_unix if NAMES_ARE_SHORT else open_loopback
