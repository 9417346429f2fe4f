"""Where state is kept, and how a file is written so that nobody ever sees half of it."""

import errno
import hashlib
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
from cordee.system import disk

# Why writing failed, and what helps. Every other error is not the storage's, and stays what it is.
STORAGE_FAULTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota of this account is used up: free some space, or have it raised",
    errno.EFBIG: (
        "no file may be that large there: choose a folder on another disk (FAT ends at 4 GB), or raise the "
        "limit that `ulimit -f` shows"
    ),
    errno.EACCES: "permission denied: choose a folder that you may write to, or have its owner let you",
    errno.EPERM: "the system does not permit it there: choose a folder that you may write to",
    errno.EROFS: "that disk is read-only: choose a folder on another one, or mount it for writing",
    errno.EIO: "the disk fails (input/output error): save what is on it, then check the disk itself",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a file is where a folder should be: choose another place",
    errno.EISDIR: "a folder is where the file should be: choose another name",
    errno.ENOTEMPTY: "the folder is not empty: choose another name",
    errno.ELOOP: "its links go round in a circle: choose another place",
    errno.EMFILE: "this process has too many files open: raise the limit that `ulimit -n` shows",
    errno.ENFILE: "this machine has too many files open: end other programs",
    errno.ESTALE: "the network drive that it is on has gone: connect it again",
    errno.ENXIO: "the device that it is on has gone: connect it again",
    errno.ENODEV: "the device that it is on has gone: connect it again",
}
NAME_BYTES_MAX = 255  # of a file, on all usual file systems
PARTIAL_BYTES = 40  # of its name that a file in the making adds: dots, process id, random letters, suffix


def home() -> Path:
    """The folder of all state: `CORDEE_HOME`, else the user's data folder. Created readable by the user only.

    Raises:
        StorageFailed: the folder cannot be created, its name is not text, or this user has no home folder.
    """
    chosen = os.environ.get("CORDEE_HOME")
    try:
        folder = Path(expanded(chosen) if chosen else platformdirs.user_data_dir("cordee"))
    except RuntimeError:  # neither HOME nor an entry of this user says where it is
        folder = Path("~")
    if folder.parts[0].startswith("~"):
        raise StorageFailed(
            f"There is no home folder for {chosen or 'this user'}: set CORDEE_HOME to a folder that you "
            "may write to."
        )
    if printable(str(folder)) != str(folder):  # it is sent to processes and written down
        raise StorageFailed(
            f"The state folder's name, {printable(str(folder))}, is not UTF-8: set CORDEE_HOME to another."
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(
            f"The state folder {folder} cannot be created ({_reason(error).partition(': ')[0]}): "
            "set CORDEE_HOME to a folder that you may write to."
        ) from error
    return folder


def expanded(path: str) -> str:
    """A path as people write it: `~` and `~name` stand for a home folder, if there is one."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path's own raises for a user that does not exist


def printable(text: str) -> str:
    """A text without the stand-ins for bytes that are not UTF-8, of a file's name or an argument."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def storage_failed(what: object, error: OSError, fault: str = "cannot be written") -> StorageFailed:
    """Why something (a file, a folder, a model) cannot be stored, with the remedy."""
    return StorageFailed(f"{what} {fault}: {_reason(error)}, then try again.")


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):  # not in the table: within a block it may mean something else
        return "its folder does not exist: make it first"
    return STORAGE_FAULTS.get(error.errno or 0, f"{error.strerror or error}: check its folder")


def partial_name(name: str, suffix: str) -> str:
    """The name of a file in the making: `name` and `suffix`, of which a long name keeps a digest.

    A suffix has at most PARTIAL_BYTES, and a file name NAME_BYTES_MAX.
    """
    encoded = os.fsencode(name)
    # What is longer than a name may be (and a dot before it) stays: to make such a file fails at once.
    if NAME_BYTES_MAX - PARTIAL_BYTES < len(encoded) <= NAME_BYTES_MAX + 1:
        name = hashlib.sha256(encoded).hexdigest()[:32]
    return name + suffix


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
        prefix = partial_name(f".{path.name}", f".{os.getpid()}.")
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".partial")
    except OSError as error:
        raise storage_failed(path, error) from error
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        disk.replace(partial, path)
        disk.sync(path.parent)
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise storage_failed(path, error) from error
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
        prefix = partial_name(f".{path.name}", f".{os.getpid()}.")
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".partial"))
    except OSError as error:
        raise storage_failed(path, error) from error
    with disk_faults(path):
        try:
            yield partial
            partial.chmod(0o755)
            for entry in (*partial.iterdir(), partial):
                disk.sync(entry)
            disk.replace(partial, path)
            disk.sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, whose `write` may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def disk_faults(root: Path) -> Generator[None]:
    """Turn what a disk or folder refuses (STORAGE_FAULTS) into StorageFailed, which names `root`."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise storage_failed(root, error) from error


def publish(ready: Path, place: Path) -> None:
    """Move a finished file to its final place on the same disk, so that it survives a power cut."""
    disk.sync(ready)
    disk.replace(ready, place)
    disk.sync(place.parent)


def _sweep(path: Path) -> None:
    """Remove partial files of `path` whose process no longer lives."""
    partial = re.compile(re.escape(partial_name(f".{path.name}", ".")) + r"(\d+)\..*\.partial")
    with suppress(OSError):  # what is wrong with the folder shows when the file is made
        for entry in path.parent.iterdir():
            match = partial.fullmatch(entry.name)
            if match and not psutil.pid_exists(int(match[1])):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
