"""Links between gateways and hosts over real TLS on loopback: each message is its sender's."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from cordee.agent import stream_links
from cordee.agent.stream_links import StreamLinks
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Join, StreamMessage, StreamsJoin
from cordee.worker.process import opening
from members import cluster

PATIENCE_SECONDS = 30.0


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


class Node:
    """The end of these links on a node, and what it heard."""

    def __init__(self, member: Identity) -> None:
        self.node, self.folder = member.node, member.folder
        self.heard: list[tuple[str, bytes]] = []
        self.links = StreamLinks(member.folder, member.node, lambda *came: self.heard.append(came))
        self.inbox = ""
        self.incoming: list[asyncio.StreamWriter] = []

    async def accept(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As the agent does."""
        self.incoming.append(writer)
        with contextlib.suppress(LinkClosed):
            if isinstance(await opening(reader), StreamsJoin):
                await self.links.serve(node, reader, writer)
        writer.transport.abort()


@contextlib.asynccontextmanager
async def nodes(members: list[Identity]) -> AsyncGenerator[list[Node]]:
    """Their nodes, each of which listens."""
    made = [Node(member) for member in members]
    servers: list[asyncio.Server] = []
    try:
        for each in made:
            server, each.inbox = await tls_link.open_listener(each.folder, "127.0.0.1", each.accept)
            servers.append(server)
        yield made
    finally:
        for each in made:
            await each.links.close()
        for server in servers:
            server.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_questions_and_answers_go_both_ways_and_name_their_sender(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(cluster(tmp_path, 3)) as (gateway, other, host):
            for each in (gateway, other):
                each.links.follow({host.node: host.inbox, each.node: "no endpoint is needed for oneself"})
                each.links.ask(host.node, b"before the link is open")
                each.links.ask(each.node, b"to myself")
            await until(lambda: len(host.heard) == 2)
            assert set(host.heard) == {(each.node, b"before the link is open") for each in (gateway, other)}
            for size in (0, 1, 1 << 20):
                gateway.links.ask(host.node, bytes(size))
                await until(lambda size=size: host.heard[-1] == (gateway.node, bytes(size)))
            host.links.answer(gateway.node, b"to the one who asked")
            await until(lambda: (host.node, b"to the one who asked") in gateway.heard)
            assert other.heard == [(other.node, b"to myself")]  # and it hears nothing else
            host.links.answer("nobody", b"lost")
            gateway.links.ask("nobody", b"lost")

    asyncio.run(story())


def test_another_member_at_the_hosts_address_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_links, "RETRY_SECONDS", (0.05, 0.05))

    async def story() -> None:
        async with nodes(cluster(tmp_path, 3)) as (gateway, impostor, host):
            gateway.links.follow({host.node: impostor.inbox})
            gateway.links.ask(host.node, b"a secret")
            await asyncio.sleep(0.5)
            assert impostor.heard == []
            gateway.links.follow({host.node: host.inbox})  # its true address becomes known
            gateway.links.ask(host.node, b"another")
            await until(lambda: host.heard)
            assert impostor.heard == []

    asyncio.run(story())


def test_a_link_that_ends_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_links, "RETRY_SECONDS", (0.05, 0.05))

    async def story() -> None:
        async with nodes(cluster(tmp_path, 2)) as (gateway, host):
            gateway.links.follow({host.node: host.inbox})
            for number in range(5):
                message = f"message {number}".encode()
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while (gateway.node, message) not in host.heard:  # it may be lost, and is said again
                        gateway.links.ask(host.node, message)
                        await asyncio.sleep(0.02)
                host.incoming[-1].transport.abort()

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["another frame", "too long", "no frame"])
def test_what_is_no_message_about_streams_ends_the_link(tmp_path: Path, kind: str) -> None:
    async def story() -> None:
        async with nodes(cluster(tmp_path, 2)) as (stranger, host):
            reader, writer = await tls_link.open_stream(stranger.folder, host.inbox, host.node)
            frames.write(writer, StreamsJoin())
            frames.write(writer, StreamMessage(), b"one")
            await until(lambda: host.heard == [(stranger.node, b"one")])
            if kind == "another frame":
                frames.write(writer, Join("wiring"))
            elif kind == "too long":
                writer.write(frames.LENGTHS.pack(8, stream_links.MESSAGE_BYTES_MAX + 1))
            else:
                writer.write(b"\xff" * 64)
            async with asyncio.timeout(PATIENCE_SECONDS):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            assert host.heard == [(stranger.node, b"one")]

    asyncio.run(story())


def test_what_a_node_does_not_take_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that stops reading loses its link, and the gateway's memory does not grow."""
    monkeypatch.setattr(stream_links, "OUTBOX_BYTES_MAX", 1 << 20)

    async def story() -> None:
        async with nodes(cluster(tmp_path, 2)) as (gateway, host):
            gateway.links.follow({host.node: host.inbox})
            gateway.links.ask(host.node, b"first")
            await until(lambda: host.heard)
            host.incoming[-1].transport.pause_reading()
            writer = gateway.links._outgoing[host.node].writer
            assert writer is not None
            for _ in range(200):
                gateway.links.ask(host.node, bytes(1 << 20))
            assert writer.transport.get_write_buffer_size() <= 3 << 20
            assert writer.transport.is_closing()

    asyncio.run(story())
