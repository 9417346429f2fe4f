"""How long a host waits for the results of its micro-batches. Pure.

A stage that hangs, or a link that hardly carries anything, shows in nothing but that no result comes. What is
long follows from what was predicted of the placement: PATIENCE times as much for the rows that are under way,
and RESULT_SECONDS beside; for the first result of a wiring also the time to read the weights.

A prediction may be wrong. So if a result is late again on the same machines the host waits for twice as long,
and in no case longer than RESULT_SECONDS_MAX.
"""

from dataclasses import dataclass

RESULT_SECONDS = 10.0  # a machine that swaps, or that something else keeps busy
RESULT_SECONDS_MAX = 600.0  # 512 rows of prefill take this long on a machine that does one row a second
PATIENCE = 20.0  # long contexts, and rows computed one by one, take several times as long as others
LATE_KEPT_SECONDS = 3600.0  # for which it is remembered that a result was late
# A longer pause between two looks is one of this process: the results may lie there unread.
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Expectation:
    """What a placement should take for a row, and to read its weights for the first time, in seconds.

    With `row_seconds` 0 nothing is known, and the wait is as long as ever.
    """

    row_seconds: float = 0.0
    read_seconds: float = 0.0


class Results:
    """What is under way in one wiring. `now` is a clock that never jumps, in seconds."""

    def __init__(self) -> None:
        self._expectation = Expectation()
        self._places: object = None
        self._rows: dict[int, int] = {}  # of the micro-batches under way
        self._heard = 0.0  # when a result came last, or the first of those under way left
        self._looked: float | None = None
        self._is_first = True
        self._late_count = 0
        self._late_at = 0.0

    def expect(self, places: object, expectation: Expectation) -> None:
        """What is known of the placement from now on; `places` stand for its machines."""
        if places != self._places:
            self._places, self._late_count = places, 0
        self._expectation = expectation

    def sent(self, batch: int, rows: int, now: float) -> None:
        """A micro-batch leaves."""
        if not self._rows:
            self._heard = now
        self._rows[batch] = rows

    def came(self, batch: int, last: bool, now: float) -> None:
        """A result came; more of them follow from a micro-batch that goes round, up to the `last` one."""
        if batch not in self._rows:
            return
        self._heard, self._is_first = now, False
        if last:
            del self._rows[batch]

    def clear(self) -> None:
        """Nothing is under way any more; another wiring follows."""
        self._rows.clear()
        self._is_first = True

    def late_seconds(self, now: float) -> float:
        """For how long a result has been waited for, if that is too long; else 0. To be called often."""
        pause = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        if pause > LOOK_SECONDS:
            self._heard += pause
        if now - self._late_at > LATE_KEPT_SECONDS:
            self._late_count = 0
        waited = now - self._heard
        if not self._rows or waited <= self._allowed_seconds():
            return 0.0
        self._late_count, self._late_at = self._late_count + 1, now
        return waited

    def _allowed_seconds(self) -> float:
        expected = self._expectation
        if not expected.row_seconds:
            return RESULT_SECONDS_MAX
        seconds = RESULT_SECONDS + PATIENCE * expected.row_seconds * sum(self._rows.values())
        if self._is_first:
            seconds += expected.read_seconds
        return min(seconds * 2.0 ** min(self._late_count, 16), RESULT_SECONDS_MAX)
