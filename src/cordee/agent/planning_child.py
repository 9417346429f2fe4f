"""A child process that answers questions of planning, one at a time: the agent goes on meanwhile.

Run as `python -m cordee.agent.planning_child`. It reads questions from its standard input and writes answers
to its standard output, each in msgpack with its length before it (`agent/planning.py`), until its input ends.
"""

import contextlib
import sys
from typing import BinaryIO

import msgspec

from cordee.cluster.questions import Question, answer
from cordee.privacy import no_core_dumps
from cordee.system.processes import lower_priority

LENGTH_BYTES = 4  # big-endian, before each message


def main() -> int:
    """Answer until the parent has no more questions, or ended."""
    no_core_dumps()
    with contextlib.suppress(OSError):
        lower_priority()
    while (message := _read(sys.stdin.buffer)) is not None:
        found, _ = answer(msgspec.msgpack.decode(message, type=Question))
        assert found is not None, "it has all steps that a search may take"
        sys.stdout.buffer.write(framed(msgspec.msgpack.encode(found)))
        sys.stdout.buffer.flush()
    return 0


def framed(message: bytes) -> bytes:
    """A message with its length."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def _read(source: BinaryIO) -> bytes | None:
    """The next message; None at the end."""
    length = source.read(LENGTH_BYTES)
    message = source.read(int.from_bytes(length, "big"))
    return message if len(length) == LENGTH_BYTES else None
