"""Whether the rows that a stage sent, or the tokens that it gave, are those that were computed again.

See docs/spot-checks.md.

Honest machines round differently: other kernels, other types of the cache, other batches. How far that goes
is measured on the very rows, with two arithmetics of one machine. Pure: arrays in, findings out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cordee.generation.request import Choice, SamplingParams
from cordee.generation.sampling import GREEDY_BELOW, Sampler

# Roundings are spread alike wherever they come from: of 1,000 values of a row one is ten times as far off as
# the median value. So values that stand out of their own row were not rounded, but altered.
VALUE_FACTOR = 12.0
VALUE_FLOOR = 1 / 32  # what is off by less is not worth an accusation, however exact the rest
# All values of a row together may be off by so many times the difference between two arithmetics of one
# machine. Those of quantized models leave little for other machines to add: each rounding decides the next.
ROW_FACTOR = 4.0
ROW_FLOOR = 1 / 32
LOGIT_FACTOR = 8.0
VALUES_SHARE, VALUES_MIN = 1 / 200, 4  # of a row, that must differ
ROWS_SHARE, ROWS_MIN = 1 / 20, 3  # of a stretch, that must differ
TOKENS_SHARE, TOKENS_MIN = 1 / 10, 2
DRAWS = 24  # with changed logits, for a token that is not the one computed again


@dataclass(frozen=True)
class Difference:
    """What a comparison found. `explanation` is for people."""

    differs: bool
    explanation: str


def distances(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far each value of (..., width) rows is off, by the size of its reference and the row's median size.

    A value that is no number is infinitely far.
    """
    sizes = np.abs(reference)
    scale = sizes + np.median(sizes, axis=-1, keepdims=True) + np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(rows - reference) / scale
    found[~np.isfinite(found)] = np.inf
    return found


@dataclass(frozen=True)
class Rounding:
    """How far honest rows are apart: the median value of a row, and the share of rows that are much farther
    apart, because a router chose other experts."""

    typical: float
    routed: float


def rounding(one: np.ndarray, other: np.ndarray) -> Rounding:
    """From the same (n, width) rows by two arithmetics of an honest machine."""
    medians = np.median(distances(other, one), axis=1)
    typical = float(np.median(medians))
    return Rounding(typical, float(_rows_differ(other, one, typical).mean()))


def compare_rows(claimed: np.ndarray, computed: np.ndarray, honest: Rounding) -> Difference:
    """Compare (n, width) rows that a stage sent with the same computed again."""
    if claimed.shape != computed.shape:
        return Difference(True, f"it sent rows of width {claimed.shape[1]}, not {computed.shape[1]}")
    rows = _rows_differ(claimed, computed, honest.typical)
    needed = max(ROWS_MIN, int(len(rows) * (ROWS_SHARE + 2 * honest.routed)) + 1)
    if rows.sum() < needed:
        return Difference(False, f"{len(rows)} rows agree")
    first = int(np.flatnonzero(rows)[0])
    far = _far(distances(claimed[first], computed[first]))
    worst = int(np.argmax(np.abs(claimed[first] - computed[first]) * far))
    return Difference(
        True,
        f"{int(rows.sum())} of {len(rows)} rows differ (row {first}: {int(far.sum())} of {far.size} values; "
        f"value {worst} was {claimed[first, worst]:.4g}, not {computed[first, worst]:.4g})",
    )


def compare_tokens(
    tokens: Mapping[int, int], computed: Mapping[int, np.ndarray], noise: float, sampler: "Resampler"
) -> Difference:
    """Compare tokens that a last stage gave with (n_vocab,) logits computed again, both by position.

    `noise` is by how much rounding changes a logit (`logit_noise`).
    """
    wrong = [
        position
        for position, logits in computed.items()
        if not sampler.could_give(tokens[position], position, logits, noise)
    ]
    if len(wrong) < max(TOKENS_MIN, int(len(computed) * TOKENS_SHARE) + 1):
        return Difference(False, f"{len(computed)} tokens agree")
    return Difference(
        True,
        f"{len(wrong)} of {len(computed)} tokens cannot follow from the rows it received (the first at "
        f"position {wrong[0]})",
    )


def logit_noise(one: np.ndarray, other: np.ndarray) -> float:
    """By how much rounding changes a logit: (n, n_vocab) logits by two arithmetics, the median of rows.

    At least a thousandth of a row's spread, which greedy choices between equals need.
    """
    spread = float(np.median(np.std(one, axis=1)))
    return max(spread / 1000, float(np.median(np.quantile(np.abs(one - other), 0.99, axis=1))))


@dataclass(frozen=True)
class Resampler:
    """Chooses tokens of a stream again, each by itself. `history` has the tokens of all positions and the
    one after them; `start` is the length of what the sampler started from, `index` how many of those were
    generated."""

    params: SamplingParams
    history: Sequence[int]
    start: int
    index: int

    def could_give(self, token: int, position: int, logits: np.ndarray, noise: float) -> bool:
        """Whether this token may be chosen at a position from logits that are off by rounding."""
        if self._choice(position, logits).token == token:
            return True
        margin = LOGIT_FACTOR * noise
        if self.params.temperature < GREEDY_BELOW:
            raised = logits.copy()
            raised[token] += 2 * margin
            return self._choice(position, raised).token == token
        random = np.random.default_rng(position)
        for _ in range(DRAWS):
            changed = logits + random.normal(0.0, margin, logits.shape).astype(np.float32)
            if self._choice(position, changed).token == token:
                return True
        return False

    def _choice(self, position: int, logits: np.ndarray) -> Choice:
        split = self.start - self.index
        sampler = Sampler(self.params, None, self.history[:split], self.history[split : position + 1])
        return sampler.sample(logits)


def _far(found: np.ndarray) -> np.ndarray:
    """Which distances stand out of their row; (..., width) both."""
    medians = np.median(found, axis=-1, keepdims=True)
    return found > np.maximum(VALUE_FLOOR, VALUE_FACTOR * medians)


def _rows_differ(claimed: np.ndarray, computed: np.ndarray, typical: float) -> np.ndarray:
    """(n,) bool: rows of which some values stand out, or all are too far off."""
    found = distances(claimed, computed)
    altered = _far(found).sum(axis=1) >= max(VALUES_MIN, int(computed.shape[1] * VALUES_SHARE) + 1)
    return altered | (np.median(found, axis=1) > max(ROW_FLOOR, ROW_FACTOR * typical))
