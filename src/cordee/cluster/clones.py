"""Clones: two machines that run as one node, because a disk was copied with the identity on it. Pure.

Each run of an agent has a random session, which all its heartbeats name. After a restart the old session is
heard no more; of two machines with one identity both go on speaking. So a node is cloned if one of its
sessions is heard for OVERLAP_SECONDS after another was heard first. Nothing but messages for people depends
on it, except that of two clones the newer run ends itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cordee.cluster.membership import NODES_MAX, REORDER_SECONDS, Heartbeat

OVERLAP_SECONDS = 2 * REORDER_SECONDS  # no network holds a message back for so long
RUNS_MAX = 4  # of one node that are told apart: two are enough to name it
KEPT_SECONDS = 600.0  # for which a run that fell silent is remembered, and its clone still named

T = TypeVar("T")


@dataclass(eq=False)
class _Run:
    """When a session was heard first and last, and when it began, by our clock."""

    first: float
    last: float
    began: float


class Clones:
    """See the module's docstring. `now` is a clock that never jumps, in seconds."""

    def __init__(self, me: str, session: str) -> None:
        self._me = me
        self._session = session
        self._began: float | None = None  # our own run
        self._runs: dict[str, dict[str, _Run]] = {}  # by node and session

    def age_seconds(self, now: float) -> float:
        """How long our own run lasts."""
        return 0.0 if self._began is None else now - self._began

    def hear(self, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat came, also one in our own name."""
        node, session = heartbeat.facts.node, heartbeat.session
        if node == self._me and session == self._session:
            return
        runs = self._runs.setdefault(node, {})
        if session in runs:
            runs[session].last = now
        else:
            runs[session] = _Run(now, now, now - heartbeat.age_seconds)
        _bound(runs, RUNS_MAX, lambda run: run.last)

    def settle(self, now: float) -> None:
        """Call it often: silent runs and impossible times are forgotten. Our run begins at the first call."""
        if self._began is None or not self._began <= now:
            self._began = now
        for node, runs in list(self._runs.items()):
            for session, run in list(runs.items()):
                if not 0 <= now - run.last < KEPT_SECONDS or not run.first <= run.last:  # or not a number
                    del runs[session]
            if not runs:
                del self._runs[node]
        _bound(self._runs, NODES_MAX, lambda runs: max(run.last for run in runs.values()))

    def nodes(self, now: float) -> frozenset[str]:
        """The nodes that two machines run as."""
        return frozenset(node for node in self._runs if self._overlap(node, now))

    def is_newer(self, now: float) -> bool:
        """Whether we are cloned, and our run is the newer one: the copy, as far as anybody can tell."""
        own = now - self.age_seconds(now)
        return any(
            run.last - max(run.first, own) >= OVERLAP_SECONDS
            and (own > run.began or (own == run.began and self._session > session))
            for session, run in self._runs.get(self._me, {}).items()
        )

    def _overlap(self, node: str, now: float) -> bool:
        runs = list(self._runs[node].values())
        if node == self._me:
            runs.append(_Run(now - self.age_seconds(now), now, 0.0))
        return any(
            min(one.last, other.last) - max(one.first, other.first) >= OVERLAP_SECONDS
            for index, one in enumerate(runs)
            for other in runs[:index]
        )


def _bound(items: dict[str, T], count: int, last: Callable[[T], float]) -> None:
    """Keep the `count` items that were heard last."""
    if len(items) > count:
        for name in sorted(items, key=lambda name: (last(items[name]), name))[: len(items) - count]:
            del items[name]
