"""What makes a matrix ternary: its scales, found in its values or computed as b1.58 models define them.

Matrices are read in strips of rows, so memory depends on their width alone.
"""

from collections.abc import Callable
from math import gcd

import numpy as np

from cordee.convert.ternary_file import strips
from cordee.errors import BadModelFile, UnsupportedModel

# b1.58 divides by the mean magnitude, but never by less than this.
MEAN_MIN = np.float32(1e-5)

# From first and last row (exclusive) to (rows, cols), numbers as they are stored.
Read = Callable[[int, int], np.ndarray]


def found_scales(name: str, rows: int, read: Read, remedy: str = "") -> np.ndarray:
    """The float32 scales of a matrix whose rows hold -s, 0 and s; as few as possible, see `grouped`.

    Raises:
        UnsupportedModel: a row holds more than one magnitude; the message ends with `remedy`.
        BadModelFile: a value is not a number.
    """
    return grouped(
        np.concatenate([_row_scales(name, first, read(first, last), remedy) for first, last in strips(rows)])
    )


def span_scales(name: str, first: int, values: np.ndarray, columns: int, remedy: str = "") -> np.ndarray:
    """(n, cols) values from row `first` on -> (n, spans) float32 scales, one for each `columns` columns.

    Raises:
        UnsupportedModel: a span of a row holds more than one magnitude, or one that float16 cannot hold.
        BadModelFile: a value is not a number.
    """
    rows, cols = values.shape
    spans = -(-cols // columns)
    padded = np.zeros((rows, spans * columns), dtype=np.float32)
    padded[:, :cols] = values
    scales = _row_scales(name, first, padded.reshape(-1, columns), remedy, spans)
    if (scales.astype(np.float16) != scales).any():
        raise UnsupportedModel(f"{name} has a scale that float16 does not hold, near row {first}.{remedy}")
    return scales.reshape(rows, spans)


def found_span_scales(name: str, rows: int, read: Read, columns: int) -> np.ndarray:
    """(rows, spans) scales of a matrix, one for each `columns` columns. Raises as `span_scales`."""
    return np.concatenate(
        [span_scales(name, first, read(first, last), columns) for first, last in strips(rows)]
    )


def grouped(scales: np.ndarray) -> np.ndarray:
    """One scale for each row, 0 where all weights are 0 -> as few as possible, each for equally many rows."""
    used = np.flatnonzero(scales > 0)
    if not len(used):
        return np.ones(1, dtype=np.float32)
    # A row of zeros agrees with any scale: it takes that of the row before it.
    numbers = np.where(scales > 0, np.arange(len(scales)), used[0])
    filled = scales[np.maximum.accumulate(numbers)]
    changes = np.flatnonzero(filled[1:] != filled[:-1]) + 1
    return filled[:: gcd(len(scales), *changes.tolist())].astype(np.float32)


def mean_scale(name: str, rows: int, read: Read) -> np.float32:
    """The mean magnitude of a whole matrix, by which b1.58 models divide their master weights.

    Raises:
        BadModelFile: a value is not a number.
    """
    total = numbers = 0
    for first, last in strips(rows):
        values = _finite(name, first, read(first, last))
        total += np.abs(values).sum(dtype=np.float64)
        numbers += values.size
    return max(np.float32(total / numbers), MEAN_MIN)


def rounded_masters(masters: np.ndarray, mean: np.float32) -> np.ndarray:
    """Master weights -> int8 of -1, 0, 1. Ma et al., "The Era of 1-bit LLMs", 2024, equations 1 to 3."""
    return np.clip(np.rint(masters * (np.float32(1) / mean)), -1, 1).astype(np.int8)


def _row_scales(name: str, first: int, values: np.ndarray, remedy: str, spans: int = 1) -> np.ndarray:
    """The magnitude of each row of `values`, of which `spans` make up one of the matrix."""
    magnitudes = np.abs(_finite(name, first, values))
    scales = magnitudes.max(axis=1)
    between = (magnitudes > 0) & (magnitudes != scales[:, None])
    if between.any():
        row = first + int(np.argmax(between.any(axis=1))) // spans
        shared = "" if spans == 1 else f" of {values.shape[1]} columns that share a scale"
        raise UnsupportedModel(
            f"{name} is not ternary: row {row} holds more than one magnitude{shared}. This model needs "
            f"training or compression to become ternary, not conversion.{remedy}"
        )
    return scales


def _finite(name: str, first: int, values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    if not finite.all():
        row = first + int(np.argmin(finite.all(axis=1)))
        raise BadModelFile(
            f"{name} holds a weight that is not a number, in row {row}: fetch the model again."
        )
    return values
