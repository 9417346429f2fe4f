"""The vocabulary of a model, safe for a process that serves others: text to token ids and back, template.

A vocabulary comes from outside, and libllama ends the process on many that are wrong: when it loads them, at
some text, or when it spells a token (of 3,000 random changes to a sound one, 263 did that). So libllama has
it in a child process (vocabulary_child.py), which gives everything but the tokenizer as a table, once it has
tokenized ordinary texts. Here tokens become text from that table; only texts that become tokens go to the
child. If it ends at one, that text is refused, and the next one gets a new child.
"""

import array
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path

from cordee.engine.child import Child, Ended, Rested, rebuilt
from cordee.engine.vocabulary_messages import (
    CONTROL,
    HIDDEN,
    Failed,
    FindControls,
    Message,
    Numbers,
    Table,
    Tokenize,
    decoder,
    text_bytes,
)
from cordee.errors import BadModelFile, BadRequest, CordeeError, StageFailed

# For the start of a child: its interpreter, libllama, the vocabulary. On a slow and busy machine.
START_SECONDS = 60.0
# For a request: its fixed part, and the slowest rate at which texts are tokenized; a PC does 2 MB/s.
REQUEST_SECONDS, BYTES_PER_SECOND = 20.0, 100_000
# A child that nobody has asked yet ends sooner than others: a node opens the vocabularies of all models.
FRESH_SECONDS = 10.0
SERVED_SECONDS = 3600.0  # ... unless its model is served: then the first request finds it ready
# After this many children ended at a text within CRASH_SECONDS, texts are refused until that time is over: a
# start takes half a second of a core.
CRASHES_MAX, CRASH_SECONDS = 5, 60.0

MODULE = "cordee.engine.vocabulary_child"
ANOTHER = "fetch the model again, or choose another edition of it"


@dataclass(frozen=True)
class Infill:
    """The tokens by which a model is asked for what stands between two texts.

    `repository` and `separator` stand before the name of a repository, and of a file of it, where the model
    knows files beside the one that is written.
    """

    prefix: int
    suffix: int
    middle: int
    repository: int | None = None
    separator: int | None = None


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
        self._child: Child[Message] | None = None
        self._forget = weakref.finalize(self, lambda: None)
        table = self._start("table")
        if not isinstance(table, Table):
            raise StageFailed(f"{self.name}: the process of its vocabulary gave no table")
        self._pieces, self._flags = table.pieces, table.flags
        self._ends = array.array("I", [0])
        self._ends.frombytes(table.ends)
        self.size = len(table.flags)
        # No token stands for more bytes of a text: see `least_tokens`.
        self._longest_bytes = max(map(sub, self._ends[1:], self._ends), default=0)
        self.bos, self.eos = table.bos, table.eos
        self.bos_text, self.eos_text = table.bos_text, table.eos_text
        self.wants_bos = table.wants_bos
        self.end_of_generation = frozenset(table.end_of_generation)
        self.chat_template = table.chat_template
        can_fill_in = {"prefix", "suffix", "middle"} <= table.infill.keys()
        self.infill = Infill(**table.infill) if can_fill_in else None
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

    def least_tokens(self, nbytes: int) -> int:
        """How many tokens a text of so many bytes has at least, without looking at it."""
        return -(-nbytes // max(self._longest_bytes, 1))

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
                except Rested:  # it was idle, and ended when this request was on its way
                    continue
                except Ended as error:
                    raise self._failure(error, "tokenize this text with its vocabulary") from error
                break
        if isinstance(answer, Failed):
            raise rebuilt(answer.error, answer.message)
        if not isinstance(answer, Numbers):
            raise StageFailed(f"{self.name}: the process of its vocabulary gave {type(answer).__name__}")
        numbers = array.array("i")
        numbers.frombytes(answer.numbers)
        return numbers.tolist()

    def _ready_child(self) -> Child[Message]:
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
        arguments = (str(self.path.absolute()), self.name, str(self._fresh_seconds), how)
        self._child = child = Child(decoder, self.name, "vocabulary", MODULE, *arguments)
        self._forget.detach()
        self._forget = weakref.finalize(self, child.end)
        try:
            answer = child.receive(START_SECONDS)
        except (Ended, Rested) as error:
            raise self._failure(error, "use its vocabulary") from error
        if isinstance(answer, Failed):
            child.end()
            raise rebuilt(answer.error, answer.message)
        return answer

    def _failure(self, error: Ended | Rested, work: str) -> CordeeError:
        """The error for a child that ended over its work, or was ended because it did not answer."""
        if self._closed:
            return StageFailed(f"{self.name} is no longer answered here")
        self._crashes.append(time.monotonic())
        if isinstance(error, Rested) or error.is_passing:
            return StageFailed(f"{self.name}: libllama could not {work} now ({error}): try again")
        return BadModelFile(f"{self.name}: libllama cannot {work} ({error}): {ANOTHER}")
