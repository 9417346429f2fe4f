"""Work in progress on one output file, in a folder beside it: it can go on after a kill at any moment.

    layer-0007.npz     the packed tensors of a layer that is done
    hidden-0008.f32    the rows in front of layer 8, of both streams (layerwise.py)
    kept.json          the matrices that are left at 8 bits, if they were chosen by size (budget.py)
    training.npz       a training of all layers together (distill/end_to_end.py)
    settings           a digest of all that the result depends on
    lock               held by the process that works

Everything appears by renaming, whole. A layer is done when its tensors are there, and the rows behind it if
the method needs rows; what was begun behind the last such layer is made again, from the same inputs, and so
has the same bytes.
"""

import io
import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from cordee.errors import BadRequest, CordeeError
from cordee.files import atomic_file, disk_faults, partial_name
from cordee.system import disk, locks

if TYPE_CHECKING:
    from typing_extensions import Buffer

FOLDER_SUFFIX = ".compress"
KEPT, STATE = "kept.json", "training.npz"


class Work:
    """The folder of one run; made by `work_folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def layers_done(self, needs_rows: bool) -> int:
        """How many layers need not be made again."""
        done = 0
        while self._layer(done).exists():
            done += 1
        while needs_rows and done and not self._rows(done).exists():
            done -= 1  # rows are kept in front of one layer only
        return done

    def put_layer(self, layer: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep the tensors of a layer that is done."""
        self._put(self._layer(layer), tensors)

    def tensor(self, layer: int, name: str) -> np.ndarray:
        """A tensor that was kept."""
        with np.load(self._layer(layer), allow_pickle=False) as tensors:
            return tensors[name]

    def tensors(self, layer: int) -> dict[str, np.ndarray]:
        """All tensors of a layer that were kept."""
        with np.load(self._layer(layer), allow_pickle=False) as tensors:
            return dict(tensors)

    def put_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the state of a training instead of the one before."""
        self._put(self._folder / STATE, arrays)

    def state(self) -> dict[str, np.ndarray] | None:
        """The state that was kept; None if none was."""
        path = self._folder / STATE
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def put_kept(self, names: tuple[str, ...]) -> None:
        """Keep the choice of matrices that are left at 8 bits."""
        with atomic_file(self._folder / KEPT) as file:
            file.write(json.dumps(names).encode())

    def kept(self) -> tuple[str, ...] | None:
        """The choice that was kept; None if none was made."""
        path = self._folder / KEPT
        return tuple(json.loads(path.read_bytes())) if path.exists() else None

    def rows(self, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        """The rows in front of a layer, to be read."""
        return np.memmap(self._rows(layer), dtype=np.float32, mode="r", shape=shape)

    def has_rows(self, layer: int) -> bool:
        """Whether the rows in front of a layer are kept."""
        return self._rows(layer).exists()

    def new_rows(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Room for rows, all of it taken now: a mapped file that finds the disk full ends the process."""
        path = self._folder / name
        nbytes = int(np.prod(shape, dtype=np.int64)) * 4
        with path.open("wb") as file:
            disk.reserve(file.fileno(), nbytes)
        return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)

    def put_rows(self, layer: int, rows: np.ndarray, name: str) -> None:
        """Keep the rows of `new_rows(name)` as those in front of a layer; drop those of the one before."""
        if isinstance(rows, np.memmap):
            rows.flush()
        (self._folder / name).replace(self._rows(layer))
        if layer:
            self._rows(layer - 1).unlink(missing_ok=True)

    def _put(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        with atomic_file(path) as file:
            buffered = io.BufferedWriter(_Raw(file))
            np.savez(buffered, allow_pickle=False, **arrays)
            buffered.flush()

    def _layer(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:04d}.npz"

    def _rows(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:04d}.f32"


class _Raw(io.RawIOBase):
    """An unbuffered file that cannot seek, so that numpy writes an archive from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: "Buffer", /) -> int:
        return self._file.write(data)


def folder_of(path: Path) -> Path:
    """Where work on `path` is kept."""
    return path.parent / partial_name(f".{path.name}", FOLDER_SUFFIX)


@contextmanager
def work_folder(path: Path, settings: str) -> Generator[Work]:
    """The folder for work on `path`, with what an interrupted run with the same `settings` left.

    It is removed when the block ends well, or with an error that a user can meet; it stays when the process
    is interrupted or killed.

    Raises:
        BadRequest: another process works on `path`.
        StorageFailed: the folder cannot be made, or the disk is full.
    """
    folder = folder_of(path)
    with disk_faults(path):
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            _hold(lock.fileno(), path)
            noted = folder / "settings"
            if not noted.exists() or noted.read_text(encoding="utf-8") != settings:
                _empty(folder)
                with atomic_file(noted) as file:
                    file.write(settings.encode())
            try:
                yield Work(folder)
            except (CordeeError, OSError):
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)


def _hold(descriptor: int, path: Path) -> None:
    try:
        locks.take(descriptor)
    except BlockingIOError as error:
        raise BadRequest(
            f"Another process is writing {path}: wait for it, or name another file.", "path"
        ) from error


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != "lock":
            entry.unlink()
