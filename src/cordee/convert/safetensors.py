"""Safetensors files of a checkpoint: which tensors there are, and their rows, read piece by piece.

The `safetensors` package parses and checks a file's header; the bytes are read here, because it has no
bfloat16 for numpy. The format: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.metadata import FETCH_AGAIN

INDEX = "model.safetensors.index.json"
# Configurations have some kB; an index has a line for each tensor (a hundred bytes, at most 65,536 of them);
# the largest tokenizers met have 33 MB.
JSON_BYTES_LIMIT = 64 << 20

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "U32": "<u4"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are; rows are its first dimension."""

    name: str
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    # From first and last row (exclusive) to (rows, cols) float32, if they are computed from what is stored.
    computed: Callable[[int, int], np.ndarray] | None = None

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (exclusive): uint8 or uint32 of a packed tensor, float32 of any other.

        Raises:
            UnsupportedModel: it is stored in another type.
            BadModelFile: the file changed.
        """
        if self.computed is not None:
            return self.computed(first, last)
        if self.dtype not in _DTYPES:
            raise UnsupportedModel(f"{self.name} is stored as {self.dtype}, which cannot be read here.")
        row_bytes = self.nbytes // max(self.shape[0], 1)
        count = (last - first) * row_bytes // np.dtype(_DTYPES[self.dtype]).itemsize
        values = np.fromfile(self.path, _DTYPES[self.dtype], count, offset=self.offset + first * row_bytes)
        if len(values) != count:
            raise BadModelFile(f"{self.path} became shorter while it was read: {FETCH_AGAIN}.")
        if self.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype not in ("U8", "U32"):
            values = values.astype(np.float32)
        return values.reshape(last - first, *self.shape[1:])

    def all(self) -> np.ndarray:
        """All values of a small tensor, flat."""
        return self.rows(0, self.shape[0]).reshape(-1) if self.shape else self._flat().rows(0, 1)

    def _flat(self) -> "StoredTensor":
        return StoredTensor(self.name, self.dtype, (1,), self.path, self.offset, self.nbytes)


def stored_tensors(source: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, or of all those of a checkpoint's folder, by name.

    Raises:
        BadModelFile: a file is missing or damaged, or the index does not fit the files.
    """
    if source.is_file():
        return _of_file(source)
    index = source / INDEX
    if not index.is_file():
        return _of_file(_only_file(source))
    placed = _weight_map(index)
    files = {name: _of_file(source / name) for name in sorted(set(placed.values()))}
    for tensor, name in placed.items():
        if tensor not in files[name]:
            raise BadModelFile(f"{source / name} lacks {tensor}, which {INDEX} places there: {FETCH_AGAIN}.")
    return {tensor: files[name][tensor] for tensor, name in placed.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        BadModelFile: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > JSON_BYTES_LIMIT:
            raise BadModelFile(f"{path} has more than {JSON_BYTES_LIMIT >> 20} MiB: {FETCH_AGAIN}.")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModelFile(
            f"{path} cannot be read ({error.strerror}): a checkpoint needs all files of its folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path} is not JSON ({error}): {FETCH_AGAIN}.") from error
    if not is_object(found):
        raise BadModelFile(f"{path} holds no JSON object: {FETCH_AGAIN}.")
    return found


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value decoded from JSON is an object."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a value decoded from JSON is an array."""
    return isinstance(value, list)


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor, by an index."""
    with suppress(msgspec.ValidationError):
        placed = msgspec.convert(read_json(index).get("weight_map"), dict[str, str])
        if all(map(_is_plain_name, placed.values())):
            return placed
    raise BadModelFile(f"{index} does not say which file holds what: {FETCH_AGAIN}.")


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    usual = folder / "model.safetensors"
    if usual in found or len(found) == 1:
        return usual if usual in found else found[0]
    fault = f"holds {len(found)} safetensors files and no {INDEX}" if found else "holds no safetensors file"
    raise BadModelFile(f"{folder} {fault}: give a folder with a complete checkpoint, or one file.")


def _of_file(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header: sizes, overlaps, gaps
            pass
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(nbytes))
    except SafetensorError as error:
        raise BadModelFile(f"{path} is damaged ({error}): {FETCH_AGAIN}.") from error
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read ({error.strerror}): {FETCH_AGAIN}.") from error
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            name, entry["dtype"], tuple(entry["shape"]), path, 8 + nbytes + begin, end - begin
        )
    return tensors


def _is_plain_name(name: str) -> bool:
    return Path(name).name == name
