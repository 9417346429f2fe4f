"""Which guesses of a scheduler's streams travel, and what became of them (docs/speculation.md)."""

from collections.abc import Collection, Iterable, Sequence

from cordee.generation.slots import Flight, SlottedStream
from cordee.speculation.costs import CHANCE_MIN, EXTRA_TOKENS_MIN, GUESSES_MAX, Costs
from cordee.speculation.guesser import Guess, Guesser

# Streams that travel together with their guesses: more of them fill a machine's arithmetic by themselves.
STREAMS_MAX = 8

Left = tuple[SlottedStream, int]  # a stream, and the tokens that it may still get


class Guessing:
    """What a scheduler asks before it sends guesses. `places` are the micro-batches that travel at once.

    With one place, guesses travel in their stream's micro-batch, where they pay by what it costs (`beside`).
    With more of them each is a micro-batch of its own, one stage behind the last one (`alone`).
    """

    def __init__(self, places: int, ends: Collection[int]) -> None:
        self.is_on = False
        self.costs = Costs()
        self.offered = self.accepted = 0
        self.make = guesser_of  # a stream's guesser
        self._places = places
        self._ends = ends

    def beside(self, streams: Sequence[Left], rows_max: int) -> list[list[int]]:
        """The guesses that travel beside a row of each of these streams; at most `rows_max` rows in all."""
        none = [list[int]() for _ in streams]
        if not self.is_on or self._places > 1 or not 0 < len(streams) <= STREAMS_MAX:
            return none
        proposals = [self._proposed(stream, min(GUESSES_MAX, left - 1)) for stream, left in streams]
        depths = self.costs.depth(len(streams), [[guess.chance for guess in own] for own in proposals])
        if sum(depths) > rows_max - len(streams):
            return none
        return [[guess.token for guess in own[:depth]] for own, depth in zip(proposals, depths, strict=True)]

    def begins(self, stream: SlottedStream, left: int, active: int) -> bool:
        """Whether a stream's rows should come back after each token, so that its guesses can follow them.

        `active` streams have a slot, here and below.
        """
        if not self.is_on or active >= self._places:
            return False
        guesses = self._proposed(stream, min(self._places - active, left - 1))
        return sum(guess.chance for guess in guesses) >= EXTRA_TOKENS_MIN

    def pays(self, streams: Sequence[Left], active: int) -> bool:
        """Whether some of these streams, whose micro-batch goes round, would do better with guesses."""
        if self._places > 1:
            return any(self.begins(stream, left, active) for stream, left in streams)
        return any(map(len, self.beside(streams, GUESSES_MAX * STREAMS_MAX)))

    def alone(self, streams: Iterable[Left], active: int) -> tuple[SlottedStream, int] | None:
        """The likeliest guess that may travel now as a micro-batch of its own, with its stream."""
        if not self.is_on or active >= self._places:
            return None
        best, found = CHANCE_MIN, None
        for stream, left in streams:
            if len(stream.guesses) < min(self._places, left) - 1:
                guesses = self._proposed(stream, 1)
                if guesses and guesses[0].chance >= best:
                    best, found = guesses[0].chance, (stream, guesses[0].token)
        return found

    def append(self, stream: SlottedStream, token: int) -> bool:
        """A stream got a token. Whether that was guessed: its row travels already."""
        if stream.guesser is not None:
            stream.guesser.append(token)
        if not stream.guesses:
            return False
        if stream.guesses[0] != token:
            self.forget(stream)
            return False
        del stream.guesses[0]
        stream.accepted += 1
        self.accepted += 1
        return True

    def force(self, stream: SlottedStream, tokens: Sequence[int]) -> None:
        """A grammar leaves these tokens to come next."""
        if self.is_on:
            self._guesser(stream).force(tokens)

    def forget(self, stream: SlottedStream) -> None:
        """What a stream guessed is stale."""
        stream.rejected += len(stream.guesses)
        stream.guesses.clear()

    def sent(self, stream: SlottedStream, tokens: Sequence[int]) -> None:
        """These guesses travel."""
        stream.guesses += tokens
        self.offered += len(tokens)

    def came(self, flight: Flight, now: float) -> None:
        """A micro-batch came back for the last time."""
        if flight.decode_rows and self._places == 1:
            seconds = (now - flight.sent) / flight.rounds
            observe = self.costs.observe_round if flight.repeats else self.costs.observe
            observe(flight.decode_rows, seconds)

    def _proposed(self, stream: SlottedStream, most: int) -> list[Guess]:
        if most <= 0 or not stream.opened or stream.apart or stream.is_scored:
            return []
        return self._guesser(stream).propose(stream.guesses, most)

    def _guesser(self, stream: SlottedStream) -> Guesser:
        if stream.guesser is None:
            stream.guesser = self.make(stream, self._ends)
        return stream.guesser


def guesser_of(stream: SlottedStream, ends: Collection[int]) -> Guesser:
    """The guesser of a stream as it is now."""
    return Guesser(stream.log.tokens(0, len(stream.log)), stream.request.prediction, ends)
