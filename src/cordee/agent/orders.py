"""What an admin orders another node to do, over a link like that of admins.py: be drained, or work again.

The order carries the authority's signature under the node's id and what it is to do. It goes to that very
node alone, inside TLS, so nobody else can repeat it, and to another node it would say nothing.
"""

import asyncio
import contextlib
import logging

from cordee.agent.exchange import exchange
from cordee.cluster.facts import Facts
from cordee.errors import BadRequest
from cordee.net.identity import Identity
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Drained, DrainOrder

ANSWER_SECONDS = 20.0  # to obey takes the other node a moment

log = logging.getLogger(__name__)


async def drain(identity: Identity, member: Facts, on: bool) -> None:
    """Have a member run nothing any more, or take stages again; this node is an admin.

    Raises:
        BadRequest: it cannot be reached, or does not obey.
    """
    order = DrainOrder(on, identity.sign_as_authority(_statement(member.node, on)))
    try:
        answer, _ = await exchange(identity.folder, member, order, ANSWER_SECONDS)
        if not isinstance(answer, Drained):
            raise LinkClosed("its answer is none")
    except LinkClosed as error:
        raise BadRequest(
            f"{member.name} did not confirm it ({error}): look whether it runs the same version, or type "
            "`cordee drain` on it.",
            "node",
        ) from error


def is_from_admin(identity: Identity, order: DrainOrder) -> bool:
    """Whether an admin ordered that of this node; if not, it is logged."""
    good = identity.is_of_authority(_statement(identity.node, order.on), order.signature)
    if not good:
        log.warning("a member that is no admin ordered this node to be drained; it is not obeyed")
    return good


async def confirm(writer: asyncio.StreamWriter) -> None:
    """Tell the admin that its order is obeyed."""
    frames.write(writer, Drained())
    writer.close()
    with contextlib.suppress(OSError):  # the sender went: it asks again
        await writer.wait_closed()


def _statement(node: str, on: bool) -> bytes:
    """What the authority signs."""
    return f"cordee drain {node} {'on' if on else 'off'}".encode()
