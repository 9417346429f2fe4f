"""Invite and join over real TLS on loopback: the right code works once, and all others are refused."""

import asyncio
import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import JoinFailed
from cordee.net import enrolment, identity
from cordee.net import invitations as invitations_module
from cordee.net.address import parse
from cordee.net.enrolment import Code, read_code
from cordee.net.identity import Identity
from cordee.net.invitations import Invitations
from cordee.net.peers import Peers
from members import DAY_SECONDS, at_home, cluster, founder

BUS = "127.0.0.1:7330"


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


class Clock:
    """The time, and as much later as a test says."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_seconds


@contextlib.asynccontextmanager
async def invitations(admin: Identity, clock: Clock | None = None) -> AsyncGenerator[Invitations]:
    opened = Invitations(admin, "127.0.0.1", lambda: [BUS], clock or time.time)
    try:
        yield opened
    finally:
        await opened.close()


async def join(folder: Path, code: str, clock: Clock | None = None) -> Identity:
    """Join from the machine whose state lies in `folder`."""
    at_home(folder)
    return await asyncio.to_thread(enrolment.join, code, clock or time.time)


async def refused(folder: Path, code: str, clock: Clock | None = None) -> str:
    """The message with which joining fails; nothing half-made is left."""
    with pytest.raises(JoinFailed) as caught:
        await join(folder, code, clock)
    assert not identity.exists() or identity.load()
    return caught.value.message


def guess(code: str) -> str:
    """The same code with a secret that was made up."""
    true = read_code(code)
    return Code(true.addresses, true.pin, b"x" * enrolment.SECRET_BYTES).text()


def test_a_code_makes_a_member_that_knows_the_others_and_who_was_removed(tmp_path: Path) -> None:
    admin, other = cluster(tmp_path, 2)
    admin.revoke("0123456789abcdef")
    Peers(admin).remember(other.node, "127.0.0.1:4711")

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            assert code == code.strip() and len(code.split()) == 1 and code.isalnum()
            joined = await join(tmp_path / "new", f"  {code[:40]}\n {code[40:].upper()}\n")
        assert joined.cluster == admin.cluster and not joined.is_admin
        assert joined.revoked == admin.revoked
        assert Peers(joined).known == {admin.node: BUS, other.node: "127.0.0.1:4711"}
        loaded = identity.load()
        assert (loaded.node, loaded.revoked) == (joined.node, joined.revoked)
        enrolment.check(loaded, time.time())

    asyncio.run(story())


def test_an_admin_invited_by_an_admin_can_invite_when_the_first_is_lost(tmp_path: Path) -> None:
    admin = founder(tmp_path / "first")

    async def story() -> None:
        async with invitations(admin) as opened:
            second = await join(tmp_path / "second", await opened.invite(admin=True))
            plain = await join(tmp_path / "plain", await opened.invite())
        assert second.is_admin and not plain.is_admin
        at_home(tmp_path / "second")
        async with invitations(identity.load()) as opened:
            third = await join(tmp_path / "third", await opened.invite())
        assert third.cluster == admin.cluster
        async with invitations(plain) as opened:
            with pytest.raises(JoinFailed, match="no admin"):
                await opened.invite()

    asyncio.run(story())


def test_a_code_works_once_but_a_lost_answer_may_be_asked_for_again(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            joined = await join(tmp_path / "new", code)
            assert (await join(tmp_path / "new", code)).node == joined.node
            assert "used already" in await refused(tmp_path / "thief", code)

    asyncio.run(story())


def test_a_code_expires(tmp_path: Path) -> None:
    admin, clock = founder(tmp_path / "admin"), Clock()

    async def story() -> None:
        async with invitations(admin, clock) as opened:
            code = await opened.invite()
            clock.ahead_seconds = invitations_module.INVITE_SECONDS + 1
            assert "expired" in await refused(tmp_path / "new", code)
            await join(tmp_path / "new", await opened.invite())

    asyncio.run(story())


def test_guesses_are_refused_and_bounded(tmp_path: Path) -> None:
    admin, clock = founder(tmp_path / "admin"), Clock()

    async def story() -> None:
        async with invitations(admin, clock) as opened:
            code = await opened.invite()
            for _ in range(invitations_module.FAILED_ATTEMPTS_MAX):
                assert "not (or no longer) known" in await refused(tmp_path / "new", guess(code))
            assert "Too many wrong codes" in await refused(tmp_path / "new", guess(code))
            assert "Too many wrong codes" in await refused(tmp_path / "new", code)
            clock.ahead_seconds = invitations_module.FAILED_ATTEMPT_SECONDS
            await join(tmp_path / "new", code)

    asyncio.run(story())


def test_failed_attempts_are_counted_by_address_alone() -> None:
    failed_attempts = invitations_module.FailedAttempts()
    for number in range(invitations_module.FAILED_ATTEMPTS_MAX):
        assert not failed_attempts.too_many("a", 0.0)
        failed_attempts.note("a", float(number))
    assert failed_attempts.too_many("a", 10.0) and not failed_attempts.too_many("b", 10.0)
    for number in range(2 * invitations_module.FAILED_ADDRESSES_MAX):
        failed_attempts.note(str(number), 10.0)
    assert len(failed_attempts._attempts) == invitations_module.FAILED_ADDRESSES_MAX
    assert not failed_attempts.too_many("b", 11.0)
    for number in range(1000):
        failed_attempts.note("a", 20.0 + number / 100)
    assert len(failed_attempts._attempts["a"]) == invitations_module.FAILED_ATTEMPTS_MAX
    assert failed_attempts.too_many("a", 30.0)
    assert not failed_attempts.too_many("a", 30.0 + invitations_module.FAILED_ATTEMPT_SECONDS)


ATTACKERS = [f"127.0.1.{number}" for number in range(1, 13)]  # addresses of this machine


def post(endpoint: str, body: bytes, whence: str) -> bytes:
    """What the endpoint answers to a machine that does not look at certificates."""
    host, port = parse(endpoint, 0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    source = (whence, 0)
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=context, source_address=source)
    with contextlib.closing(connection):
        connection.request("POST", "/join", body)
        return connection.getresponse().read()


@pytest.mark.parametrize("kind", ["wrong codes", "nonsense"])
def test_wrong_codes_lock_out_their_addresses_and_not_the_newcomer(tmp_path: Path, kind: str) -> None:
    admin = founder(tmp_path / "admin")
    body = b"nonsense"
    if kind == "wrong codes":
        wanted = identity.certificate_request(identity.new_key())
        body = msgspec.msgpack.encode(enrolment.Application(wanted, b"x" * 32))

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            endpoint = read_code(code).addresses[0]
            for whence in ATTACKERS:
                for _ in range(invitations_module.FAILED_ATTEMPTS_MAX):
                    assert b"unknown" in await asyncio.to_thread(post, endpoint, body, whence)
                assert b"busy" in await asyncio.to_thread(post, endpoint, body, whence)
            joined = await join(tmp_path / "new", code)
        assert joined.cluster == admin.cluster

    asyncio.run(story())


def test_silent_connections_do_not_stop_an_invitation(tmp_path: Path) -> None:
    """Neither those that say nothing, nor those that after TLS say nothing, or half a request."""
    admin = founder(tmp_path / "admin")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def idle(where: tuple[str, int], number: int) -> socket.socket:
        link = socket.create_connection(where, 20)
        if number % 3:
            with contextlib.suppress(OSError):
                link = context.wrap_socket(link)
                link.sendall(b"POST /join HTTP/1.1\r\n" * (number % 3 - 1))
        return link

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            where = parse(read_code(code).addresses[0], 0)
            links = [await asyncio.to_thread(idle, where, number) for number in range(60)]
            joined = await join(tmp_path / "new", code)
            for link in links:
                link.close()
        assert joined.cluster == admin.cluster

    asyncio.run(story())


def test_an_impostor_never_gets_the_secret_nor_a_member(tmp_path: Path) -> None:
    """Another cluster's admin at the code's address: the newcomer stops before it proves anything."""
    admin, stranger = founder(tmp_path / "admin"), founder(tmp_path / "stranger")

    async def story() -> None:
        async with invitations(stranger) as opened:
            there = read_code(await opened.invite())
            code = Code(there.addresses, enrolment.pin_of(admin.authority), b"s" * 16).text()
            assert "another cluster" in await refused(tmp_path / "new", code)
            assert not opened._failed_attempts._attempts  # nothing was shown to it

    asyncio.run(story())


def test_an_address_that_means_another_cluster_here_does_not_hide_the_next(tmp_path: Path) -> None:
    """A container's bridge has the same address on every machine: behind it may be a node of one's own."""
    admin, stranger = founder(tmp_path / "admin"), founder(tmp_path / "stranger")

    async def story() -> None:
        async with invitations(stranger) as elsewhere, invitations(admin) as opened:
            true, bridge = read_code(await opened.invite()), read_code(await elsewhere.invite()).addresses
            joined = await join(tmp_path / "new", Code(bridge + true.addresses, true.pin, true.secret).text())
            assert joined.cluster == admin.cluster
            assert not elsewhere._failed_attempts._attempts

    asyncio.run(story())


def test_an_unreachable_admin_is_reported_with_its_addresses(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
        message = await refused(tmp_path / "new", code)
        assert "cannot be reached" in message and read_code(code).addresses[0] in message

    asyncio.run(story())


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_a_day_off_joins(tmp_path: Path, days: int) -> None:
    admin, clock = founder(tmp_path / "admin"), Clock()
    clock.ahead_seconds = days * DAY_SECONDS

    async def story() -> None:
        async with invitations(admin) as opened:
            joined = await join(tmp_path / "new", await opened.invite(), clock)
        enrolment.check(joined, clock())

    asyncio.run(story())


@pytest.mark.parametrize(("days", "side"), [(-3, "behind"), (400, "ahead of")])
def test_a_clock_far_off_is_named(tmp_path: Path, days: int, side: str) -> None:
    admin, clock = founder(tmp_path / "admin"), Clock()
    clock.ahead_seconds = days * DAY_SECONDS

    async def story() -> None:
        async with invitations(admin) as opened:
            message = await refused(tmp_path / "new", await opened.invite(), clock)
        assert f"{abs(days)}.0 days {side}" in message

    asyncio.run(story())


def test_a_node_whose_certificate_ran_out_joins_again_as_itself(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")

    async def story() -> None:
        async with invitations(admin) as opened:
            joined = await join(tmp_path / "new", await opened.invite())
            with pytest.raises(JoinFailed, match=r"ran out on .*cordee invite"):
                enrolment.check(joined, time.time() + 40 * DAY_SECONDS)
            with pytest.raises(JoinFailed, match="not valid before"):
                enrolment.check(joined, time.time() - 40 * DAY_SECONDS)
            again = await join(tmp_path / "new", await opened.invite())
            assert again.node == joined.node

    asyncio.run(story())


def test_a_removed_node_is_never_admitted_again(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")

    async def story() -> None:
        async with invitations(admin) as opened:
            joined = await join(tmp_path / "new", await opened.invite())
            admin.revoke(joined.node)
            assert "removed from the cluster for good" in await refused(
                tmp_path / "new", await opened.invite()
            )
        joined.admit(admin.revocations)
        with pytest.raises(JoinFailed, match="for good"):
            enrolment.check(joined, time.time())

    asyncio.run(story())


def test_a_member_of_another_cluster_stays_there(tmp_path: Path) -> None:
    admin, stranger = founder(tmp_path / "admin"), founder(tmp_path / "stranger")

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            assert "belongs to another cluster" in await refused(tmp_path / "stranger", code)
            assert identity.load().node == stranger.node

    asyncio.run(story())


def test_no_node_gets_a_slot_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = founder(tmp_path / "admin")
    true, twins = identity.new_key, 0

    async def story() -> None:
        nonlocal twins
        async with invitations(admin) as opened:
            first = await join(tmp_path / "first", await opened.invite())

            def new_key() -> EllipticCurvePrivateKey:
                nonlocal twins
                key = true()
                while twins < 2 and identity.slot_of(identity.node_id(key.public_key())) != slot:
                    key = true()
                twins += 1
                return key

            slot = identity.slot_of(first.node)
            monkeypatch.setattr(identity, "new_key", new_key)
            second = await join(tmp_path / "second", await opened.invite())
            assert identity.slot_of(second.node) != slot and twins > 2

    asyncio.run(story())


def test_the_endpoint_closes_when_no_invitation_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invitations_module, "LINGER_SECONDS", 0.05)
    admin = founder(tmp_path / "admin")

    async def story() -> None:
        async with invitations(admin) as opened:
            code = await opened.invite()
            await join(tmp_path / "new", code)
            async with asyncio.timeout(20):
                while opened._serving:
                    await asyncio.sleep(0.01)
            assert "cannot be reached" in await refused(tmp_path / "late", code)
            await join(tmp_path / "other", await opened.invite())

    asyncio.run(story())


@given(st.data())
def test_a_typing_error_in_a_code_is_noticed(data: st.DataObject) -> None:
    code = Code(("192.168.1.20:41234", "[fd00::1]:41234"), b"p" * 16, b"s" * 16)
    text = code.text()
    assert read_code(text) == code
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    wrong = data.draw(
        st.sampled_from(
            [text[:place], text[:place] + text[place + 1 :], text[:place] + other + text[place + 1 :]]
        )
    )
    if wrong == text:
        return
    try:  # base32 uses only some bits of the last character: the others change nothing
        assert (read_code(wrong), wrong[:-1]) == (code, text[:-1])
    except JoinFailed as error:
        assert "not a whole invitation code" in error.message


@given(st.text(max_size=200))
def test_garbage_is_no_code(text: str) -> None:
    with pytest.raises(JoinFailed):
        read_code(text)
