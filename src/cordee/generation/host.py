"""The host's side of streams: asks of many gateways become streams of one scheduler, its events go back.

Pure: messages, results and the clock are handed in; `drain` gives what is to be sent. See streams.py for the
messages. An ask's life:

    Ask -> (refused | queued and generated) -> its tokens are sent as they come, in one Said for each gateway
           and step; kept until an Assert shows that they arrived, and sent again where it shows the contrary
        -> dropped: an Assert does not name it, a newer ask of its stream came, or its gateway asserted
           nothing for LEASE_SECONDS

- Everything about a gateway and a model is their *session*, which asserts keep alive. Anything that a fault
  wrote into it ends with it, and a gateway that still wants something is told that its asks are unknown, and
  asks again.
- Within a session an ask is started once at most: Asks that are not newer than the last Assert count only if
  it names them; one that was replaced is older than the ask that replaced it; and one that ended, however it
  did, is kept until it is dropped.
- A gateway does not notice that the pipeline is lost: the scheduler replays its own logs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from cordee.errors import BadRequest, CordeeError, Overloaded, StageFailed
from cordee.generation.batches import Event, MicroBatch
from cordee.generation.clock import AwakeClock
from cordee.generation.guessing import Guessing
from cordee.generation.request import NO_GUESSES, Choice, FinishReason, GuessCounts, PromptProgress
from cordee.generation.scheduler import Scheduler
from cordee.generation.streams import (
    STREAMS_MAX,
    Ask,
    Assert,
    Failure,
    Piece,
    Said,
    failure,
    piece,
)
from cordee.generation.suspects import Suspects

# Streams of a gateway that asserts nothing for this long are dropped. Gateways assert every second: ten lost
# in a row are no accident, and a gateway that was merely stopped asks again and loses nothing but time.
LEASE_SECONDS = 10.0
# At a time, of all gateways and models: the nodes of a cluster, several times over, since each restart of a
# node makes a new one.
SESSIONS_MAX = 256
# Tokens of a stream that may be unacknowledged; with an assert each second no pipeline comes near.
WINDOW_TOKENS = 1024


@dataclass(eq=False)
class _Entry:
    """An ask under way, or one whose end the gateway has not acknowledged."""

    ask: int
    stream: int
    name: str  # the scheduler's id
    base: int  # index of the first of `choices`; the gateway has all before
    sent: int  # the first index that was not sent yet
    heard: float  # when it was asked for, or an Assert last named it, in awake seconds
    choices: list[Choice] = field(default_factory=list[Choice])
    prompt_choices: tuple[Choice, ...] = ()  # until the gateway has the first token
    cached_tokens: int = 0
    guesses: GuessCounts = NO_GUESSES
    finish_reason: FinishReason | None = None
    failure: Failure | None = None

    @property
    def has_news(self) -> bool:
        ended = self.finish_reason is not None or self.failure is not None
        return ended or self.sent < self.base + len(self.choices)

    def rewind(self, have: int) -> bool:
        """Send again what follows the first `have` tokens; False if that is no longer kept."""
        kept = self.base <= have <= self.base + len(self.choices)
        self.choices = self.choices[have - self.base :] if kept else []
        self.base = self.sent = have
        if have:
            self.prompt_choices = ()
        return kept

    def take_news(self) -> Piece:
        """What is to be sent now; it counts as sent."""
        first, self.sent = self.sent, self.base + len(self.choices)
        choices = tuple(self.choices[first - self.base :])
        scores = self.prompt_choices if first == 0 else ()
        return piece(
            self.ask,
            first,
            choices,
            self.cached_tokens,
            self.finish_reason,
            self.failure,
            scores,
            self.guesses,
        )


@dataclass(eq=False)
class _Session:
    """What is known of one run of a gateway, for one of its peers."""

    node: str
    gateway: int
    peer: int
    id: int
    heard: float  # when it last asserted or asked, in awake seconds
    asserted: int = 0  # number of the last Assert ...
    wanted: frozenset[int] = frozenset()  # ... and what it named
    entries: dict[int, _Entry] = field(default_factory=dict[int, _Entry])  # by ask
    news: dict[int, _Entry] = field(default_factory=dict[int, _Entry])  # those with something to send
    answers: int = 0  # the Assert to answer
    unknown: tuple[int, ...] = ()  # to it
    progress: tuple[tuple[int, PromptProgress], ...] = ()  # of asks before their first token

    def said(self, ready: bool) -> list[Said]:
        """All that is to be sent now. Scores of a prompt are long: they go in a message of their own."""
        if not self.news and not self.answers:
            return []
        pieces = [entry.take_news() for entry in self.news.values()]
        usual = tuple(each for each in pieces if not each.scores)
        said = [
            Said(self.gateway, self.peer, self.id, ready, usual, self.answers, self.unknown, self.progress),
            *(Said(self.gateway, self.peer, self.id, ready, (each,)) for each in pieces if each.scores),
        ]
        self.news.clear()
        self.answers, self.unknown, self.progress = 0, (), ()
        return said


class Host:
    """See the module's theory of operation. It serves one model, and owns the scheduler: all micro-batches
    come from here.

    `n_vocab` bounds the token ids of asks. `random` gives session ids, and must differ between runs.
    """

    def __init__(self, scheduler: Scheduler, n_vocab: int, random: Random) -> None:
        self.ready = False  # whether micro-batches can be sent; the caller sets it
        self._scheduler = scheduler
        self._n_vocab = n_vocab
        self._random = random
        self._clock = AwakeClock()
        # By node, run of its gateway, and what its streams ask for: one model may go by several stream keys.
        self._sessions: dict[tuple[str, int, str], _Session] = {}
        self._named: dict[str, tuple[_Session, _Entry]] = {}  # by the scheduler's id
        self._suspects = Suspects()

    @property
    def waiting(self) -> int:
        """Streams that wait for a slot."""
        return self._scheduler.waiting

    @property
    def active(self) -> int:
        """Streams that hold a slot."""
        return self._scheduler.active

    @property
    def held_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self._scheduler.held_tokens

    @property
    def guessing(self) -> Guessing:
        """Which guesses travel, and what became of them."""
        return self._scheduler.guessing

    def receive(self, node: str, message: Ask | Assert, refusal: CordeeError | None = None) -> None:
        """Handle a message of the gateway on a node, which must be about this model.

        `refusal` is why an Ask is refused, if it was found to be.
        """
        session = self._session(node, message)
        if session is None:
            return  # the gateway repeats it; leases end
        if isinstance(message, Ask):
            self._ask(session, message, refusal)
        else:
            self._assert(session, message)

    def tick(self, now: float) -> None:
        """Let time pass; `now` in seconds. Several times a second."""
        self._clock.tick(now)
        oldest = self._clock.seconds - LEASE_SECONDS
        for key, session in list(self._sessions.items()):
            for entry in list(session.entries.values()):
                # Only a fault makes an ask whose number no Assert of the gateway will ever reach.
                if min(entry.heard, session.heard) < oldest:
                    self._drop(session, entry)
            if session.heard < oldest:
                del self._sessions[key]

    def next_batch(self, now: float = 0.0) -> MicroBatch | None:
        """The next micro-batch to send, at the time `now`; None if nothing can be sent now."""
        batch = self._scheduler.next_batch(now) if self.ready else None
        if batch is not None:
            self._suspects.sent(batch)
        return batch

    def halts(self) -> list[int]:
        """Micro-batches that should not go round again; see `Scheduler.halts`."""
        return self._scheduler.halts()

    def complete(
        self,
        batch_id: int,
        choices: Mapping[int, Choice],
        failures: Mapping[int, str],
        scores: Mapping[int, Sequence[Choice]] | None = None,
        *,
        last: bool = True,
        guessed: Mapping[int, Sequence[Choice]] | None = None,
        forced: Mapping[int, Sequence[int]] | None = None,
        now: float = 0.0,
    ) -> None:
        """Handle a micro-batch's result, as `Scheduler.complete` does."""
        events = self._scheduler.complete(
            batch_id, choices, failures, scores, last=last, guessed=guessed, forced=forced, now=now
        )
        self._suspects.result(batch_id, [event.stream for event in events], last=last)
        for event in events:
            self._tell(event)

    def lost(self) -> None:
        """The pipeline lost its state, or has a new wiring: everything is computed again from the logs."""
        self._scheduler.lost()
        apart, ended = self._suspects.lost()
        for name in apart:
            self._scheduler.set_apart(name)
        for name in ended:
            reason = failure(StageFailed("the stages fail again and again at this request"), refused=False)
            self._scheduler.cancel(name)
            self._end(name, None, reason)

    def set_can_trim(self, can_trim: bool) -> None:
        """Say whether the stages can shorten a sequence; see `Scheduler`. After `lost`, before any batch."""
        self._scheduler.can_trim = can_trim

    def restore(self, held: Mapping[int, Sequence[int]]) -> None:
        """The placement before has these tokens, by sequence: see `Scheduler.restore`."""
        self._scheduler.restore(held)

    def forget_restored(self) -> None:
        """The placement before is gone."""
        self._scheduler.forget_restored()

    def drain(self) -> list[tuple[str, Said]]:
        """The messages to send now, each with the node it goes to."""
        return [
            (session.node, said) for session in self._sessions.values() for said in session.said(self.ready)
        ]

    def _session(self, node: str, message: Ask | Assert) -> _Session | None:
        """The session that a message belongs to; None where it is over, or there is no room for another."""
        key = (node, message.gateway, message.model)
        session = self._sessions.get(key)
        if session is not None and session.peer < message.peer:
            # For each model a gateway knows a host by one number at a time, and the next is greater.
            for entry in list(session.entries.values()):
                self._drop(session, entry)
            del self._sessions[key]
            session = None
        if session is None and len(self._sessions) < SESSIONS_MAX:
            session = _Session(
                node, message.gateway, message.peer, self._random.getrandbits(63), self._clock.seconds
            )
            self._sessions[key] = session
        return session if session is not None and session.peer == message.peer else None

    def _ask(self, session: _Session, ask: Ask, refusal: CordeeError | None) -> None:
        stale = ask.number < session.asserted and ask.number not in session.wanted
        if stale or ask.number in session.entries or len(session.entries) >= STREAMS_MAX:
            return
        for other in list(session.entries.values()):
            if other.stream == ask.stream:
                if other.ask > ask.number:
                    return
                self._drop(session, other)
        session.heard = self._clock.seconds
        length = len(ask.generated)
        name = f"{session.id:x}-{ask.number}"
        entry = _Entry(ask.number, ask.stream, name, length, length, self._clock.seconds)
        session.entries[ask.number] = entry
        try:
            if refusal is not None:
                raise refusal
            if not all(0 <= token < self._n_vocab for token in (*ask.request.prompt, *ask.generated)):
                raise BadRequest(f"token ids must be 0 to {self._n_vocab - 1}", "prompt")
            self._scheduler.submit(msgspec.structs.replace(ask.request, id=name), ask.generated)
        except CordeeError as error:
            entry.failure = failure(error, refused=True)
            session.news[entry.ask] = entry
        else:
            self._named[name] = (session, entry)

    def _assert(self, session: _Session, message: Assert) -> None:
        if message.number <= session.asserted:
            return  # late, or a duplicate
        wanted = dict(message.asks[:STREAMS_MAX])
        session.heard = self._clock.seconds
        session.asserted, session.wanted = message.number, frozenset(wanted)
        for entry in list(session.entries.values()):
            if entry.ask not in wanted and entry.ask < message.number:
                self._drop(session, entry)
        unknown: list[int] = []
        for ask, have in wanted.items():
            entry = session.entries.get(ask)
            if entry is None:
                unknown.append(ask)
                continue
            entry.heard = self._clock.seconds
            if not entry.rewind(have):
                self._give_up(session, entry)
            elif entry.has_news:
                session.news[ask] = entry
        session.answers, session.unknown = message.number, tuple(unknown)
        session.progress = self._progress(session)

    def _progress(self, session: _Session) -> tuple[tuple[int, PromptProgress], ...]:
        """How far those of a session's asks are that have no token yet."""
        progress = self._scheduler.progress()
        return tuple(
            (entry.ask, progress[entry.name]) for entry in session.entries.values() if entry.name in progress
        )

    def _tell(self, event: Event) -> None:
        session, entry = self._named[event.stream]
        entry.cached_tokens, entry.guesses = event.cached_tokens, event.guesses
        entry.prompt_choices = entry.prompt_choices or event.prompt_choices
        if event.choice is not None:
            entry.choices.append(event.choice)
            session.news[entry.ask] = entry
        if event.failure is not None:
            self._end(event.stream, None, failure(StageFailed(event.failure), refused=False))
        elif event.finish_reason is not None:
            self._end(event.stream, event.finish_reason, None)
        elif len(entry.choices) > WINDOW_TOKENS:
            self._give_up(session, entry)

    def _give_up(self, session: _Session, entry: _Entry) -> None:
        """End an ask; its gateway must ask again, with the tokens that it has."""
        self._scheduler.cancel(entry.name)
        self._suspects.forget(entry.name)
        self._named.pop(entry.name, None)
        entry.finish_reason = None
        entry.failure = failure(Overloaded("tokens were not acknowledged for too long"), refused=True)
        session.news[entry.ask] = entry

    def _end(self, name: str, finish_reason: FinishReason | None, failed: Failure | None) -> None:
        session, entry = self._named.pop(name)
        self._suspects.forget(name)
        entry.finish_reason, entry.failure = finish_reason, failed
        session.news[entry.ask] = entry

    def _drop(self, session: _Session, entry: _Entry) -> None:
        self._scheduler.cancel(entry.name)
        self._suspects.forget(entry.name)
        self._named.pop(entry.name, None)
        session.news.pop(entry.ask, None)
        del session.entries[entry.ask]
