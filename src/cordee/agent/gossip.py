"""What a node says of itself, and what it hears of others: heartbeats, liveliness tokens, removals.

Everything goes over the bus, and what is heard goes to the controller. A heartbeat is sent every
HEARTBEAT_SECONDS, and at once where the controller's decision is news. Heartbeats of another wire (a version
of Cordée that says things otherwise) are not believed, but their nodes are named.

    heartbeat/NODE             published: a Heartbeat (msgpack) of that node
    alive/NODE                 announced while that node runs
    removed/NODE/OTHER/PROOF   announced by the buses of the other nodes: its signed removal, in hexadecimal

The bus compares NODE's first digits, its slot, with the certificate of the link that brings a message; and in
a heartbeat there is the certificate of the whole id, so that a member cannot invent others of its slot. What
is wrong changes nothing, and is counted for the member that has the slot.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence

import msgspec

from cordee import __version__
from cordee.access.api_keys import ApiKeys
from cordee.agent.reach import is_there
from cordee.cluster.controller import Controller
from cordee.cluster.facts import Gauges
from cordee.cluster.membership import (
    HEARTBEAT_SECONDS,
    SILENCE_SECONDS,
    WIRE,
    Farewell,
    Greeting,
    Heartbeat,
)
from cordee.cluster.soundness import plain
from cordee.errors import SetupNeeded
from cordee.net.bus import REMOVED, Bus, speaker
from cordee.net.identity import SLOT_DIGITS, SLOTS, Identity, revoked_node
from cordee.net.lost_nodes import LostNodes
from cordee.net.members import KnownMember, Members

HEARTBEAT_BYTES_MAX = 2 << 20  # 64 deployments of models with hundreds of layers take 300 kB
# Of one node in a second. An agent looks, and so speaks, fifty times at most (GATHER_SECONDS).
HEARTBEATS_MAX = 60
HEARD_BYTES_MAX = 2 * HEARTBEAT_BYTES_MAX
SEEK_SECONDS = 2.0  # between looks for a node that is there but not heard; one is asked at a time

log = logging.getLogger(__name__)


class Gossip:
    """See the module's docstring. All methods on one event loop.

    `changed` is called when the controller learnt something, `excluded` when other nodes were removed from
    the cluster; `removed` is set when this node was removed, `cloned` when it is the newer of two machines
    that run as one node. `members` and `api_keys` are kept up to date with what is heard.
    """

    def __init__(
        self,
        bus: Bus,
        identity: Identity,
        controller: Controller,
        changed: Callable[[], None],
        excluded: Callable[[], None],
        api_keys: ApiKeys | None = None,
    ) -> None:
        self.api_keys = api_keys or ApiKeys(identity)
        self.removed = asyncio.Event()
        self.cloned = asyncio.Event()
        self.members = Members(identity)
        # By slot, so each member fills one place:
        self._speakers: dict[str, str] = {}  # the node that was heard
        self._strangers: dict[str, tuple[float, str]] = {}  # when heard last, and what is to be said of it
        self._counts: dict[str, tuple[float, int, int]] = {}  # when a second began; heartbeats, bytes since
        self._bus = bus
        self._identity = identity
        self._controller = controller
        self._changed = changed
        self._excluded = excluded
        self._has_spoken = False
        self._said_keys = self.api_keys.all

    def open(self) -> None:
        """Listen from now on, and be seen by the others."""
        node = self._identity.node
        self._bus.subscribe("heartbeat/*", self._hear)
        self._bus.watch("alive/*", self._note_liveliness)
        self._bus.watch(REMOVED.format(node, "*", "*"), self._hear_removal)
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
        heartbeat = msgspec.structs.replace(heartbeat, api_keys=self.api_keys.packed)
        self._said_keys = self.api_keys.all
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
        now, slot = time.monotonic(), speaker(key)
        if self._is_flooding(slot, len(payload), now):
            return
        said = key.rpartition("/")[2]
        try:
            if len(payload) > HEARTBEAT_BYTES_MAX:
                raise ValueError("a heartbeat that is too long")
            greeting = msgspec.msgpack.decode(payload, type=Greeting)
            if greeting.wire != WIRE:
                self._note_stranger(said, greeting, now)
                return
            heartbeat = msgspec.msgpack.decode(payload, type=Heartbeat)
        except (msgspec.MsgspecError, ValueError):
            self._count_unsound(slot, said, "a heartbeat that is none")
            return
        node = heartbeat.facts.node
        if node in self._identity.revoked:
            return
        if node != said or not self._identity.is_member(node, heartbeat.certificate):
            self._count_unsound(slot, said, "a heartbeat in the name of another node")
            return
        self._speakers[slot] = node
        if slot in self._strangers:
            self._strangers[slot] = -math.inf, ""
        if not self._admit(heartbeat.revocations):
            self._count_unsound(slot, node, "a removal that no admin signed")
        self._believe(heartbeat, now)

    @property
    def has_news(self) -> bool:
        """Whether the others should hear of keys at once: one was made or revoked, here or elsewhere."""
        return self.api_keys.all is not self._said_keys

    def _believe(self, heartbeat: Heartbeat, now: float) -> None:
        """A member said that."""
        node = heartbeat.facts.node
        if heartbeat.api_keys != self.api_keys.packed:
            if wrong := self.api_keys.hear(heartbeat.api_keys):
                self._controller.count_unsound(node, wrong)
            if self.has_news:
                self._changed()
        if self._controller.hear(heartbeat, now):
            self._changed()
        if heartbeat.farewell == "leaves":
            self._bus.forget(node)
            self.members.forget(node)
        elif node != self._identity.node:
            self._remember(node, now)
        elif self._controller.is_newer_clone(now):
            self.cloned.set()

    def _is_flooding(self, slot: str, nbytes: int, now: float) -> bool:
        """Whether a member says more than anybody has to say; the rest is not even looked at."""
        began, count, total = self._counts.get(slot, (now, 0, 0))
        if not 0 <= now - began < 1.0:
            began, count, total = now, 0, 0
        self._counts[slot] = began, count + 1, total + nbytes
        is_flood = count >= HEARTBEATS_MAX or total + nbytes > HEARD_BYTES_MAX
        if is_flood and count and total <= HEARD_BYTES_MAX and count <= HEARTBEATS_MAX:  # the first of them
            self._count_unsound(slot, slot, f"more than {HEARTBEATS_MAX} heartbeats in a second, or too long")
        return is_flood

    def _count_unsound(self, slot: str, said: str, what: str) -> None:
        """Count it for the member that has the slot, whatever node it names."""
        self._controller.count_unsound(self._speakers.setdefault(slot, said), what)

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
        slot = node[:SLOT_DIGITS]
        if node in self._identity.revoked or node == self._identity.node:
            return
        name, version = plain(greeting.facts.name), plain(greeting.facts.version)
        said = (
            f"{name or plain(node)} runs Cordée {version or '0.2.0 or older'} and this node "
            f"{__version__}, which do not understand each other: update all machines to the same version."
        )
        if slot not in self._strangers:
            log.warning("%s", said)
        self._strangers[slot] = now, said

    def _hear_removal(self, key: str, alive: bool) -> None:
        with contextlib.suppress(ValueError):  # no hexadecimal digits
            self._admit([bytes.fromhex(key.rpartition("/")[2])])

    def _admit(self, revocations: Sequence[bytes]) -> bool:
        """Take in removals, up to the first that the authority did not sign; False if there is one."""
        news: list[bytes] = []
        for entry in revocations[:SLOTS]:
            if revoked_node(entry) not in self._identity.revoked:
                if not self._identity.is_revocation(entry):
                    break
                news.append(entry)
        removed = self._identity.admit(news)
        if self._identity.node in removed:
            self.removed.set()
        elif removed:
            self._excluded()
        return all(revoked_node(entry) in self._identity.revoked for entry in revocations[:SLOTS])

    def _note_liveliness(self, key: str, alive: bool) -> None:
        node = key.rpartition("/")[2]
        if node != self._identity.node:
            self._controller.liveliness(node, alive, time.monotonic())
            self._changed()
