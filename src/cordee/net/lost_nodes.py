"""Nodes that are there, but are not heard: found, so that the bus can connect to them anew.

zenoh connects again when a link ends, but not always well: where both sides do so at the same moment, as
after a pause of a machine, two nodes may end with links between them that carry neither's messages, and stay
so (bench/cluster.py met it in one of about twenty pauses). All others hear both; each counts the other as
gone.

So it is looked after from above: a remembered node that was not heard for LOST_SECONDS, and shows its
certificate at an address where it was seen last, is there, and the bus reopens its session. The side with the
smaller id begins, so that both do not reopen at the same moment. If that does not help, as with a node that
lets this one in no more, the pauses grow.
"""

from collections.abc import Collection
from dataclasses import dataclass

LOST_SECONDS = 10.0  # zenoh tries an address again after 4 s at the latest: what was to come back has come
PAUSE_SECONDS_MAX = 300.0  # between two reopenings for the same node; other links blink each time


@dataclass
class _Lost:
    """A node that is not heard: when to look for it next, and how long to wait after a reopening."""

    look: float
    pause_seconds: float


class LostNodes:
    """Which of the remembered nodes to look for. `now` is a clock that never jumps, in seconds."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._lost: dict[str, _Lost] = {}

    def due(self, remembered: Collection[str], heard: Collection[str], now: float) -> str | None:
        """The node to look for now, if there is one; it is not due again for LOST_SECONDS."""
        missing = {node for node in remembered if node not in heard and node != self._me}
        self._lost = {node: lost for node, lost in self._lost.items() if node in missing}
        for node in missing - self._lost.keys():
            pause_seconds = LOST_SECONDS if self._me < node else 2 * LOST_SECONDS
            self._lost[node] = _Lost(now + pause_seconds, pause_seconds)
        node = min(self._lost, key=lambda each: (self._lost[each].look, each), default=None)
        if node is None or self._lost[node].look > now:
            return None
        self._lost[node].look = now + LOST_SECONDS
        return node

    def reopened(self, node: str, now: float) -> None:
        """The bus connected anew because of this node: the next time comes later."""
        lost = self._lost.get(node)
        if lost is not None:
            lost.pause_seconds = min(2 * lost.pause_seconds, PAUSE_SECONDS_MAX)
            lost.look = now + lost.pause_seconds
