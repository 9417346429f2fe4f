"""Matrices as the work folder keeps them, and as the file is written from there."""

from collections.abc import Mapping

import numpy as np

from cordee.compress.source import Source
from cordee.compress.trits import TernaryMatrix
from cordee.compress.work import Work
from cordee.convert.ternary_file import TernaryModel, layout_of, padded

CODES_PER_BYTE = 4
BITS = 8 // CODES_PER_BYTE


def stored(matrices: Mapping[str, TernaryMatrix]) -> dict[str, np.ndarray]:
    """The matrices of a layer as arrays: codes of trits four in a byte, others as they are."""
    arrays = dict[str, np.ndarray]()
    for name, matrix in matrices.items():
        is_ternary = matrix.codes.size == 0 or np.abs(matrix.codes).max() <= 1
        arrays[f"{name}.trits" if is_ternary else f"{name}.bytes"] = (
            packed(matrix.codes) if is_ternary else matrix.codes
        )
        arrays[f"{name}.scales"] = matrix.scales
    return arrays


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes of -1, 0, 1 in any shape -> flat bytes."""
    flat = codes.reshape(-1)
    fields = np.zeros(-(-len(flat) // CODES_PER_BYTE) * CODES_PER_BYTE, dtype=np.uint8)
    fields[: len(flat)] = (flat + 1).astype(np.uint8)
    quads = fields.reshape(-1, CODES_PER_BYTE)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def unpacked(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `packed`."""
    fields = np.stack([data >> BITS * field & 3 for field in range(CODES_PER_BYTE)], axis=1)
    return (fields.reshape(-1)[: int(np.prod(shape))].astype(np.int8) - 1).reshape(shape)


class StoredWeights:
    """What the folder holds, as a `cordee.convert.ternary_file.WeightSource`."""

    def __init__(
        self, source: Source, model: TernaryModel, work: Work, signs: Mapping[str, np.ndarray]
    ) -> None:
        self._source, self._model, self._work, self._signs = source, model, work, signs
        self._last: tuple[str, np.ndarray] = ("", np.empty(0))  # strips of one matrix follow one another

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `WeightSource.rows`."""
        if not name.startswith("blk."):
            return self._source.rows(name, first, last)
        if self._last[0] != name:
            self._last = (name, self._matrix(name))
        return self._last[1][first:last]

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`."""
        _, layer, matrix, _ = name.split(".")
        scales = self._work.tensor(int(layer), f"{matrix}.scales")
        return np.concatenate(list(scales), axis=1) if self._model.scale_columns else scales[0, :, 0]

    def vector(self, name: str) -> np.ndarray:
        """See `WeightSource.vector`."""
        found = self._signs.get(name)
        return self._source.vector(name) if found is None else found

    def _matrix(self, name: str) -> np.ndarray:
        """All planes of a matrix, side by side."""
        _, layer, matrix, _ = name.split(".")
        _, planes = layout_of(self._model, name)
        shape = (planes, *self._model.matrices()[matrix])
        if name in self._model.kept:
            codes = self._work.tensor(int(layer), f"{matrix}.bytes")
        else:
            codes = unpacked(self._work.tensor(int(layer), f"{matrix}.trits"), shape)
        if planes == 1:
            return codes[0]
        wide = np.zeros((planes, shape[1], padded(shape[2])), dtype=np.int8)
        wide[:, :, : shape[2]] = codes
        return np.concatenate(list(wide), axis=1)
