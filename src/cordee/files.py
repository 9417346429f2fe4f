"""Where state is kept, and how a file is written so that nobody ever sees half of it."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs
import psutil

from cordee.errors import StorageFailed

# Errors that mean that writing failed: no more room (disk, quota, the process's file size limit), a disk that
# fails or became read-only, or a folder where the file should be.
STORAGE_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EISDIR})


def home() -> Path:
    """The folder of all state: `CORDEE_HOME`, else the user's data folder. Created readable by the user only.

    Raises:
        StorageFailed: the folder cannot be created.
    """
    chosen = os.environ.get("CORDEE_HOME")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("cordee"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(
            f"The state folder {folder} cannot be created ({error.strerror}): "
            "set CORDEE_HOME to a folder that you may write to."
        ) from error
    return folder


@contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO]:
    """A new file that appears under `path` only when the block ends well: complete and on disk.

    It is written beside `path` (same file system) and renamed. When the block fails, nothing is left and a
    file that was at `path` before is untouched. The next writer removes what a killed process left.

    Raises:
        StorageFailed: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    _sweep(path)
    try:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=".partial"
        )
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written ({error.strerror}): check its folder.") from error
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise StorageFailed(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder, "
            "then try again."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """A new folder of files that appears under `path` only when the block ends well: complete and on disk.

    `path` must be new, or an empty folder. As with `atomic_file`, nothing is left when the block fails, and
    what a killed process left is removed.

    Raises:
        StorageFailed: the disk is full, the parent folder cannot be written to, or `path` is in the way.
    """
    _sweep(path)
    try:
        prefix = f".{path.name}.{os.getpid()}."
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".partial"))
    except OSError as error:
        raise StorageFailed(f"{path} cannot be created ({error.strerror}): name another place.") from error
    with disk_faults(path):
        try:
            yield partial
            partial.chmod(0o755)
            for entry in (*partial.iterdir(), partial):
                _sync(entry)
            partial.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, whose `write` may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def disk_faults(root: Path) -> Generator[None]:
    """Turn the OSError of a full or read-only disk into StorageFailed, which names `root`."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS | {errno.EACCES, errno.EPERM}:
            raise
        raise StorageFailed(
            f"{root} cannot be written ({error.strerror}): free some space or check its permissions, "
            "then try again."
        ) from error


def publish(ready: Path, place: Path) -> None:
    """Move a finished file to its final place on the same disk, so that it survives a power cut."""
    _sync(ready)
    ready.replace(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove partial files of `path` whose process no longer lives."""
    partial_name = re.compile(re.escape(f".{path.name}.") + r"(\d+)\..*\.partial")
    with suppress(FileNotFoundError):
        for entry in path.parent.iterdir():
            match = partial_name.fullmatch(entry.name)
            if match and not psutil.pid_exists(int(match[1])):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
