"""The matrices and norms of a file for the ternary engine: read, and written into a copy of it.

What training changes has the same shape as before, so the new file is the old one with other bytes in places.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cordee.compress.trits import TernaryMatrix
from cordee.convert.ternary_file import (
    LAYOUTS,
    Layout,
    TernaryModel,
    pack,
    pack_scales,
    padded,
    unpack,
    unpack_scales,
)
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.files import atomic_file
from cordee.models.gguf import Header, Tensor
from cordee.models.metadata import FETCH_AGAIN

COPY_BYTES = 4 << 20


class TernaryFile:
    """An open file; `model` has the sizes of its layers, which those of the original are, too.

    Raises:
        UnsupportedModel: its scales are not of groups, or it is in a rotated basis.
        BadModelFile: its layers are not those of `model`.
    """

    def __init__(self, header: Header, model: TernaryModel) -> None:
        self._header, self._model = header, model
        self.span = header.count("cordee.ternary.scale_columns", 0)
        self.planes = header.count("cordee.ternary.weight_planes", 1)
        layout = header.text("cordee.ternary.layout")
        if not self.span or layout not in LAYOUTS:
            raise UnsupportedModel(
                f"{header.name} has one scale for a whole row: only models with scales of groups are trained "
                "(cordee compress --group 64, 128 or 256)."
            )
        if header.text("cordee.ternary.rotated", ""):
            raise UnsupportedModel(
                f"{header.name} is in a rotated basis, which is not trained: compress it with --no-rotate."
            )
        self._layout = LAYOUTS[layout]
        for layer in range(model.layers):
            for name in model.matrices():
                self._tensor(f"blk.{layer}.{name}.weight")

    def is_ternary(self, layer: int, name: str) -> bool:
        """Whether a matrix is codes of -1, 0, 1; else it was left at 8 bits."""
        return self._layout_of(layer, name) is self._layout

    def matrix(self, layer: int, name: str) -> TernaryMatrix:
        """A matrix of a layer."""
        layout, (rows, cols) = self._layout_of(layer, name), self._model.matrices()[name]
        planes = self.planes if layout is self._layout else 1
        wide = padded(cols) if planes > 1 else cols
        shape = layout.shape(rows, planes * wide)
        payload = self._read(f"blk.{layer}.{name}.weight", np.uint8).reshape(shape)
        codes = unpack(payload, layout, rows, planes * wide)
        codes = codes.reshape(rows, planes, wide)[:, :, :cols].swapaxes(0, 1)
        return TernaryMatrix(
            np.ascontiguousarray(codes), self._scales(layer, name, layout, planes), self.span
        )

    def vector(self, layer: int, name: str) -> np.ndarray:
        """A norm of a layer, float32."""
        return self._read(f"blk.{layer}.{name}.weight", np.float32)

    def write(self, out: Path, changed: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write a copy to `out` with other tensors: their names and bytes, as `packed` makes them.

        Raises:
            StorageFailed: no room on disk.
        """
        with self._header.path.open("rb") as file, atomic_file(out) as target:
            shutil.copyfileobj(file, target, COPY_BYTES)
            for name, array in changed:
                tensor = self._tensor(name)
                data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
                if data.nbytes != tensor.nbytes:
                    raise BadModelFile(f"{name} has {data.nbytes} bytes instead of {tensor.nbytes}.")
                target.seek(tensor.offset)
                target.write(data.data)

    def packed(self, layer: int, name: str, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        """A ternary matrix, (planes, rows, cols) and (planes, rows, spans), as tensors of the file."""
        planes, rows, cols = codes.shape
        wide = np.zeros((planes, rows, padded(cols) if planes > 1 else cols), dtype=np.int8)
        wide[:, :, :cols] = codes
        full = f"blk.{layer}.{name}"
        return {
            f"{full}.weight": pack(np.concatenate(list(wide), axis=1), self._layout),
            f"{full}.scale": pack_scales(np.concatenate(list(scales), axis=1), self._layout),
        }

    def _scales(self, layer: int, name: str, layout: Layout, planes: int) -> np.ndarray:
        rows, cols = self._model.matrices()[name]
        spans = -(-cols // self.span)
        raw = self._read(f"blk.{layer}.{name}.scale", np.dtype("<f2"))
        scales = unpack_scales(raw.reshape(-1, planes * spans, layout.group_rows), rows)
        return np.ascontiguousarray(scales.reshape(rows, planes, spans).swapaxes(0, 1))

    def _layout_of(self, layer: int, name: str) -> Layout:
        rows, cols = self._model.matrices()[name]
        wide = self.planes * padded(cols) if self.planes > 1 else cols
        nbytes = self._tensor(f"blk.{layer}.{name}.weight").nbytes
        for layout, columns in ((self._layout, wide), (LAYOUTS["int8"], cols)):
            if nbytes == np.prod(layout.shape(rows, columns), dtype=np.int64):
                return layout
        raise self._other(f"blk.{layer}.{name}.weight")

    def _read(self, name: str, kind: "np.dtype[np.floating] | type[np.generic]") -> np.ndarray:
        tensor = self._tensor(name)
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise BadModelFile(f"{self._header.name}: {name} ends too soon: {FETCH_AGAIN}.")
        return np.frombuffer(data, dtype=kind)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._header.tensor(name)
        if tensor is None:
            raise self._other(name)
        return tensor

    def _other(self, name: str) -> BadModelFile:
        return BadModelFile(
            f"{self._header.name} was not made from that model: {name} is not what the original's would be."
        )
