"""The messages between gateways and hosts about streams, and their wire format (msgpack).

A *gateway* is the node a client talks to; it keeps the token logs of its streams. The *host* of a model runs
the scheduler. Three messages suffice, each of which may be lost, late, duplicated or out of order:

    gateway -> host   Ask     generate this stream, from this log on
                      Assert  the asks still wanted, and how much of each has arrived; drop all others
    host -> gateway   Said    tokens and ends of all streams with news; the unknown asks of an Assert

So there is no message to cancel or to acknowledge: an Assert does both, and is sent again and again.

No message says which node it comes from: the link that brings it does (agent/stream_links.py), and a node is
answered over a link that it opened. So a member can neither ask nor answer in another's name.

Numbers that keep old messages from doing harm:

- `gateway` is random and new for each run of a gateway. Its asks and asserts share one counter, `number`.
- `peer` stands for (host node, model) within a gateway, so that a Said names neither.
- `session` is random and new whenever a host hears from a (gateway, peer) of which it holds nothing. Within a
  session an ask is started once at most.
"""

import msgspec

from cordee import errors
from cordee.errors import BadRequest, CordeeError, StageFailed
from cordee.generation.request import NO_GUESSES, Choice, FinishReason, GuessCounts, PromptProgress, Request

# Streams that a gateway has open at a time; a host keeps as many asks of each. A waiting stream costs its
# prompt, 4 MB at the longest; this is a hundred times what a household's pipeline answers at once.
STREAMS_MAX = 1024
MESSAGE_BYTES_MAX = 64 << 20  # an Ask with a context of a million tokens takes 5 MB, a Said of all streams 40


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """Generate a stream of which the tokens `generated`, perhaps none, are there already.

    `stream` is the number of the stream's first ask: of asks with the same
    `stream` only the newest counts.
    """

    gateway: int
    peer: int
    model: str
    number: int
    stream: int
    request: Request
    generated: tuple[int, ...]


class Assert(msgspec.Struct, frozen=True, array_like=True, tag="assert"):
    """All asks that this peer is to work on: (number, tokens of the answer that the gateway has).

    Asks that are older than this message and not in it are to be dropped. A host answers with a Said.
    """

    gateway: int
    peer: int
    model: str
    number: int
    asks: tuple[tuple[int, int], ...]


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """Why a stream ended without a finish reason. `error` is the name of a class in cordee.errors.

    `refused`: nothing was computed for the ask, and another host, or this one later, may take it.
    """

    error: str
    message: str
    param: str | None
    refused: bool


# A token's log-probability, and tokens that were likelier or as likely, with theirs.
Logprobs = tuple[float | None, tuple[tuple[int, float], ...]]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of an answer, from index `first` on, and the end of the answer where it follows them.

    `logprobs`, where they were asked for, are those of each token's `Choice`. `scores` are the same for each
    token of the prompt but the first; they come with the answer's first token, where they were asked for.
    """

    ask: int
    first: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    scores: tuple[Logprobs, ...] = ()
    guesses: GuessCounts = NO_GUESSES

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The tokens as they were chosen."""
        if not self.logprobs:
            return tuple(map(Choice, self.tokens))
        return tuple(Choice(token, *said) for token, said in zip(self.tokens, self.logprobs, strict=True))


class Said(msgspec.Struct, frozen=True, array_like=True, tag="said"):
    """News of one host's streams for one gateway.

    `answers` is the number of the Assert that this answers, or 0; then `unknown` are the asks of that Assert
    which the host does not hold, and it holds the others. `progress` is of those without a token so
    far. `ready`: the pipeline works on them now.
    """

    gateway: int
    peer: int
    session: int
    ready: bool
    pieces: tuple[Piece, ...]
    answers: int = 0
    unknown: tuple[int, ...] = ()
    progress: tuple[tuple[int, PromptProgress], ...] = ()


Message = Ask | Assert | Said

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as it travels."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message in `data`.

    Raises:
        BadRequest: it is not a message.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadRequest(f"a message of {len(data)} bytes is longer than any about streams")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"not a message about streams: {error}") from error


def failure(error: CordeeError, *, refused: bool) -> Failure:
    """An error as it travels."""
    return Failure(type(error).__name__, error.message, getattr(error, "param", None), refused)


def as_error(said: Failure) -> CordeeError:
    """The error of a host as an exception of this process; a StageFailed where its class is unknown."""
    kind = getattr(errors, said.error, None)
    if not (isinstance(kind, type) and issubclass(kind, CordeeError)):
        kind = StageFailed
    if issubclass(kind, BadRequest):
        return kind(said.message, said.param)
    return kind(said.message)


def piece(
    ask: int,
    first: int,
    choices: tuple[Choice, ...],
    cached_tokens: int,
    finish_reason: FinishReason | None,
    failed: Failure | None,
    prompt_choices: tuple[Choice, ...] = (),
    guesses: GuessCounts = NO_GUESSES,
) -> Piece:
    """A piece made of choices; it has log-probabilities only where they do."""
    tokens = tuple(choice.token for choice in choices)
    scores = _logprobs(prompt_choices)
    return Piece(
        ask, first, tokens, _logprobs(choices), cached_tokens, finish_reason, failed, scores, guesses
    )


def _logprobs(choices: tuple[Choice, ...]) -> tuple[Logprobs, ...]:
    if all(choice.logprob is None for choice in choices):
        return ()
    return tuple((choice.logprob, choice.top_logprobs) for choice in choices)
