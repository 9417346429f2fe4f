"""What a member may say on the bus, with real zenoh sessions over loopback: what is its own, and no more."""

import asyncio
from pathlib import Path

import pytest
import zenoh

from buses import PATIENCE_SECONDS, node, run, tokens, until
from cordee.net import zenoh_bus as bus_module
from cordee.net.zenoh_bus import Inbox
from intruders import intruder
from members import cluster

QUIET_SECONDS = 0.5  # for what was forged to be heard


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


@pytest.mark.parametrize("mode", ["peer", "client", "router"])
def test_a_member_says_nothing_under_the_keys_of_others_and_nobody_passes_it_on(
    tmp_path: Path, mode: str
) -> None:
    """It is linked with one of the two others only, and says everything under every key."""
    admin, member, hostile = cluster(tmp_path, 3)
    own, late = f"heartbeat/{hostile.node}", set[str]()
    prefix = f"cordee/{admin.cluster}/"
    forged = [
        f"{kind}/{name}"
        for kind in ("heartbeat", "alive", "at", "chunk", "removed")
        for name in (admin.node, member.node, "*", f"{admin.node[:2]}$*", "**")
    ]

    async def story() -> None:
        async with node(admin, []) as a, node(member, a.bus.addresses) as b:
            await until(lambda: a.alive == b.alive == tokens(admin, member))
            session = await asyncio.to_thread(
                intruder, hostile.folder, hostile.folder / "ca.pem", b.bus.addresses, None, mode
            )
            try:
                for key in forged:
                    session.put(prefix + key, b"forged")
                    session.liveliness().declare_token(prefix + key)
                alive = session.liveliness().declare_token(f"{prefix}alive/{hostile.node}")
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while (own, b"its own") not in b.heard:
                        session.put(prefix + own, b"its own")
                        await asyncio.sleep(0.05)
                await until(lambda: b.alive == tokens(admin, member, hostile))
                b.bus.watch("**", lambda key, _: late.add(key))  # what is there already
                await asyncio.sleep(QUIET_SECONDS)
                assert {payload for _, payload in a.heard} == set()  # nobody passes it on
                assert {payload for _, payload in b.heard} == {b"its own"}
                assert a.alive == tokens(admin, member)
                addresses = {
                    f"at/{each.node}/{','.join(bus.addresses)}"
                    for each, bus in ((admin, a.bus), (member, b.bus))
                }
                assert late == b.alive | addresses
                alive.undeclare()
                await until(lambda: b.alive == tokens(admin, member))
            finally:
                await asyncio.to_thread(session.close)

    run(story)


def test_a_member_answers_only_for_itself(tmp_path: Path) -> None:
    admin, member, hostile = cluster(tmp_path, 3)
    asked: list[str] = []

    async def story() -> None:
        async with node(admin, []) as a, node(member, a.bus.addresses) as b:

            async def answer(_: bytes) -> bytes:
                return b"true"

            b.bus.serve(f"ask/{member.node}", answer)
            await until(lambda: a.alive == b.alive == tokens(admin, member))
            session = await asyncio.to_thread(
                intruder, hostile.folder, hostile.folder / "ca.pem", [*a.bus.addresses, *b.bus.addresses]
            )

            def lie(query: zenoh.Query) -> None:
                asked.append(str(query.key_expr))
                query.reply(query.key_expr, b"evil")

            def tell(query: zenoh.Query) -> None:
                query.reply(f"cordee/{admin.cluster}/ask/{hostile.node}", b"its own")

            try:
                session.declare_queryable("cordee/**", lie)
                session.declare_queryable(f"cordee/{admin.cluster}/ask/{member.node}", lie)
                session.declare_queryable(f"cordee/{admin.cluster}/ask/*", lie)
                session.declare_queryable(f"cordee/{admin.cluster}/ask/{hostile.node}", tell)
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while sorted(await a.bus.query("ask/*", b"?", seconds=2)) != [b"its own", b"true"]:
                        await asyncio.sleep(0.05)
                assert await a.bus.query(f"ask/{member.node}", b"?", seconds=2) == [b"true"]
                assert set(asked) <= {f"cordee/{admin.cluster}/ask/*"}  # as it answers itself there
            finally:
                await asyncio.to_thread(session.close)

    run(story)


def test_one_member_fills_neither_an_inbox_nor_a_watch(tmp_path: Path) -> None:
    async def story() -> None:
        got: list[str] = []
        inbox = Inbox(asyncio.get_running_loop(), got.append)
        for number in range(5000):
            inbox.put(f"heartbeat/ab{number}", speaker="ab")
        inbox.put("heartbeat/cd", speaker="cd")
        await until(lambda: "heartbeat/cd" in got)
        assert len(got) == bus_module.SPEAKER_MESSAGES_MAX + 1
        inbox.put("heartbeat/ab again", speaker="ab")
        await until(lambda: "heartbeat/ab again" in got)

    run(story)
    seen: list[tuple[str, bool]] = []
    watch = bus_module._Watch("alive/*", lambda key, alive: seen.append((key, alive)))
    keys = [f"alive/ab{number:014x}" for number in range(1000)]
    for key in (*keys, "alive/cd"):
        watch.note(key, True)
    assert [key for key, _ in seen] == [*keys[: bus_module.SPEAKER_KEYS_MAX], "alive/cd"]
    watch.note(keys[0], False)
    watch.note(keys[99], True)
    assert seen[-2:] == [(keys[0], False), (keys[99], True)]
