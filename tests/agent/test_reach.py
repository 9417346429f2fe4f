"""Nodes that try each other's ports: what they find, and why nobody can scan with them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest

from clusters import facts_of
from cordee.agent import reach
from cordee.agent.checks import clock_findings
from cordee.agent.reach import Reach, Tried
from cordee.cluster.facts import Facts
from cordee.net import address
from cordee.net.bus import BusOptions
from cordee.net.identity import DAY_SECONDS, Identity
from cordee.net.peers import Peers
from cordee.net.zenoh_bus import ZenohBus
from cordee.worker import tls_link
from members import cluster

PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of its own for each test, and the old one afterwards; and less patience, as on loopback."""
    monkeypatch.setattr(reach, "TRY_SECONDS", 1.5)
    return home


class Node:
    """A member on the bus with an inbox; `says` is what the others hear of it."""

    def __init__(self, member: Identity, bus: ZenohBus, inbox: str, known: dict[str, Facts]) -> None:
        self.id, self.member, self.bus, self.inbox, self.known = member.node, member, bus, inbox, known
        self.reach = Reach(bus, member, lambda: {node: f for node, f in known.items() if node != self.id})
        self.says(inbox)

    def says(self, inbox: str) -> None:
        self.known[self.id] = msgspec.structs.replace(facts_of(self.id), inbox=inbox)

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(sorted(address.parse(each, 0)[1] for each in (self.bus.addresses[0], self.inbox)))


@contextlib.asynccontextmanager
async def nodes(members: list[Identity]) -> AsyncGenerator[list[Node]]:
    known: dict[str, Facts] = {}
    made: list[Node] = []

    async def ignore(_: str, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with contextlib.AsyncExitStack() as stack:
        for member in members:
            peers = tuple(made[0].bus.addresses) if made else ()
            bus = await ZenohBus.open(member, BusOptions("127.0.0.1:0", peers, ""))
            stack.push_async_callback(bus.close)
            server, inbox = await tls_link.open_listener(member.folder, "127.0.0.1", ignore)
            stack.callback(server.close)
            made.append(Node(member, bus, inbox, known))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(len(Peers(each).known) < len(members) - 1 for each in members):
                await asyncio.sleep(0.02)
        yield made


async def seen(node: Node) -> dict[str, Tried]:
    """What the others say; a query may come before they have heard that it can be asked."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(found := await node.reach.seen_by_others()) < len(node.known) - 1:
            await asyncio.sleep(0.02)
    return found


def test_open_ports_are_reached_and_closed_ones_are_not(tmp_path: Path) -> None:
    members = cluster(tmp_path, 3)

    async def story() -> None:
        async with nodes(members) as (a, b, c):
            assert await seen(a) == {b.id: Tried(a.ports), c.id: Tried(a.ports)}
            assert await b.reach.seen_from_here() == {a.id: Tried(a.ports), c.id: Tried(c.ports)}
            with socket.create_server(("127.0.0.1", 0)) as probe:
                nobody = probe.getsockname()[1]
            assert await b.reach.answers("localhost", a.ports[0])
            assert not await b.reach.answers("127.0.0.1", nobody)
            a.says(f"127.0.0.1:{nobody}")
            bus = address.parse(a.bus.addresses[0], 0)[1]
            assert set((await seen(a)).values()) == {Tried((bus,), (nobody,))}
            a.says(f"127.0.0.1:{nobody},{a.inbox}")  # one address of several will do
            assert {each.reached for each in (await seen(a)).values()} == {a.ports}

    asyncio.run(story())


@pytest.mark.long
def test_nobody_can_scan_the_network_with_the_nodes(tmp_path: Path) -> None:
    """A member that announces what is not its own hears the same whether or not something listens there."""
    members = cluster(tmp_path, 2)

    async def story() -> None:
        async with nodes(members) as (a, b):
            bus = address.parse(a.bus.addresses[0], 0)[1]
            with socket.create_server(("127.0.0.1", 0)) as plain:  # it accepts, and says nothing
                silent = plain.getsockname()[1]
                for inbox in (f"127.0.0.1:{silent}", b.inbox, "", "example.invalid:22", "x", ",,,", ":1"):
                    a.says(inbox)
                    [tried] = (await seen(a)).values()
                    assert tried.reached == (bus,)
            other = address.parse(b.inbox, 0)[1]
            a.says(f"127.0.0.1:{silent},{b.inbox}")
            [tried] = (await seen(a)).values()
            assert tried == Tried((bus,), tuple(sorted((silent, other))))

    asyncio.run(story())


def test_only_nodes_that_are_alive_are_helped(tmp_path: Path) -> None:
    members = cluster(tmp_path, 2)

    async def story() -> None:
        async with nodes(members) as (a, b):
            assert await seen(a)
            del a.known[a.id]
            assert await a.reach.seen_by_others() == {}
            for question in (b"", b"\xff", b"x" * 1000, b.id.encode()):
                assert await a.bus.query(f"reach/{b.id}", question, seconds=0.3) == []

    asyncio.run(story())


# Clocks


def test_nodes_whose_clocks_agree_are_well() -> None:
    assert clock_findings({}) == []
    assert clock_findings({"b": 2.0, "c": -3.0}) == []


@pytest.mark.parametrize(
    ("ahead", "what"),
    [
        ({"b": -7200.0}, "This machine's clock is 2 hours ahead of that of b: one of the two is wrong."),
        ({"b": 90.0}, "This machine's clock is 90 seconds behind that of b: one of the two is wrong."),
        ({"b": 600.0, "c": 601.0}, "This machine's clock is 10 minutes behind those of the other nodes."),
        ({"b": 1.0, "c": -400_000.0}, "The clock of c is 5 days behind those of the other nodes."),
    ],
)
def test_the_clock_that_differs_is_named(ahead: dict[str, float], what: str) -> None:
    [finding] = clock_findings(ahead)
    assert finding.what == what
    assert finding.problem == (max(map(abs, ahead.values())) > DAY_SECONDS)
