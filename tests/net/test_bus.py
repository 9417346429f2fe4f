"""The bus with real zenoh sessions over loopback: nodes meet and talk, and others see nothing at all."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
import threading
import time
from pathlib import Path

import psutil
import pytest
import zenoh

from buses import LOOPBACK, PATIENCE_SECONDS, hears, node, run, tokens, until
from cordee.errors import BadRequest
from cordee.net import address, enrolment, identity, scouting
from cordee.net import zenoh_bus as bus_module
from cordee.net.bus import PORT, REMOVED, BusOptions
from cordee.net.peers import Peers
from cordee.net.zenoh_bus import Inbox, ZenohBus
from intruders import intruder, intruder_certificate
from members import DAY_SECONDS, at_home, cluster, founder, newcomer

QUIET_SECONDS = 0.5  # after a member heard it, for an intruder to hear it too


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


@pytest.mark.parametrize("listen", [LOOPBACK, "[::1]:0"])
def test_three_nodes_meet_through_one_address_and_talk(tmp_path: Path, listen: str) -> None:
    first, second, third = cluster(tmp_path, 3)
    try:
        address.listener(address.parse(listen, 0)[0], 0).close()
    except OSError:
        pytest.skip(f"this machine has no address for {listen}")

    async def story() -> None:
        async with (
            node(first, [], listen=listen) as a,
            node(second, a.bus.addresses, listen=listen) as b,
            node(third, a.bus.addresses, listen=listen) as c,
        ):
            everybody = tokens(first, second, third)
            await until(lambda: a.alive == b.alive == c.alive == everybody)
            await hears(c, b, b"from b")  # gossip: they know each other through a
            await hears(a, c, b"from c")
            assert threading.active_count() > 1
        assert a.bus.addresses != b.bus.addresses

    run(story)


def test_nodes_of_one_cluster_meet_by_multicast_and_those_of_another_do_not(tmp_path: Path) -> None:
    first, second = cluster(tmp_path / "ours", 2)
    stranger, other = cluster(tmp_path / "theirs", 2)

    async def story() -> None:
        async with (
            node(first, [], scouting="lo") as a,
            node(stranger, [], scouting="lo") as x,
            node(second, [], scouting="lo") as b,
            node(other, a.bus.addresses, scouting="lo") as y,
        ):
            await until(lambda: a.alive == b.alive == tokens(first, second))
            await until(lambda: x.alive == y.alive == tokens(stranger, other))
            await hears(b, a, b"ours")
            await hears(y, x, b"theirs")
            assert not {payload for _, payload in a.heard + b.heard} & {b"theirs"}
            assert not {payload for _, payload in x.heard + y.heard} & {b"ours"}

    run(story)


def test_nodes_are_found_by_multicast_without_entering_the_bus(tmp_path: Path) -> None:
    """As a node does whose certificate ran out, while the admin's address changed."""
    first = founder(tmp_path)

    async def story() -> None:
        async with node(first, [], scouting="lo"):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await scouting.hosts(first.cluster, "lo", 0.5) != ["127.0.0.1"]:
                    pass
            assert await scouting.hosts("0123456789abcdef", "lo", 0.5) == []
            assert await scouting.hosts(first.cluster, "", 0.5) == []
            assert await scouting.hosts(first.cluster, "nosuch", 0.1) == []

    run(story)


def test_queries_are_answered_by_all_nodes_that_serve_them(tmp_path: Path) -> None:
    first, second, third = cluster(tmp_path, 3)

    async def story() -> None:
        async with (
            node(first, []) as a,
            node(second, a.bus.addresses) as b,
            node(third, a.bus.addresses) as c,
        ):
            for each, member, name in ((b, second, b"b"), (c, third, b"c")):

                async def answer(question: bytes, name: bytes = name) -> bytes | None:
                    return name + question[:2] if question else None

                each.bus.serve(f"ask/{member.node}", answer)
            await until(lambda: len(a.alive) == 3)
            assert sorted(await a.bus.query("ask/*", b"?!", seconds=5)) == [b"b?!", b"c?!"]
            longest = b"?!" * (bus_module.QUESTION_BYTES_MAX // 2)
            assert await a.bus.query(f"ask/{second.node}", longest, seconds=PATIENCE_SECONDS) == [b"b?!"]
            assert await a.bus.query(f"ask/{second.node}", longest + b"?", seconds=1) == []
            assert await a.bus.query("ask/*", b"", seconds=5) == []
            assert await a.bus.query("ask/nobody", b"?", seconds=5) == []

    run(story)


def test_a_restarted_node_is_the_same_node_at_a_new_address(tmp_path: Path) -> None:
    """No multicast and no --peer after the first time: what was remembered is enough."""
    first, second = cluster(tmp_path, 2)

    async def story() -> None:
        async with node(first, []) as a:
            async with node(second, a.bus.addresses) as b:
                await until(lambda: a.alive == b.alive == tokens(first, second))
                await until(lambda: Peers(first).addresses() == b.bus.addresses)
                old = b.bus.addresses
            await until(lambda: a.alive == tokens(first))
            at_home(tmp_path / "1")
            again = identity.load()
            async with node(again, []) as b:  # it finds a where a was
                await until(lambda: a.alive == b.alive == tokens(first, second))
                assert b.bus.addresses != old
                await until(lambda: Peers(first).addresses() == b.bus.addresses)
        async with node(first, [], listen=a.bus.addresses[0]) as a, node(again, []) as b:
            await until(lambda: a.alive == b.alive == tokens(first, second))

    run(story)


def test_a_refresh_does_not_show_on_the_node_itself(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)

    async def story() -> None:
        async with node(first, []) as a, node(second, a.bus.addresses) as b:
            await until(lambda: a.alive == b.alive == tokens(first, second))
            seen = list(a.changes)
            at = a.bus.addresses
            await a.bus.refresh()
            await asyncio.sleep(bus_module.SETTLE_SECONDS + 0.5)
            assert a.changes == seen and a.bus.addresses == at
            assert b.alive == tokens(first, second)
            await hears(a, b, b"after")
            await hears(b, a, b"after too")

    run(story)


def test_a_removed_node_is_alone(tmp_path: Path) -> None:
    admin, member, removed = cluster(tmp_path, 3)

    async def story() -> None:
        async with (
            node(admin, []) as a,
            node(member, a.bus.addresses) as b,
            node(removed, a.bus.addresses) as r,
        ):

            async def answer(_: bytes) -> bytes:
                return b"secret"

            a.bus.serve(f"ask/{admin.node}", answer)
            await until(lambda: a.alive == b.alive == r.alive == tokens(admin, member, removed))
            assert await r.bus.query(f"ask/{admin.node}", b"?", seconds=5) == [b"secret"]
            admin.revoke(removed.node)
            member.admit(admin.revocations)
            await asyncio.gather(a.bus.refresh(), b.bus.refresh())
            await until(lambda: a.alive == b.alive == tokens(admin, member) and r.alive == tokens(removed))
            r.heard.clear()
            await hears(b, a, b"secret")
            r.bus.publish(r.key, b"still here")
            assert await r.bus.query("ask/*", b"?", seconds=1) == []
            await hears(a, b, b"end")
            assert not {key for key, _ in a.heard + b.heard} & {r.key}
            assert [key for key, _ in r.heard] == [r.key]  # its own
            await r.bus.refresh()  # and coming back does not help
            await asyncio.sleep(QUIET_SECONDS)
            await hears(b, a, b"secret again")
            assert r.alive == tokens(removed) or tokens(admin, member).isdisjoint(b.alive)
            assert b"secret again" not in {payload for _, payload in r.heard}

    run(story)


def test_a_node_that_was_removed_while_away_learns_that_and_nothing_else(tmp_path: Path) -> None:
    admin, removed, other = cluster(tmp_path, 3)
    admin.revoke(removed.node)
    admin.revoke(other.node)
    told: list[str] = []

    async def story() -> None:
        async with node(admin, []) as a, node(removed, a.bus.addresses) as r:
            for member in (removed, other):
                r.bus.watch(REMOVED.format(member.node, "*", "*"), lambda key, alive: told.append(key))
            await until(lambda: told)
            await asyncio.sleep(QUIET_SECONDS)
            assert r.alive == tokens(removed)
            assert removed.admit([bytes.fromhex(told[0].rpartition("/")[2])]) == {removed.node}

    run(story)
    assert len(told) == 1


def test_members_renew_over_the_bus(tmp_path: Path) -> None:
    now = time.time()
    admin = founder(tmp_path / "admin", now - 12 * DAY_SECONDS)
    member = newcomer(tmp_path / "member", admin, now - 12 * DAY_SECONDS)

    async def story() -> None:
        async with node(admin, []) as a, node(member, a.bus.addresses) as b:
            await until(lambda: b.alive == tokens(admin, member))
            assert not await enrolment.renew(b.bus, member, now)  # nobody answers
            enrolment.serve_renewals(a.bus, admin)
            assert member.renewal_due(now) and admin.renewal_due(now)
            async with asyncio.timeout(PATIENCE_SECONDS):  # until b has heard that there is an admin
                while not await enrolment.renew(b.bus, member, now):
                    await asyncio.sleep(0.01)
            assert await enrolment.renew(a.bus, admin, now)
            assert not member.renewal_due(now) and not admin.renewal_due(now)
            await asyncio.gather(a.bus.refresh(), b.bus.refresh())
            await hears(b, a, b"renewed")

    run(story)


@pytest.mark.parametrize("kind", ["foreign", "expired", "self-made", "removed", "public"])
def test_intruders_see_nothing_and_are_not_heard(tmp_path: Path, kind: str) -> None:
    """They connect to a member, and a member connects to them, as after a forged answer to its multicast.

    "public" stands for a certificate of the web's public authorities, which zenoh accepts when it connects:
    one that TLS verifies, with a name that those authorities sign.
    """
    admin, member, removed = cluster(tmp_path, 3)
    admin.revoke(removed.node)
    member.admit(admin.revocations)
    folder = intruder_certificate(kind, tmp_path, admin, removed)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    seen: list[str] = []
    own = f"cordee/{admin.cluster}/heartbeat/{removed.node}"

    async def story() -> None:
        async with node(admin, [f"127.0.0.1:{port}"]) as a, node(member, a.bus.addresses) as b:
            await until(lambda: a.alive == b.alive == tokens(admin, member))
            session = await asyncio.to_thread(
                intruder, folder, admin.folder / "ca.pem", [*a.bus.addresses, *b.bus.addresses], port
            )
            try:
                session.declare_subscriber("cordee/**", lambda sample: seen.append(str(sample.key_expr)))
                session.liveliness().declare_subscriber(
                    "cordee/**", lambda s: seen.append(str(s.key_expr)), history=True
                )
                with session.liveliness().declare_token(f"cordee/{admin.cluster}/alive/{removed.node}"):
                    for _ in range(20):  # as long as retries of both sides take
                        session.put(own, b"forged")
                        a.bus.publish(a.key, b"secret")
                        await asyncio.sleep(0.1)
                    await hears(b, a, b"end")
                    replies = await asyncio.to_thread(
                        lambda: list(session.get("cordee/**", timeout=QUIET_SECONDS))
                    )
                    assert a.alive == b.alive == tokens(admin, member)
                assert replies == []
                # TLS itself refuses the others
                assert bool(session.info.links()) == (kind in ("removed", "public"))
            finally:
                await asyncio.to_thread(session.close)
            assert {payload for _, payload in a.heard + b.heard} <= {b"secret", b"end"}

    run(story)
    # except its own messages, and the key that says that it was removed
    known = re.compile(
        f"heartbeat/{removed.node}|alive/{removed.node}" + f"|removed/{removed.node}/.*" * (kind == "removed")
    )
    prefix = f"cordee/{admin.cluster}/"
    assert [key for key in seen if key.startswith(prefix) and not known.fullmatch(key, len(prefix))] == []
    assert seen.count(own) <= 20


def test_that_intruder_would_hear_everything_with_a_members_certificate(tmp_path: Path) -> None:
    """The counterpart of the test above, which shows that it could fail."""
    admin, member = cluster(tmp_path, 2)
    seen: list[str] = []
    own = f"heartbeat/{member.node}"

    async def story() -> None:
        async with node(admin, []) as a:
            session = await asyncio.to_thread(
                intruder, member.folder, admin.folder / "ca.pem", a.bus.addresses, 0
            )
            try:
                session.declare_subscriber(
                    "cordee/**", lambda sample: seen.append(sample.payload.to_string())
                )
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while "open" not in seen or (own, b"its own") not in a.heard:
                        a.bus.publish(a.key, b"open")
                        session.put(f"cordee/{admin.cluster}/{own}", b"its own")
                        await asyncio.sleep(0.05)
            finally:
                await asyncio.to_thread(session.close)

    run(story)


def test_the_only_listener_speaks_tls_and_wants_a_certificate(tmp_path: Path) -> None:
    (admin,) = cluster(tmp_path, 1)

    async def story() -> None:
        before = {
            each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"
        }
        async with node(admin, [], scouting="lo") as a:
            after = {
                each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"
            }
            (port,) = after - before
            assert a.bus.addresses == [f"127.0.0.1:{port}"]
            assert await asyncio.to_thread(answer_without_certificate, port) == b""
            plain = {
                "mode": "client",
                "connect": {"endpoints": [f"tcp/127.0.0.1:{port}"], "timeout_ms": 1000},
                "scouting": {"multicast": {"enabled": False}},
            }
            with pytest.raises(zenoh.ZError):
                await asyncio.to_thread(zenoh.open, zenoh.Config.from_json5(json.dumps(plain)))

    run(story)


def answer_without_certificate(port: int) -> bytes:
    """What a TLS client without a certificate reads from the listener."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as plain:
        try:
            with context.wrap_socket(plain) as link:
                link.sendall(b"\x00" * 64)
                return link.recv(1)
        except OSError:  # the alert "certificate required"
            return b""


def test_a_message_that_is_too_long_is_dropped(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)

    async def story() -> None:
        async with node(first, []) as a, node(second, a.bus.addresses) as b:
            await until(lambda: b.alive == tokens(first, second))
            a.bus.publish(a.key, bytes(bus_module.MESSAGE_BYTES_MAX + 1))
            await hears(b, a, bytes(bus_module.MESSAGE_BYTES_MAX))
            assert {len(payload) for _, payload in b.heard} == {bus_module.MESSAGE_BYTES_MAX}

    run(story)


def test_an_inbox_keeps_the_order_and_a_bound() -> None:
    async def story() -> None:
        got: list[int] = []
        inbox = Inbox(asyncio.get_running_loop(), got.append)
        flood = threading.Thread(
            target=lambda: [inbox.put(n) for n in range(bus_module.INBOX_MESSAGES_MAX + 500)]
        )
        flood.start()
        flood.join()  # the loop did not run meanwhile
        await until(lambda: len(got) >= bus_module.INBOX_MESSAGES_MAX)
        assert got == list(range(bus_module.INBOX_MESSAGES_MAX))
        inbox.put(1, weight_bytes=bus_module.INBOX_BYTES_MAX)
        inbox.put(2, weight_bytes=1)
        await until(lambda: got[-1] == 1)
        inbox.put(3, weight_bytes=1)
        await until(lambda: got[-1] == 3)
        assert 2 not in got[bus_module.INBOX_MESSAGES_MAX :]

    run(story)


def test_a_taken_or_foreign_address_is_a_plain_error(tmp_path: Path) -> None:
    (admin,) = cluster(tmp_path, 1)

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            where = f"127.0.0.1:{taken.getsockname()[1]}"
            for listen in (where, "203.0.113.1:0", "nonsense:port"):
                with pytest.raises(BadRequest, match=listen.partition(":")[0]):
                    await ZenohBus.open(admin, BusOptions(listen, scouting=""))

    run(story)


def test_a_port_that_is_taken_is_left_to_others_only_if_nobody_chose_it(tmp_path: Path) -> None:
    """And the sentence says who has it."""
    (admin,) = cluster(tmp_path, 1)
    taken = contextlib.ExitStack()
    with contextlib.suppress(OSError):  # somebody else's, then: a node that runs here
        taken.enter_context(socket.create_server(("127.0.0.1", PORT)))

    async def story() -> None:
        async with node(admin, [], listen="127.0.0.1") as a:
            assert address.parse(a.bus.addresses[0], 0)[1] in address.PORTS
        for listen in (f"127.0.0.1:{PORT}", f"localhost:{PORT}", f":{PORT}"):
            with pytest.raises(BadRequest, match=rf"{PORT}.*taken by .*--listen HOST:PORT"):
                await ZenohBus.open(admin, BusOptions(listen, scouting=""))

    with taken:
        run(story)


@pytest.mark.parametrize(
    "options",
    [BusOptions(LOOPBACK, ("0.0.0.0",)), BusOptions(LOOPBACK, scouting="nosuch"), BusOptions("192.168.1")],
    ids=["peer", "scouting", "listen"],
)
def test_an_option_that_cannot_work_is_refused_and_leaves_no_thread(
    tmp_path: Path, options: BusOptions
) -> None:
    (admin,) = cluster(tmp_path, 1)
    before = threading.active_count()

    async def story() -> None:
        with pytest.raises(BadRequest):
            await ZenohBus.open(admin, options)

    run(story)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff" * 300_000, b"x y z\n", b"0123456789abcdef ../..:1,a b:2,:\n"]
)
def test_garbage_among_the_remembered_peers_is_skipped(tmp_path: Path, garbage: bytes) -> None:
    first, second = cluster(tmp_path, 2)
    (second.folder / "peers").write_bytes(garbage)

    async def story() -> None:
        async with node(first, []) as a, node(second, a.bus.addresses) as b:
            await until(lambda: a.alive == b.alive == tokens(first, second))
            await until(lambda: Peers(second).known == {first.node: a.bus.addresses[0]})

    run(story)


def test_nothing_is_left_when_it_closes(tmp_path: Path) -> None:
    (admin,) = cluster(tmp_path, 1)
    before = threading.active_count()

    async def story() -> None:
        async with node(admin, [], scouting="lo"):
            pass

    run(story)
    assert threading.active_count() == before


def test_a_refresh_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    before = threading.active_count()

    async def story() -> None:
        async with node(first, []) as a, node(second, a.bus.addresses) as b:
            await until(lambda: a.alive == b.alive == tokens(first, second))
            for patience_seconds in (0.0, 0.005, 0.02, 0.05):
                refreshing = asyncio.create_task(b.bus.refresh())
                await asyncio.sleep(patience_seconds)
                refreshing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await refreshing
            await b.bus.refresh()
            await hears(a, b, b"still here")
            await until(lambda: a.alive == b.alive == tokens(first, second))

    run(story)
    assert threading.active_count() == before
