"""Files: reads and writes at a place, what survives a power cut, holes, shared blocks, renaming.

Windows renames no file that somebody has open, and removes none: a reader, or a scanner for viruses, is
mostly done a moment later, so `replace` waits that long. It has no sync of a folder, either; NTFS keeps a
journal of names.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPLACE_SECONDS = 5.0  # for another program to close a file that it is reading
RETRY_SECONDS = 0.02
OPEN_FILES_STAY = sys.platform == "win32"  # an open file cannot be removed, nor its folder renamed
BINARY = os.O_BINARY if sys.platform == "win32" else 0  # a flag of os.open

if sys.platform == "win32":
    from cordee.system import windows

    pread, pwrite = windows.read_at, windows.write_at

    def sync(path: Path) -> None:
        """Have a file on disk for certain; for a folder there is nothing to do."""
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR | BINARY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(source: Path, target: Path) -> None:
        """Rename a file or folder, over what was at `target` before."""
        patiently(lambda: source.replace(target))

    def has_data(descriptor: int, at: int, nbytes: int) -> bool:
        """Whether a file has anything but a hole there: nobody can say."""
        return True

    def allocated_bytes(status: os.stat_result) -> int:
        """What a file takes of its disk."""
        return status.st_size

    def clone(source: int, target: int) -> bool:
        """Let `target` share the blocks of `source`; False if the file system cannot."""
        return False

    def free_file_count(folder: Path) -> int | None:
        """How many more files its disk can have; None: as many as there is room for."""
        return None

    def reserve(descriptor: int, nbytes: int) -> None:
        """Take so much of the disk for an empty file, now."""
        os.ftruncate(descriptor, nbytes)

else:
    import fcntl

    pread, pwrite = os.pread, os.pwrite
    FICLONE = 0x40049409  # linux/fs.h; other systems refuse it

    def sync(path: Path) -> None:
        """Have a file, or the names in a folder, on disk for certain."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(source: Path, target: Path) -> None:
        """Rename a file or folder, over what was at `target` before."""
        source.replace(target)

    def has_data(descriptor: int, at: int, nbytes: int) -> bool:
        """Whether a file has anything but a hole there; a file system without holes has data everywhere."""
        try:
            return os.lseek(descriptor, at, os.SEEK_DATA) < at + nbytes
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return False
            raise

    def allocated_bytes(status: os.stat_result) -> int:
        """What a file takes of its disk."""
        return status.st_blocks * 512

    def clone(source: int, target: int) -> bool:
        """Let `target` share the blocks of `source`; False if the file system cannot."""
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError:
            return False
        return True

    def free_file_count(folder: Path) -> int | None:
        """How many more files its disk can have; None: as many as there is room for."""
        disk = os.statvfs(folder)
        return disk.f_favail if disk.f_files else None  # some file systems say 0 of 0

    def reserve(descriptor: int, nbytes: int) -> None:
        """Take so much of the disk for an empty file, now."""
        os.posix_fallocate(descriptor, 0, nbytes)


def patiently(act: Callable[[], object], seconds: float = REPLACE_SECONDS) -> None:
    """Do what fails as long as another program has a file open; after so long, PermissionError stays."""
    ends = time.monotonic() + seconds
    while True:
        try:
            act()
            return
        except PermissionError:
            if time.monotonic() > ends:
                raise
        time.sleep(RETRY_SECONDS)
