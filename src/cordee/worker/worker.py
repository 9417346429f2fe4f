"""A stage worker: one process, one stage. Started with the arguments ID CONTROL INBOX.

CONTROL is its parent's socket, INBOX the path at which this worker listens for the stage before it. One
thread does everything except connecting to the neighbours, since the stage is the only thing worth waiting
for:

    start -> LoadStage -> loaded -> Wire -> wired: rows in, rows (or tokens) out
                            ^                 |
                            '--- Wire again --' a link was lost: Broken, and rows are dropped until then

Rows come through the inbox from this machine, and through a listener of tls_link.py from others: there only
from the node that the Wire names, as its certificate shows. A micro-batch that goes round comes back to the
first stage from the last, or stays here if that is the same worker; its tokens go to the scheduler as well.

The process ends when its control link does, even in the middle of a decode, so that no worker outlives its
parent: a second thread waits for that and for nothing else. A failure in the stage ends the process too: the
parent replaces it, which also gets rid of any state that made it fail.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from cordee.errors import BadRequest, CordeeError, StageFailed
from cordee.net.crowd import Crowd
from cordee.privacy import no_core_dumps
from cordee.system import links, processes
from cordee.worker import frames
from cordee.worker.compute import Compute, again
from cordee.worker.frames import FrameLate, LinkClosed
from cordee.worker.joining import Peer, joined, keep_early
from cordee.worker.messages import (
    AdmitReaders,
    Broken,
    Data,
    Halt,
    HeldSequence,
    Hello,
    Join,
    KvAnswer,
    KvQuery,
    KvReaders,
    Loaded,
    LoadFailed,
    LoadStage,
    Message,
    Prepare,
    Prepared,
    ReaderJoin,
    Recompute,
    Record,
    RecordQuery,
    Rows,
    Tokens,
    Wire,
    Wired,
    WireFailed,
)

if TYPE_CHECKING:  # workers of one machine start sooner without TLS
    from collections.abc import Callable, Iterable

    from cordee.worker.kv_transfer import KvSources
    from cordee.worker.tls_link import Handshake, TlsListener

PEERS_MAX = 16  # that connected and have not said what they join
PEERS_OF_NODE_MAX = 4  # those of a new wiring while the old one is closed
# Connections of other machines, in all and of one address: those that have said nothing, which cost a socket
# each, and those whose handshake is under way. Whoever opens more of them loses the oldest (net/crowd.py).
SILENT_MAX = (64, 64)
HANDSHAKES_MAX = (16, 8)
BACKLOG = 64  # local peers that connect during a decode: with a full backlog the right one would be refused
JOIN_SECONDS = 1.0  # for the rest of a Join that began to arrive: it is one small write
KV_READERS_MAX = 16  # workers of the next placement whose layers overlap with this one's, and some that fell
# The tokens of a micro-batch that goes round are held back for this long, to be sent together: nobody reads
# faster, and each message costs the scheduler's process as much as a layer of a small model.
GATHER_SECONDS = 0.02


class _Closable(Protocol):
    """What a selector can wait for, and what can be closed."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


T = TypeVar("T")
C = TypeVar("C", bound=_Closable)


class Worker:
    """The state of a worker process."""

    def __init__(self, control: socket.socket, inbox: links.LocalListener) -> None:
        self._control = control
        self._inbox = inbox
        self._upstream: dict[bool, socket.socket] = {}  # by whether what comes there goes round
        self._downstream: socket.socket | None = None
        self._first: socket.socket | None = None  # where micro-batches go to again; None: to this worker
        self._round: deque[tuple[Rows, memoryview]] = deque()  # that go round in this worker
        self._halted = 0  # the newest micro-batch that must not go round again
        self._gathered: dict[int, list[Tokens]] = {}  # of micro-batches that go round; STEPS_MAX each at most
        self._sent_at = 0.0  # when tokens were sent last
        self._wiring = ""
        self._left_wiring = ""  # the last wiring that was left, whose sequences are still here
        self._kv_readers: Crowd[socket.socket] = Crowd(KV_READERS_MAX, KV_READERS_MAX)
        self._admitted: tuple[str, frozenset[str]] = ("", frozenset())  # a wiring, and who may read from it
        self._early_readers: dict[tuple[str, str], socket.socket] = {}  # by wiring and node, not admitted yet
        self._kv_sources: KvSources | None = None
        self._kv_found: dict[int, HeldSequence] = {}  # what the sources hold
        self._identity: Path | None = None  # of this node, where other machines take part
        self._listener: TlsListener | None = None
        self._silent: Crowd[Handshake] = Crowd(*SILENT_MAX)  # of other machines, that said nothing yet
        self._handshakes: Crowd[Handshake] = Crowd(*HANDSHAKES_MAX)  # that are still proving who they are
        # That have not said yet what they join.
        self._unjoined: Crowd[Peer] = Crowd(PEERS_MAX, PEERS_OF_NODE_MAX)
        self._early: dict[
            tuple[Join, str], socket.socket
        ] = {}  # that joined before this worker's Wire, by node
        self._wired_by: Wire | None = None  # the last Wire
        self._compute: Compute | None = None
        self._done: SimpleQueue[Callable[[], None]] = SimpleQueue()  # what other threads want done here
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(inbox, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> None:
        """Handle messages until the control link ends."""
        with contextlib.suppress(LinkClosed):  # of the control link; the others are handled where they end
            while True:
                for key, _ in self._selector.select(0 if self._round else None):
                    if key.fileobj is self._control:
                        self._handle_control()
                    else:
                        self._handle(key.fileobj)
                if self._round:
                    self._run(*self._round.popleft())

    def _handle(self, source: object) -> None:
        """A source other than the control link is readable; one that was dropped a moment ago is ignored."""
        if source is self._inbox:
            self._accept()
        elif source is self._woken:
            self._woken.recv(1)
            self._done.get()()
        elif source is self._listener:
            self._accept_handshake()
        elif (handshake := _same([*self._silent, *self._handshakes], source)) is not None:
            self._continue_handshake(handshake)
        elif (peer := _same(self._unjoined, source)) is not None:
            self._read_join(peer)
        elif source in (self._downstream, self._first):
            self._link_lost()  # nothing is ever sent here on these links
        elif (upstream := _same(self._upstream.values(), source)) is not None:
            self._handle_rows(upstream)
        elif (reader := _same(self._kv_readers, source)) is not None:
            self._handle_kv_reader(reader)

    def _handle_control(self) -> None:
        message, payload = frames.receive(self._control)
        if isinstance(message, LoadStage):
            self._load(message)
        elif isinstance(message, Wire):
            self._wire(message)
        elif isinstance(message, RecordQuery):
            self._answer_record(message)
        elif isinstance(message, Recompute):
            assert self._compute is not None, "LoadStage comes before Recompute"
            frames.send(self._control, *self._compute.recompute(message, payload))
        elif isinstance(message, AdmitReaders):
            self._admitted = (message.wiring, frozenset(message.nodes))
            for wiring, node in list(self._early_readers):
                if wiring == message.wiring and node in message.nodes:
                    self._attach_reader(self._early_readers.pop((wiring, node)), ReaderJoin(wiring))

    def _answer_record(self, query: RecordQuery) -> None:
        """What this stage received and sent, for a spot check; a wiring that was left counts, too."""
        if self._compute is None or query.wiring not in (self._wiring, self._left_wiring):
            frames.send(self._control, Record(query.number))
        else:
            frames.send(self._control, *self._compute.records.answer(query))

    def _load(self, load: LoadStage) -> None:
        try:
            self._compute = Compute(load)
            if load.identity is not None:
                self._open_listener(Path(load.identity), load.listen)
        except CordeeError as error:
            frames.send(self._control, LoadFailed(type(error).__name__, error.message))
            return
        endpoint = "" if self._listener is None else self._listener.endpoint
        frames.send(self._control, Loaded(self._compute.description, endpoint))

    def _open_listener(self, identity: Path, host: str) -> None:
        from cordee.worker.tls_link import TlsListener

        try:
            self._listener = TlsListener(identity, host)
        except OSError as error:
            raise BadRequest(
                f"workers cannot listen on {host or 'any address'}: {error}", "listen"
            ) from error
        self._identity = identity
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _wire(self, wire: Wire) -> None:
        assert self._compute is not None, "LoadStage comes before Wire"
        self._drop_upstream()
        self._drop_downstream()
        self._drop_kv_readers()
        self._drop_kv_sources()
        self._compute.clear()
        self._wiring, self._left_wiring, self._wired_by = wire.wiring, "", wire
        threading.Thread(target=self._connect, args=(wire,), daemon=True).start()

    def _connect(self, wire: Wire) -> None:
        """Connect to the neighbours, on a thread of its own: they may be connecting to this worker."""
        links, fault = joined(self._identity, wire)
        kv_sources = None
        if wire.sources and not fault and self._identity is not None:
            from cordee.worker.kv_transfer import KvSources

            kv_sources = KvSources.of(self._identity, wire.sources)
        self._soon(lambda: self._attach_links(wire, links, kv_sources, fault))

    def _soon(self, action: Callable[[], None]) -> None:
        """Have something done by the thread that does everything; for any other."""
        self._done.put(action)
        self._waker.send(b".")

    def _attach_links(
        self, wire: Wire, links: list[socket.socket], kv_sources: KvSources | None, fault: WireFailed | None
    ) -> None:
        if fault or wire.wiring != self._wiring or self._downstream is not None:
            for peer in [*links, *([] if kv_sources is None else [kv_sources])]:
                peer.close()
            frames.send(self._control, fault or WireFailed(wire.wiring, "another Wire came"))
            return
        self._downstream = links[0]
        self._first = links[1] if len(links) > 1 else None
        self._kv_sources = kv_sources
        for peer in links:
            self._selector.register(peer, selectors.EVENT_READ)
        self._attach_upstream()
        frames.send(self._control, Wired(wire.wiring))

    def _accept(self) -> None:
        """Accept a peer; one that sends nothing takes one of PEERS_MAX places, and no time."""
        peer, _ = self._inbox.accept()
        self._admit(Peer(peer, ""), self._unjoined, "")

    def _admit(self, peer: C, among: Crowd[C], owner: str) -> None:
        out = among.add(peer, owner)
        if out is not None:
            self._forget(out, among).close()
        self._selector.register(peer, selectors.EVENT_READ)

    def _forget(self, peer: C, among: Crowd[C]) -> C:
        among.discard(peer)
        self._selector.unregister(peer)
        return peer

    def _accept_handshake(self) -> None:
        assert self._listener is not None
        handshake = self._listener.accept()
        if handshake is not None:
            self._admit(handshake, self._silent, handshake.address)

    def _continue_handshake(self, handshake: Handshake) -> None:
        among = self._silent if handshake.silent else self._handshakes
        self._selector.unregister(handshake)  # the link that it becomes has the same file descriptor
        try:
            came = handshake.proceed()
        except LinkClosed:
            among.discard(handshake)
            return
        if came is None and among is self._handshakes:
            self._selector.register(handshake, selectors.EVENT_READ)
            return
        among.discard(handshake)
        if came is None:
            self._admit(handshake, self._handshakes, handshake.address)
        else:
            node, peer = came
            self._admit(Peer(peer, node), self._unjoined, node)

    def _read_join(self, caller: Peer) -> None:
        """Read which wiring a peer joins; the peer may have learnt of it before this worker."""
        self._forget(caller, self._unjoined)
        peer = caller.link
        peer.settimeout(JOIN_SECONDS)
        if not caller.node and not self._inbox.admits(peer):
            peer.close()
            return
        try:
            message, _ = frames.receive(peer, 0, frames.OPENING_BYTES_MAX)
        except LinkClosed:
            message = None
        if isinstance(message, ReaderJoin):
            self._read_reader_join(caller, message)
            return
        if not isinstance(message, Join):
            peer.close()
            return
        peer.settimeout(frames.SOCKET_SECONDS)
        keep_early(self._early, (message, caller.node), peer)
        self._attach_upstream()

    def _read_reader_join(self, caller: Peer, join: ReaderJoin) -> None:
        """A worker of the next placement; its node may have learnt before ours that there is one."""
        wiring, nodes = self._admitted
        if join.wiring not in (self._wiring, self._left_wiring):
            caller.close()
        elif join.wiring == wiring and caller.node in nodes:
            self._attach_reader(caller.link, join)
        else:
            keep_early(self._early_readers, (join.wiring, caller.node), caller.link)

    def _attach_reader(self, reader: socket.socket, join: ReaderJoin) -> None:
        self._admit(reader, self._kv_readers, "")
        frames.send(self._control, KvReaders(len(self._kv_readers)))
        self._serve_kv(reader, join)

    def _attach_upstream(self) -> None:
        """Take rows from the stages that joined this wiring, once there is somewhere to send the results."""
        wire = self._wired_by
        if self._downstream is None or wire is None:
            return
        expected = {
            Join(wire.wiring): wire.upstream_node,
            Join(wire.wiring, again=True): wire.again_node,
        }
        for join, node in expected.items():
            if (join, node) in self._early:
                self._drop(join.again)
                self._upstream[join.again] = self._early.pop((join, node))
                self._selector.register(self._upstream[join.again], selectors.EVENT_READ)

    def _handle_rows(self, source: socket.socket) -> None:
        try:
            message, payload = frames.receive(source)
        except FrameLate as error:
            assert self._wired_by is not None, "links are attached once a Wire came"
            wire, goes_round = self._wired_by, source is self._upstream.get(True)
            self._link_lost(wire.again_node if goes_round else wire.upstream_node, str(error))
            return
        except LinkClosed:
            message, payload = None, memoryview(b"")
        if not isinstance(message, Rows | Halt | KvQuery | Prepare) or message.wiring != self._wiring:
            self._link_lost()
        elif isinstance(message, Rows):
            self._run(message, payload)
        elif isinstance(message, Halt):
            self._halt(message)
        elif isinstance(message, Prepare):
            self._prepare(message)
        else:
            self._query_kv(message)

    def _run(self, message: Rows, payload: memoryview) -> None:
        assert self._compute is not None
        if not self._inherit(message):
            return
        answer, rows = self._compute.run(message, payload)
        if isinstance(answer, Rows):
            self._send(answer, rows)
        elif message.batch > self._halted and self._compute.goes_round(message, answer):
            self._gathered.setdefault(answer.batch, []).append(answer)
            if time.monotonic() - self._sent_at >= GATHER_SECONDS:
                self._send_tokens(answer.batch, last=False)
            self._send_round(*again(message, answer))
        else:
            self._gathered.setdefault(answer.batch, []).append(answer)
            self._send_tokens(answer.batch, last=True)

    def _send_tokens(self, batch: int, *, last: bool) -> None:
        """Send the tokens of a micro-batch that were gathered."""
        *before, newest = self._gathered.pop(batch)
        self._sent_at = time.monotonic()
        earlier = tuple(tokens.choices for tokens in before)
        self._send(msgspec.structs.replace(newest, earlier=earlier, last=last))

    def _inherit(self, message: Rows) -> bool:
        """Take over the sequences that the runs inherit; False where that fails, and the wiring is lost."""
        assert self._compute is not None
        for run in message.runs:
            if not run.inherit:
                continue
            held = self._kv_found.get(run.sequence)
            try:
                if self._kv_sources is None or held is None:
                    raise LinkClosed("this worker has no sources for it")
                tokens = None if held.tokens is None else held.tokens[: run.first_position]
                states = self._kv_sources.read(run.sequence, run.first_position)
                self._compute.restore(
                    run.sequence, HeldSequence(run.tenure, run.first_position, tokens), states
                )
            except (LinkClosed, StageFailed):
                self._link_lost()
                return False
        return True

    def _query_kv(self, message: KvQuery) -> None:
        """Pass on what could be taken over: what all stages before, and all of this one's sources, hold."""
        assert self._compute is not None
        self._kv_found = {}
        if self._kv_sources is not None:
            try:
                self._kv_found = self._kv_sources.held()
            except LinkClosed:
                self._drop_kv_sources()
        held = self._kv_found
        if message.held is not None:
            from cordee.worker.kv_transfer import both

            held = both(message.held, held)
        if self._compute.description.is_last:
            self._send(KvAnswer(message.wiring, held))
        else:
            self._send(KvQuery(message.wiring, held))

    def _handle_kv_reader(self, reader: socket.socket) -> None:
        """A reader sent something; a query means that the next placement takes over: leave this wiring."""
        try:
            message, _ = frames.receive(reader)
        except LinkClosed:
            message = None
        if isinstance(message, KvQuery) and self._wiring:
            self._link_lost()
        self._serve_kv(reader, message)

    def _serve_kv(self, reader: socket.socket, message: Message | None) -> None:
        from cordee.worker.kv_transfer import serve

        try:
            if self._compute is None:
                raise LinkClosed("nothing is loaded here")
            serve(self._compute, reader, message, self._left_wiring)
        except LinkClosed:
            self._forget(reader, self._kv_readers).close()
            frames.send(self._control, KvReaders(len(self._kv_readers)))

    def _halt(self, message: Halt) -> None:
        assert self._compute is not None
        if self._compute.description.is_last:
            self._halted = max(self._halted, message.batch)
        else:
            self._send(message)

    def _prepare(self, message: Prepare) -> None:
        """Have a grammar compiled on another thread, if its answer is sampled here."""
        assert self._compute is not None

        def done(failure: str) -> None:
            self._soon(lambda: self._send_prepared(Prepared(message.wiring, message.number, failure)))

        if self._compute.description.is_last:
            self._compute.grammars.prepare(message.grammar, done)
        else:
            self._send(message)

    def _send_prepared(self, answer: Prepared) -> None:
        if answer.wiring == self._wiring:
            self._send(answer)

    def _send(self, message: Data, payload: bytes | memoryview = b"") -> None:
        if self._downstream is None:
            return
        try:
            frames.send(self._downstream, message, payload)
        except LinkClosed:
            self._link_lost()

    def _send_round(self, message: Rows, payload: memoryview) -> None:
        if self._first is None:
            self._round.append((message, payload))
            return
        try:
            frames.send(self._first, message, payload)
        except LinkClosed:
            self._link_lost()

    def _link_lost(self, late_node: str = "", message: str = "") -> None:
        """A link is gone, and with it what the stages of this wiring computed together."""
        self._drop_upstream()
        self._drop_downstream()
        wiring, self._wiring = self._wiring, ""
        self._left_wiring = wiring or self._left_wiring
        frames.send(self._control, Broken(wiring, late_node, message))

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

    def _drop_kv_readers(self) -> None:
        for reader in self._kv_readers:
            self._forget(reader, self._kv_readers).close()
        for reader in self._early_readers.values():
            reader.close()
        self._early_readers.clear()

    def _drop_kv_sources(self) -> None:
        if self._kv_sources is not None:
            self._kv_sources.close()
        self._kv_sources, self._kv_found = None, {}


def _same(items: Iterable[T], source: object) -> T | None:
    """The item that is this very object, if there is one."""
    return next((each for each in items if each is source), None)


def _end_with(control: socket.socket) -> None:
    """End the process once the other side of its control link is gone, even if the main thread computes."""
    processes.wait_for_hangup(control)
    os._exit(0)


def main() -> None:
    """Connect, listen, serve."""
    no_core_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for its parent to handle
    worker_id, control_path, inbox_path = sys.argv[1:]
    inbox = links.local_listener(Path(inbox_path))
    inbox.listen(BACKLOG)
    control = links.connect(Path(control_path), None)
    frames.send(control, Hello(worker_id))
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    try:
        Worker(control, inbox).serve()
    except CordeeError as error:
        sys.exit(f"stage: {error.message}")
