"""Whether guesses pay: what a micro-batch costs by its rows, as measured, against the tokens it may give.

On stages that compute one after the other on the same machine a guess costs time: its row is computed in any
case. How much depends on machine and model: reading the weights is shared by all rows, the arithmetic is not.
On stages of several machines a guess travels while its stage has nothing to do, and costs nothing that anyone
waits for; then only its chance decides.
"""

from collections.abc import Sequence

DECAY = 0.97  # how much a measurement counts beside the next one
# What a further row costs of the first one's time, until it was measured; and what is believed at most, since
# other programs disturb the measurements.
ROW_PRIOR, ROW_MIN, ROW_MAX = 0.4, 0.01, 1.2
PRIOR_WEIGHT = 2.0
GAIN_MIN = 1.05  # less is not worth leaving micro-batches that go round by themselves
GUESSES_MAX = 15  # of one stream in a micro-batch
CHANCE_MIN = 0.3  # of guesses for which a stage has nothing else to do
EXTRA_TOKENS_MIN = 0.6  # for which a stream begins to guess on several machines


class Costs:
    """Seconds of micro-batches of decode rows, by their number: a straight line through what was measured."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._product = 0.0
        self._round: float | None = None  # of a micro-batch that goes round, for its rows, against the line

    def observe(self, rows: int, seconds: float) -> None:
        """A micro-batch of so many rows came back after this time; nothing else was under way."""
        if seconds <= 0:
            return
        self._weight = self._weight * DECAY + 1
        self._rows = self._rows * DECAY + rows
        self._seconds = self._seconds * DECAY + seconds
        self._rows2 = self._rows2 * DECAY + rows * rows
        self._product = self._product * DECAY + rows * seconds

    def observe_round(self, rows: int, seconds: float) -> None:
        """A micro-batch that goes round by itself took so long for each round."""
        if seconds > 0 and self._weight:
            ratio = min(max(seconds / self.seconds(rows), 0.5), 1.0)
            self._round = ratio if self._round is None else 0.8 * self._round + 0.2 * ratio

    def seconds(self, rows: int) -> float:
        """How long a micro-batch takes; before any measurement in units of one row's time."""
        if not self._weight:
            return 1.0 + ROW_PRIOR * (rows - 1)
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = max(self._rows2 / self._weight - mean_rows**2, 0.0)
        covariance = self._product / self._weight - mean_rows * mean_seconds
        # The prior: as if so much of the variance had been seen at ROW_PRIOR.
        one = mean_seconds / (1.0 + ROW_PRIOR * (mean_rows - 1.0))
        slope = (covariance * self._weight + PRIOR_WEIGHT * ROW_PRIOR * one) / (
            variance * self._weight + PRIOR_WEIGHT
        )
        slope = min(max(slope, ROW_MIN * one), ROW_MAX * one)
        return max(mean_seconds + slope * (rows - mean_rows), mean_seconds / 100)

    def depth(self, rows: int, chances: Sequence[Sequence[float]]) -> list[int]:
        """How many guesses of each stream a micro-batch of `rows` rows should have beside them.

        `chances` are, by stream, those of its guesses in order, falling. All zeros: guessing does not pay.
        """
        depths = [0] * len(chances)
        tokens = float(rows)
        best = tokens / (self.seconds(rows) * (1.0 if self._round is None else self._round)) * GAIN_MIN
        found, taken = depths[:], 0
        while True:
            left = [
                (own[depth], -stream)
                for stream, (own, depth) in enumerate(zip(chances, depths, strict=True))
                if depth < min(len(own), GUESSES_MAX)
            ]
            if not left:
                return found
            chance, stream = max(left)
            depths[-stream] += 1
            taken += 1
            tokens += chance
            if tokens / self.seconds(rows + taken) > best:
                best, found = tokens / self.seconds(rows + taken), depths[:]
