"""An admin orders another machine to run nothing: over real TLS, and only admins are obeyed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest

from clusters import facts_of
from cordee.agent import orders
from cordee.errors import BadRequest
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import DrainOrder
from members import cluster


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


class Member:
    """Where a member's agent listens, and which orders it obeyed."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.obeyed: list[bool] = []
        self.endpoint = ""

    async def on_link(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(LinkClosed):
            order, _ = await frames.read(reader)
            assert isinstance(order, DrainOrder)
            if orders.is_from_admin(self.identity, order):
                self.obeyed.append(order.on)
                await orders.confirm(writer)
        writer.close()


@contextlib.asynccontextmanager
async def listening(identity: Identity) -> AsyncGenerator[Member]:
    member = Member(identity)
    door, member.endpoint = await tls_link.open_listener(identity.folder, "127.0.0.1", member.on_link)
    try:
        yield member
    finally:
        door.close()


async def drain(admin: Identity, member: Member, on: bool, node: str = "") -> None:
    facts = facts_of(node or member.identity.node)
    await orders.drain(admin, msgspec.structs.replace(facts, name="pc-3", inbox=member.endpoint), on)


def test_an_admins_order_is_obeyed(tmp_path: Path) -> None:
    admin, member = cluster(tmp_path, 2)

    async def story() -> list[bool]:
        async with listening(member) as opened:
            await drain(admin, opened, True)
            await drain(admin, opened, False)
        return opened.obeyed

    assert asyncio.run(story()) == [True, False]


def test_nobody_else_is_obeyed(tmp_path: Path) -> None:
    """A member has no authority of its own; an order for another machine, or to do the opposite, is none."""
    admin, member, other = cluster(tmp_path, 3)

    async def story() -> list[bool]:
        async with listening(member) as opened:
            for node, on in ((other.node, True), (member.node, False)):
                signature = admin.sign_as_authority(orders._statement(node, on))
                reader, writer = await tls_link.open_stream(other.folder, opened.endpoint, member.node)
                frames.write(writer, DrainOrder(True, signature))
                with pytest.raises(LinkClosed):
                    await frames.read(reader)
                writer.close()
        return opened.obeyed

    assert asyncio.run(story()) == []


def test_a_machine_that_does_not_obey_is_named(tmp_path: Path) -> None:
    admin, member, other = cluster(tmp_path, 3)

    async def story() -> None:
        async with listening(member) as opened:
            await drain(admin, opened, True, node=other.node)

    with pytest.raises(BadRequest, match="pc-3 did not confirm"):
        asyncio.run(story())
