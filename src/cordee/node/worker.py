"""A stage worker: one process, one stage. Run as `python -m cordee.node.worker ID CONTROL INBOX`.

CONTROL is the pipeline's socket, INBOX the path at which this worker listens for the stage before it. One
thread does everything, since the stage is the only thing worth waiting for:

    start -> Load -> loaded -> Wire -> wired: rows in, rows (or tokens) out
                        ^                |
                        '--- Wire again, |link lost: rows are dropped until then

The process ends when its control link does, even in the middle of a decode, so that no worker outlives its
service: a second thread waits for that and for nothing else. A failure in the stage ends the process too: the
pipeline replaces it, which also gets rid of whatever state made it fail.
"""

import hashlib
import os
import select
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np

from cordee import errors
from cordee.engine.llama import LlamaStage
from cordee.engine.stage import Batch, Stage
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.generation.grammar import GrammarTokenizer
from cordee.generation.request import Choice
from cordee.generation.sampling import Sampler
from cordee.node import link
from cordee.node.link import LinkClosed
from cordee.node.messages import (
    Hello,
    Join,
    Load,
    Loaded,
    LoadFailed,
    Opening,
    Rows,
    Tokens,
    Wire,
    Wired,
    WireFailed,
)

PEERS_MAX = 4  # that connected and are not wired yet: a new placement's while an old one is being closed
BACKLOG = 64  # peers that knock during a decode: with a full backlog the true one would be refused
JOIN_SECONDS = 1.0  # for the rest of a Join that began to arrive: it is one small write


class Worker:
    """The state of a worker process."""

    def __init__(self, control: socket.socket, inbox: socket.socket) -> None:
        self._control = control
        self._inbox = inbox
        self._upstream: socket.socket | None = None
        self._downstream: socket.socket | None = None
        self._placement = ""
        self._strangers: list[socket.socket] = []  # that connected and said nothing yet
        self._early: dict[str, socket.socket] = {}  # by the placement that they joined
        self._path = Path()
        self._stage: Stage | None = None
        self._samplers: dict[int, Sampler] = {}
        self._lengths: dict[int, int] = {}  # tokens that each sequence holds
        self._tokenizer: GrammarTokenizer | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(inbox, selectors.EVENT_READ)

    def serve(self) -> None:
        """Do what comes in until the control link ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    try:
                        self._obey()
                    except LinkClosed:
                        return
                elif key.fileobj is self._inbox:
                    self._accept()
                elif key.fileobj is self._upstream:
                    self._take_rows()
                elif key.fileobj in self._strangers:
                    self._meet(key.fileobj)

    def _obey(self) -> None:
        message, _ = link.receive(self._control)
        if isinstance(message, Load):
            self._load(message)
        elif isinstance(message, Wire):
            self._wire(message)

    def _load(self, load: Load) -> None:
        try:
            self._path = Path(load.path)
            self._stage = LlamaStage(self._path, load.config, is_last=load.is_last)
        except CordeeError as error:
            link.send(self._control, LoadFailed(type(error).__name__, error.message))
            return
        link.send(self._control, Loaded(self._stage.description))

    def _wire(self, wire: Wire) -> None:
        assert self._stage is not None, "Load comes before Wire"
        self._drop_upstream()
        self._drop_downstream()
        self._stage.clear()
        self._samplers.clear()
        self._lengths.clear()
        self._placement = wire.placement
        downstream = socket.socket(socket.AF_UNIX)
        downstream.settimeout(link.SOCKET_SECONDS)
        try:
            downstream.connect(wire.downstream)
            link.send(downstream, Join(wire.placement))
        except (OSError, LinkClosed) as error:
            downstream.close()  # the next stage just died: another Wire follows
            link.send(self._control, WireFailed(wire.placement, str(error)))
            return
        self._downstream = downstream
        self._adopt()
        link.send(self._control, Wired(wire.placement))

    def _accept(self) -> None:
        """Let a peer in; whoever says nothing costs a place among PEERS_MAX and no time."""
        if len(self._strangers) == PEERS_MAX:
            self._forget(self._strangers[0]).close()
        peer, _ = self._inbox.accept()
        peer.settimeout(JOIN_SECONDS)
        self._strangers.append(peer)
        self._selector.register(peer, selectors.EVENT_READ)

    def _forget(self, stranger: socket.socket) -> socket.socket:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger)
        return stranger

    def _meet(self, stranger: socket.socket) -> None:
        """Hear which placement a peer joins; it may have learnt of it before this worker."""
        peer = self._forget(stranger)
        try:
            message, _ = link.receive(peer)
        except LinkClosed:
            message = None
        if not isinstance(message, Join):
            peer.close()
            return
        peer.settimeout(link.SOCKET_SECONDS)
        if len(self._early) == PEERS_MAX:
            self._early.pop(next(iter(self._early))).close()
        self._early[message.placement] = peer
        self._adopt()

    def _adopt(self) -> None:
        """Take rows from the stage that joined this placement, if it has."""
        if self._placement not in self._early:
            return
        self._drop_upstream()
        self._upstream = self._early.pop(self._placement)
        self._selector.register(self._upstream, selectors.EVENT_READ)

    def _take_rows(self) -> None:
        assert self._upstream is not None
        try:
            message, payload = link.receive(self._upstream)
        except LinkClosed:
            self._drop_upstream()
            return
        if not isinstance(message, Rows) or message.placement != self._placement:
            self._drop_upstream()
            return
        answer, rows = self._compute(message, payload)
        if self._downstream is None:
            return
        try:
            link.send(self._downstream, answer, rows)
        except LinkClosed:
            self._drop_downstream()

    def _compute(self, message: Rows, payload: memoryview) -> tuple[Rows | Tokens, memoryview]:
        assert self._stage is not None
        self._trim(message)
        batch = as_batch(message, payload)
        result = self._stage.decode(batch)
        if not self._stage.description.is_last:
            forwarded = Rows(
                placement=message.placement,
                batch=message.batch,
                runs=message.runs,
                opens=message.opens,
                n_embd=result.shape[1],
                measure=message.measure,
            )
            return forwarded, memoryview(result).cast("B")
        return self._sample(message, result), memoryview(b"")

    def _trim(self, message: Rows) -> None:
        """Make each sequence as long as its next run expects it."""
        assert self._stage is not None
        for run in message.runs:
            if run.first_position < self._lengths.get(run.sequence, 0):
                self._stage.trim(run.sequence, run.first_position)
            self._lengths[run.sequence] = run.first_position + run.rows

    def _sample(self, message: Rows, logits: np.ndarray) -> Tokens:
        sequences = [run.sequence for run in message.runs if run.output]
        if message.measure:
            digests = {
                sequence: hashlib.sha256(row.tobytes()).hexdigest()
                for sequence, row in zip(sequences, logits, strict=True)
            }
            return Tokens(message.placement, message.batch, digests=digests)
        choices: dict[int, Choice] = {}
        failures: dict[int, str] = {}
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                if sequence in message.opens:
                    self._samplers[sequence] = self._sampler(message.opens[sequence])
                choices[sequence] = self._samplers[sequence].sample(row)
            except CordeeError as error:
                failures[sequence] = error.message
        return Tokens(message.placement, message.batch, choices, failures)

    def _sampler(self, opening: Opening) -> Sampler:
        if opening.sampling.grammar is not None and self._tokenizer is None:
            self._tokenizer = GrammarTokenizer(Vocabulary(self._path))  # slow, and most streams need none
        return Sampler(opening.sampling, self._tokenizer, opening.prompt, opening.generated)

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._selector.unregister(self._upstream)
            self._upstream.close()
            self._upstream = None

    def _drop_downstream(self) -> None:
        if self._downstream is not None:
            self._downstream.close()
            self._downstream = None


def as_batch(message: Rows, payload: memoryview) -> Batch:
    """The engine's batch behind a message; its inputs lie in `payload`."""
    runs = message.runs
    positions = np.array([run.first_position for run in runs], dtype=np.int32)
    sequences = np.array([run.sequence for run in runs], dtype=np.int32)
    outputs = np.array([run.output for run in runs], dtype=bool)
    counts = [run.rows for run in runs]
    if max(counts) > 1:  # else nobody prefills, and every run is its row
        ends = np.cumsum(counts)
        total = int(ends[-1])
        positions = np.arange(total, dtype=np.int32) + np.repeat(
            positions - (ends - counts).astype(np.int32), counts
        )
        sequences = np.repeat(sequences, counts)
        last = outputs
        outputs = np.zeros(total, dtype=bool)
        outputs[ends - 1] = last
    if message.n_embd:
        inputs = np.frombuffer(payload, dtype=np.float32).reshape(len(positions), message.n_embd)
    else:
        inputs = np.frombuffer(payload, dtype=np.int32)
    return Batch(inputs, positions, sequences, outputs)


def rebuilt_error(failed: LoadFailed) -> CordeeError:
    """The error that a worker met, as an exception of this process."""
    kind = getattr(errors, failed.error, CordeeError)
    return kind(failed.message)


def _end_with(control: socket.socket) -> None:
    """End the process when the other side of its control link is gone, whatever the main thread does."""
    hangup = select.poll()
    hangup.register(control, 0)  # POLLHUP alone, which cannot be left out
    hangup.poll()
    os._exit(0)


def main() -> None:
    """Connect, listen, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to handle
    worker_id, control_path, inbox_path = sys.argv[1:]
    inbox = socket.socket(socket.AF_UNIX)
    inbox.bind(inbox_path)
    inbox.listen(BACKLOG)
    control = socket.socket(socket.AF_UNIX)
    control.connect(control_path)
    link.send(control, Hello(worker_id))
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    try:
        Worker(control, inbox).serve()
    except CordeeError as error:
        sys.exit(f"stage: {error.message}")


if __name__ == "__main__":
    main()
