"""The vocabulary of a model, safe for a process that serves others: text to token ids and back, template.

A vocabulary comes from outside, and libllama ends the process on many that are wrong: when it loads them, at
some text, or when it spells a token (of 3,000 random changes to a sound one, 263 did that). So libllama has
it in a child process (vocabulary_child.py), which gives everything but the tokenizer as a table, once it has
tokenized ordinary texts. Here tokens become text from that table; only texts that become tokens go to the
child. If it ends at one, that text is refused, and the next one gets a new child.
"""

import array
import os
import re
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from cordee import children, errors
from cordee.engine.vocabulary_messages import (
    CONTROL,
    HIDDEN,
    Failed,
    FindControls,
    Message,
    Numbers,
    Table,
    Tokenize,
    receive,
    send,
    text_bytes,
)
from cordee.errors import BadModelFile, BadRequest, CordeeError, StageFailed

# For the start of a child: its interpreter, libllama, the vocabulary. On a slow and busy machine.
START_SECONDS = 60.0
# For a request: its fixed part, and the slowest rate at which texts are tokenized; a PC does 2 MB/s.
REQUEST_SECONDS, BYTES_PER_SECOND = 20.0, 100_000
END_SECONDS = 5.0  # for a process that has closed its link, to be gone
# A child that nobody has asked yet ends sooner than others: a node opens the vocabularies of all models.
FRESH_SECONDS = 10.0
SERVED_SECONDS = 3600.0  # ... unless its model is served: then the first request finds it ready
# Children of one process that may wait for requests: the vocabularies in use on one node are fewer.
CHILDREN_MAX = 8
# After this many children ended at a text within CRASH_SECONDS, texts are refused until that time is over: a
# start takes half a second of a core.
CRASHES_MAX, CRASH_SECONDS = 5, 60.0
REASON_BYTES_MAX, REASON_CHARS_MAX = 8192, 300  # of what an ended child wrote to its standard error

# ggml would start a debugger on a process that it ends.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
ANOTHER = "fetch the model again, or choose another edition of it"


class Vocabulary:
    """An open vocabulary. `size` counts tokens; ids are 0 to size - 1. For any number of threads.

    `name` is what messages call the model, by default its file's path. With `served` the child stays for the
    first request, however late it comes. Opening takes about half a second, and a text is tokenized at 2 MB/s
    or so: do either in a thread beside an event loop. The rest takes no time.

    Raises:
        BadModelFile: libllama cannot read the file, or its vocabulary does not take ordinary text.
        UnsupportedModel: the file has no tokenizer, or one that libllama does not know yet.
        StageFailed: no process can be started, or it does not answer.
    """

    def __init__(self, path: str | Path, name: str | None = None, *, served: bool = False) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        self._fresh_seconds = SERVED_SECONDS if served else FRESH_SECONDS
        self._lock = threading.Lock()  # held while the child is asked
        self._closed = False
        self._crashes: deque[float] = deque(maxlen=CRASHES_MAX)  # time.monotonic
        self._child: _Child | None = None
        self._forget = weakref.finalize(self, lambda: None)
        table = self._start("table")
        if not isinstance(table, Table):
            raise StageFailed(f"{self.name}: the process of its vocabulary gave no table")
        self._pieces, self._flags = table.pieces, table.flags
        self._ends = array.array("I", [0])
        self._ends.frombytes(table.ends)
        self.size = len(table.flags)
        self.bos, self.eos = table.bos, table.eos
        self.bos_text, self.eos_text = table.bos_text, table.eos_text
        self.wants_bos = table.wants_bos
        self.end_of_generation = frozenset(table.end_of_generation)
        self.chat_template = table.chat_template
        starts = "".join(map(re.escape, table.control_starts))
        self._control_starts = re.compile(f"[{starts}]" if starts else r"(?!)")

    def close(self) -> None:
        """End the child; nothing can be tokenized afterwards. Closing twice is harmless."""
        self._closed = True
        if self._child is not None:
            self._child.end()

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]:
        """Give the token ids of a text.

        `special` reads control tokens written in the text, such as <|im_start|>, as tokens; without it
        they are plain text. `add_bos` puts the model's BOS in front if the model's file wants one and the
        text (a rendered chat template, say) does not begin with it already.

        Raises:
            BadRequest: the text is longer than TEXT_BYTES_MAX, or is not valid Unicode.
            BadModelFile: libllama cannot tokenize it with this vocabulary.
            StageFailed: the vocabulary is closed, or its process does not answer.
        """
        tokens = self._asked(Tokenize(text, special))
        if add_bos and self.wants_bos and self.bos is not None and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        return tokens

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where in a text the names of control tokens stand: (start, end); if two match, the longer.

        Raises as `tokenize` does.
        """
        if not self._control_starts.search(text):
            return []
        edges = iter(self._asked(FindControls(text)))
        return list(zip(edges, edges, strict=True))

    def piece(self, token: int, special: bool = False) -> bytes:
        """Give a token's raw bytes, perhaps part of a character; b'' for control tokens unless `special`.

        Raises:
            BadRequest: there is no such token.
        """
        self._check(token)
        if not special and self._flags[token] & HIDDEN:
            return b""
        return self._pieces[self._ends[token] : self._ends[token + 1]]

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Give the joined pieces of the tokens: exactly what a stream of them would send."""
        return b"".join(self.piece(token) for token in tokens)

    def is_control(self, token: int) -> bool:
        """Tell whether a token is a control token, which no plain text gives."""
        self._check(token)
        return bool(self._flags[token] & CONTROL)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.size:
            raise BadRequest(f"token id {token} is outside the model's vocabulary of {self.size} tokens")

    def _asked(self, request: Tokenize | FindControls) -> list[int]:
        """The numbers that the child answers with."""
        seconds = REQUEST_SECONDS + text_bytes(request.text) / BYTES_PER_SECOND
        with self._lock:
            while True:
                child = self._ready_child()
                try:
                    answer = child.ask(request, seconds)
                except _Rested:  # it was idle, and ended when this request was on its way
                    continue
                except _Ended as error:
                    raise self._failure(error, "tokenize this text with its vocabulary") from error
                break
        if isinstance(answer, Failed):
            raise _rebuilt(answer)
        if not isinstance(answer, Numbers):
            raise StageFailed(f"{self.name}: the process of its vocabulary gave {type(answer).__name__}")
        numbers = array.array("i")
        numbers.frombytes(answer.numbers)
        return numbers.tolist()

    def _ready_child(self) -> "_Child":
        if self._closed:
            raise StageFailed(f"{self.name} is no longer answered here")
        if self._child is None or self._child.ended:
            self._start("again")
        assert self._child is not None, "it was started"
        return self._child

    def _start(self, how: str) -> Message:
        """Start a child; its first message."""
        now = time.monotonic()
        if len(self._crashes) == CRASHES_MAX and now - self._crashes[0] < CRASH_SECONDS:
            raise BadModelFile(
                f"{self.name}: libllama ended {CRASHES_MAX} times on its vocabulary within a minute, so it "
                f"is given no text for another: {ANOTHER}"
            )
        self._child = child = _Child(self.path, self.name, self._fresh_seconds, how)
        self._forget.detach()
        self._forget = weakref.finalize(self, child.end)
        try:
            answer = child.receive(START_SECONDS)
        except (_Ended, _Rested) as error:
            raise self._failure(error, "use its vocabulary") from error
        if isinstance(answer, Failed):
            child.end()
            raise _rebuilt(answer)
        return answer

    def _failure(self, error: "_Ended | _Rested", work: str) -> CordeeError:
        """The error for a child that ended over its work, or was ended because it did not answer."""
        if self._closed:
            return StageFailed(f"{self.name} is no longer answered here")
        self._crashes.append(time.monotonic())
        if isinstance(error, _Rested) or error.is_passing:
            return StageFailed(f"{self.name}: libllama could not {work} now ({error}): try again")
        return BadModelFile(f"{self.name}: libllama cannot {work} ({error}): {ANOTHER}")


class _Ended(Exception):
    """A child ended, for the reason in the text. `is_passing`: it may be otherwise next time."""

    def __init__(self, reason: str, is_passing: bool = False) -> None:
        super().__init__(reason)
        self.is_passing = is_passing


class _Rested(Exception):
    """A child was ended, or ended by itself, because it had nothing to do."""


class _Child:
    """A process with a vocabulary. Asked by one thread at a time; `end` is for any."""

    _living: ClassVar["set[_Child]"] = set()
    # Of `_living`, and of `is_asked` and `rested` of those in it; the garbage collector may end some, too.
    _guard = threading.RLock()

    def __init__(self, path: Path, name: str, fresh_seconds: float, how: str) -> None:
        self.ended = False
        self.rested = False  # ended to make room for another
        self.is_asked = True  # until it has started
        self.used = time.monotonic()
        self._link, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(path.absolute()), name, str(fresh_seconds), how]
        try:
            self._process = subprocess.Popen(
                children.command("cordee.engine.vocabulary_child", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # the terminal's Ctrl-C is its parent's to handle
            )
        except OSError as error:
            self._link.close()
            raise StageFailed(f"{name}: the process of its vocabulary does not start: {error}") from error
        finally:
            theirs.close()
        assert self._process.stderr is not None, "it is a pipe"
        self._errors = self._process.stderr
        os.set_blocking(self._errors.fileno(), False)  # a process of its own may hold the other end
        self._make_room()

    def ask(self, request: Message, seconds: float) -> Message:
        """Its answer to a request.

        Raises:
            _Rested: it had nothing to do before, and ended: ask another.
            _Ended: it ended, or took too long and was ended.
        """
        with self._guard:
            self.is_asked = True
        try:
            self._link.settimeout(seconds)
            send(self._link, request)
        except OSError:
            pass  # what it said before it ended is read below
        return self.receive(seconds)

    def receive(self, seconds: float) -> Message:
        """Its next message. Raises as `ask` does."""
        try:
            answer = receive(self._link, seconds)
        except TimeoutError:
            self.end()
            raise _Ended("it took too long", is_passing=True) from None
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
        rested, killed = self.rested or status == 0, status == -signal.SIGKILL
        self.end()
        if killed:  # by no fault of its own: the system does that when memory is short
            reason = "its process was killed, for want of memory perhaps"
        return _Rested("it was idle") if rested else _Ended(reason, is_passing=killed)

    def _reason(self, status: int | None) -> str:
        """What it wrote last, or its status."""
        try:
            data = self._errors.read(REASON_BYTES_MAX) or b""
        except ValueError:  # closed by another thread, which ended the child
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


def _rebuilt(failed: Failed) -> CordeeError:
    """The error that the child met, as an exception of this process."""
    kind = getattr(errors, failed.error, CordeeError)
    return kind(failed.message)
