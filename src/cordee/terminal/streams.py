"""Standard input, output and error, whatever they are: closed, full, a broken pipe, an old terminal.

What a verb prints on standard output is its result: if that cannot be written, the verb has failed. What it
says on standard error is for the person at the terminal: if nobody can read it, the verb goes on.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from cordee.errors import StorageFailed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it


def prepare() -> None:
    """Set up the standard streams of this process. Call it before anything opens a file."""
    _open_closed()
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as the process
    keyboard = sys.stdin
    if isinstance(keyboard, io.TextIOWrapper):
        keyboard.reconfigure(errors="replace")  # a terminal may send what is not of its encoding
    results, notes = _Results(1, "w", closefd=False), _Notes(2, "w", closefd=False)
    sys.stdout = _text(results, sys.stdout, line_buffering=results.isatty())
    sys.stderr = _text(notes, sys.stderr, line_buffering=True)


def _open_closed() -> None:
    """Open the descriptors 0 to 2 if they are closed, or the next file that is opened would get them.

    Standard output then cannot be written to, so that a result that goes nowhere is noticed.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free descriptor, which is this one
            os.set_inheritable(descriptor, True)


def _text(raw: io.FileIO, before: TextIO | None, *, line_buffering: bool) -> io.TextIOWrapper:
    """Text to a stream, encoded as before; characters that it cannot show become question marks."""
    encoding = before.encoding if before is not None else None
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding=encoding, errors="replace", line_buffering=line_buffering)


class _Results(io.FileIO):
    """Standard output. A pipe that nobody reads ends the program as SIGPIPE would.

    What cannot be written is an expected error, once: the interpreter flushes again when it ends.
    """

    _failed = False

    def write(self, data: "ReadableBuffer", /) -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            while (written := super().write(data)) is None:  # another process has made it non-blocking
                select.select([], [self], [])
        except BrokenPipeError:
            self._failed = True
            sys.exit(BROKEN_PIPE)
        except OSError as error:
            self._failed = True
            raise StorageFailed(
                f"The result cannot be written to standard output ({error.strerror}): direct it to a file "
                "on a disk that has room."
            ) from error
        return written


class _Notes(io.FileIO):
    """Standard error. What cannot be written is dropped."""

    def write(self, data: "ReadableBuffer", /) -> int:
        with suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes
