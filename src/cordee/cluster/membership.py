"""Membership: which nodes are there, and what each said last.

Theory of operation. Every node says everything about itself in each *heartbeat*, once a second and at each
change; there are no differences to lose and no history to agree on. A node is judged by two signs: its
heartbeats, and the liveliness token that the bus takes away when the node's links end. Neither alone is
believed at once:

    state     entered when                                        its placements   new placements
    alive     a heartbeat is heard                                stay             may use it
    suspect   its token is lost, or SILENCE_SECONDS passed        stay             do not use it
              without a heartbeat
    gone      suspect for SUSPICION_SECONDS, or it said that      are infeasible   do not use it
              it stops
    (none)    gone for FORGET_SECONDS, or it said that it leaves

Only the times of the last signs are stored; states are computed from them and `now`. A time that a fault put
into the future becomes now, so it delays a change of state by one period at most.

Order without counters. A heartbeat names its *session* (random, made when the node's agent starts) and when
it was sent (a clock of that session). Within a session a heartbeat sent earlier than the last heard is old,
and so is a heartbeat of the session before. Both only for REORDER_SECONDS after the last heartbeat was
heard, longer than a network holds messages back: whatever a fault wrote into these fields, the node is heard
again after that.

Convergence. Once faults have stopped, after SILENCE_SECONDS + SUSPICION_SECONDS each node has heard a true
heartbeat from every live node and none from dead ones, so all live nodes hold the same facts, as old as the
messages' delay; and as everything that is decided is a function of the view, they decide the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import NODES_MAX, Facts, Gauges

Liveness = Literal["alive", "suspect", "gone"]
Farewell = Literal["", "stops", "leaves"]  # until it is started again, or for good

HEARTBEAT_SECONDS = 1.0  # how often a node says everything again
# The bus closes a link that was silent for this long. Bounds on healing are stated in this unit.
LEASE_SECONDS = 3.0
SILENCE_SECONDS = 4.0  # three heartbeats lost in a row, and one late
# A machine busy with something else misses a lease of 2 s now and then; moving a model costs more than that.
SUSPICION_SECONDS = 2.0
LISTEN_SECONDS = 3.0  # after a start: long enough to be found by all others, and to hear a heartbeat of each
REORDER_SECONDS = 2.0  # TCP keeps order, so only messages of a link that was just replaced come late
FORGET_SECONDS = 3600.0  # how long a node that went is still shown
# One more with each change after which nodes no longer understand those of the version before. A node whose
# WIRE differs is not believed, but named: see `Greeting`.
WIRE = 3


class Heartbeat(msgspec.Struct, frozen=True):
    """All that a node says, again and again.

    `sent` is in seconds of the session's own clock, `clock` in seconds since 1970 as the sender believes.
    `revocations` are signed records; the shell checks them and hands those that are valid to
    `Controller.observe`. The last heartbeat of a session that ends as it should carries a `farewell`. The
    session lasts for `age_seconds`. `certificate` shows that the node is a member (trust.py). `api_keys` are
    signed, too (access/api_keys.py): the shell adds them, and takes in those of others.
    """

    session: str
    sent: float
    clock: float
    facts: Facts
    deployments: tuple[Deployment, ...] = ()
    revocations: tuple[bytes, ...] = ()
    gauges: Gauges = Gauges()
    farewell: Farewell = ""
    wire: int = WIRE
    age_seconds: float = 0.0
    certificate: bytes = b""
    api_keys: tuple[bytes, ...] = ()


class Caller(msgspec.Struct, frozen=True):
    """What a `Greeting` says of the node's facts."""

    name: str = ""
    version: str = ""


class Greeting(msgspec.Struct, frozen=True):
    """What of a heartbeat every version can read, whatever the others add or drop: this never changes."""

    wire: int = 0  # nodes up to 0.2.0 do not say it
    facts: Caller = Caller()


@dataclass(frozen=True)
class View:
    """What one node knows, as far as anything depends on it. `facts` are of alive and suspect nodes, by id.

    `listening`: the node has just started, or was stopped, and may not have heard of what runs already.
    """

    facts: Mapping[str, Facts]
    suspects: frozenset[str]
    deployments: tuple[Deployment, ...]
    listening: bool = False


@dataclass(eq=False)
class Sighting:
    """The last signs of a node. `replaced` is when its session took the place of the `previous` one."""

    heartbeat: Heartbeat
    heard: float
    offset: float  # its clock less our `now` when the heartbeat came
    lost: float | None = None
    previous: str = ""
    replaced: float = -math.inf

    def since(self) -> float:
        """From when on the node is suspect, or after its farewell gone."""
        if self.heartbeat.farewell:
            return self.heard
        silent = self.heard + SILENCE_SECONDS
        return silent if self.lost is None else min(silent, self.lost)


class Membership:
    """See the module's theory of operation. `now` is a clock that never jumps, in seconds."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._seen: dict[str, Sighting] = {}

    def hear(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take a heartbeat; False if it is our own, an old one, or changes nothing that `View` shows."""
        node = heartbeat.facts.node
        seen = self._seen.get(node)
        if node == self._me or (seen is not None and _is_old(heartbeat, seen, now)):
            return False
        offset = heartbeat.clock - now
        if seen is None:
            self._seen[node] = Sighting(heartbeat, now, offset)
            return True
        if heartbeat.session != seen.heartbeat.session:
            seen.previous, seen.replaced = seen.heartbeat.session, now
        same = (
            heartbeat.facts == seen.heartbeat.facts
            and self.liveness(node, now) == "alive"
            and not heartbeat.farewell
        )
        seen.heartbeat, seen.heard, seen.offset, seen.lost = heartbeat, now, offset, None
        return not same

    def said(self, node: str) -> Facts | None:
        """The facts that another node said last."""
        seen = self._seen.get(node)
        return None if seen is None else seen.heartbeat.facts

    def liveliness(self, node: str, alive: bool, now: float) -> None:
        """The bus says that a node's token came or went."""
        seen = self._seen.get(node)
        if seen is not None:
            seen.lost = None if alive else now

    def liveness(self, node: str, now: float) -> Liveness:
        """A node's state; one that was never heard from is gone."""
        seen = self._seen.get(node)
        if seen is None:
            return "alive" if node == self._me else "gone"
        since = seen.since()
        if now < since:
            return "alive"
        return "suspect" if now < since + SUSPICION_SECONDS and not seen.heartbeat.farewell else "gone"

    def facts(self, now: float) -> dict[str, tuple[Liveness, Facts]]:
        """The other nodes, by id, without those that left for good."""
        return {
            node: (self.liveness(node, now), seen.heartbeat.facts)
            for node, seen in self._seen.items()
            if seen.heartbeat.farewell != "leaves"
        }

    def gauges(self, now: float) -> dict[str, Gauges]:
        """What the other nodes that are alive measured last, by id."""
        seen = self._seen.items()
        return {node: each.heartbeat.gauges for node, each in seen if self.liveness(node, now) == "alive"}

    def clocks(self, own: float, now: float) -> dict[str, float]:
        """By how many seconds the clocks of the other alive nodes are ahead of ours, by id."""
        return {
            node: seen.offset + now - own
            for node, seen in self._seen.items()
            if math.isfinite(seen.offset) and self.liveness(node, now) == "alive"
        }

    def settle(self, now: float) -> None:
        """Call it often: impossible times are mended, long gone nodes forgotten."""
        for node, seen in list(self._seen.items()):
            if not seen.heard <= now:  # or not a number
                seen.heard = now
            if seen.lost is not None and not seen.lost <= now:
                seen.lost = now
            # A node that left is remembered for as long as an earlier heartbeat of it may still come.
            kept_seconds = REORDER_SECONDS if seen.heartbeat.farewell == "leaves" else FORGET_SECONDS
            if now - seen.since() >= kept_seconds:
                del self._seen[node]
        excess = len(self._seen) - NODES_MAX  # of those that are gone the longest gone are forgotten first
        if excess > 0:
            for node in sorted(self._seen, key=lambda node: (self._seen[node].since(), node))[:excess]:
                del self._seen[node]

    def clock(self, own: float, now: float) -> float:
        """The cluster's clock: the lower median of the clocks of the alive nodes, ours included."""
        clocks = [own]
        for node, seen in self._seen.items():
            if math.isfinite(seen.offset) and self.liveness(node, now) == "alive":
                clocks.append(seen.offset + now)
        clocks.sort()
        return clocks[(len(clocks) - 1) // 2]


def _is_old(heartbeat: Heartbeat, seen: Sighting, now: float) -> bool:
    if heartbeat.session == seen.heartbeat.session:
        return heartbeat.sent <= seen.heartbeat.sent and 0 <= now - seen.heard < REORDER_SECONDS
    return heartbeat.session == seen.previous and 0 <= now - seen.replaced < REORDER_SECONDS
