"""What a node says of itself, and what it hears of others: heartbeats, liveliness tokens, removals.

Everything goes over the bus, and what is heard goes to the controller. A heartbeat is sent every
HEARTBEAT_SECONDS, and at once where the controller's decision is news. Heartbeats of another wire (a version
of Cordée that says things otherwise) are not believed, but their nodes are named.

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

from cordee import __version__
from cordee.agent.reach import is_there
from cordee.cluster.controller import Controller
from cordee.cluster.facts import Gauges
from cordee.cluster.membership import (
    HEARTBEAT_SECONDS,
    NODES_MAX,
    SILENCE_SECONDS,
    WIRE,
    Farewell,
    Greeting,
    Heartbeat,
)
from cordee.cluster.soundness import plain
from cordee.errors import SetupNeeded
from cordee.net.bus import REMOVED, Bus
from cordee.net.identity import Identity, revoked_node
from cordee.net.lost_nodes import LostNodes
from cordee.net.members import KnownMember, Members

HEARTBEAT_BYTES_MAX = 4 << 20  # 64 deployments of models with hundreds of layers take 200 kB
SEEK_SECONDS = 2.0  # between looks for a node that is there but not heard; one is asked at a time

log = logging.getLogger(__name__)


class Gossip:
    """See the module's docstring. All methods on one event loop.

    `changed` is called when the controller learnt something, `excluded` when other nodes were removed from
    the cluster; `removed` is set when this node was removed, `cloned` when it is the newer of two machines
    that run as one node. `members` is kept up to date with what is heard.
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
        self.cloned = asyncio.Event()
        self.members = Members(identity)
        self._strangers: dict[str, tuple[float, str]] = {}  # when heard last, and what is to be said of it
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
            if node is not None and await is_there(self._identity, node) and node not in self._heard():
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
        """Send the last heartbeat, if the others heard any; not if another machine goes on as this node."""
        if self._has_spoken and not self.cloned.is_set():
            self.speak(gauges, farewell)

    def strangers(self, now: float) -> list[str]:
        """A sentence for each node that speaks another wire than this one."""
        return [said for heard, said in self._strangers.values() if 0 <= now - heard < SILENCE_SECONDS]

    def _hear(self, key: str, payload: bytes) -> None:
        now = time.monotonic()
        if len(payload) > HEARTBEAT_BYTES_MAX:
            return
        try:
            greeting = msgspec.msgpack.decode(payload, type=Greeting)
            if greeting.wire != WIRE:
                self._note_stranger(key.rpartition("/")[2], greeting, now)
                return
            heartbeat = msgspec.msgpack.decode(payload, type=Heartbeat)
        except (msgspec.MsgspecError, ValueError):
            return
        node = heartbeat.facts.node
        if node in self._identity.revoked or key != f"heartbeat/{node}":
            return
        self._strangers.pop(node, None)
        self._admit(heartbeat.revocations)
        if self._controller.hear(heartbeat, now):
            self._changed()
        if heartbeat.farewell == "leaves":
            self._bus.forget(node)
            self.members.forget(node)
        elif node != self._identity.node:
            self._remember(node, now)
        elif self._controller.is_newer_clone(now):
            self.cloned.set()

    def _remember(self, node: str, now: float) -> None:
        """Remember a member as the controller knows it: of what it said only what is sound."""
        _, facts = self._controller.nodes(now).get(node, ("gone", None))
        if facts is not None:
            known = KnownMember(
                node, facts.name, facts.admin, facts.version, facts.renewals, round(time.time())
            )
            self.members.remember(known)

    def _note_stranger(self, node: str, greeting: Greeting, now: float) -> None:
        """Name a node that this one does not understand; it does the same."""
        if node in self._identity.revoked or node == self._identity.node:
            return
        name, version = plain(greeting.facts.name), plain(greeting.facts.version)
        said = (
            f"{name or node} runs Cordée {version or '0.2.0 or older'} and this node "
            f"{__version__}, which do not understand each other: update all machines to the same version."
        )
        if node not in self._strangers:
            log.warning("%s", said)
            while len(self._strangers) >= NODES_MAX:
                del self._strangers[min(self._strangers, key=lambda node: self._strangers[node])]
        self._strangers[node] = now, said

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
