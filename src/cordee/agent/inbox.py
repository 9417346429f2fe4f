"""The inbox of a node: the door for the agents and the last stages of others. A link has one purpose:

first message             what follows                              from
StreamsJoin               questions and their answers               a gateway
Join                      tokens of a model that this node hosts    a last stage
Probe                     bytes there and back                      any node (probes.py)
RecordQuery, SpotRequest  one answer                                a host that checks (spot_checks.py)
Promotion                 the authority's key                       an admin (admins.py)
DrainOrder                one answer                                an admin (orders.py)
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol

from cordee.agent import probes
from cordee.agent.spot_checks import SpotChecks
from cordee.agent.stream_links import StreamLinks
from cordee.net.doors import Door
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import FrameLate, LinkClosed
from cordee.worker.messages import (
    DrainOrder,
    Join,
    KvAnswer,
    Prepared,
    Probe,
    Promotion,
    RecordQuery,
    SpotRequest,
    StreamsJoin,
    Tokens,
)
from cordee.worker.process import opening

RESULT_BYTES_MAX = 8 << 20  # of a last stage: tokens of SEQUENCES_MAX streams with all that is known of each


class AgentInboxOwner(Protocol):
    """What the inbox needs of the agent; called on the event loop."""

    def on_result(self, node: str, message: Tokens | KvAnswer | Prepared) -> None:
        """A last stage on a node has a result."""

    def doubt(self, node: str, reason: str) -> None:
        """A node is too slow."""

    async def become_admin(self, promotion: Promotion, writer: asyncio.StreamWriter) -> None:
        """An admin offers the authority's key."""

    async def obey(self, order: DrainOrder, writer: asyncio.StreamWriter) -> None:
        """An admin, or somebody who says so, orders that."""


class AgentInbox:
    """See the module's docstring. All methods on one event loop."""

    def __init__(
        self, owner: AgentInboxOwner, identity: Identity, stream_links: StreamLinks, spot_checks: SpotChecks
    ) -> None:
        self._owner = owner
        self._identity = identity
        self._stream_links = stream_links
        self._spot_checks = spot_checks
        self._door: Door | None = None
        self._links: set[asyncio.StreamWriter] = set()

    async def open(self, host: str) -> str:
        """Listen at a host of this machine; the endpoint.

        Raises:
            LinkClosed: this node has no valid identity.
            OSError: the address is not this machine's.
        """
        self._door, endpoint = await tls_link.open_listener(self._identity.folder, host, self._accept)
        return endpoint

    def close(self) -> None:
        """Let nobody in any more, and end all links."""
        if self._door is not None:
            self._door.close()
        _abort(self._links)

    def cut_removed(self) -> None:
        """End the links of nodes that were removed from the cluster."""
        _abort(each for each in self._links if not self._is_of_member(each))

    def _is_of_member(self, writer: asyncio.StreamWriter) -> bool:
        try:
            tls_link.check_member(self._identity.folder, writer.get_extra_info("peercert"))
        except LinkClosed:
            return False
        return True

    async def _accept(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        try:
            await self._serve(node, reader, writer)
        except FrameLate as error:
            self._owner.doubt(node, str(error))
        except LinkClosed:
            pass  # that worker was wired anew, or ended, or that gateway has no use for the link
        finally:
            self._links.discard(writer)
            writer.transport.abort()

    async def _serve(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await opening(reader)
        if isinstance(first, StreamsJoin):
            await self._stream_links.serve(node, reader, writer)
        elif isinstance(first, Join):
            while True:
                message, _ = await frames.read(reader, 0, RESULT_BYTES_MAX)
                if isinstance(message, Tokens | KvAnswer | Prepared):
                    self._owner.on_result(node, message)
        elif isinstance(first, Probe):
            await probes.answer(reader, writer)
        elif isinstance(first, RecordQuery | SpotRequest):
            await self._spot_checks.serve(node, first, reader, writer)
        elif isinstance(first, Promotion):
            await self._owner.become_admin(first, writer)
        elif isinstance(first, DrainOrder):
            await self._owner.obey(first, writer)


def _abort(writers: Iterable[asyncio.StreamWriter]) -> None:
    for writer in list(writers):
        writer.transport.abort()
