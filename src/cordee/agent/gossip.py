"""What a node says of itself, and what it hears of others: heartbeats, liveliness tokens, removals.

Everything goes over the bus, and what is heard goes to the controller. A heartbeat is sent every
HEARTBEAT_SECONDS, and at once where the controller's decision is news.

    heartbeat/NODE       published: a Heartbeat (msgpack) of that node
    alive/NODE           announced while that node runs
    removed/NODE/PROOF   announced by the other nodes' buses: its signed removal, in hexadecimal
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from cordee.cluster.controller import Controller
from cordee.cluster.facts import Gauges
from cordee.cluster.membership import HEARTBEAT_SECONDS, Farewell, Heartbeat
from cordee.errors import SetupNeeded
from cordee.net.bus import REMOVED, Bus
from cordee.net.identity import Identity, revoked_node
from cordee.net.lost_nodes import LostNodes

HEARTBEAT_BYTES_MAX = 4 << 20  # 64 deployments of models with hundreds of layers take 200 kB
SEEK_SECONDS = 2.0  # between looks for a node that is there but not heard; one is asked at a time

log = logging.getLogger(__name__)


class Gossip:
    """See the module's docstring. All methods on one event loop.

    `changed` is called when the controller learnt something, `excluded` when other nodes were removed from
    the cluster; `removed` is set when this node was removed.
    """

    def __init__(
        self,
        bus: Bus,
        identity: Identity,
        controller: Controller,
        changed: Callable[[], None],
        excluded: Callable[[], None],
    ) -> None:
        self.removed = asyncio.Event()
        self._bus = bus
        self._identity = identity
        self._controller = controller
        self._changed = changed
        self._excluded = excluded
        self._has_spoken = False

    def open(self) -> None:
        """Listen from now on, and be seen by the others."""
        node = self._identity.node
        self._bus.subscribe("heartbeat/*", self._hear)
        self._bus.watch("alive/*", self._note_liveliness)
        self._bus.watch(REMOVED.format(node, "*"), self._hear_removal)
        self._bus.announce(f"alive/{node}")

    def revocations(self) -> dict[str, bytes]:
        """The signed removals that are known, by node."""
        return {revoked_node(entry): entry for entry in self._identity.revocations}

    async def speak_always(self, measure: Callable[[], Gauges]) -> None:
        """Send a heartbeat every HEARTBEAT_SECONDS, each with what is measured just then."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self.speak(measure())

    async def seek_lost_always(self) -> None:
        """Connect anew where a node is there but not heard."""
        lost = LostNodes(self._identity.node)
        while True:
            await asyncio.sleep(SEEK_SECONDS)
            node = lost.due(self._bus.remembered, self._heard(), time.monotonic())
            if node is not None and await self._bus.answers(node) and node not in self._heard():
                log.warning("node %s answers at its address, but is not heard: connecting anew", node)
                lost.reopened(node, time.monotonic())
                with contextlib.suppress(SetupNeeded):  # the bus tries again by itself
                    await self._bus.refresh()

    def _heard(self) -> set[str]:
        nodes = self._controller.nodes(time.monotonic())
        return {node for node, (state, _) in nodes.items() if state == "alive"}

    def speak(self, gauges: Gauges, farewell: Farewell = "") -> None:
        """Send a heartbeat now. The controller's first `step` comes before."""
        heartbeat = self._controller.heartbeat(time.monotonic(), gauges, farewell)
        self._bus.publish(f"heartbeat/{self._identity.node}", msgspec.msgpack.encode(heartbeat))
        self._has_spoken = True

    def say_farewell(self, gauges: Gauges, farewell: Farewell) -> None:
        """Send the last heartbeat, if the others have heard any."""
        if self._has_spoken:
            self.speak(gauges, farewell)

    def _hear(self, key: str, payload: bytes) -> None:
        if len(payload) > HEARTBEAT_BYTES_MAX:
            return
        try:
            heartbeat = msgspec.msgpack.decode(payload, type=Heartbeat)
        except (msgspec.MsgspecError, ValueError):
            return
        node = heartbeat.facts.node
        if node in self._identity.revoked or key != f"heartbeat/{node}":
            return
        self._admit(heartbeat.revocations)
        if heartbeat.farewell == "leaves":
            self._bus.forget(node)
        if self._controller.hear(heartbeat, time.monotonic()):
            self._changed()

    def _hear_removal(self, key: str, alive: bool) -> None:
        with contextlib.suppress(ValueError):  # no hexadecimal digits
            self._admit([bytes.fromhex(key.rpartition("/")[2])])

    def _admit(self, revocations: Sequence[bytes]) -> None:
        removed = self._identity.admit(revocations)
        if self._identity.node in removed:
            self.removed.set()
        elif removed:
            self._excluded()

    def _note_liveliness(self, key: str, alive: bool) -> None:
        node = key.rpartition("/")[2]
        if node != self._identity.node:
            self._controller.liveliness(node, alive, time.monotonic())
            self._changed()
