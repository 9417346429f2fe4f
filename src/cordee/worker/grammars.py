"""The grammars of a worker's streams: compiled on a thread of their own, followed within a budget of time.

The thread that computes must not wait for a grammar, since all other streams wait with it. So the scheduler
has each grammar prepared before its stream is begun: llguidance compiles without Python's lock. (Only where a
stream goes on in a new worker is it compiled on the way.) A grammar from another machine is tried by a child
process first: its host has done so as well, unless somebody has taken that machine over.

Masks are computed between micro-batches. They take microseconds as a rule, but an ambiguous grammar takes
longer at each token; a stream whose grammar has used its budget ends.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.errors import CordeeError
from cordee.generation.request import Grammar
from cordee.grammar.grammar import STEP_SECONDS, GrammarState, GrammarTokenizer, refusal

if TYPE_CHECKING:  # workers of one machine alone start sooner without it
    from cordee.worker.grammar_trials import GrammarTrials

COMPILED_MAX = 8  # grammars that are kept for further streams; most take less than 1 MB, the largest 40
PREPARING_MAX = 1024  # grammars that wait to be compiled: a host's streams
SLOW_MAX = 256  # grammars that are remembered to be slow
# Of a core: a stream's grammar may take so long at each token, on average, and this much more in all. The
# first mask of a large vocabulary takes 50 ms, and thrice that on an old machine; most take 0.1 ms.
TOKEN_SECONDS, SPARE_SECONDS = 0.02, 1.0
STACK_BYTES = 16 << 20  # of the thread that compiles: no less than where grammars are tried


class WorkerGrammars:
    """The grammars for the vocabulary in a slice's file. `prepare` and `open` are for one thread.

    `from_elsewhere`: they come from other machines, and are tried here as well.
    """

    def __init__(self, path: Path, name: str, *, from_elsewhere: bool = False) -> None:
        self._path, self._name = path, name
        self._trials = _trials(path, name) if from_elsewhere else None
        self._preparing = 0  # of `prepare`'s thread
        self._lock = threading.Lock()  # of what follows
        self._tokenizer: GrammarTokenizer | None = None
        self._compiled: OrderedDict[Grammar, GrammarState] = OrderedDict()  # the latest used last
        self._slow: OrderedDict[Grammar, None] = OrderedDict()
        threading.stack_size(STACK_BYTES)
        self._thread = ThreadPoolExecutor(1, "grammars")

    def prepare(self, grammar: Grammar, done: Callable[[str], None]) -> None:
        """Compile a grammar; `done` is called with what is wrong with it, or "", on another thread mostly."""

        def compile_it() -> None:
            failure = ""
            try:
                self._state(grammar)
            except CordeeError as error:
                failure = error.message
            except BaseException as error:
                failure = f"the grammar cannot be compiled here: {error}"
            with self._lock:
                self._preparing -= 1
            done(failure)

        with self._lock:
            if self._preparing >= PREPARING_MAX:
                done(f"{PREPARING_MAX} grammars are being compiled: try again later")
                return
            self._preparing += 1
        self._thread.submit(compile_it)

    def open(self, grammar: Grammar, generated: Sequence[int]) -> "Followed":
        """The state of a stream in its grammar, after the tokens generated so far.

        Raises:
            BadRequest: the grammar is bad, the tokens do not follow it, or it was too slow before.
            UnsupportedModel: no grammar can bind this model.
        """
        state = self._state(grammar).copy()
        for token in generated:
            state.accept(token)
        return Followed(state, lambda: self._remember_slow(grammar))

    def _state(self, grammar: Grammar) -> GrammarState:
        """The compiled grammar, before any token."""
        with self._lock:
            if grammar in self._slow:
                raise too_slow(grammar.kind)
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            tokenizer = self._tokenizer
        if self._trials is not None:
            self._trials.check_here(grammar)
        if tokenizer is None:  # slow, and most workers need none
            tokenizer = GrammarTokenizer(LlamaVocabulary(self._path, self._name))
        state = GrammarState(grammar, tokenizer)
        with self._lock:
            self._tokenizer = tokenizer
            self._compiled[grammar] = state
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        return state

    def _remember_slow(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)
            self._slow[grammar] = None
            if len(self._slow) > SLOW_MAX:
                self._slow.popitem(last=False)


class Followed:
    """A grammar's state that counts what it costs. `slow` is called when that is too much."""

    def __init__(self, state: GrammarState, slow: Callable[[], None]) -> None:
        self._state = state
        self._slow = slow
        self._left_seconds = SPARE_SECONDS

    def allowed(self) -> np.ndarray:
        """See GrammarState.allowed."""
        self._left_seconds += TOKEN_SECONDS
        started = time.thread_time()
        found = self._state.allowed()
        self._spend(time.thread_time() - started)
        return found

    def accept(self, token: int) -> None:
        """See GrammarState.accept."""
        started = time.thread_time()
        self._state.accept(token)
        self._spend(time.thread_time() - started)

    def forced(self) -> list[int]:
        """See GrammarState.forced."""
        started = time.thread_time()
        found = self._state.forced()
        self._left_seconds -= time.thread_time() - started
        return found

    def _spend(self, seconds: float) -> None:
        self._left_seconds = min(self._left_seconds - seconds, SPARE_SECONDS)
        if self._left_seconds < 0 or seconds > STEP_SECONDS:
            self._slow()
            raise too_slow(self._state.kind)


def _trials(path: Path, name: str) -> "GrammarTrials":
    from cordee.worker.grammar_trials import GrammarTrials

    return GrammarTrials.of(path, name)


def too_slow(kind: str) -> CordeeError:
    """Why a stream of a grammar of this kind ends."""
    return refusal(kind, "it takes too long for each token: make it less ambiguous, or shorten the answer")
