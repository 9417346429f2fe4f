"""What a scheduler keeps of its slots, of the streams that have one, and of the micro-batches under way."""

from dataclasses import dataclass, field

from cordee.generation.request import Choice, Request
from cordee.generation.tokenlog import TokenLog
from cordee.speculation.guesser import Guesser


@dataclass(eq=False)
class Slot:
    """A sequence of the KV cache, and what it holds."""

    sequence: int
    tokens: list[int] = field(default_factory=list[int])  # by position, in the KV cache or on their way
    used: int = 0  # when its last stream ended, or it was copied last, counted in such events
    tenure: int = 0  # of the stream that has it, or had it last
    restored: bool = False  # the tokens are in the KV cache of the placement before, not in this one


@dataclass(eq=False)
class SlottedStream:
    """A stream that has a slot. The slot's tokens are always the beginning of its log.

    `guesses` are tokens that follow the log, if they are right; their rows travel already, behind those of
    the slot's tokens.
    """

    request: Request
    log: TokenLog
    slot: Slot
    cached: int
    opened: bool = False  # its sampler was made
    apart: bool = False  # nothing else may be under way with it
    leader: "SlottedStream | None" = None  # whose first tokens it waits for, to have them copied ...
    awaited_tokens: int = 0  # ... and how many
    scores: list[Choice] = field(default_factory=list[Choice])  # of the prompt, until they are given
    guesser: Guesser | None = None  # made when it is first asked
    guesses: list[int] = field(default_factory=list[int])
    accepted: int = 0  # guesses that were right ...
    rejected: int = 0  # ... and that were not, or stale

    @property
    def is_scored(self) -> bool:
        """Its prompt's log-probabilities are still to be given."""
        return self.request.scores_prompt and not self.log.generated

    @property
    def rows_left(self) -> int:
        """Rows that can be sent now; none while its next token is under way."""
        return len(self.log) - len(self.slot.tokens)

    @property
    def decodes(self) -> bool:
        """Only the row of the last generated token is left to send."""
        return self.rows_left == 1 and bool(self.log.generated)

    def check_end(self) -> None:
        """Assert that the slot's tokens may be the beginning of the log, from their number and the last one.

        A row at a wrong position, or of a wrong token, would silently change the answer.
        """
        held = self.slot.tokens
        assert len(held) <= len(self.log), f"{self.request.id}: its slot is longer than its log"
        assert not held or held[-1] == self.log.token(len(held) - 1), (
            f"{self.request.id}: its slot is not its log"
        )


@dataclass(eq=False)
class Flight:
    """A micro-batch under way: the streams that get a token from it, those that get scores of so many rows,
    those of which a decode row is in it, and whether it goes round. `sent` is when, in seconds; `decode_rows`
    are its rows, 0 if it has others than decode rows and guesses; `rounds` are those that came back."""

    streams: list[SlottedStream]
    scored: list[tuple[SlottedStream, int]]
    decoding: set[SlottedStream]
    repeats: bool
    sent: float = 0.0
    decode_rows: int = 0
    rounds: int = 0
    halted: bool = False
