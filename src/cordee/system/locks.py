"""Exclusive locks between processes, which the system takes from a process that ends."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class _Open(Protocol):
    def fileno(self) -> int: ...


if sys.platform == "win32":
    from cordee.system import windows

    def wait_for(file: _Open) -> None:
        """Lock an open file, until it is closed; waits for whoever holds it."""
        windows.lock(file.fileno(), wait=True)

    def take(file: _Open | int) -> None:
        """Lock an open file, until it is closed; BlockingIOError if another holds it."""
        windows.lock(file if isinstance(file, int) else file.fileno(), wait=False)

    @contextmanager
    def held_folder(folder: Path) -> Generator[None]:
        """Hold a lock on a folder.

        Raises:
            BlockingIOError: another process holds it.
            FileNotFoundError: there is no such folder.
        """
        folder.stat()
        held = windows.FolderLock(folder)
        try:
            yield
        finally:
            held.close()

else:
    import fcntl

    def wait_for(file: _Open) -> None:
        """Lock an open file, until it is closed; waits for whoever holds it."""
        fcntl.flock(file, fcntl.LOCK_EX)

    def take(file: _Open | int) -> None:
        """Lock an open file, until it is closed; BlockingIOError if another holds it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextmanager
    def held_folder(folder: Path) -> Generator[None]:
        """Hold a lock on a folder.

        Raises:
            BlockingIOError: another process holds it.
            FileNotFoundError: there is no such folder.
        """
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)
