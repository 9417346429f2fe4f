"""Which nodes could not work together, and what follows from it for placements. Pure.

A node that meets a fault of another one *doubts* it: it could not connect to it, waits for a stage of it that
makes no progress, or waits for a result. It says so in its facts, with the reason, for DOUBT_SECONDS; each
time that the same node disappoints again for twice as long, up to DOUBT_SECONDS_MAX.

Nobody has to believe a doubt to do what follows from it (`Exclusions`):

    doubted by one node             no placement has both of them: the doubter loses what it cannot use anyway
    doubted by EXCLUDERS nodes      no placement has it
    doubted by itself               the same

So one node that lies, or whose own cable is broken, keeps by its word alone nothing but itself from working;
with a true doubt of another node beside its own, it excludes a third. These are preferences: where nothing
else holds a model, doubted nodes are tried again.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from cordee.cluster.facts import NODES_MAX, Doubt, Facts
from cordee.cluster.soundness import plain

DOUBT_SECONDS = 60.0  # a cable that is plugged in again, a machine that was busy
DOUBT_SECONDS_MAX = 3600.0
# A doubt that ended so long ago is forgotten: the next one is short again.
MEMORY_SECONDS = 2 * DOUBT_SECONDS_MAX
REASON_CHARS_MAX = 400
EXCLUDERS = 2  # one alone may lie
PAIRS_TRIED_MAX = 2  # of which either node may have to go, or both: 3**2 plans


@dataclass(eq=False)
class _Doubted:
    """Until when a doubt counts, and for how long it did."""

    reason: str
    until: float
    seconds: float


class Doubts:
    """The doubts of one node. `now` is a clock that never jumps, in seconds."""

    def __init__(self) -> None:
        self._doubted: dict[str, _Doubted] = {}
        self._unreachable: dict[str, str] = {}

    def note(self, node: str, reason: str, now: float, seconds: float = DOUBT_SECONDS) -> None:
        """A node disappointed. While it is doubted already, for as long or longer, nothing changes."""
        before = self._doubted.get(node)
        if before is not None and now < before.until:
            if seconds <= before.seconds:
                return
        elif before is not None:
            seconds = max(seconds, 2 * before.seconds)
        if before is None and len(self._doubted) >= NODES_MAX:
            return
        seconds = min(seconds, DOUBT_SECONDS_MAX)
        self._doubted[node] = _Doubted(plain(reason)[:REASON_CHARS_MAX], now + seconds, seconds)

    def unreachable(self, reasons: Mapping[str, str]) -> None:
        """The nodes that do not answer at their doors now, and why; all of them, each time."""
        wanted = itertools.islice(reasons.items(), NODES_MAX)
        self._unreachable = {node: plain(reason)[:REASON_CHARS_MAX] for node, reason in wanted}

    def settle(self, now: float) -> None:
        """Call it often: what is over is forgotten, and so are impossible times."""
        for node, doubted in list(self._doubted.items()):
            left = doubted.until - now
            if not -MEMORY_SECONDS < left <= doubted.seconds <= DOUBT_SECONDS_MAX:  # or not a number
                del self._doubted[node]

    def said(self, now: float) -> tuple[Doubt, ...]:
        """What the facts should say."""
        found = {node: doubted.reason for node, doubted in self._doubted.items() if now < doubted.until}
        found |= self._unreachable
        return tuple(Doubt(node, found[node]) for node in sorted(found))


class Exclusions:
    """What follows from the doubts in a view's facts; see the module's docstring."""

    def __init__(self, facts: Mapping[str, Facts]) -> None:
        self._doubters: dict[str, set[str]] = {}
        for node, own in facts.items():
            for doubt in own.doubts:
                if doubt.node in facts:
                    self._doubters.setdefault(doubt.node, set()).add(node)
        self._out = {
            node
            for node, doubters in self._doubters.items()
            if len(doubters) >= EXCLUDERS or node in doubters
        }
        for node, doubters in self._doubters.items():
            doubters.discard(node)
        self._paired = {node for node, by in self._doubters.items() if by}.union(*self._doubters.values())

    def concern(self, nodes: Collection[str]) -> bool:
        """Whether these nodes should not work together."""
        return any(
            node in self._out or not self._doubters[node].isdisjoint(nodes) for node in self._known(nodes)
        )

    def in_pairs(self, nodes: Collection[str]) -> int:
        """How many of these nodes doubt any other, or are doubted: of two either may be to blame."""
        return len(self._paired.intersection(nodes))

    def groups(self, nodes: Collection[str], last_resort: bool = False) -> Iterator[frozenset[str]]:
        """Parts of these nodes that should work together, the best first; mostly there is just one.

        As a `last_resort` those without the nodes that several doubt, and then all.
        """
        trusted = frozenset(nodes) if last_resort else frozenset(nodes) - self._out
        yield from self._without_pairs(trusted, PAIRS_TRIED_MAX)
        if last_resort and self.concern(nodes):
            yield frozenset(nodes)

    def _known(self, nodes: Collection[str]) -> Iterator[str]:
        return (node for node in nodes if node in self._doubters)

    def _without_pairs(self, nodes: frozenset[str], tries: int) -> Iterator[frozenset[str]]:
        """Leave out who is in most pairs; of two in a pair of their own, either or both."""
        others: dict[str, set[str]] = {}
        for node in self._known(nodes):
            for doubter in self._doubters[node] & nodes:
                others.setdefault(node, set()).add(doubter)
                others.setdefault(doubter, set()).add(node)
        if not others:
            yield nodes
            return
        worst = min(others, key=lambda node: (-len(others[node]), node))
        if len(others[worst]) > 1:
            yield from self._without_pairs(nodes - {worst}, tries)
            return
        yield from self._without_pairs(nodes - {worst}, tries - 1)
        if tries > 0:
            yield from self._without_pairs(nodes - others[worst], tries - 1)
            yield from self._without_pairs(nodes - others[worst] - {worst}, tries - 1)
