"""The gateway's side of streams: it keeps their token logs, finds them a host, gives clients each token once.

Pure: messages, routes and the clock are handed in; `drain` gives what is to be sent, and the news for
clients. See streams.py for the messages. A stream's life:

    open -> unasked <-------------------- (the host lost it, refused it, or the route leads elsewhere)
               | a route, and no pause         ^
               v                               |
             asked -> held by the host ---> tokens -> finished | failed | cancelled

- **The log decides.** A token counts if it is the next one of the log and comes from the current ask, in the
  session of the host that first confirmed that ask. So all tokens after those the ask began with come from
  one computation, even if another node still believes that it is the host; and no token is ever taken back.
- **Everything is repeated.** An Assert goes to each host every ASSERT_SECONDS, and soon after something
  began, ended or is missing. It names all asks that the host is to work on, and how many tokens of each have
  arrived. The answer brings what was lost on the way, and says which asks are unknown there (by now): those
  are asked again, with the log as it is then.
- **Nothing is believed for long.** What is known of a host that answers no Assert for SILENCE_SECONDS is
  forgotten, and its streams are asked again: so anything that a fault wrote into these tables heals.
- **Waiting is bounded.** A stream that no ready host has held for WAIT_SECONDS fails. A refusal before its
  first token goes to the client, unless a host had accepted the stream before; after any other the stream is
  asked again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cordee.errors import BadRequest, CordeeError, Overloaded, StageFailed
from cordee.generation.clock import AwakeClock
from cordee.generation.request import NO_GUESSES, Choice, FinishReason, GuessCounts, PromptProgress, Request
from cordee.generation.streams import (
    STREAMS_MAX,
    Ask,
    Assert,
    Failure,
    Piece,
    Said,
    as_error,
)

TICK_SECONDS = 0.05  # how often `tick` is to be called
ASSERT_SECONDS = 1.0  # often enough to notice a loss soon, for 20 bytes a stream
HURRY_SECONDS = 0.05  # before an extra Assert, so that one covers many beginnings and ends
# A host of which nothing was wanted for this long is forgotten: its leases have ended long ago. Not sooner,
# so that requests that follow one another stay one session.
IDLE_SECONDS = 60.0
# As long as three leases: by then the host holds nothing for this gateway.
SILENCE_SECONDS = 30.0
# How long a stream waits for a host: loading 60 GB at 100 MB/s takes this long, and clients that get
# keep-alive events wait longer.
WAIT_SECONDS = 600.0
# Between two news of a stream's progress, so that a long queue costs little as it moves.
PROGRESS_SECONDS = 1.0
# Between two attempts that failed; doubled each time, from the time of a token to what a person notices.
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 4.0


@dataclass(frozen=True)
class News:
    """News for the client of a stream, in order. The last has a finish reason or an error.

    `prompt_choices` come with the first token where the prompt is scored. With `progress` there is nothing
    else.
    """

    stream: str
    choices: tuple[Choice, ...] = ()
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    guesses: GuessCounts = NO_GUESSES
    error: CordeeError | None = None
    prompt_choices: tuple[Choice, ...] = ()
    progress: PromptProgress | None = None


@dataclass(eq=False)
class _Peer:
    """A node as the host of a model."""

    number: int
    node: str
    model: str
    due: float  # when the next Assert is
    wanted: float  # when it last had asks
    heard: float  # when it last answered
    asserted: int = 0  # number of the last Assert ...
    answered: int = 0  # ... and of the last that was answered
    asks: dict[int, "_Stream"] = field(default_factory=dict[int, "_Stream"])


@dataclass(eq=False)
class _Asked:
    """A stream's current ask."""

    number: int
    peer: _Peer
    sent: int  # the counter when it was sent last: answers to older asserts do not cover it
    again: float  # it is not sent again before
    session: int | None = None  # of the host, once it has confirmed


@dataclass(eq=False)
class _Stream:
    number: int
    request: Request
    model: str
    waiting: float  # since when no ready host has held it
    generated: list[int] = field(default_factory=list[int])
    accepted: bool = False  # some host held it once
    cached_tokens: int | None = None  # as the host of the first token reported
    ask: _Asked | None = None
    ask_at: float = 0.0  # when it may be asked
    pause: float = PAUSE_SECONDS_MIN
    refusal: CordeeError | None = None  # the last one
    progress: PromptProgress | None = None  # as the client was told
    progress_at: float = 0.0  # when the client may be told of more

    def paused(self) -> float:
        """The pause before the next attempt, which makes the one after it longer."""
        pause, self.pause = self.pause, min(2 * self.pause, PAUSE_SECONDS_MAX)
        return pause


class Gateway:
    """See the module's theory of operation. Models are named as the callers of `route` and `open` agree.

    `id` is a random number of 63 bits, new for each run. The defaults of
    `assert_seconds` and `hurry_seconds` are those of gateways whose messages travel over a network.
    """

    def __init__(
        self,
        id: int,
        assert_seconds: float = ASSERT_SECONDS,
        hurry_seconds: float = HURRY_SECONDS,
    ) -> None:
        self._id = id
        self._assert_seconds = assert_seconds
        self._hurry_seconds = hurry_seconds
        self._clock = AwakeClock()
        self._counter = 0
        self._streams: dict[str, _Stream] = {}  # by request id, oldest first
        self._routes: dict[str, str] = {}
        self._peers: dict[int, _Peer] = {}
        self._messages: list[tuple[str, Ask | Assert]] = []
        self._news: list[News] = []

    @property
    def routes(self) -> Mapping[str, str]:
        """The node that hosts a model now, by model; where none does, the model is not there."""
        return self._routes

    @property
    def busy(self) -> bool:
        """Whether `tick` is needed: streams are open, or hosts are still to learn that they are not."""
        return bool(self._streams or self._peers)

    def open(self, request: Request, model: str) -> None:
        """Begin a stream.

        Raises:
            BadRequest: a stream of that id is open.
            Overloaded: there are STREAMS_MAX streams already, or half as many of this one's share.
        """
        if request.id in self._streams:
            raise BadRequest(f"a stream {request.id} is already running", "id")
        if len(self._streams) >= STREAMS_MAX:
            raise Overloaded(f"{STREAMS_MAX} requests are being answered or waiting: try again later")
        share = request.share
        own = sum(each.request.share == share for each in self._streams.values()) if share else 0
        if own >= STREAMS_MAX // 2:
            raise Overloaded(f"{own} requests of {share} are being answered or waiting: try again later")
        stream = _Stream(self._next(), request, model, waiting=self._clock.seconds)
        self._streams[request.id] = stream
        self._ask(stream)

    def cancel(self, stream_id: str) -> None:
        """End a stream without news; unknown ids are ignored, since it may just have finished."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._leave(stream)

    def route(self, model: str, node: str | None) -> None:
        """The host of a model is now this node, or not known. Streams at another host move."""
        if self._routes.get(model) == node:
            return
        if node is None:
            del self._routes[model]  # a host that was asked already may go on
            return
        self._routes[model] = node
        for stream in self._streams.values():
            if stream.model == model and (stream.ask is None or stream.ask.peer.node != node):
                self._leave(stream)
                self._ask(stream)

    def follow(self, routes: Mapping[str, str]) -> None:
        """These nodes host models now, and no others do."""
        for model in [*self._routes.keys() - routes.keys(), *routes]:
            self.route(model, routes.get(model))

    def receive(self, node: str, said: Said) -> None:
        """Handle the news of a host, the node that sent them: it has a say in its own streams only."""
        peer = self._peers.get(said.peer)
        if said.gateway != self._id or peer is None or peer.node != node:
            return
        for piece in said.pieces:
            stream = peer.asks.get(piece.ask)
            if stream is not None and self._confirmed(stream, said.session):
                self._advance(stream, piece)
        if peer.answered < said.answers <= peer.asserted:
            peer.answered = said.answers
            self._answered(peer, said)

    def tick(self, now: float) -> None:
        """Let time pass; `now` in seconds. Every TICK_SECONDS while it is `busy`."""
        self._clock.tick(now)
        clock = self._clock.seconds
        for stream in list(self._streams.values()):
            if clock - stream.waiting > WAIT_SECONDS:
                self._fail(stream, stream.refusal or _nobody())
            elif stream.ask is None and stream.ask_at <= clock:
                self._ask(stream)
        for peer in list(self._peers.values()):
            if peer.asks:
                peer.wanted = clock
            silent = not 0 <= clock - peer.heard <= SILENCE_SECONDS
            if silent or clock - peer.wanted > IDLE_SECONDS:
                self._forget(peer)
            elif peer.due <= clock:
                self._assert(peer)

    def drain(self) -> tuple[list[tuple[str, Ask | Assert]], list[News]]:
        """The messages to send now, with the nodes they go to, and the news for clients."""
        drained = self._messages, self._news
        self._messages, self._news = [], []
        return drained

    def _next(self) -> int:
        self._counter += 1
        return self._counter

    def _ask(self, stream: _Stream) -> None:
        """Ask the host for a stream from its log on, if there is a host."""
        node = self._routes.get(stream.model)
        if node is None:
            return
        peer = self._peer(node, stream.model)
        number = self._next()
        stream.ask = _Asked(number, peer, number, again=self._clock.seconds)
        peer.asks[number] = stream
        self._hurry(peer)  # the answer says whether the host has it
        self._send(stream, stream.ask)

    def _send(self, stream: _Stream, ask: _Asked) -> None:
        message = Ask(
            self._id,
            ask.peer.number,
            stream.model,
            ask.number,
            stream.number,
            stream.request,
            tuple(stream.generated),
        )
        self._messages.append((ask.peer.node, message))

    def _peer(self, node: str, model: str) -> _Peer:
        for peer in self._peers.values():
            if (peer.node, peer.model) == (node, model):
                return peer
        clock = self._clock.seconds
        peer = _Peer(self._next(), node, model, due=clock + self._assert_seconds, wanted=clock, heard=clock)
        self._peers[peer.number] = peer
        return peer

    def _assert(self, peer: _Peer) -> None:
        asks = tuple((number, len(stream.generated)) for number, stream in peer.asks.items())
        peer.asserted = self._next()
        peer.due = self._clock.seconds + self._assert_seconds
        message = Assert(self._id, peer.number, peer.model, peer.asserted, asks)
        self._messages.append((peer.node, message))

    def _forget(self, peer: _Peer) -> None:
        del self._peers[peer.number]
        for stream in list(peer.asks.values()):
            self._leave(stream)

    def _hurry(self, peer: _Peer) -> None:
        peer.due = min(peer.due, self._clock.seconds + self._hurry_seconds)

    def _leave(self, stream: _Stream) -> None:
        """Give up the current ask, if there is one; its host learns of it soon."""
        if stream.ask is not None:
            del stream.ask.peer.asks[stream.ask.number]
            self._hurry(stream.ask.peer)
            stream.ask = None
        stream.ask_at = self._clock.seconds

    def _confirmed(self, stream: _Stream, session: int) -> bool:
        """Whether the current ask belongs to this session of its host. If not, the stream is asked again."""
        assert stream.ask is not None
        if stream.ask.session is None:
            stream.ask.session = session
        if stream.ask.session != session:
            self._leave(stream)
            self._ask(stream)
            return False
        return True

    def _advance(self, stream: _Stream, piece: Piece) -> None:
        """Add what is new in a piece to the log, if nothing is missing before it."""
        assert stream.ask is not None
        have = len(stream.generated)
        if piece.first > have:
            self._hurry(stream.ask.peer)
            return
        choices = piece.choices[have - piece.first :]
        prompt_choices = _prompt_choices(stream.request, piece) if choices and not have else ()
        if prompt_choices is None:
            self._fail(stream, StageFailed("the stages gave no log-probabilities of the prompt"))
            return
        if choices:
            if stream.cached_tokens is None:
                stream.cached_tokens = piece.cached_tokens
            stream.generated += [choice.token for choice in choices]
            stream.waiting = self._clock.seconds
            stream.accepted = True
            stream.pause = PAUSE_SECONDS_MIN
        if choices or piece.finish_reason is not None:
            cached = stream.cached_tokens or 0
            self._news.append(
                News(
                    stream.request.id,
                    choices,
                    cached,
                    piece.finish_reason,
                    piece.guesses,
                    prompt_choices=prompt_choices,
                )
            )
        if piece.finish_reason is not None:
            self.cancel(stream.request.id)
        elif piece.failure is not None:
            self._failed(stream, piece.failure)

    def _failed(self, stream: _Stream, failure: Failure) -> None:
        error = as_error(failure)
        transient = stream.generated or (stream.accepted and isinstance(error, Overloaded))
        if failure.refused and transient:
            stream.refusal = error
            self._leave(stream)
            stream.ask_at = self._clock.seconds + stream.paused()
        else:
            self._fail(stream, error)

    def _fail(self, stream: _Stream, error: CordeeError) -> None:
        self.cancel(stream.request.id)
        self._news.append(News(stream.request.id, error=error))

    def _answered(self, peer: _Peer, said: Said) -> None:
        """The answer to an Assert: the asks it named are held by the host, or unknown there."""
        peer.heard = self._clock.seconds
        unknown, progress = set(said.unknown), dict(said.progress)
        for number, stream in list(peer.asks.items()):
            ask = stream.ask
            assert ask is not None
            if ask.sent > said.answers:
                continue  # it is still on its way
            if number not in unknown:
                if self._confirmed(stream, said.session):
                    stream.accepted = True
                    stream.waiting = self._clock.seconds if said.ready else stream.waiting
                    self._tell_progress(stream, progress.get(number))
            elif ask.session is not None:
                self._leave(stream)
                self._ask(stream)
            elif ask.again <= self._clock.seconds:
                # It was lost; and if it is only late, a second copy does no harm.
                ask.sent = self._next()
                ask.again = self._clock.seconds + stream.paused()
                self._send(stream, ask)

    def _tell_progress(self, stream: _Stream, progress: PromptProgress | None) -> None:
        """Tell the client how far its stream is before it begins, if that is news, and can be."""
        clock = self._clock.seconds
        if progress is None or progress == stream.progress or clock < stream.progress_at:
            return
        reads = not stream.generated and 0 < progress.read_tokens <= len(stream.request.prompt)
        if progress.place > 0 or reads:
            stream.progress, stream.progress_at = progress, clock + PROGRESS_SECONDS
            self._news.append(News(stream.request.id, progress=progress))


def _prompt_choices(request: Request, piece: Piece) -> tuple[Choice, ...] | None:
    """The tokens of a scored prompt but the first; None if they are not there, or not all."""
    tokens = request.prompt[1:] if request.scores_prompt else ()
    if not request.scores_prompt or len(piece.scores) == len(tokens):
        return tuple(Choice(token, *said) for token, said in zip(tokens, piece.scores, strict=False))
    return None


def _nobody() -> StageFailed:
    return StageFailed(f"no machine was ready to answer for {WAIT_SECONDS:.0f} s: `cordee status` shows why")
