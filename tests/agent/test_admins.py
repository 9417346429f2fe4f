"""A running member becomes an admin: over real TLS, to that very node, and both sides know it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest

from clusters import facts_of
from cordee.agent import admins
from cordee.errors import BadRequest
from cordee.net import identity
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Promoted, Promotion
from members import at_home, cluster, founder


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


class Inbox:
    """Where a member's agent listens; what it does with a Promotion is said by `answer`."""

    def __init__(self, member: Identity, answer=None) -> None:
        self.member = member
        self.got: list[Promotion] = []
        self._answer = answer
        self.endpoint = ""

    async def on_link(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(LinkClosed):
            message, _ = await frames.read(reader)
            assert isinstance(message, Promotion)
            self.got.append(message)
            if self._answer is None:
                await admins.accept(self.member, message, writer)
            else:
                frames.write(writer, self._answer(message))
        writer.close()


@contextlib.asynccontextmanager
async def inbox(member: Identity, answer=None) -> AsyncGenerator[Inbox]:
    opened = Inbox(member, answer)
    server, opened.endpoint = await tls_link.open_listener(member.folder, "127.0.0.1", opened.on_link)
    try:
        yield opened
    finally:
        server.close()


async def hand_over(admin: Identity, node: str, where: Inbox) -> None:
    await admins.hand_over(admin, msgspec.structs.replace(facts_of(node), name="pc-3", inbox=where.endpoint))


def test_the_member_is_an_admin_from_then_on(tmp_path: Path) -> None:
    admin, member, third = cluster(tmp_path, 3)

    async def story() -> None:
        async with inbox(member) as opened:
            await hand_over(admin, member.node, opened)
            await hand_over(admin, member.node, opened)  # an answer was lost: once more does no harm

    asyncio.run(story())
    at_home(tmp_path / "1")
    reloaded = identity.load()
    assert reloaded.is_admin
    reloaded.revoke(third.node)
    assert admin.admit(reloaded.revocations) == {third.node}


def test_the_key_goes_to_no_other_node(tmp_path: Path) -> None:
    """Another member has the wanted one's address, or says that it has."""
    admin, member, other = cluster(tmp_path, 3)

    async def story() -> None:
        async with inbox(other) as opened:
            with pytest.raises(BadRequest, match=f"pc-3 did not confirm.*node {other.node} answers there"):
                await hand_over(admin, member.node, opened)
        assert opened.got == []

    asyncio.run(story())
    assert not other.is_admin


def test_a_removed_node_gets_nothing(tmp_path: Path) -> None:
    admin, member = cluster(tmp_path, 2)
    admin.revoke(member.node)

    async def story() -> None:
        async with inbox(member) as opened:
            with pytest.raises(BadRequest, match="was removed"):
                await hand_over(admin, member.node, opened)
        assert opened.got == []

    asyncio.run(story())


@pytest.mark.parametrize("proof", ["nothing", "of another nonce", "of another node", "by its own key"])
def test_a_member_that_does_not_prove_that_it_has_the_key_is_not_called_an_admin(
    tmp_path: Path, proof: str
) -> None:
    admin, member = cluster(tmp_path, 2)
    stranger = founder(tmp_path / "stranger")

    def answer(promotion: Promotion) -> Promoted:
        if proof == "nothing":
            return Promoted(b"")
        if proof == "by its own key":
            return Promoted(stranger.prove_admin(promotion.nonce))
        nonce = b"x" * len(promotion.nonce) if proof == "of another nonce" else promotion.nonce
        return Promoted(admin.prove_admin(nonce))  # signed as the admin, not as the member

    async def story() -> None:
        async with inbox(member, answer) as opened:
            with pytest.raises(BadRequest, match="its answer proves nothing"):
                await hand_over(admin, member.node, opened)

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["another cluster's", "garbage", "no P-256"])
def test_a_key_that_is_not_the_clusters_makes_no_admin(tmp_path: Path, kind: str) -> None:
    """A member that somebody has taken over sends what it has."""
    bad, member = cluster(tmp_path, 2)
    key = founder(tmp_path / "stranger").authority_key_pem() if kind == "another cluster's" else b"garbage"
    if kind == "no P-256":
        key = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAA\n-----END PRIVATE KEY-----\n"

    async def story() -> None:
        async with inbox(member) as opened:
            reader, writer = await tls_link.open_stream(bad.folder, opened.endpoint, member.node)
            frames.write(writer, Promotion(key, b"n"))
            with pytest.raises(LinkClosed):
                await asyncio.wait_for(frames.read(reader), 20)
            writer.close()

    asyncio.run(story())
    assert not member.is_admin
    assert not (member.folder / "ca.key").exists()
