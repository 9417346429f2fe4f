"""Certificates that are not valid now, over real TLS on loopback: renewed with the node's key, or refused."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.errors import JoinFailed
from cordee.net import enrolment, identity, renewal
from cordee.net.address import parse
from cordee.net.identity import Identity
from cordee.net.members import KnownMember, Members
from cordee.net.renewal import RenewalEndpoint
from members import DAY_SECONDS, at_home, founder, newcomer

YEAR_SECONDS = 365 * DAY_SECONDS


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


@contextlib.asynccontextmanager
async def endpoint(
    admin: Identity, *members: Identity, clock: Callable[[], float] = time.time
) -> AsyncGenerator[RenewalEndpoint]:
    """Where the admin renews; the members remember it."""
    opened = await RenewalEndpoint.open(admin, "127.0.0.1", clock)
    for member in members:
        remember(member, admin, opened.addresses)
    try:
        yield opened
    finally:
        opened.close()


def remember(member: Identity, admin: Identity, renewals: str) -> None:
    Members(member).remember(KnownMember(admin.node, "pc-1", admin=True, renewals=renewals, heard=1.0))


def made(folder: Path, days: float) -> tuple[Identity, Identity]:
    """An admin, and a member whose certificate was made so many days ago."""
    admin = founder(folder / "admin")
    return admin, newcomer(folder / "member", admin, time.time() - days * DAY_SECONDS)


async def renewed(member: Identity, clock: Callable[[], float] = time.time) -> str:
    return await asyncio.to_thread(renewal.renew, member, clock)


@given(st.floats(-30 * 365, 20 * 365))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_certificate_of_any_date_is_renewed_for_its_own_key(tmp_path: Path, days: float) -> None:
    at_home(tmp_path / "admin")
    admin = identity.load() if identity.exists() else identity.found(time.time())
    folder = tmp_path / f"member{days}"
    member = newcomer(folder, admin, time.time() - days * DAY_SECONDS)
    node = member.node

    async def story() -> None:
        async with endpoint(admin, member):
            assert await renewed(member) == ""

    asyncio.run(story())
    at_home(folder)
    loaded = identity.load()
    enrolment.check(loaded, time.time())
    assert (loaded.node, loaded.is_admin) == (node, False)


def test_a_removed_node_gets_the_proof_of_its_removal_and_no_certificate(tmp_path: Path) -> None:
    admin, member = made(tmp_path, 60)
    admin.revoke(member.node)
    before = (member.folder / "node.pem").read_bytes()

    async def story() -> None:
        async with endpoint(admin, member):
            with pytest.raises(JoinFailed, match="for good"):
                await renewed(member)
            with pytest.raises(JoinFailed, match="for good"):  # now it knows for itself
                await renewal.until_valid(member, "", print)

    asyncio.run(story())
    assert (member.folder / "node.pem").read_bytes() == before
    at_home(tmp_path / "member")
    assert identity.load().revoked == {member.node}


@pytest.mark.parametrize("kind", ["stranger", "other key", "no certificate"])
def test_whoever_does_not_hold_the_key_of_a_member_gets_nothing(tmp_path: Path, kind: str) -> None:
    admin, member = made(tmp_path, 60)
    thief = founder(tmp_path / "stranger")

    async def story() -> None:
        async with endpoint(admin, member) as opened:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            if kind == "stranger":
                context.load_cert_chain(thief.folder / "node.pem", thief.folder / "node.key")
            if kind == "other key":  # what a copy of the member's certificate is worth
                with pytest.raises(ssl.SSLError):
                    context.load_cert_chain(member.folder / "node.pem", thief.folder / "node.key")
            assert await asyncio.to_thread(all_that_comes, context, opened.addresses) == b""

    asyncio.run(story())


def all_that_comes(context: ssl.SSLContext, where: str) -> bytes:
    with (
        contextlib.suppress(OSError),
        socket.create_connection(parse(where, 0), 20) as plain,
        context.wrap_socket(plain) as link,
    ):
        return link.recv(1 << 16)
    return b""


def test_nothing_but_the_renewal_is_served_and_nothing_is_read(tmp_path: Path) -> None:
    """A member whose certificate ran out says what it likes: it gets a certificate for its key alone."""
    admin, member = made(tmp_path, 60)

    async def story() -> None:
        async with endpoint(admin, member) as opened:
            for said in (b"", b"GET /join HTTP/1.1\r\n\r\n", bytes(100_000)):
                answer = await asyncio.to_thread(exchange, said, opened.addresses)
                assert (
                    identity.certified_node(x509.load_pem_x509_certificate(answer.certificate)) == member.node
                )
                assert not answer.revocation

    def exchange(said: bytes, where: str) -> renewal.RenewalAnswer:
        with (
            socket.create_connection(parse(where, 0), 20) as plain,
            renewal._context(member, server=False).wrap_socket(plain) as link,
        ):
            with contextlib.suppress(OSError):
                link.sendall(said)
            data = b""
            while piece := link.recv(1 << 16):
                data += piece
        return renewal.msgspec.msgpack.decode(data, type=renewal.RenewalAnswer)

    asyncio.run(story())


def test_an_admin_that_was_removed_is_not_believed(tmp_path: Path) -> None:
    """It still holds the authority's key, and listens where another admin was: it is not asked."""
    admin, member = made(tmp_path, 60)
    stolen = newcomer(tmp_path / "stolen", admin)
    stolen.become_admin(admin.authority_key_pem())
    admin.revoke(stolen.node)
    member.admit(admin.revocations)

    async def story() -> None:
        async with endpoint(stolen) as opened:
            remember(member, stolen, opened.addresses)
            assert await renewed(member) == "none is known"
            remember(member, admin, opened.addresses)
            assert "it was removed from the cluster" in await renewed(member)

    asyncio.run(story())
    assert not member.is_valid(time.time())


@pytest.mark.parametrize(("days", "side"), [(400, "ahead of"), (-400, "behind")])
def test_a_machine_whose_own_clock_is_wrong_is_told_so(tmp_path: Path, days: int, side: str) -> None:
    admin, member = made(tmp_path, 0)
    before = member.validity()

    async def story() -> None:
        async with endpoint(admin, member):
            with pytest.raises(JoinFailed, match=rf"400\.0 days {side} the cluster's"):
                await renewal.until_valid(member, "", print, lambda: time.time() + days * DAY_SECONDS)

    asyncio.run(story())
    assert member.validity() == before


def test_a_certificate_from_an_admin_whose_clock_is_wrong_is_not_taken_on_the_bus(tmp_path: Path) -> None:
    admin, member = made(tmp_path, 15)
    before = member.validity()

    class Bus:
        async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
            return [admin.sign(member.request(), time.time() + YEAR_SECONDS)]

    assert not asyncio.run(enrolment.renew(Bus(), member, time.time()))
    assert member.validity() == before


def test_it_waits_for_an_admin_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "RETRY_SECONDS", 0.05)
    admin, member = made(tmp_path, 60)
    said: list[str] = []

    async def story() -> None:
        async with endpoint(admin, member):
            pass
        waiting = asyncio.create_task(renewal.until_valid(member, "", said.append))
        while not said:
            await asyncio.sleep(0.01)
        async with endpoint(admin):  # on the port that it had before
            await asyncio.wait_for(waiting, 60)

    asyncio.run(story())
    assert len(said) == 1
    assert "ran out on" in said[0] and "pc-1 at 127.0.0.1:" in said[0]
    enrolment.check(member, time.time())


def test_a_member_that_knows_no_admin_is_told_to_join_again(tmp_path: Path) -> None:
    _, member = made(tmp_path, 60)
    with pytest.raises(JoinFailed, match=r"ran out on .*cordee invite"):
        asyncio.run(renewal.until_valid(member, "", print))


def test_the_port_is_kept_and_another_one_taken_if_it_cannot_be_had(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")

    async def where() -> str:
        async with endpoint(admin) as opened:
            return opened.addresses

    first = asyncio.run(where())
    assert asyncio.run(where()) == first
    with socket.create_server(parse(first, 0)):
        second = asyncio.run(where())
    assert second != first
    assert asyncio.run(where()) == second
    (admin.folder / "renewal-port").write_bytes(b"\xff no port")
    assert asyncio.run(where())


def test_an_admin_that_moved_is_looked_for_where_nodes_are(tmp_path: Path) -> None:
    admin, member = made(tmp_path, 60)

    async def story() -> None:
        async with endpoint(admin) as opened:
            _, port = parse(opened.addresses, 0)
            remember(member, admin, f"127.0.0.9:{port}")
            assert "127.0.0.9" in await renewed(member)
            assert await asyncio.to_thread(renewal.renew, member, time.time, ["127.0.0.1"]) == ""

    asyncio.run(story())


@given(st.lists(st.text(max_size=30), max_size=5))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_for_addresses_does_no_harm(tmp_path: Path, parts: list[str]) -> None:
    folder = tmp_path / "member"
    at_home(folder)
    member = identity.load() if identity.exists() else made(tmp_path, 60)[1]
    Members(member).remember(KnownMember("0" * 16, "x", admin=True, renewals=",".join(parts)))
    endpoints = renewal._endpoints(member, ["127.0.0.1"])
    assert all(0 <= parse(where, 0)[1] <= 65535 for _, where in endpoints)


# Clocks that were wrong once


@pytest.mark.parametrize("wrong", [4 * YEAR_SECONDS, -20 * YEAR_SECONDS])
def test_a_founder_whose_clock_was_wrong_once_goes_on_and_lets_others_in(
    tmp_path: Path, wrong: float
) -> None:
    now = time.time()
    admin = founder(tmp_path / "admin", now + wrong)
    cluster = admin.cluster
    assert not admin.is_valid(now)
    asyncio.run(renewal.until_valid(admin, "", print))
    enrolment.check(admin, now)
    assert (admin.cluster, admin.is_valid(now)) == (cluster, True)
    member = newcomer(tmp_path / "member", admin)
    enrolment.check(member, now)
    for each in (admin, member):
        assert handshakes(each, admin)


def test_an_admin_whose_clock_was_wrong_at_one_start_goes_on(tmp_path: Path) -> None:
    now = time.time()
    admin = founder(tmp_path / "admin", now)
    assert admin.renewal_due(now + 4 * YEAR_SECONDS)
    admin.renew_self(now + 4 * YEAR_SECONDS)
    assert admin.renewal_due(now)
    admin.renew_self(now)
    enrolment.check(admin, now)
    assert not admin.renewal_due(now)


def handshakes(client: Identity, server: Identity) -> bool:
    """Whether OpenSSL, which looks at the dates of all certificates, lets these two shake hands."""
    here, there = socket.socketpair()
    contexts = []
    for member, kind in ((client, ssl.PROTOCOL_TLS_CLIENT), (server, ssl.PROTOCOL_TLS_SERVER)):
        context = ssl.SSLContext(kind)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(member.folder / "ca.pem")
        context.load_cert_chain(member.folder / "node.pem", member.folder / "node.key")
        contexts.append(context)

    async def story() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        reader, writer = await asyncio.open_connection(sock=here)
        accepted = asyncio.create_task(
            asyncio.get_running_loop().connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), serve), there, ssl=contexts[1]
            )
        )
        await writer.start_tls(contexts[0])
        assert await reader.read() == b"hello"
        await accepted
        writer.close()

    asyncio.run(story())
    return True


def test_the_life_of_the_authority_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 0.2 and older began when the founder's clock said, and ended thirty years later."""
    now = time.time()
    monkeypatch.setattr(identity, "AUTHORITY_START", now + 4 * YEAR_SECONDS)
    monkeypatch.setattr(identity, "AUTHORITY_SECONDS", 30 * YEAR_SECONDS)
    admin = founder(tmp_path / "admin", now)
    with pytest.raises(JoinFailed, match=r"The cluster's own certificate is not valid before .*cordee leave"):
        enrolment.check(admin, now)
    enrolment.check(newcomer(tmp_path / "b", admin, now + 5 * YEAR_SECONDS), now + 5 * YEAR_SECONDS)
    with pytest.raises(JoinFailed, match="The cluster's own certificate ran out"):
        enrolment.check(admin, now + 40 * YEAR_SECONDS)
