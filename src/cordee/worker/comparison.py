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

# Of the difference between two arithmetics of one machine: others differ no more than a few times as much.
ROUNDING_FACTOR = 8.0
# A value that differs by less is not worth an accusation, whatever was measured: half the precision of bf16
# rows after a dozen layers.
VALUE_FLOOR = 1 / 16
MEASURED_QUANTILE = 0.99  # of the differences in a row; what lies above it are values that cancel out
VALUES_SHARE, VALUES_MIN = 1 / 200, 4  # of a row, that must differ
ROWS_SHARE, ROWS_MIN = 1 / 20, 3  # of a stretch, that must differ
TOKENS_SHARE, TOKENS_MIN = 1 / 10, 2
DRAWS = 24  # with changed logits, for a token that is not the one computed again
NAMED_ROWS = 3  # in an explanation


@dataclass(frozen=True)
class Difference:
    """What a comparison found. `explanation` is for people."""

    differs: bool
    explanation: str


def distances(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far each value of (n, width) rows is off: by the size of its reference and the row's median size.

    A value that is no number is infinitely far.
    """
    sizes = np.abs(reference)
    scale = sizes + np.median(sizes, axis=1, keepdims=True) + np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(rows - reference) / scale
    found[~np.isfinite(found)] = np.inf
    return found


def rounding(one: np.ndarray, other: np.ndarray) -> float:
    """How far a value may be off, from the same (n, width) rows by two arithmetics of an honest machine.

    The median over the rows: where a router of experts chose another one, few rows are far apart.
    """
    measured = np.quantile(distances(other, one), MEASURED_QUANTILE, axis=1)
    return max(VALUE_FLOOR, ROUNDING_FACTOR * float(np.median(measured)))


def routed_otherwise(one: np.ndarray, other: np.ndarray, tolerance: float) -> float:
    """The share of rows that differ although both are honest: of experts, others were chosen."""
    return float(_rows_differ(one, other, tolerance).mean())


def compare_rows(
    claimed: np.ndarray, computed: np.ndarray, tolerance: float, honest_share: float = 0.0
) -> Difference:
    """Compare (n, width) rows that a stage sent with the same computed again.

    `honest_share` of the rows differ between honest machines as well, twice as many are no evidence.
    """
    rows = _rows_differ(claimed, computed, tolerance)
    needed = max(ROWS_MIN, int(len(rows) * (ROWS_SHARE + 2 * honest_share)) + 1)
    if rows.sum() < min(needed, max(len(rows), 1)):
        return Difference(False, f"{len(rows)} rows agree")
    worst = np.flatnonzero(rows)[:NAMED_ROWS]
    far = distances(claimed[worst], computed[worst]) > tolerance
    examples = "; ".join(
        f"row {row}: {int(each.sum())} of {each.size} values"
        for row, each in zip(worst.tolist(), far, strict=True)
    )
    return Difference(True, f"{int(rows.sum())} of {len(rows)} rows differ ({examples})")


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
        margin = ROUNDING_FACTOR * noise
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


def _rows_differ(claimed: np.ndarray, computed: np.ndarray, tolerance: float) -> np.ndarray:
    """(n,) bool: rows in which too many values are too far off."""
    far = (distances(claimed, computed) > tolerance).sum(axis=1)
    return far >= max(VALUES_MIN, int(computed.shape[1] * VALUES_SHARE) + 1)
