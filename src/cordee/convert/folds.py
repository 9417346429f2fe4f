"""Matrices with a scale for each column, as tensor-parallel training leaves them, brought to scales of rows.

A matrix that was trained in shards on several machines (as TriLM's may be) has a scale for each shard. Shards
of most matrices are rows; those of attn_output and ffn_down are columns, and our file has scales of rows
only. But what enters a column of these two is computed by a row of another matrix, and is proportional to
that row's scale. So the column's scale can be multiplied into the row's: the same model, except for the
rounding of float32. This would not hold if activations were rounded, or normalised, in between.
"""

import numpy as np

from cordee.convert.scales import Read, grouped
from cordee.convert.ternary_file import TernaryModel, WeightSource, strips
from cordee.errors import UnsupportedModel

# The matrix whose rows produce what the columns of a matrix consume.
PRODUCERS = {"attn_output": "attn_v", "ffn_down": "ffn_up"}


class Folded:
    """A `WeightSource` over another, in which scales of columns may have become scales of other rows."""

    def __init__(self, source: WeightSource, model: TernaryModel) -> None:
        self.rows, self.vector = source.rows, source.vector
        self._source = source
        self._model = model
        self._scales: dict[str, np.ndarray] = {}

    def fold(self, name: str, read: Read) -> None:
        """Move the scales of columns out of a matrix, whose values `read` gives.

        Raises:
            UnsupportedModel: a column holds more than one magnitude, or this cannot be done in this model.
        """
        _, layer, matrix, _ = name.split(".")
        model = self._model
        if matrix not in PRODUCERS or model.planes < 3 or model.sub_norms:
            raise UnsupportedModel(f"{name} is not ternary by rows.")
        columns = _column_scales(name, model.matrices()[matrix][0], read)
        used = columns[columns > 0]
        first = used[0] if len(used) else np.float32(1)
        factors = np.where(columns > 0, columns, first) / first
        if matrix == "attn_output":
            factors = _of_kv_heads(name, factors, model)
        producer = f"blk.{layer}.{PRODUCERS[matrix]}.weight"
        scales = self._source.scales(producer)
        self._scales[name] = np.array([first], dtype=np.float32)
        self._scales[producer] = grouped(np.repeat(scales, len(factors) // len(scales)) * factors)

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`."""
        found = self._scales.get(name)
        return self._source.scales(name) if found is None else found


def _column_scales(name: str, rows: int, read: Read) -> np.ndarray:
    """(cols,) the magnitude in each column; 0 where all are zero."""
    magnitudes = np.concatenate([_strip_scales(read(first, last)) for first, last in strips(rows)])
    scales = magnitudes.max(axis=0)
    if ((magnitudes > 0) & (magnitudes != scales)).any():
        raise UnsupportedModel(f"{name} is not ternary, by rows or by columns.")
    return scales


def _strip_scales(values: np.ndarray) -> np.ndarray:
    """(2, cols) the largest and the smallest magnitude in each column, ignoring zeros."""
    magnitudes = np.abs(values)
    largest = magnitudes.max(axis=0)
    smallest = np.where(magnitudes > 0, magnitudes, np.inf).min(axis=0)
    return np.stack([largest, np.where(largest > 0, smallest, 0)])


def _of_kv_heads(name: str, factors: np.ndarray, model: TernaryModel) -> np.ndarray:
    """Factors of the columns of all heads -> those of the rows of attn_v, which heads of a group share."""
    shared = factors.reshape(model.kv_heads, -1, model.head_dim)
    if (shared != shared[:, :1]).any():
        raise UnsupportedModel(f"{name} has scales of columns that differ within a group of heads.")
    return shared[:, 0].reshape(-1)
