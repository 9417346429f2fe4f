"""Slices on this disk are hashed against their manifest before they are loaded, and now and then.

Disks lose bits, and a worker maps its file: what is damaged there computes wrongly without a word. Each chunk
was checked when it came; this is for what happens to it afterwards.
"""

import logging
import threading
import time
from collections.abc import Collection

from cordee.cluster.goals import SliceGoal
from cordee.distribution.inventory import Stopped
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, StageFailed

FRESH_SECONDS = 3600.0  # a worker that is replaced need not wait for the hashing again: 1 GB takes a second
NAMED_MAX = 8  # pieces in the log
IDLE_SHARE = 0.1  # of a core, and so of the disk, for what is hashed while others work

log = logging.getLogger(__name__)


class Attestation:
    """When the slices of a store were hashed last. `close` ends a hashing that is under way."""

    def __init__(self, slice_store: SliceStore) -> None:
        self._slice_store = slice_store
        self._hashed_at: dict[SliceGoal, float] = {}  # by time.monotonic
        self._closed = threading.Event()

    def note(self, goal: SliceGoal) -> None:
        """Each chunk of a slice has just come, and was hashed."""
        self._hashed_at[goal] = time.monotonic()

    def check(self, goal: SliceGoal, name: str, model: str) -> None:
        """Hash a slice that is here, unless that was done a moment ago; in a thread.

        `name` is what to call the slice, and `model` its model, in a message. Raises:
            BadModelFile: it is damaged; what is damaged is fetched again the next time it is wanted.
            CordeeError: it is gone, or the node stops.
        """
        if goal not in self._hashed_at or time.monotonic() - self._hashed_at[goal] > FRESH_SECONDS:
            damaged = self._hash(goal, 1.0)
            if damaged:
                remedy = "what is damaged is fetched again"
                if self._slice_store.is_whole(goal.model, goal.first, goal.last):
                    remedy = f"`cordee pull` it again, after `cordee rm {model}`"
                pieces = f"{damaged} piece{'s' * (damaged > 1)}"
                raise BadModelFile(f"{name} is damaged on this disk ({pieces}): {remedy}.")

    def check_oldest(self, goals: Collection[SliceGoal]) -> SliceGoal | None:
        """Hash the one that is due and was hashed longest ago, slowly; in a thread. It is given if damaged.

        Raises:
            CordeeError, OSError: it is gone, or the node stops.
        """
        self._hashed_at = {goal: at for goal, at in self._hashed_at.items() if goal in goals}
        before = time.monotonic() - FRESH_SECONDS
        due = [goal for goal in goals if self._hashed_at.get(goal, before) <= before]
        if not due:
            return None
        oldest = min(due, key=lambda goal: (self._hashed_at.get(goal, 0.0), goal))
        return oldest if self._hash(oldest, IDLE_SHARE) else None

    def close(self) -> None:
        """End what is under way."""
        self._closed.set()

    def _hash(self, goal: SliceGoal, share: float) -> int:
        """Hash a slice with a share of a core; the number of its pieces that are damaged."""
        began = time.monotonic()

        def progress(_done_bytes: int, _total_bytes: int) -> None:
            nonlocal began
            if self._closed.wait((time.monotonic() - began) * (1 / share - 1)):
                raise Stopped
            began = time.monotonic()

        try:
            damaged = self._slice_store.verify(goal.model, goal.first, goal.last, progress)
        except Stopped as error:
            raise StageFailed("the node stops") from error
        if damaged:
            self._hashed_at.pop(goal, None)
            log.warning("damaged on this disk: %s", ", ".join(damaged[:NAMED_MAX]))
        else:
            self.note(goal)
        return len(damaged)
