"""Where nodes are said to be: what is false or too much is not remembered, nothing outside is dialled."""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadRequest
from cordee.net import address, claims, peers, renewal, zenoh_bus
from cordee.net.bus import BusOptions
from cordee.net.claims import Claims
from cordee.net.identity import SLOTS, Identity
from cordee.net.members import KnownMember, Members
from cordee.net.peers import Peers
from cordee.net.zenoh_bus import ZenohBus
from cordee.worker import tls_link
from cordee.worker.frames import LinkClosed
from members import cluster, founder

PATIENCE_SECONDS = 60
OUTSIDE = ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "updates.example.com", "localhost")


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def fake(number: int) -> str:
    """The id of a node that does not exist."""
    return f"{number:016x}"


@contextlib.asynccontextmanager
async def listening(member: Identity) -> AsyncGenerator[str]:
    """Where a member shows its certificate."""

    async def ignore(_: str, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    door, where = await tls_link.open_listener(member.folder, "127.0.0.1", ignore)
    try:
        yield where
    finally:
        door.close()


@contextlib.contextmanager
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts to which connections are opened meanwhile; none is."""
    hosts: list[str] = []

    async def connect(host: str, *_: object, **__: object) -> None:
        hosts.append(host)
        raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "open_connection", connect)
        patch.setattr(socket, "create_connection", lambda where, *_: hosts.append(where[0]) or refuse())
        yield hosts


def refuse() -> None:
    raise ConnectionRefusedError


def test_an_address_is_remembered_once_its_nodes_certificate_was_seen_there(tmp_path: Path) -> None:
    me, other, third = cluster(tmp_path, 3)
    known = Peers(me)

    async def story() -> None:
        heard = Claims(me, known, ())
        async with listening(other) as where, listening(third) as elsewhere:
            heard.hear(other.node, f"{elsewhere},{where}")
            await until(lambda: known.known == {other.node: where})
            heard.hear(third.node, where)  # somebody says that it is where another one is
            heard.hear(other.node, elsewhere)
            heard.hear(third.node, elsewhere)
            await until(lambda: known.known == {other.node: where, third.node: elsewhere})
            await until(lambda: not heard._looks)
        assert Peers(me).known == known.known and not known.unproven
        with socket.create_server(("127.0.0.1", 0)) as gone:
            silent = f"127.0.0.1:{gone.getsockname()[1]}"
        heard.hear(other.node, silent)  # it is behind a firewall now, or somebody says so
        heard.hear(fake(1), silent)
        await until(lambda: fake(1) in known.known)
        assert known.known[other.node] == where
        await heard.close()

    asyncio.run(story())


def test_a_flood_of_claims_pushes_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PAUSE_SECONDS", 0.0)
    me, other = cluster(tmp_path, 2)
    known = Peers(me)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]

    async def story() -> None:
        heard = Claims(me, known, ())
        async with listening(other) as where:
            heard.hear(other.node, where)
            await until(lambda: known.is_proven(other.node, where))
            for number in range(20):
                for each in range(300):
                    heard.hear(fake(300 * number + each), f"127.0.0.1:{port}")
                assert len(heard._waiting) <= claims.CLAIMS_MAX and len(heard._looks) <= claims.LOOKS_MAX
                await asyncio.sleep(0.01)
            await until(lambda: not heard._waiting)
            assert other.node in known.known and len(known.known) <= peers.UNPROVEN_MAX + 1
            again = Peers(me)
            assert again.known == known.known
            for number in range(SLOTS):  # also those of the last run make room for nodes that are proven
                again.remember(fake(number), "127.0.0.1:1")
            assert len(again.known) == SLOTS
        await heard.close()

    asyncio.run(story())


def test_a_member_that_announces_thousands_of_nodes_fills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real bus: the tokens of one member, with ids and addresses that it made up."""
    monkeypatch.setattr(claims, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(zenoh_bus, "LOOK_AGAIN_SECONDS", 0.5)
    me, liar, honest = cluster(tmp_path, 3)

    async def story() -> None:
        a = await ZenohBus.open(me, BusOptions("127.0.0.1:0", scouting=""))
        b = await ZenohBus.open(liar, BusOptions("127.0.0.1:0", tuple(a.addresses), ""))
        for number in range(1000):
            where = f"{OUTSIDE[0]}:443" if number % 10 else "127.0.0.1:9"
            b.announce(f"at/{fake(number)}/{where}")
        b.announce(f"at/{honest.node}/{b.addresses[0]}")
        c = await ZenohBus.open(honest, BusOptions("127.0.0.1:0", tuple(a.addresses), ""))
        try:
            await until(lambda: Peers(me).known.get(honest.node) == c.addresses[0])
            assert len(a.remembered) <= peers.UNPROVEN_MAX + 2
            assert not [each for each in Peers(me).addresses() if each.startswith(OUTSIDE[0])]
        finally:
            for bus in (c, b, a):
                await bus.close()

    asyncio.run(story())


@pytest.mark.parametrize("host", OUTSIDE)
def test_nothing_outside_is_dialled_because_a_member_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    me, other = cluster(tmp_path, 2)
    where = address.text(host, 7330)
    Members(me).remember(KnownMember(other.node, "b", admin=True, renewals=where))

    async def story() -> None:
        heard = Claims(me, Peers(me), ())
        heard.hear(other.node, where)
        await asyncio.sleep(0)
        with pytest.raises(LinkClosed, match=re.escape(f"cordee up --peer {host}")):
            await tls_link.open_stream(me.folder, where, other.node)
        with pytest.raises(LinkClosed, match="none of this machine's networks"):
            tls_link.connect(me.folder, where, other.node)
        assert renewal.renew(me) == "none is known"
        await heard.close()

    with dialled(monkeypatch) as hosts:
        asyncio.run(story())
    assert (hosts, Peers(me).known) == ([], {})


def test_what_a_person_gave_is_dialled_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --peer; and what the admin named when this machine joined."""
    me, other, third = cluster(tmp_path, 3)
    known = Peers(me)
    where, code = address.text(OUTSIDE[1], 7330), address.text(OUTSIDE[0], 7331)
    known.remember(third.node, code)

    async def story() -> None:
        heard = Claims(me, known, (OUTSIDE[1],))
        heard.hear(other.node, where)
        await until(lambda: other.node in known.known)
        for node, endpoint in ((other.node, where), (third.node, code)):
            with pytest.raises(LinkClosed, match="refused"):
                await tls_link.open_stream(me.folder, endpoint, node)
        await heard.close()

    async def refused(*_: object) -> None:
        raise ConnectionRefusedError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.SelectorEventLoop, "sock_connect", refused)
        asyncio.run(story())


NETWORKS = ("0.0.0.0/0", "::/0", "10.0.0.0/8", "100.64.0.0/10", "fc00::/7")


@given(st.one_of([st.ip_addresses(network=each) for each in NETWORKS]))
def test_near_is_what_is_private_or_shares_a_network_with_an_interface(
    host: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    plain = address.number(str(host))
    own = any(plain in network for network in address._networks())
    shared = plain.version == 4 and plain in ipaddress.ip_network("100.64.0.0/10")
    here = own or plain.is_loopback or plain.is_link_local
    of_nobody = plain.is_multicast or plain.is_unspecified
    if address.is_near(str(host)):
        assert not of_nobody and (here or shared or plain.is_private)
    else:
        assert of_nobody or not here


@given(st.text(max_size=40))
def test_whatever_a_member_calls_an_address_it_is_near_only_if_it_is_a_number(text: str) -> None:
    assert address.is_near(text) is False or address.number(text) is not None
    for host in address.hosts(text):
        address.parse(host, 0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3), st.booleans()), max_size=60))
def test_what_is_proven_is_never_pushed_out_by_what_is_not(events: list[tuple[int, int, bool]]) -> None:
    member = type("Member", (), {"folder": Path("/nonexistent"), "revoked": frozenset()})()
    known = Peers(member)
    known._write = lambda: None
    proven: dict[str, str] = {}
    for number, port, is_proven in events:
        node, where = fake(number), f"127.0.0.1:{port}"
        known.remember(node, where, proven=is_proven)
        if is_proven:
            proven[node] = where
        assert proven.items() <= known.known.items()
        assert len(known.known) <= len(proven) + peers.UNPROVEN_MAX
        assert all(known.is_proven(each, its) for each, its in proven.items())


def test_a_renewal_is_asked_of_admins_in_these_networks_alone(tmp_path: Path) -> None:
    admin, me = founder(tmp_path / "x"), founder(tmp_path / "y")
    Members(me).remember(KnownMember(admin.node, "x", admin=True, renewals="8.8.8.8:443,127.0.0.1:7340"))
    assert [where for _, where in renewal._endpoints(me)] == ["127.0.0.1:7340"]
    with pytest.raises(BadRequest):
        address.parse("", 0)
