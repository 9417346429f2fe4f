"""Probes: which of the others a node reaches for rows, and what it says of those that it does not."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from clusters import facts_of
from cordee.agent import probes
from cordee.agent.probes import Probes
from cordee.cluster.facts import Facts
from cordee.net.identity import CERTIFICATE_SECONDS, DAY_SECONDS, Identity
from cordee.worker import frames, tls_link
from cordee.worker.messages import Probe, StreamsJoin
from members import cluster

PATIENCE_SECONDS = 20.0

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback needs no patience."""
    for name, seconds in {"ANSWER_SECONDS": 0.5, "AGAIN_SECONDS": 0.05, "LOOK_SECONDS": 0.02}.items():
        monkeypatch.setattr(probes, name, seconds)


async def as_agents_do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    message, _ = await frames.read(reader)
    assert isinstance(message, Probe)
    await probes.answer(reader, writer)


async def in_silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def with_something_else(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    frames.write(writer, StreamsJoin())


async def byte_by_byte(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        for byte in frames.LENGTHS.pack(20, probes.PROBE_BYTES) + bytes(10_000):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def inbox(member: Identity, serve: Serve) -> AsyncGenerator[Facts]:
    """The facts of a node whose inbox serves like that."""

    async def accept(_: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.transport.abort()

    server, endpoint = await tls_link.open_listener(member.folder, "127.0.0.1", accept)
    try:
        yield msgspec.structs.replace(facts_of(member.node), inbox=endpoint)
    finally:
        server.close()


async def unreachable(
    member: Identity, known: dict[str, Facts], until: Callable[[dict[str, str]], bool] = bool
) -> dict[str, str]:
    """What a node's probes find once `until` is true of it."""
    news = asyncio.Event()
    probing = Probes(member, lambda: known, news.set)
    watching = asyncio.create_task(probing.watch())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not until(dict(probing.unreachable)):
                await news.wait()
                news.clear()
    finally:
        watching.cancel()
    return dict(probing.unreachable)


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (in_silence, "16 kB do not come back"),
        (with_something_else, "something else"),
        (byte_by_byte, "16 kB do not come back"),
    ],
)
def test_who_does_not_give_back_what_it_gets_is_named(tmp_path: Path, serve: Serve, said: str) -> None:
    a, b, c = cluster(tmp_path, 3)

    async def story() -> dict[str, str]:
        async with inbox(b, serve) as bad, inbox(c, as_agents_do) as good:
            return await unreachable(a, {b.node: bad, c.node: good})

    found = asyncio.run(story())
    assert found.keys() == {b.node}
    assert said in found[b.node]


def test_a_closed_port_and_another_node_behind_it_are_named(tmp_path: Path) -> None:
    a, b, c = cluster(tmp_path, 3)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"

    async def story() -> dict[str, str]:
        async with inbox(c, as_agents_do) as other:
            shut = msgspec.structs.replace(facts_of(b.node), inbox=nobody)
            mine = msgspec.structs.replace(facts_of("d" * 16), inbox=other.inbox)
            return await unreachable(a, {b.node: shut, "d" * 16: mine}, lambda found: len(found) == 2)

    found = asyncio.run(story())
    assert nobody in found[b.node]
    assert c.node in found["d" * 16]


def test_a_wrong_clock_is_asked_for_where_a_certificate_is_not_accepted(tmp_path: Path) -> None:
    a, b = cluster(tmp_path, 2)
    b.renew(a.sign(b.request(), time.time() + CERTIFICATE_SECONDS + 9 * DAY_SECONDS))

    async def story() -> tuple[dict[str, str], dict[str, str]]:
        async with inbox(a, as_agents_do) as left, inbox(b, as_agents_do) as right:
            return await unreachable(a, {b.node: right}), await unreachable(b, {a.node: left})

    for found in asyncio.run(story()):
        [reason] = found.values()
        assert "is a clock wrong?" in reason


def test_who_is_reached_again_or_gone_is_not_unreachable_any_more(tmp_path: Path) -> None:
    a, b, c = cluster(tmp_path, 3)
    known: dict[str, Facts] = {}

    async def story() -> None:
        news = asyncio.Event()
        probing = Probes(a, lambda: known, news.set)
        watching = asyncio.create_task(probing.watch())

        async def until(nodes: set[str]) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while probing.unreachable.keys() != nodes:
                    await news.wait()
                    news.clear()

        async with inbox(b, in_silence) as bad, inbox(c, in_silence) as worse:
            known[b.node], known[c.node] = bad, worse
            await until({b.node, c.node})
            async with inbox(b, as_agents_do) as good:
                known[b.node] = good
                await until({c.node})
                del known[c.node]
                await until(set())
        watching.cancel()

    asyncio.run(story())
