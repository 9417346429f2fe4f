"""A stage worker: one process, one stage. Run as `python -m cordee.worker.worker ID CONTROL INBOX`.

CONTROL is its parent's socket, INBOX the path at which this worker listens for the stage before it. One
thread does everything but to reach the neighbours, since the stage is the only thing worth waiting for:

    start -> Load -> loaded -> Wire -> wired: rows in, rows (or tokens) out
                        ^                |
                        '--- Wire again, |link lost: Broken, and rows are dropped until then

Rows come through the inbox from this machine, and through a door of dataplane.py from others. A micro-batch
that goes round comes back to the first stage from the last, or stays here if that is the same; the service
hears of its tokens meanwhile.

The process ends when its control link does, even in the middle of a decode, so that no worker outlives its
parent: a second thread waits for that and for nothing else. A failure in the stage ends the process too: the
parent replaces it, which also gets rid of whatever state made it fail.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import msgspec

from cordee.errors import BadRequest, CordeeError, StageFailed
from cordee.worker import frames
from cordee.worker.compute import Compute, Result, again
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import (
    Broken,
    Data,
    Halt,
    Heirs,
    Held,
    Hello,
    Inherit,
    Join,
    Load,
    Loaded,
    LoadFailed,
    Message,
    Recall,
    Recalled,
    Rows,
    Tokens,
    Wire,
    Wired,
    WireFailed,
)

if TYPE_CHECKING:  # workers of one machine start sooner without TLS
    from cordee.worker.kv_transfer import Legacy
    from cordee.worker.tls_link import Door, Guest

PEERS_MAX = 4  # that connected and are not wired yet: a new placement's while an old one is being closed
BACKLOG = 64  # peers that knock during a decode: with a full backlog the true one would be refused
JOIN_SECONDS = 1.0  # for the rest of a Join that began to arrive: it is one small write
HEIRS_MAX = 16  # workers of the next placement whose layers overlap with this one's, and some that fell
# A micro-batch that goes round may keep its tokens back for so long: nobody reads faster, and each message
# costs the service as much as a small model's layer.
GATHER_SECONDS = 0.02


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
        self._gathered: dict[int, list[Tokens]] = {}  # of micro-batches that go round; STEPS_MAX each at most
        self._told = 0.0  # when tokens were sent last
        self._placement = ""
        self._left = ""  # the placement before it was left, whose sequences are still here
        self._heirs: list[socket.socket] = []
        self._legacy: Legacy | None = None
        self._recalled: dict[int, Held] = {}  # what the sources said
        self._identity: Path | None = None  # of this node, where other machines take part
        self._door: Door | None = None
        self._guests: list[Guest] = []  # of other machines, that are still proving who they are
        self._strangers: list[socket.socket] = []  # that connected and said nothing yet
        self._early: dict[Join, socket.socket] = {}  # that joined before this worker heard of their placement
        self._compute: Compute | None = None
        self._connected: SimpleQueue[tuple[Wire, list[socket.socket], Legacy | None, str]] = SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(inbox, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> None:
        """Do what comes in until the control link ends."""
        with contextlib.suppress(
            LinkClosed
        ):  # of the control link; what ends others is handled where it is met
            while True:
                for key, _ in self._selector.select(0 if self._round else None):
                    if key.fileobj is self._control:
                        self._obey()
                    else:
                        self._hear(key.fileobj)
                if self._round:
                    self._run(*self._round.popleft())

    def _hear(self, source) -> None:
        """Something came from somewhere else than the parent; what was dropped a moment ago is nobody's."""
        if source is self._inbox:
            self._accept()
        elif source is self._woken:
            self._take_links()
        elif source is self._door:
            self._accept_guest()
        elif source in self._guests:
            self._greet(source)
        elif source in self._strangers:
            self._meet(source)
        elif source in (self._downstream, self._first):
            self._lose()  # nothing is ever said there
        elif source in self._upstream.values():
            self._take_rows(source)
        elif source in self._heirs:
            self._heed(source)

    def _obey(self) -> None:
        message, _ = frames.receive(self._control)
        if isinstance(message, Load):
            self._load(message)
        elif isinstance(message, Wire):
            self._wire(message)

    def _load(self, load: Load) -> None:
        try:
            self._compute = Compute(load)
            if load.identity is not None:
                self._open_door(Path(load.identity), load.listen)
        except CordeeError as error:
            frames.send(self._control, LoadFailed(type(error).__name__, error.message))
            return
        endpoint = "" if self._door is None else self._door.endpoint
        frames.send(self._control, Loaded(self._compute.description, endpoint))

    def _open_door(self, identity: Path, host: str) -> None:
        from cordee.worker.tls_link import Door

        try:
            self._door = Door(identity, host)
        except OSError as error:
            raise BadRequest(
                f"workers cannot listen on {host or 'any address'}: {error}", "listen"
            ) from error
        self._identity = identity
        self._selector.register(self._door, selectors.EVENT_READ)

    def _wire(self, wire: Wire) -> None:
        assert self._compute is not None, "Load comes before Wire"
        self._drop_upstream()
        self._drop_downstream()
        self._drop_heirs()
        self._drop_legacy()
        self._compute.clear()
        self._placement, self._left = wire.placement, ""
        threading.Thread(target=self._connect, args=(wire,), daemon=True).start()

    def _connect(self, wire: Wire) -> None:
        """Reach the neighbours, on a thread of its own: they greet only while they are not greeting us."""
        links: list[socket.socket] = []
        legacy, fault = None, ""
        try:
            links.append(_joined(self._identity, wire.downstream, Join(wire.placement)))
            if wire.first is not None:
                links.append(_joined(self._identity, wire.first, Join(wire.placement, again=True)))
        except (OSError, LinkClosed) as error:  # that stage just died: another Wire follows
            fault = str(error) or "it closed the link"
        if wire.sources and not fault and self._identity is not None:
            from cordee.worker.kv_transfer import Legacy

            legacy = Legacy.of(self._identity, wire.sources)
        self._connected.put((wire, links, legacy, fault))
        self._waker.send(b".")

    def _take_links(self) -> None:
        self._woken.recv(1)
        wire, links, legacy, fault = self._connected.get()
        if fault or wire.placement != self._placement or self._downstream is not None:
            for peer in [*links, *([] if legacy is None else [legacy])]:
                peer.close()
            frames.send(self._control, WireFailed(wire.placement, fault or "another one was wired"))
            return
        self._downstream = links[0]
        self._first = links[1] if len(links) > 1 else None
        self._legacy = legacy
        for peer in links:
            self._selector.register(peer, selectors.EVENT_READ)
        self._adopt()
        frames.send(self._control, Wired(wire.placement))

    def _accept(self) -> None:
        """Let a peer in; whoever says nothing costs a place among PEERS_MAX and no time."""
        peer, _ = self._inbox.accept()
        self._let_in(peer, self._strangers)

    def _let_in(self, peer, among: list, at_most: int = PEERS_MAX) -> None:
        if len(among) == at_most:
            self._forget(among[0], among).close()
        among.append(peer)
        self._selector.register(peer, selectors.EVENT_READ)

    def _forget(self, peer, among: list):
        among.remove(peer)
        self._selector.unregister(peer)
        return peer

    def _accept_guest(self) -> None:
        assert self._door is not None
        try:
            guest = self._door.accept()
        except LinkClosed:
            return
        if guest is not None:
            self._let_in(guest, self._guests)

    def _greet(self, guest: Guest) -> None:
        self._selector.unregister(guest)  # the link that it becomes has the same file descriptor
        try:
            peer = guest.greet()
        except LinkClosed:
            self._guests.remove(guest)
            return
        if peer is None:
            self._selector.register(guest, selectors.EVENT_READ)
        else:
            self._guests.remove(guest)
            self._let_in(peer, self._strangers)

    def _meet(self, stranger: socket.socket) -> None:
        """Hear which placement a peer joins; it may have learnt of it before this worker."""
        peer = self._forget(stranger, self._strangers)
        peer.settimeout(JOIN_SECONDS)
        try:
            message, _ = frames.receive(peer)
        except LinkClosed:
            message = None
        if isinstance(message, Inherit) and message.placement in (self._placement, self._left):
            self._let_in(peer, self._heirs, HEIRS_MAX)
            frames.send(self._control, Heirs(len(self._heirs)))
            self._bequeath(peer, message)
            return
        if not isinstance(message, Join):
            peer.close()
            return
        peer.settimeout(frames.SOCKET_SECONDS)
        if len(self._early) == PEERS_MAX:
            self._early.pop(next(iter(self._early))).close()
        self._early[message] = peer
        self._adopt()

    def _adopt(self) -> None:
        """Take rows from the stages that joined this placement, once there is somewhere to send theirs."""
        if self._downstream is None:
            return
        for join in (Join(self._placement), Join(self._placement, again=True)):
            if join in self._early:
                self._drop(join.again)
                self._upstream[join.again] = self._early.pop(join)
                self._selector.register(self._upstream[join.again], selectors.EVENT_READ)

    def _take_rows(self, source: socket.socket) -> None:
        try:
            message, payload = frames.receive(source)
        except LinkClosed:
            message, payload = None, memoryview(b"")
        if not isinstance(message, Rows | Halt | Recall) or message.placement != self._placement:
            self._lose()
        elif isinstance(message, Rows):
            self._run(message, payload)
        elif isinstance(message, Halt):
            self._halt(message)
        else:
            self._recall(message)

    def _run(self, message: Rows, payload: memoryview) -> None:
        assert self._compute is not None
        if not self._inherit(message):
            return
        answer, rows = self._compute.run(message, payload)
        if isinstance(answer, Rows):
            self._send(answer, rows)
        elif message.batch > self._halted and self._compute.goes_round(message, answer):
            self._gathered.setdefault(answer.batch, []).append(answer)
            if time.monotonic() - self._told >= GATHER_SECONDS:
                self._tell(answer.batch, last=False)
            self._send_round(*again(message, answer))
        else:
            self._gathered.setdefault(answer.batch, []).append(answer)
            self._tell(answer.batch, last=True)

    def _tell(self, batch: int, *, last: bool) -> None:
        """Send the tokens of a micro-batch that were gathered."""
        *before, newest = self._gathered.pop(batch)
        self._told = time.monotonic()
        earlier = tuple(tokens.choices for tokens in before)
        self._send(msgspec.structs.replace(newest, earlier=earlier, last=last))

    def _inherit(self, message: Rows) -> bool:
        """Take over what the runs want of the placement before; without it the placement is lost."""
        assert self._compute is not None
        for run in message.runs:
            if not run.inherit:
                continue
            held = self._recalled.get(run.sequence)
            try:
                if self._legacy is None or held is None:
                    raise LinkClosed("nothing was left to this worker")
                tokens = None if held.tokens is None else held.tokens[: run.first_position]
                parts = self._legacy.take(run.sequence, run.first_position)
                self._compute.restore(run.sequence, Held(run.tenure, run.first_position, tokens), parts)
            except (LinkClosed, StageFailed):
                self._lose()
                return False
        return True

    def _recall(self, message: Recall) -> None:
        """Tell what could be taken over: what all stages before, and all of this one's sources, have."""
        assert self._compute is not None
        self._recalled = {}
        if self._legacy is not None:
            try:
                self._recalled = self._legacy.held()
            except LinkClosed:
                self._drop_legacy()
        held = self._recalled
        if message.held is not None:
            from cordee.worker.kv_transfer import both

            held = both(message.held, held)
        if self._compute.description.is_last:
            self._send(Recalled(message.placement, held))
        else:
            self._send(Recall(message.placement, held))

    def _heed(self, heir: socket.socket) -> None:
        """An heir wants something: the next placement is there, and this one has nothing to do any more."""
        try:
            message, _ = frames.receive(heir)
        except LinkClosed:
            message = None
        if isinstance(message, Recall) and self._placement:
            self._lose()
        self._bequeath(heir, message)

    def _bequeath(self, heir: socket.socket, message: Message | None) -> None:
        from cordee.worker.kv_transfer import bequeath

        try:
            bequeath(self._compute, heir, message, self._left)
        except LinkClosed:
            self._forget(heir, self._heirs).close()
            frames.send(self._control, Heirs(len(self._heirs)))

    def _halt(self, message: Halt) -> None:
        assert self._compute is not None
        if self._compute.description.is_last:
            self._halted = max(self._halted, message.batch)
        else:
            self._send(message)

    def _send(self, message: Data, payload: bytes | memoryview = b"") -> None:
        if self._downstream is None:
            return
        try:
            frames.send(self._downstream, message, payload)
        except LinkClosed:
            self._lose()

    def _send_round(self, message: Rows, payload: memoryview) -> None:
        if self._first is None:
            self._round.append((message, payload))
            return
        try:
            frames.send(self._first, message, payload)
        except LinkClosed:
            self._lose()

    def _lose(self) -> None:
        """A link is gone: so is what this placement computed together."""
        self._drop_upstream()
        self._drop_downstream()
        placement, self._placement = self._placement, ""
        self._left = placement or self._left
        frames.send(self._control, Broken(placement))

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
                self._selector.unregister(peer)
                peer.close()
        self._downstream = self._first = None
        self._round.clear()
        self._gathered.clear()

    def _drop_heirs(self) -> None:
        for heir in list(self._heirs):
            self._forget(heir, self._heirs).close()

    def _drop_legacy(self) -> None:
        if self._legacy is not None:
            self._legacy.close()
        self._legacy, self._recalled = None, {}


def _joined(identity: Path | None, target: str, join: Join) -> socket.socket:
    """A link to the worker, or the service, that is there.

    Raises:
        OSError, LinkClosed: nobody takes it.
    """
    if target.startswith("/"):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(frames.SOCKET_SECONDS)
        peer.connect(target)
    else:
        from cordee.worker import tls_link

        assert identity is not None, "who has neighbours on other machines listens for them"
        peer = tls_link.connect(identity, target)
    frames.send(peer, join)
    return peer


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
    frames.send(control, Hello(worker_id))
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    try:
        Worker(control, inbox).serve()
    except CordeeError as error:
        sys.exit(f"stage: {error.message}")


if __name__ == "__main__":
    main()
