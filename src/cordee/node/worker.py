"""A stage worker: one process, one stage. Run as `python -m cordee.node.worker ID CONTROL INBOX`.

CONTROL is the pipeline's socket, INBOX the path at which this worker listens for the stage before it. One
thread does everything, since the stage is the only thing worth waiting for:

    start -> Load -> loaded -> Wire -> wired: rows in, rows (or tokens) out
                        ^                |
                        '--- Wire again, |link lost: rows are dropped until then

A micro-batch that goes round comes back to the first stage from the last, or stays here if that is the same;
the service hears of its tokens meanwhile.

The process ends when its control link does, even in the middle of a decode, so that no worker outlives its
service: a second thread waits for that and for nothing else. A failure in the stage ends the process too: the
pipeline replaces it, which also gets rid of whatever state made it fail.
"""

import os
import select
import selectors
import signal
import socket
import sys
import threading
from collections import deque

from cordee import errors
from cordee.errors import CordeeError
from cordee.node import link
from cordee.node.compute import Compute, Result, again
from cordee.node.link import LinkClosed
from cordee.node.messages import (
    Halt,
    Hello,
    Join,
    Load,
    Loaded,
    LoadFailed,
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
        self._upstream: dict[bool, socket.socket] = {}  # by whether what comes there goes round
        self._downstream: socket.socket | None = None
        self._first: socket.socket | None = None  # where micro-batches go round to; None: here
        self._round: deque[Result] = deque()  # that go round here; as many as are in flight at most
        self._halted = 0  # the newest micro-batch that shall not go round again
        self._placement = ""
        self._strangers: list[socket.socket] = []  # that connected and said nothing yet
        self._early: dict[Join, socket.socket] = {}  # that joined before this worker heard of their placement
        self._compute: Compute | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(inbox, selectors.EVENT_READ)

    def serve(self) -> None:
        """Do what comes in until the control link ends."""
        while True:
            for key, _ in self._selector.select(0 if self._round else None):
                if key.fileobj is self._control:
                    try:
                        self._obey()
                    except LinkClosed:
                        return
                elif key.fileobj is self._inbox:
                    self._accept()
                elif key.fileobj in self._strangers:
                    self._meet(key.fileobj)
                else:
                    self._take_rows(key.fileobj)
            if self._round:
                self._run(*self._round.popleft())

    def _obey(self) -> None:
        message, _ = link.receive(self._control)
        if isinstance(message, Load):
            self._load(message)
        elif isinstance(message, Wire):
            self._wire(message)
        elif isinstance(message, Halt):
            self._halted = max(self._halted, message.batch)

    def _load(self, load: Load) -> None:
        try:
            self._compute = Compute(load)
        except CordeeError as error:
            link.send(self._control, LoadFailed(type(error).__name__, error.message))
            return
        link.send(self._control, Loaded(self._compute.description))

    def _wire(self, wire: Wire) -> None:
        assert self._compute is not None, "Load comes before Wire"
        self._drop_upstream()
        self._drop_downstream()
        self._compute.clear()
        self._placement = wire.placement
        try:
            self._downstream = _joined(wire.downstream, Join(wire.placement))
            if wire.first is not None:
                self._first = _joined(wire.first, Join(wire.placement, again=True))
        except (OSError, LinkClosed) as error:  # that stage just died: another Wire follows
            self._drop_downstream()
            link.send(self._control, WireFailed(wire.placement, str(error)))
            return
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
        self._early[message] = peer
        self._adopt()

    def _adopt(self) -> None:
        """Take rows from the stages that joined this placement, as far as they have."""
        for join in (Join(self._placement), Join(self._placement, again=True)):
            if join in self._early:
                self._drop(join.again)
                self._upstream[join.again] = self._early.pop(join)
                self._selector.register(self._upstream[join.again], selectors.EVENT_READ)

    def _take_rows(self, source: socket.socket) -> None:
        goes_round = next((again for again, peer in self._upstream.items() if peer is source), None)
        if goes_round is None:
            return  # a Wire dropped it a moment ago
        try:
            message, payload = link.receive(source)
        except LinkClosed:
            message, payload = None, memoryview(b"")
        if isinstance(message, Rows) and message.placement == self._placement:
            self._run(message, payload)
        else:
            self._drop(goes_round)

    def _run(self, message: Rows, payload: memoryview) -> None:
        assert self._compute is not None
        answer, rows = self._compute.run(message, payload)
        if isinstance(answer, Rows):
            self._send(answer, rows)
            return
        if message.batch > self._halted and self._compute.goes_round(message, answer):
            self._send(Tokens(answer.placement, answer.batch, answer.choices, last=False))
            self._send_round(*again(message, answer))
        else:
            self._send(answer)

    def _send(self, message: Rows | Tokens, payload: bytes | memoryview = b"") -> None:
        if self._downstream is None:
            return
        try:
            link.send(self._downstream, message, payload)
        except LinkClosed:
            self._drop_downstream()

    def _send_round(self, message: Rows, payload: memoryview) -> None:
        if self._first is None:
            self._round.append((message, payload))
            return
        try:
            link.send(self._first, message, payload)
        except LinkClosed:
            self._drop_downstream()

    def _drop_upstream(self) -> None:
        for goes_round in list(self._upstream):
            self._drop(goes_round)

    def _drop(self, goes_round: bool) -> None:
        source = self._upstream.pop(goes_round, None)
        if source is not None:
            self._selector.unregister(source)
            source.close()

    def _drop_downstream(self) -> None:
        for peer in (self._downstream, self._first):
            if peer is not None:
                peer.close()
        self._downstream = self._first = None
        self._round.clear()


def _joined(path: str, join: Join) -> socket.socket:
    """A link to the worker, or the service, at this path.

    Raises:
        OSError, LinkClosed: nobody takes it.
    """
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.settimeout(link.SOCKET_SECONDS)
        peer.connect(path)
        link.send(peer, join)
    except BaseException:
        peer.close()
        raise
    return peer


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
