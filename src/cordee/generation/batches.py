"""What a scheduler is given and gives: its bounds, the micro-batches that travel, and what came of them."""

from dataclasses import dataclass

import msgspec

from cordee.errors import BadRequest
from cordee.generation.request import NO_GUESSES, Choice, FinishReason, GuessCounts
from cordee.generation.tokenlog import TokenLog


@dataclass(frozen=True)
class Limits:
    """Bounds of a scheduler.

    `context` is in tokens for each of `sequences` slots. `queue` bounds the streams that wait for a slot: one
    share has half as many places, and all that have a share twice as many. `in_flight` bounds the
    micro-batches under way. A micro-batch has room for a row of every sequence, so that no stream has to wait
    for others to end. Of prompts it has at most `piece_rows` rows (0: as many as there is room for), so that
    several stages work on one prompt.

    Raises:
        BadRequest: `sequences` is more than `batch_rows`.
    """

    sequences: int
    context: int
    batch_rows: int
    queue: int
    in_flight: int = 1
    piece_rows: int = 0

    def __post_init__(self) -> None:
        if self.sequences > self.batch_rows:
            raise BadRequest(
                f"{self.sequences} sequences do not fit a micro-batch of {self.batch_rows} rows: take fewer",
                "sequences",
            )


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one stream in a micro-batch. `sample`: the last one's logits give a token.

    `tenure` is the number of the stream among all that had a slot. `inherit`: the positions before the first
    one are to be taken over from the placement before. `score`: each row but the prompt's last one gives the
    log-probability of the prompt's next token.

    The last `guesses` tokens are guesses: each gives a token as well, if it and all before it are what the
    last stage drew; else it is stale, and gives nothing. Of the sequence's positions `sure` are of the
    stream's log, as far as it is known.
    """

    stream: str
    sequence: int
    first_position: int
    tokens: list[int]
    sample: bool
    tenure: int = 0
    inherit: bool = False
    score: bool = False
    guesses: int = 0
    sure: int = 0


class SequenceCopy(msgspec.Struct, frozen=True, array_like=True):
    """`sequence` is to hold the first `length` positions of `source` and nothing else, for the stream of this
    `tenure`."""

    source: int
    sequence: int
    length: int
    tenure: int


@dataclass(frozen=True)
class MicroBatch:
    """What travels the pipeline as one message; at most one segment of each sequence.

    The `copies` are made first, one after the other.

    A segment that starts before the end of what its sequence holds replaces the rest of it. `opens` maps a
    sequence to the token log that its new sampler starts from (as it is when the batch is made). The
    micro-batch goes round up to `steps` times: after the first time with the tokens of the time before, one
    position on.
    """

    id: int
    segments: tuple[Segment, ...]
    opens: dict[int, TokenLog]
    steps: int = 1
    copies: tuple[SequenceCopy, ...] = ()


@dataclass(frozen=True)
class Event:
    """A stream got a token, or ended, or both. `choice` None: it ended without another token.

    `cached_tokens` of its prompt were in the KV cache when it got its slot. `failure` says why its token
    could not be chosen; the stream has ended then, without a finish reason. `prompt_choices` come with the
    first token where the prompt is scored: its tokens but the first. Such a stream has a choice for the token
    that ends it, too: clients that want scores count tokens. `guesses` are the stream's so far.
    """

    stream: str
    choice: Choice | None
    finish_reason: FinishReason | None
    cached_tokens: int
    failure: str | None = None
    prompt_choices: tuple[Choice, ...] = ()
    guesses: GuessCounts = NO_GUESSES
