"""Doors under a flood: what says little or nonsense is bounded, and who comes for something is served."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cordee.net import doors, http_door
from cordee.net.crowd import Crowd
from cordee.net.doors import Connection, Door, Places, open_streams
from cordee.net.http_door import HttpServer
from cordee.net.identity import Identity
from cordee.net.renewal import _context
from handshakes import hello
from members import founder

PATIENCE_SECONDS = 60
PLACES = Places(opening=(8, 4), admitted=(4, 2), resting=3, resting_seconds=PATIENCE_SECONDS)
FLOOD = 300
ATTACKER = "127.0.0.9"  # another address of this machine


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


def run(story: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(story, PATIENCE_SECONDS))


@contextlib.asynccontextmanager
async def echo(member: Identity, places: Places = PLACES) -> AsyncGenerator[tuple[Door, int]]:
    """A door that admits whoever says a line, and says it again."""

    async def serve(
        connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                connection.admit()
                writer.write(line)
        writer.transport.abort()

    listener = socket.create_server(("127.0.0.1", 0))
    door = open_streams(listener, serve, places, _context(member, server=True))
    try:
        yield door, listener.getsockname()[1]
    finally:
        door.close()


async def said(member: Identity, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection over which a line has gone there and back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=_context(member, server=False))
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    return reader, writer


def connected(port: int, says: bytes = b"", whence: str = "127.0.0.1") -> socket.socket:
    link = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS, source_address=(whence, 0))
    with contextlib.suppress(OSError):
        link.sendall(says)
    return link


async def flooded(stack: contextlib.ExitStack, port: int, says: bytes, count: int = FLOOD) -> None:
    for number in range(count):
        stack.callback(connected(port, says, ATTACKER).close)
        if number % 16 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0.1)


def is_closed(link: socket.socket) -> bool:
    """Whether the other side has closed it; reads what it sent before."""
    link.setblocking(False)
    try:
        while link.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=40),
)
def test_a_crowd_has_its_bounds_and_the_heaviest_makes_room(
    most: int, each: int, events: list[tuple[str, bool]]
) -> None:
    crowd: Crowd[int] = Crowd(most, each)
    inside: list[tuple[int, str]] = []
    for number, (owner, stays) in enumerate(events):
        counts = {name: [its for _, its in inside].count(name) for name in "abcd"}
        out = crowd.add(number, owner)
        if out is not None:
            its = dict(inside)[out]
            assert counts[its] == (each if counts[owner] >= each else max(counts.values()))
            assert out == next(item for item, name in inside if name == its)  # its oldest
            inside = [pair for pair in inside if pair[0] != out]
        inside.append((number, owner))
        if not stays:
            crowd.discard(number)
            crowd.discard(number)
            inside.pop()
        assert list(crowd) == [item for item, _ in inside] and len(crowd) <= most
    assert (crowd.heaviest() is None) == (not inside)


@pytest.mark.parametrize("kind", ["nothing", "a byte", "hello", "plain text"])
def test_a_flood_is_bounded_and_keeps_nobody_out(tmp_path: Path, kind: str) -> None:
    member = founder(tmp_path / "a")
    says = {"nothing": b"", "a byte": b"\x16", "hello": hello(), "plain text": b"GET / HTTP/1.1\r\n"}[kind]

    async def story() -> None:
        async with echo(member) as (door, port):
            with contextlib.ExitStack() as stack:
                before = await said(member, port)
                await flooded(stack, port, says)
                counts = {step: len(crowd) for step, crowd in door._crowds.items()}
                assert counts["silent"] <= doors.SILENT_MAX and counts["opening"] <= PLACES.opening[1]
                after = await said(member, port)
                for reader, writer in (before, after):
                    writer.write(b"still here\n")
                    assert await reader.readline() == b"still here\n"
                    writer.transport.abort()
            await until(lambda: not any(map(len, door._crowds.values())))

    run(story())


@pytest.mark.parametrize("kind", ["nothing", "a byte", "hello", "all but a word"])
def test_what_is_not_admitted_ends_in_time(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = founder(tmp_path / "a")

    async def story() -> None:
        async with echo(member) as (door, port):
            admitted = await said(member, port)
            monkeypatch.setattr(doors, "ARRIVAL_SECONDS", 0.2)
            if kind == "all but a word":
                reader, _ = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=_context(member, server=False)
                )
                with contextlib.suppress(OSError):
                    assert await reader.read() == b""
            else:
                link = connected(port, {"nothing": b"", "a byte": b"\x16", "hello": hello()}[kind])
                await until(lambda: is_closed(link))
                link.close()
            assert [len(crowd) for crowd in door._crowds.values()] == [0, 0, 1, 0]
            admitted[1].write(b"I may stay\n")
            assert await admitted[0].readline() == b"I may stay\n"
            admitted[1].transport.abort()

    run(story())


def test_where_nothing_is_admitted_the_deadline_is_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "ARRIVAL_SECONDS", 1.0)
    member = founder(tmp_path / "a")

    async def story() -> None:
        async with echo(member, Places((8, 4), admitted=None)) as (_, port):
            reader, _ = await said(member, port)
            with contextlib.suppress(OSError):
                assert await reader.read() == b""

    run(story())


def test_one_owner_has_so_many_places_and_the_oldest_goes(tmp_path: Path) -> None:
    member = founder(tmp_path / "a")

    async def story() -> None:
        async with echo(member) as (_, port):
            links = [await said(member, port) for _ in range(PLACES.admitted[1] + 1)]
            assert await links[0][0].read() == b""
            for reader, writer in links[1:]:
                writer.write(b"x\n")
                assert await reader.readline() == b"x\n"
                writer.transport.abort()

    run(story())


def test_a_door_leaves_descriptors_to_the_rest_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admitted connections are not cut off for a newcomer: it has to go. Silent ones are."""
    member = founder(tmp_path / "a")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def story() -> None:
        async with echo(member, Places((8, 8), admitted=(8, 8))) as (door, port):
            with contextlib.ExitStack() as stack:
                admitted = await said(member, port)
                door._highest = 0  # as if all descriptors were in use
                refused = connected(port)
                await until(lambda: is_closed(refused))
                refused.close()
                door._highest = soft
                silent = connected(port)
                await until(lambda: len(door._crowds["silent"]) == 1)
                door._highest = 0
                stack.callback((await said(member, port))[1].transport.abort)
                await until(lambda: is_closed(silent))
                admitted[1].write(b"still here\n")
                assert await admitted[0].readline() == b"still here\n"
                admitted[1].transport.abort()

    run(story())


def test_a_system_without_descriptors_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "PAUSE_SECONDS", 0.05)
    member = founder(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def story() -> None:
        async with echo(member) as (_, port):
            with contextlib.ExitStack() as stack:
                waiting = connected(port)
                used = waiting.fileno() + 1
                resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                await asyncio.sleep(0.2)
                assert not is_closed(waiting)
            waiting.close()
            (await said(member, port))[1].transport.abort()

    run(story())


# HTTP


@contextlib.asynccontextmanager
async def http(places: Places = PLACES) -> AsyncGenerator[tuple[HttpServer, int]]:
    """A server that answers /quick at once, /slow when it is told to by /release, /body after the body."""
    released = asyncio.Event()

    async def quick(_: Request) -> PlainTextResponse:
        return PlainTextResponse("quick")

    async def slow(_: Request) -> PlainTextResponse:
        await released.wait()
        return PlainTextResponse("slow")

    async def release(_: Request) -> PlainTextResponse:
        released.set()
        return PlainTextResponse("released")

    async def body(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    handlers = {"/quick": quick, "/slow": slow, "/release": release, "/body": body}
    routes = [Route(path, handler, methods=["GET", "POST"]) for path, handler in handlers.items()]
    config = uvicorn.Config(Starlette(routes=routes), http="h11", ws="none", log_config=None)
    config.timeout_graceful_shutdown = 1
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = HttpServer(config, listener, places)
    server.capture_signals = contextlib.nullcontext
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield server, port
    finally:
        server.should_exit = True
        await serving


def request(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode()


class Client:
    """A connection that is kept alive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def get(self, path: str) -> bytes:
        self.writer.write(request(path))
        return await self.answer()

    async def answer(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        return await self.reader.readexactly(length)


SLOW = {
    "nothing": b"",
    "half a header": request("/quick")[:-2],
    "a header without end": b"GET /quick HTTP/1.1\r\nX: " + b"x" * 1000,
    "half a body": request("/body", "Content-Length: 100", method="POST") + b"x",
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_requests_are_bounded_and_keep_nobody_waiting(kind: str) -> None:
    async def story() -> None:
        async with http() as (server, port):
            busy, idle = await Client.connect(port), await Client.connect(port)
            busy.writer.write(request("/slow"))
            assert await idle.get("/quick") == b"quick"
            with contextlib.ExitStack() as stack:
                await flooded(stack, port, SLOW[kind], 200)
                assert len(server.server_state.connections) <= PLACES.opening[0] + 2
                newcomer = await Client.connect(port)
                assert await newcomer.get("/quick") == b"quick"
                assert await idle.get("/release") == b"released"
                assert await busy.answer() == b"slow"
                for client in (busy, idle, newcomer):
                    client.writer.transport.abort()

    run(story())


@pytest.mark.parametrize("kind", SLOW)
def test_slow_requests_end_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a byte comes now and then, and on a connection that has brought a request before."""
    monkeypatch.setattr(doors, "ARRIVAL_SECONDS", 0.4)
    monkeypatch.setattr(http_door, "BODY_SECONDS", 0.4)

    async def trickle(client: Client) -> None:
        while True:
            await asyncio.sleep(0.05)
            client.writer.write(b"x")

    async def story() -> None:
        async with http() as (_, port):
            for is_first in (True, False):
                client = await Client.connect(port)
                if not is_first:
                    assert await client.get("/quick") == b"quick"
                client.writer.write(SLOW[kind] or b"G" * (not is_first))
                trickling = asyncio.create_task(trickle(client)) if SLOW[kind] else None
                with contextlib.suppress(OSError):
                    assert b"200 OK" not in await client.reader.read()
                if trickling is not None:
                    trickling.cancel()
                client.writer.transport.abort()

    run(story())


def test_a_body_that_nobody_reads_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "ARRIVAL_SECONDS", 0.4)

    async def story() -> None:
        async with http() as (_, port):
            client = await Client.connect(port)
            client.writer.write(request("/nowhere", "Content-Length: 1000000", method="POST"))
            assert await client.answer() == b"Not Found"
            with contextlib.suppress(OSError):
                while not client.writer.transport.is_closing():
                    client.writer.write(b"x")
                    await client.writer.drain()
                    await asyncio.sleep(0.02)

    run(story())


def test_of_idle_connections_the_oldest_go_and_requests_at_work_stay() -> None:
    async def story() -> None:
        async with http() as (_, port):
            busy = await Client.connect(port)
            busy.writer.write(request("/slow"))
            idle = [await Client.connect(port) for _ in range(PLACES.resting + 1)]
            for client in idle:
                assert await client.get("/quick") == b"quick"
            assert await idle[0].reader.read() == b""
            for client in reversed(idle[1:]):
                assert await client.get("/quick") == b"quick"
            idle[1].writer.write(request("/quick") + request("/release"))  # two at once
            assert [await idle[1].answer(), await idle[1].answer()] == [b"quick", b"released"]
            assert await busy.answer() == b"slow"
            for client in (busy, *idle):
                client.writer.transport.abort()

    run(story())


def test_an_idle_connection_ends_in_time() -> None:
    places = Places((8, 4), (4, 2), resting=3, resting_seconds=0.2)

    async def story() -> None:
        async with http(places) as (_, port):
            client = await Client.connect(port)
            assert await client.get("/quick") == b"quick"
            assert await client.reader.read() == b""

    run(story())
