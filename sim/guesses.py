"""Guessers that know the answers: right ones, wrong ones, and those that lead stages astray."""

from collections.abc import Collection, Sequence
from random import Random

from cordee.generation.slots import SlottedStream
from cordee.speculation.guesser import Guess, Guesser
from sim import stages

CHANCE = 0.95  # what they say of themselves


class Oracle(Guesser):
    """Guesses of which so many of a hundred are wrong, always the same ones."""

    def __init__(self, log: Sequence[int], seed: int, wrong_percent: int) -> None:
        super().__init__((), (), ())
        self._length, self._digest, self._seed = len(log), stages.digest_of(log), seed
        self._wrong_percent = wrong_percent

    def append(self, token: int) -> None:
        """See Guesser."""
        self._length, self._digest = self._length + 1, stages.step(self._digest, token)

    def propose(self, pending: Sequence[int], most: int) -> list[Guess]:
        """See Guesser."""
        digest, tokens = self._digest, list[int]()
        for position in range(self._length, self._length + len(pending) + most):
            token = stages.draw(digest, digest, self._seed)
            if Random(position * 1000 + self._seed).randrange(100) < self._wrong_percent:
                token = (token + 1) % stages.VOCABULARY
            tokens.append(token)
            digest = stages.step(digest, token)
        if tokens[: len(pending)] != list(pending):
            return []
        return [Guess(token, CHANCE) for token in tokens[len(pending) :]]


def guesser_of(stream: SlottedStream, ends: Collection[int]) -> Guesser:
    """By the stream's seed: always right, right in half the cases, hardly ever, or never."""
    seed = stream.request.sampling.seed
    log = stream.log.tokens(0, len(stream.log))
    return Oracle(log, seed, (0, 10, 50, 100)[seed % 4])
