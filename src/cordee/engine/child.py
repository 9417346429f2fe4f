"""A child process that does what may end it, or take too long: libllama on a vocabulary, a grammar's trial.

It runs a module of this package, isolated (children.py), and its first argument leads to its end of a link
(system/processes.py). A frame there is a little-endian uint32, the length, then a message in msgpack.
"""

import os
import socket
import struct
import subprocess
import threading
import time
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from cordee import children, errors
from cordee.errors import CordeeError, StageFailed
from cordee.system import processes

# The longest are a vocabulary's table and the tokens of a text of 16 MB; a table's pieces have 64 MB, its
# template too.
FRAME_BYTES_MAX = 192 << 20
END_SECONDS = 5.0  # for a process that has closed its link, to be gone
# Children of one process that may wait for requests: the vocabularies in use on one node are fewer.
CHILDREN_MAX = 8
REASON_BYTES_MAX, REASON_CHARS_MAX = 8192, 300  # of what an ended child wrote to its standard error

# ggml would start a debugger on a process that it ends.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}

M = TypeVar("M", bound=msgspec.Struct)

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def send(link: socket.socket, message: msgspec.Struct) -> None:
    """Send a message, within the time that the socket allows.

    Raises:
        OSError: the other side is gone, or (TimeoutError) does not take it.
    """
    data = _encoder.encode(message)
    link.sendall(_LENGTH.pack(len(data)) + data)


def answer(link: socket.socket, message: msgspec.Struct) -> None:
    """Send a message to the parent, which takes it whenever it likes, or ends.

    Raises:
        OSError: it ended.
    """
    link.settimeout(None)
    send(link, message)


def receive(link: socket.socket, seconds: float, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """The next message of the kinds that `decoder` knows, whole within so many seconds.

    Raises:
        EOFError: the other side ended, or sent what is no message.
        OSError: the connection broke, or (TimeoutError) nothing whole came in time.
    """
    until = time.monotonic() + seconds
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size, until))
    if length > FRAME_BYTES_MAX:
        raise EOFError(f"a message of {length} bytes is too long to be one")
    try:
        return decoder.decode(_exactly(link, length, until))
    except (msgspec.MsgspecError, ValueError) as error:
        raise EOFError(f"not a message: {error}") from error


def _exactly(link: socket.socket, count: int, until: float) -> bytearray:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link.settimeout(left)
        read = link.recv_into(view[filled:])
        if not read:
            raise EOFError("the other side ended")
        filled += read
    return data


class Ended(Exception):
    """A child ended, for the reason in the text. `is_passing`: it may be otherwise next time."""

    def __init__(self, reason: str, is_passing: bool = False) -> None:
        super().__init__(reason)
        self.is_passing = is_passing


class Rested(Exception):
    """A child was ended, or ended by itself, because it had nothing to do."""


class Child(Generic[M]):
    """A process that runs `main()` of a module. Asked by one thread at a time; `end` is for any.

    `name` is what messages call what it works on, `work` what is to come of it.
    """

    _living: ClassVar["set[Child[Any]]"] = set()
    # Of `_living`, and of `is_asked` and `rested` of those in it; the garbage collector may end some, too.
    _guard = threading.RLock()

    def __init__(
        self, decoder: msgspec.msgpack.Decoder[M], name: str, work: str, module: str, *arguments: str
    ) -> None:
        self.ended = False
        self.rested = False  # ended to make room for another
        self.is_asked = True  # until it has started
        self.used = time.monotonic()
        self._decoder = decoder
        self._link, theirs = socket.socketpair()
        try:
            self._process = processes.start_with_link(
                lambda end: children.command(module, end, *arguments),
                self._link,
                theirs,
                os.environ | ENVIRONMENT,
            )
        except OSError as error:
            self._link.close()
            raise StageFailed(f"{name}: the process of its {work} does not start: {error}") from error
        finally:
            theirs.close()
        assert self._process.stderr is not None, "it is a pipe"
        self._errors = self._process.stderr
        os.set_blocking(self._errors.fileno(), False)  # a process of its own may hold the other end
        self._make_room()

    def ask(self, request: msgspec.Struct, seconds: float) -> M:
        """Its answer to a request.

        Raises:
            Rested: it had nothing to do before, and ended: ask another.
            Ended: it ended, or took too long and was ended.
        """
        with self._guard:
            self.is_asked = True
        try:
            self._link.settimeout(seconds)
            send(self._link, request)
        except OSError:
            pass  # what it said before it ended is read below
        return self.receive(seconds)

    def receive(self, seconds: float) -> M:
        """Its next message. Raises as `ask` does."""
        try:
            answer = receive(self._link, seconds, self._decoder)
        except TimeoutError:
            self.end()
            raise Ended("it took too long", is_passing=True) from None
        except (EOFError, OSError):
            raise self._how_it_ended() from None
        except BaseException:  # an interrupt: what is left of this answer must not become the next one
            self.end()
            raise
        with self._guard:
            self.is_asked, self.used = False, time.monotonic()
        return answer

    def end(self) -> None:
        """End it by force; ending twice is harmless."""
        self.ended = True
        with self._guard:
            self._living.discard(self)
        self._process.kill()
        self._process.wait()
        self._link.close()
        self._errors.close()

    def _how_it_ended(self) -> Exception:
        try:
            status = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        reason = self._reason(status)
        rested, killed = self.rested or status == 0, processes.was_killed(status)
        self.end()
        if killed:  # by no fault of its own: the system does that when memory is short
            reason = "its process was killed, for want of memory perhaps"
        return Rested("it was idle") if rested else Ended(reason, is_passing=killed)

    def _reason(self, status: int | None) -> str:
        """What it wrote last, or its status."""
        try:
            data = self._errors.read(REASON_BYTES_MAX) or b""
        except (ValueError, OSError):  # closed by another thread, which ended the child
            data = b""
        lines = data.decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        marked = [line for line in said if "GGML_ASSERT" in line or "what():" in line]
        text = (marked or said[-1:] or [f"status {status}"])[-1]
        return " ".join(text.rpartition("/")[2].split())[:REASON_CHARS_MAX]

    def _make_room(self) -> None:
        """End the child that has had nothing to do for longest, if there are too many."""
        with self._guard:
            self._living.add(self)
            idle = [each for each in list(self._living) if not each.is_asked]
            leaving = sorted(idle, key=lambda each: each.used)[: max(0, len(self._living) - CHILDREN_MAX)]
            for each in leaving:
                each.rested = True
        for each in leaving:
            each.end()


def rebuilt(error: str, message: str) -> CordeeError:
    """The error that a child met, by the name of its class, as an exception of this process."""
    kind = getattr(errors, error, CordeeError)
    return kind(message)
