"""The bus between the agents of a cluster, over zenoh: `ZenohBus` is a `cordee.net.bus.Bus`.

Every link is TLS with a certificate on both sides; no other listener is opened, no other protocol spoken.
Peers are found by multicast (on a port of the cluster's own, so that two clusters do not contact each other),
by addresses given with `--peer`, by those remembered from last time, and by gossip. The multicast messages, a
random id and addresses, are all that travels outside of TLS.

**Access.** Beside the cluster's authority zenoh trusts the web's public authorities when it connects, and
this cannot be switched off; and anybody can answer its multicast with an address of theirs. So a link alone
does not make a member. zenoh's access control lets nothing in or out except for common names that only the
cluster's authority signs (`identity.slots`), without those of removed nodes; a removed node, which may have
been asleep when it was removed, may see one key: the one that tells it so. The list is read when a session
opens, and so is the listener's certificate: `refresh` reopens the session after a removal or a renewal, in
about 0.1 s, on the same port. Host names would add nothing and are not verified: addresses change, ids do
not. The same list says what each member may say: only what is under its own keys (zenoh_config.py).

**Threads.** zenoh calls on its own threads; everything is handed to the event loop, in order, through bounded
inboxes. Sending may block while a neighbour does not take data, and so happens on threads of this module.
Everything on the bus is soft state: what a full queue drops, its sender repeats.
"""

import asyncio
import contextlib
import json
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import zenoh
from zenoh.handlers import Callback  # pyright: ignore[reportMissingModuleSource] - in the native module

from cordee.errors import BadRequest, SetupNeeded
from cordee.net import address
from cordee.net.bus import PORT, REMOVED, Answer, BusOptions, speaker
from cordee.net.claims import CLAIMS_MAX, Claims
from cordee.net.identity import Identity, revoked_node
from cordee.net.peers import Peers
from cordee.net.zenoh_config import MESSAGE_BYTES_MAX, RUNTIME, session_config

INBOX_MESSAGES_MAX = 4096  # a second of heartbeats and tokens of the largest cluster
INBOX_BYTES_MAX = 32 << 20  # eight of the longest messages
# Of what waits in an inbox, how much may be of one member: it drops nothing of the others'.
SPEAKER_MESSAGES_MAX = 64
SPEAKER_KEYS_MAX = 8  # of one member that are watched: it has one, and in the moment of a reopening another
QUESTION_BYTES_MAX = 256 << 10  # of a query: which chunks, or a certificate
OUTBOX_MESSAGES_MAX = 1024  # more means that no neighbour takes any data
QUERIES_MAX = 64  # that are answered at once; the rest get no answer and are asked again
WATCHED_MAX = 16_384  # keys of one pattern: two of each node, and many that a member may make up
ANSWERS_MAX = 256  # to one query: one from each node
REPLY_THREADS = 2  # chunks to two slow neighbours do not stop those to a third
PORT_SECONDS = 0.01  # between checks whether the port of a closed session is free
AT = "at/*/*"  # nodes and where they say that they are
LOOK_AGAIN_SECONDS = 10.0
ADDRESS_SECONDS = 2.0  # between checks of this machine's addresses
SETTLE_SECONDS = 2.0  # after a session was reopened: nodes that have not come back by then are gone


class Inbox:
    """Hands items from any thread to the event loop, in order; when it is full, new ones are dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[..., None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._items: deque[tuple[Any, ...]] = deque()
        self._bytes = 0
        self._speakers: Counter[str] = Counter()

    def put(self, *item: Any, weight_bytes: int = 0, speaker: str = "") -> None:
        """Queue an item of a speaker, if that is known; from any thread."""
        with self._lock:
            full = len(self._items) >= INBOX_MESSAGES_MAX or self._speakers[speaker] >= SPEAKER_MESSAGES_MAX
            if full or self._bytes + weight_bytes > INBOX_BYTES_MAX:
                return
            self._items.append((weight_bytes, speaker, item))
            self._bytes += weight_bytes
            if speaker:
                self._speakers[speaker] += 1
            is_first = len(self._items) == 1
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        """Deliver one and come back for the next, so that a flood does not keep the loop from other work."""
        with self._lock:
            weight_bytes, speaker, item = self._items[0]
        try:
            self._deliver(*item)
        finally:
            with self._lock:
                self._items.popleft()
                self._bytes -= weight_bytes
                if speaker:
                    self._speakers[speaker] -= 1
                more = bool(self._items)
            if more:
                self._loop.call_soon(self._drain)


@dataclass
class _Watch:
    """The keys that are alive under a pattern, as they were reported to the handler."""

    pattern: str
    handler: Callable[[str, bool], None]
    reported: set[str] = field(default_factory=set[str])
    seen: set[str] = field(default_factory=set[str])  # by the present session

    def note(self, key: str, alive: bool) -> None:
        """The present session saw a key appear or disappear."""
        if alive and key not in self.seen:
            ours = sum(speaker(each) == speaker(key) for each in self.seen)
            if ours >= SPEAKER_KEYS_MAX or len(self.seen) >= WATCHED_MAX:
                return
        (self.seen.add if alive else self.seen.discard)(key)
        if alive != (key in self.reported):
            (self.reported.add if alive else self.reported.discard)(key)
            self.handler(key, alive)

    def settle(self) -> None:
        """Report as gone the keys that did not come back after the session was reopened."""
        for key in self.reported - self.seen:
            self.note(key, False)


class ZenohBus:
    """`Bus` over zenoh. Make it with `await ZenohBus.open(...)`; end it with `await close()`, or the process
    does not end."""

    def __init__(self, identity: Identity, options: BusOptions) -> None:
        self._identity = identity
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._prefix = f"cordee/{identity.cluster}/"
        self._peers = Peers(identity)
        given = [address.peer(each, PORT)[0] for each in options.peers]
        self._claims = Claims(identity, self._peers, given)
        self._session: zenoh.Session | None = None
        self._tokens: list[zenoh.LivelinessToken] = []  # held here: zenoh undeclares those that are dropped
        self._turn = asyncio.Lock()  # one reopening at a time
        self._subscriptions: list[tuple[str, Inbox]] = []
        self._services: list[tuple[str, Answer]] = []
        self._announced: list[str] = []
        self._watches: list[_Watch] = []
        self._tasks: set[asyncio.Task[None]] = set()  # answers under way
        self._closing: set[asyncio.Task[None]] = set()  # earlier sessions
        self._loops: list[asyncio.Task[None]] = []
        self._announced_addresses: list[str] = []
        self._queued = 0
        self._sender = ThreadPoolExecutor(1, "bus-send")
        self._repliers = ThreadPoolExecutor(REPLY_THREADS, "bus-reply")
        options.check()
        listening = options.listening()
        self._host, self._port = listening.host, _free_port(listening)

    @classmethod
    async def open(cls, identity: Identity, options: BusOptions) -> "ZenohBus":
        """Join the bus; returns at once, whether or not a peer is there.

        Raises:
            BadRequest: an option makes no sense here, or the address cannot be listened on.
            SetupNeeded: zenoh cannot open a session; the message says why.
        """
        bus = cls(identity, options)
        try:
            await bus.refresh()
        except BaseException:
            await bus.close()
            raise
        bus.watch(AT, bus._remember)
        bus._loops = [asyncio.create_task(each) for each in (bus._follow_addresses(), bus._look_again())]
        return bus

    @property
    def addresses(self) -> list[str]:
        """See `Bus.addresses`."""
        return address.own(self._host, self._port)

    @property
    def remembered(self) -> set[str]:
        """See `Bus.remembered`."""
        return self._peers.known.keys() - self._identity.revoked

    def forget(self, node: str) -> None:
        """See `Bus.forget`."""
        self._peers.forget(node)

    async def refresh(self) -> None:
        """Reopen the session with the present certificate and removals; see `Bus.refresh`.

        Raises:
            SetupNeeded: zenoh cannot open a session.
        """
        async with self._turn:
            await self._end_session()
            for watch in self._watches:
                watch.seen.clear()
            try:
                await self._open_session()
            finally:
                self._loop.call_later(SETTLE_SECONDS, self._settle, self._session)
            self._announced_addresses = self.addresses
            self._declare_token(f"at/{self._identity.node}/{','.join(self._announced_addresses)}")
            for entry in self._identity.revocations:
                self._declare_token(REMOVED.format(revoked_node(entry), self._identity.node, entry.hex()))
            for pattern, inbox in self._subscriptions:
                self._declare_subscriber(pattern, inbox)
            for key, handler in self._services:
                self._declare_queryable(key, handler)
            for key in self._announced:
                self._declare_token(key)
            for watch in self._watches:
                self._declare_watch(watch)

    async def _open_session(self) -> None:
        given = [address.peer(peer, PORT) for peer in self._options.peers]
        known = [address.parse(each, PORT) for each in self._peers.addresses()]
        own = {address.parse(each, PORT) for each in self.addresses}
        peers = [each for each in dict.fromkeys((*given, *known)) if each not in own]
        settings = session_config(self._identity, self._host, self._port, peers, self._options.scouting)
        config = zenoh.Config.from_json5(json.dumps(settings))
        os.environ.setdefault(*RUNTIME)
        opening = asyncio.ensure_future(asyncio.to_thread(zenoh.open, config))
        try:
            self._session = await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._session = await opening  # a moment later; `close` finds it and ends it
            raise
        except zenoh.ZError as error:
            raise SetupNeeded(
                f"The bus cannot be opened on {address.text(self._host, self._port)} ({error}): "
                "choose another address with --listen."
            ) from error

    def publish(self, key: str, payload: bytes) -> None:
        """See `Bus.publish`; what is longer than MESSAGE_BYTES_MAX is dropped, also where it comes."""
        session = self._session
        if session is None or len(payload) > MESSAGE_BYTES_MAX:
            return
        self._send(
            session.put,  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - no return type
            self._prefix + key,
            payload,
            congestion_control=zenoh.CongestionControl.BLOCK,
            priority=zenoh.Priority.INTERACTIVE_HIGH,
            express=True,
        )

    def subscribe(self, pattern: str, handler: Callable[[str, bytes], None]) -> None:
        """See `Bus.subscribe`."""
        inbox = Inbox(self._loop, handler)
        self._subscriptions.append((pattern, inbox))
        self._declare_subscriber(pattern, inbox)

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        """See `Bus.query`; at most ANSWERS_MAX answers."""
        answers: list[bytes] = []
        finished = asyncio.Event()

        def on_reply(reply: zenoh.Reply) -> None:
            if reply.ok is not None and len(answers) < ANSWERS_MAX:
                answers.append(reply.ok.payload.to_bytes())

        def on_done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(finished.set)

        session = self._session
        if session is None:
            return []
        cancel = zenoh.CancellationToken()
        self._send(
            session.get,
            self._prefix + pattern,
            Callback(on_reply, on_done, indirect=False),
            payload=payload,
            target=zenoh.QueryTarget.ALL,
            consolidation=zenoh.ConsolidationMode.NONE,
            timeout=seconds,
            priority=zenoh.Priority.DATA_LOW,
            cancellation_token=cancel,
        )
        try:
            async with asyncio.timeout(seconds):
                await finished.wait()
        except TimeoutError:
            pass
        finally:
            self._send(cancel.cancel)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - as put
        return list(answers)

    def serve(self, key: str, handler: Answer) -> None:
        """See `Bus.serve`; at most QUERIES_MAX at once."""
        self._services.append((key, handler))
        self._declare_queryable(key, handler)

    def announce(self, key: str) -> None:
        """See `Bus.announce`."""
        self._announced.append(key)
        self._declare_token(key)

    def watch(self, pattern: str, handler: Callable[[str, bool], None]) -> None:
        """See `Bus.watch`."""
        watch = _Watch(pattern, handler)
        self._watches.append(watch)
        self._declare_watch(watch)

    async def close(self) -> None:
        """See `Bus.close`."""
        async with self._turn:
            for each in self._loops:
                each.cancel()
            await self._end_session()
        for task in self._tasks:
            task.cancel()
        await self._claims.close()
        await asyncio.gather(*self._closing)
        for pool in (self._sender, self._repliers):
            await asyncio.to_thread(pool.shutdown)

    async def _end_session(self) -> None:
        """Close the session, and wait until its port is free.

        A link that broke a moment ago holds up zenoh's close for as long as 10 s, but not its listener: the
        rest of the close goes on beside the next session.
        """
        session, self._session = self._session, None
        self._tokens.clear()
        if session is None:
            return
        closing = asyncio.create_task(asyncio.to_thread(_close, session))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        while not closing.done() and not _is_free(self._host, self._port):
            await asyncio.sleep(PORT_SECONDS)

    async def _follow_addresses(self) -> None:
        """Reopen the session when this machine's addresses change, since zenoh keeps those it opened with;
        and when it could not be opened."""
        while True:
            await asyncio.sleep(ADDRESS_SECONDS)
            is_stale = self._session is None or set(self.addresses) != set(self._announced_addresses)
            if is_stale and not self._turn.locked():
                with contextlib.suppress(SetupNeeded):  # the next round tries again
                    await self.refresh()

    async def _look_again(self) -> None:
        """Look at where nodes say that they are, for what was dropped as too many said it at once."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            said = [key for watch in self._watches if watch.pattern == AT for key in watch.reported]
            for key in random.sample(said, min(len(said), CLAIMS_MAX)):
                self._remember(key, True)

    def _settle(self, session: zenoh.Session | None) -> None:
        if session is self._session:
            for watch in self._watches:
                watch.settle()

    def _send(self, function: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Call a function on the sending thread, in order, unless too much waits there."""
        if self._queued >= OUTBOX_MESSAGES_MAX:
            return

        def call() -> None:
            with contextlib.suppress(zenoh.ZError):  # the session closed meanwhile
                function(*arguments, **options)

        self._queued += 1
        self._sender.submit(call).add_done_callback(lambda _: self._sent())

    def _sent(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._count_sent)

    def _count_sent(self) -> None:
        self._queued -= 1

    def _declare_subscriber(self, pattern: str, inbox: Inbox) -> None:
        def on_sample(sample: zenoh.Sample) -> None:
            if len(sample.payload) <= MESSAGE_BYTES_MAX:
                key, payload = self._key(sample.key_expr), sample.payload.to_bytes()
                inbox.put(key, payload, weight_bytes=len(payload), speaker=speaker(key))

        if self._session is not None:
            self._session.declare_subscriber(self._prefix + pattern, Callback(on_sample, indirect=False))

    def _declare_queryable(self, key: str, handler: Answer) -> None:
        def start(query: zenoh.Query, payload: bytes) -> None:
            if len(self._tasks) < QUERIES_MAX:
                task = self._loop.create_task(self._answer(key, query, payload, handler))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        inbox = Inbox(self._loop, start)

        def on_query(query: zenoh.Query) -> None:
            if query.payload is None:
                inbox.put(query, b"")
            elif len(query.payload) <= QUESTION_BYTES_MAX:
                inbox.put(query, query.payload.to_bytes(), weight_bytes=len(query.payload))

        if self._session is not None:
            self._session.declare_queryable(self._prefix + key, Callback(on_query, indirect=False))

    async def _answer(self, key: str, query: zenoh.Query, payload: bytes, handler: Answer) -> None:
        answer = await handler(payload)
        if answer is not None:
            with contextlib.suppress(zenoh.ZError):  # the asker is gone
                await self._loop.run_in_executor(
                    self._repliers,
                    query.reply,  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - as put
                    self._prefix
                    + key,  # not the question's, which may be a pattern: nobody answers for others
                    answer,
                )

    def _declare_token(self, key: str) -> None:
        if self._session is not None:
            self._tokens.append(self._session.liveliness().declare_token(self._prefix + key))

    def _declare_watch(self, watch: _Watch) -> None:
        session = self._session

        def note(key: str, alive: bool) -> None:
            if self._session is session:
                watch.note(key, alive)

        inbox = Inbox(self._loop, note)

        def on_token(sample: zenoh.Sample) -> None:
            key = self._key(sample.key_expr)
            inbox.put(key, sample.kind == zenoh.SampleKind.PUT, speaker=speaker(key))

        if session is not None:
            session.liveliness().declare_subscriber(
                self._prefix + watch.pattern, Callback(on_token, indirect=False), history=True
            )

    def _key(self, key: zenoh.KeyExpr) -> str:
        return str(key).removeprefix(self._prefix)

    def _remember(self, key: str, alive: bool) -> None:
        """Keep where a node is, if that is so; its token is `at/NODE/ADDRESSES`."""
        _, node, addresses = key.split("/")
        if alive and node != self._identity.node:
            self._claims.hear(node, addresses)


def _free_port(listening: address.Listening) -> int:
    """The port to listen on: the wanted one; if taken and nobody chose it, the range's last free one."""
    wanted = address.text(listening.host, listening.port) if listening.host else f"Port {listening.port}"
    reason = ""
    others = () if listening.is_chosen else (*reversed(address.PORTS), 0)
    for port in (listening.port, *others):
        try:
            with address.listener(listening.host, port) as probe:
                return probe.getsockname()[1]
        except OSError as error:
            reason = reason or address.refusal(error, port)
    raise BadRequest(f"{wanted} cannot be used ({reason}): choose another with --listen HOST:PORT.")


def _close(session: zenoh.Session) -> None:
    """Close a session; if the first attempt gives up waiting, the second finds the work done."""
    for _ in range(2):
        with contextlib.suppress(zenoh.ZError):
            session.close()  # pyright: ignore[reportUnknownMemberType] - zenoh declares no return type
            return


def _is_free(host: str, port: int) -> bool:
    try:
        address.listener(host, port).close()
    except OSError:
        return False
    return True
