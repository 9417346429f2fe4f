"""A child process that fetches one model into the store: neither its size nor its faults trouble the node.

Run as `python -m cordee.console.pull_child ROOT SOURCE NAME`: ROOT is the store, NAME may be empty. It
writes a `PullLine` as JSON on each line of its standard output.
"""

import sys
import time
from pathlib import Path

import msgspec

from cordee.distribution.pull import pull
from cordee.errors import CordeeError
from cordee.models.store import Store
from cordee.privacy import no_core_dumps

EVERY_SECONDS = 0.2  # between two lines of progress


class PullLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far it is; at last the `model`'s name in the store, or the `error` with its `code`."""

    done_bytes: int = 0
    total_bytes: int = 0
    model: str = ""
    error: str = ""
    code: str = ""


def main() -> int:
    """Fetch; 0 unless something is wrong with this program."""
    no_core_dumps()
    root, source, name = sys.argv[1:]
    told = 0.0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY_SECONDS:
            told = time.monotonic()
            _tell(PullLine(done_bytes, total_bytes))

    try:
        _tell(PullLine(model=pull(source, name or None, Store(Path(root)), progress).name))
    except CordeeError as error:
        _tell(PullLine(error=error.message, code=error.code))
    return 0


def _tell(line: PullLine) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()
