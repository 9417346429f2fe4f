"""Grammars are tried in a child process before any stream gets one; what came of it is remembered.

A grammar comes from a client, or from another node's client. Some take llguidance minutes, gigabytes, or end
the process, and it cannot be interrupted. So the gateway of a request, the host of its model, and a worker
that takes rows of other machines each let a child (grammar_child.py) compile it first, within bounds of time
and memory: none of them relies on another. One is tried at a time, and askers take turns; streams without a
grammar, and those whose grammar is known already, wait for none.
"""

import asyncio
import hashlib
import logging
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from cordee.engine.child import Child, Ended, Rested
from cordee.errors import CordeeError, Overloaded, StageFailed
from cordee.generation.request import Grammar
from cordee.grammar import grammar as grammars
from cordee.worker.grammar_messages import GrammarVerdict, verdict_decoder

MODULE = "cordee.worker.grammar_child"
START_SECONDS = 60.0  # for the child: its interpreter, libllama, the vocabulary; on a slow and busy machine
ANSWER_SECONDS = 30.0  # for a trial, which takes 2 s of a core at the most, on a busy machine
VERDICTS_MAX = 1024  # remembered for a vocabulary, 200 bytes each
# Grammars of one asker, a node or this node's own clients, that wait to be tried: a quarter of a minute.
WAITING_MAX = 8

Key = tuple[str, bytes]

log = logging.getLogger(__name__)


class GrammarTrials:
    """What is known of grammars, for one vocabulary. Made by `GrammarTrials.of`; ends with its last user."""

    _all: ClassVar["weakref.WeakValueDictionary[Path, GrammarTrials]"] = weakref.WeakValueDictionary()

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._lock = threading.Lock()  # of what follows
        self._verdicts: OrderedDict[Key, GrammarVerdict] = OrderedDict()  # the latest used last
        self._pending: dict[Key, Future[GrammarVerdict]] = {}
        self._waiting: dict[str, deque[tuple[Key, Grammar]]] = {}  # by asker; whose turn it is comes first
        self._child: Child[GrammarVerdict] | None = None  # of the one thread below
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._forget = weakref.finalize(self, lambda: None)

    @classmethod
    def of(cls, path: Path, name: str) -> "GrammarTrials":
        """Those of a vocabulary's file, shared by all who use it; `name` is what messages call the model."""
        return cls._all.get(path) or cls._all.setdefault(path, cls(path, name))

    async def check(self, grammar: Grammar, asker: str = "") -> None:
        """Refuse a grammar that cannot be used.

        Raises:
            BadRequest: it is wrong, no text can satisfy it, or it takes too much time or memory.
            UnsupportedModel: no grammar can bind this model.
            Overloaded: too many grammars of this asker wait to be tried.
            StageFailed: it could not be tried.
        """
        _raise(await asyncio.shield(asyncio.wrap_future(self._verdict(grammar, asker))))

    def check_here(self, grammar: Grammar) -> None:
        """As `check`, for a thread that may wait."""
        _raise(self._verdict(grammar, "").result())

    def _verdict(self, grammar: Grammar, asker: str) -> Future[GrammarVerdict]:
        """What is known of a grammar, or will be."""
        grammars.check_text(grammar)
        key = grammar.kind, hashlib.sha256(grammar.text.encode()).digest()
        with self._lock:
            known = self._verdicts.get(key)
            if known is None:
                return self._trial(key, grammar, asker)
            self._verdicts.move_to_end(key)
        found: Future[GrammarVerdict] = Future()
        found.set_result(known)
        return found

    def _trial(self, key: Key, grammar: Grammar, asker: str) -> Future[GrammarVerdict]:
        """The trial of a grammar that is under way, or a new one."""
        if key not in self._pending:
            waiting = self._waiting.setdefault(asker, deque())
            if len(waiting) >= WAITING_MAX:
                raise Overloaded(f"{WAITING_MAX} grammars wait to be compiled: try again in a moment")
            waiting.append((key, grammar))
            self._pending[key] = Future()
            self._thread.submit(self._try_next)
        return self._pending[key]

    def _try_next(self) -> None:
        with self._lock:
            asker = next(iter(self._waiting))
            waiting = self._waiting.pop(asker)
            key, grammar = waiting.popleft()
            if waiting:
                self._waiting[asker] = waiting  # behind the others
        try:
            verdict, is_kept = self._asked(grammar), True
        except CordeeError as error:
            verdict, is_kept = GrammarVerdict.of(error), False
        except BaseException:  # a fault of ours: whoever waits must hear of it
            verdict, is_kept = GrammarVerdict.of(StageFailed("the grammar could not be tried")), False
            log.exception("the trial of a grammar failed")
        with self._lock:
            trial = self._pending.pop(key)
            if is_kept:
                self._verdicts[key] = verdict
                if len(self._verdicts) > VERDICTS_MAX:
                    self._verdicts.popitem(last=False)
        trial.set_result(verdict)

    def _asked(self, grammar: Grammar) -> GrammarVerdict:
        """The child's verdict."""
        while True:
            try:
                return self._ready_child().ask(grammar, ANSWER_SECONDS)
            except Rested:  # it was idle, and ended when this request was on its way
                continue
            except Ended as error:
                raise StageFailed(
                    f"{self._name}: the grammar could not be tried ({error}): try again"
                ) from error

    def _ready_child(self) -> Child[GrammarVerdict]:
        if self._child is not None and not self._child.ended:
            return self._child
        self._child = child = Child(
            verdict_decoder, self._name, "grammars", MODULE, str(self._path.absolute()), self._name
        )
        self._forget.detach()
        self._forget = weakref.finalize(self, child.end)
        try:
            verdict = child.receive(START_SECONDS)
        except (Ended, Rested) as error:
            raise StageFailed(f"{self._name}: grammars cannot be tried ({error}): try again") from error
        if (error := verdict.as_error()) is not None:
            child.end()
            raise error
        return child


def _raise(verdict: GrammarVerdict) -> None:
    if (error := verdict.as_error()) is not None:
        raise error
