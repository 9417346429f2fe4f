"""A question to another node's agent at its inbox, and the answer: one link for each."""

import asyncio
from pathlib import Path

from cordee.cluster.facts import Facts
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import DrainOrder, Promotion, RecordQuery, SpotRequest


class Unreachable(LinkClosed):
    """There is no link to a node: that says nothing of what it would answer."""


async def exchange(
    identity: Path,
    member: Facts,
    question: RecordQuery | SpotRequest | Promotion | DrainOrder,
    seconds: float,
    payload_bytes_max: int = 0,
) -> tuple[object, bytes]:
    """The answer, which the caller has to check, and its payload; `identity` is this node's folder.

    Raises:
        Unreachable: there is no link to it.
        LinkClosed: it gives no answer in time.
    """
    try:
        reader, writer = await tls_link.open_stream(identity, member.inbox, member.node)
    except LinkClosed as error:
        raise Unreachable(str(error)) from error
    try:
        async with asyncio.timeout(seconds):
            frames.write(writer, question)
            return await frames.read(reader, payload_bytes_max)
    except TimeoutError as error:
        raise LinkClosed(f"{member.name} did not answer in {seconds:.0f} s") from error
    finally:
        writer.transport.abort()
