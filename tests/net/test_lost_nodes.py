"""Nodes that are there but not heard: which to look for and when, who counts as there, and that they meet."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import Simple, facts_of
from cordee.agent import gossip as gossip_module
from cordee.agent.gossip import Gossip
from cordee.agent.reach import is_there
from cordee.cluster.controller import Controller
from cordee.cluster.facts import Gauges
from cordee.net import lost_nodes
from cordee.net.bus import BusOptions
from cordee.net.identity import Identity
from cordee.net.lost_nodes import LOST_SECONDS, PAUSE_SECONDS_MAX, LostNodes
from cordee.net.zenoh_bus import ZenohBus
from members import cluster, founder

PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


def test_the_smaller_id_begins_and_pauses_grow() -> None:
    small, large = LostNodes("a"), LostNodes("b")
    assert small.due({"a", "b"}, {"a"}, 0.0) is None
    assert large.due({"a", "b"}, {"b"}, 0.0) is None
    assert small.due({"b"}, set(), LOST_SECONDS) == "b"
    assert large.due({"a"}, set(), LOST_SECONDS) is None
    now = LOST_SECONDS
    for pause_seconds in (20.0, 40.0, 80.0, 160.0, PAUSE_SECONDS_MAX, PAUSE_SECONDS_MAX):
        small.reopened("b", now)
        assert small.due({"b"}, set(), now + pause_seconds - 1) is None
        now += pause_seconds
        assert small.due({"b"}, set(), now) == "b"
    small.due({"b"}, {"b"}, now)  # it was heard: all is forgotten
    assert small.due({"b"}, set(), now) is None
    assert small.due({"b"}, set(), now + LOST_SECONDS) == "b"


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcdef")), st.floats(0.0, 7.0)), max_size=60))
def test_only_nodes_that_are_not_heard_are_looked_for_and_none_too_often(
    steps: list[tuple[set[str], float]],
) -> None:
    lost, now = LostNodes("c"), 0.0
    looked = dict.fromkeys("abcdef", 0.0)  # when it was looked for or heard last
    for heard, seconds in steps:
        now += seconds
        node = lost.due(set("abcdef"), heard, now)
        looked |= dict.fromkeys(heard, now)
        if node is not None:
            assert node not in heard | {"c"}
            assert now - looked[node] >= LOST_SECONDS
            looked[node] = now


def test_a_node_is_there_where_it_shows_its_own_certificate(tmp_path: Path) -> None:
    first, second, third = cluster(tmp_path / "ours", 3)
    stranger = founder(tmp_path / "theirs")

    async def story() -> None:
        async with bus(second) as there, bus(stranger) as foreign:
            (where,) = there.addresses
            with socket.create_server(("127.0.0.1", 0)) as silent:
                closed = f"127.0.0.1:{silent.getsockname()[1]}"
            assert await there_at(first, second.node, where)
            assert await there_at(first, second.node, f"{closed},{where}")
            assert not await there_at(first, third.node, where)  # another has the address now
            assert not await there_at(first, second.node, closed)
            assert not await there_at(first, stranger.node, foreign.addresses[0])
            assert not await there_at(first, second.node, "")
            assert not await there_at(first, second.node, "nonsense:x")

    asyncio.run(story())


def test_two_nodes_that_live_but_do_not_hear_each_other_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if zenoh had lost their link: neither has an address of the other to try, each remembers one."""
    monkeypatch.setattr(lost_nodes, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(gossip_module, "SEEK_SECONDS", 0.1)
    first, second = cluster(tmp_path, 2)

    async def story() -> None:
        async with bus(first) as a, bus(second) as b, gossip(first, a) as one, gossip(second, b) as other:
            a._peers.remember(second.node, ",".join(b.addresses))
            b._peers.remember(first.node, ",".join(a.addresses))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (alive(one) == alive(other) == {first.node, second.node}):
                    await asyncio.sleep(0.05)

    asyncio.run(story())


async def there_at(member: Identity, node: str, addresses: str) -> bool:
    """Whether a member finds a node there, where it remembers that address of it."""
    (member.folder / "peers").write_text(f"{node} {addresses}\n")
    return await is_there(member, node)


def alive(controller: Controller) -> set[str]:
    nodes = controller.nodes(time.monotonic())
    return {node for node, (state, _) in nodes.items() if state == "alive"}


@contextlib.asynccontextmanager
async def bus(member: Identity) -> AsyncGenerator[ZenohBus]:
    """A member on the bus that nothing tells where others are."""
    opened = await ZenohBus.open(member, BusOptions("127.0.0.1:0", (), ""))
    try:
        yield opened
    finally:
        await opened.close()


@contextlib.asynccontextmanager
async def gossip(member: Identity, opened: ZenohBus) -> AsyncGenerator[Controller]:
    """A member that speaks, listens and looks for lost nodes."""
    controller = Controller(member.node, f"session of {member.node}", Simple(), member)
    controller.observe(facts_of(member.node), time.monotonic(), time.time())
    speaker = Gossip(opened, member, controller, lambda: None, lambda: None)
    speaker.open()
    tasks = [asyncio.create_task(each) for each in (speaker.speak_always(Gauges), speaker.seek_lost_always())]
    try:
        yield controller
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
