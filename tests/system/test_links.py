"""Links between processes of one account: what goes through, and who is not let in, of either kind."""

import asyncio
import contextlib
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.net.doors import Connection, Door, Places
from cordee.system import links
from cordee.system.links import LocalListener, LoopbackListener, UnixListener

KINDS = pytest.mark.parametrize(
    ("listen", "connect"),
    [(UnixListener, links.connect_unix), (LoopbackListener, links.connect_loopback)],
    ids=["unix", "loopback"],
)
NOBODY = 65534  # an account that is there, and owns nothing

Listen = Callable[[Path], LocalListener]
Connect = Callable[[Path, float | None], socket.socket]


def answering(listener: LocalListener, admitted: list[bool]) -> threading.Thread:
    """Accepts one link, and sends back what comes if it is admitted."""

    def serve() -> None:
        link, _ = listener.accept()
        with link:
            link.settimeout(5)
            link.recv(1, socket.MSG_PEEK)
            admitted.append(listener.admits(link))
            if admitted[-1]:
                link.sendall(link.recv(100))

    listener.listen(4)
    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@KINDS
def test_what_is_sent_arrives(tmp_path: Path, listen: Listen, connect: Connect) -> None:
    admitted: list[bool] = []
    with listen(tmp_path / "place") as listener:
        thread = answering(listener, admitted)
        with connect(tmp_path / "place", 5) as link:
            link.sendall(b"hello")
            assert link.recv(100) == b"hello"
        thread.join()
    assert admitted == [True]


@KINDS
def test_the_file_is_for_its_account_alone(tmp_path: Path, listen: Listen, connect: Connect) -> None:
    with listen(tmp_path / "place"):
        assert stat.S_IMODE((tmp_path / "place").stat().st_mode) == 0o600


@KINDS
def test_nobody_listens_any_more(tmp_path: Path, listen: Listen, connect: Connect) -> None:
    listen(tmp_path / "place").close()
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path / "place", 5)


@pytest.mark.parametrize("sent", [b"x" * links.SECRET_BYTES, b"\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_at_the_port_is_not_admitted(tmp_path: Path, sent: bytes) -> None:
    admitted: list[bool] = []
    with LoopbackListener(tmp_path / "place") as listener:
        thread = answering(listener, admitted)
        with socket.create_connection(listener.getsockname(), 5) as link:
            link.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(100) == b""
        thread.join()
    assert admitted == [False]


def test_a_stranger_who_took_the_port_is_told_nothing(tmp_path: Path) -> None:
    """The listener ended and left its file; somebody else listens on the port and answers with anything."""
    LoopbackListener(tmp_path / "place").close()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", int((tmp_path / "place").read_text().split()[0])))
        stranger.listen(1)

        def serve() -> None:
            link, _ = stranger.accept()
            with link:
                link.sendall(link.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConnectionRefusedError, match="not what wrote it"):
            links.connect_loopback(tmp_path / "place", 5)
        thread.join()


@pytest.mark.parametrize("text", ["", "12", "a b c", "1 zz zz", "é"])
def test_a_file_that_no_listener_wrote(tmp_path: Path, text: str) -> None:
    (tmp_path / "place").write_text(text, encoding="utf-8")
    with pytest.raises(ConnectionRefusedError, match="place"):
        links.connect_loopback(tmp_path / "place", 5)


def test_a_new_listener_has_new_secrets(tmp_path: Path) -> None:
    LoopbackListener(tmp_path / "place").close()
    before = (tmp_path / "place").read_text()
    LoopbackListener(tmp_path / "place").close()
    assert not set(before.split()[1:]) & set((tmp_path / "place").read_text().split()[1:])


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can be another account")
@KINDS
def test_another_account_cannot_come_in(tmp_path: Path, listen: Listen, connect: Connect) -> None:
    """Whatever the folder allows: not even the file can be used, which a caller needs."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with listen(tmp_path / "place") as listener:
        listener.listen(1)
        process = os.fork()
        if process == 0:
            try:
                os.setuid(NOBODY)
                connect(tmp_path / "place", 5)
            except PermissionError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize(
    ("serve", "open_streams"),
    [(links.serve_unix, links.open_unix), (links.serve_loopback, links.open_loopback)],
    ids=["unix", "loopback"],
)
def test_streams_of_an_event_loop(
    tmp_path: Path, serve: Callable[..., object], open_streams: Callable[..., object]
) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))

    async def exchange() -> bytes:
        server = await serve(tmp_path / "place", accept)
        reader, writer = await open_streams(tmp_path / "place")
        writer.write(b"hello")
        answer = await reader.readexactly(5)
        writer.close()
        server.close()
        return answer

    assert asyncio.run(exchange()) == b"hello"


def test_a_stranger_reaches_no_server(tmp_path: Path) -> None:
    called: list[int] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(1)

    async def exchange() -> bytes:
        server = await links.serve_loopback(tmp_path / "place", accept)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x" * links.SECRET_BYTES)
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""
        writer.close()
        server.close()
        return answer

    assert asyncio.run(exchange()) == b""
    assert not called


def test_more_strangers_than_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep their places for a while only, and one more is hung up on at once."""
    monkeypatch.setattr(links, "UNPROVEN_MAX", 2)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError

    async def exchange() -> bytes:
        server = await links.serve_loopback(tmp_path / "place", accept)
        callers = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in range(3)]
        try:
            return await callers[-1][0].read()
        except ConnectionResetError:
            return b""
        finally:
            for _, writer in callers:
                writer.close()
            server.close()

    assert asyncio.run(exchange()) == b""


@KINDS
def test_a_door_admits_whom_the_link_admits(tmp_path: Path, listen: Listen, connect: Connect) -> None:
    """As the agent's control socket does, whose door this is."""

    class Echo(asyncio.Protocol):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

        def connection_lost(self, exc: Exception | None) -> None:
            self.connection.leave()

    def ask(path: Path) -> bytes:
        with connect(path, 5) as link:
            link.sendall(b"hello")
            return link.recv(100)

    def intrude(address: object) -> bytes:
        with socket.create_connection(address, 5) as link:
            link.sendall(b"hello" * 20)
            try:
                return link.recv(100)
            except ConnectionResetError:
                return b""

    async def exchange() -> tuple[bytes, bytes]:
        listener = listen(tmp_path / "place")
        door = Door(listener, Echo, Places((4, 4), (4, 4)))
        loop = asyncio.get_running_loop()
        answer, stolen = await loop.run_in_executor(None, ask, tmp_path / "place"), b""
        if listen is LoopbackListener:
            stolen = await loop.run_in_executor(None, intrude, listener.getsockname())
        door.close()
        return answer, stolen

    assert asyncio.run(exchange()) == (b"hello", b"")


def test_paths_and_addresses_of_machines() -> None:
    assert links.is_path("/tmp/x")
    assert not links.is_path("192.0.2.1:80")
    assert not links.is_path("[2001:db8::1]:80")
