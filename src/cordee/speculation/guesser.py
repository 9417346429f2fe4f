"""All guessers of one stream, and how much each of them is to be believed.

    forced by the grammar > the likelier of: look-up in the stream's own text, draft model

A guess changes no token: the last stage draws what it would have drawn anyway, and compares. So nothing here
has to be right. What matters is that `propose` gives the same tokens for the same state: guesses that travel
already are the beginning of what it proposes next, as long as they are right.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from cordee.speculation.chances import Chance, MatchChances
from cordee.speculation.lookup import Lookup

FORCED_PRIOR = 0.95  # the bytes are known, but they may be cut into tokens in another way
DRAFT_PRIOR = 0.5
FORCED_MAX = DRAFTED_MAX = 64  # tokens that are kept


class Guess(NamedTuple):
    """A token, and the chance that it and all guesses before it are right."""

    token: int
    chance: float


class Guesser:
    """See the module's docstring. `ends` are tokens that are never guessed: nothing comes after them."""

    def __init__(self, text: Sequence[int], prediction: Sequence[int], ends: Collection[int]) -> None:
        self._ends = ends
        self._lookup = Lookup(text, prediction)
        self._matches = MatchChances()
        self._forced: list[int] = []
        self._forced_chance = Chance(FORCED_PRIOR)
        self._drafted: list[int] = []
        self._draft_chance = Chance(DRAFT_PRIOR)

    def append(self, token: int) -> None:
        """The stream got this token."""
        looked_up = self._lookup.guess(1)
        if looked_up:
            self._matches.of(self._lookup.matched).observe(looked_up[0] == token)
        self._lookup.append(token)
        _follow(self._forced, token, self._forced_chance)
        _follow(self._drafted, token, self._draft_chance)

    def force(self, tokens: Sequence[int]) -> None:
        """The grammar leaves nothing but these tokens to come next, or others of the same bytes."""
        self._forced = list(tokens[:FORCED_MAX])

    def draft(self, tokens: Sequence[int]) -> None:
        """The draft model thinks that these come next."""
        self._drafted = list(tokens[:DRAFTED_MAX])

    @property
    def drafted(self) -> Sequence[int]:
        """What is left of the draft model's tokens: those that no other token has contradicted."""
        return self._drafted

    def propose(self, pending: Sequence[int], most: int) -> list[Guess]:
        """Up to `most` guesses that follow those which are `pending` already; none if it would not guess
        these any more."""
        wanted = len(pending) + most
        best = max(self._candidates(wanted), key=lambda each: each[0].chance if each else 0.0)
        if [guess.token for guess in best[: len(pending)]] != list(pending):
            return []
        return best[len(pending) :]

    def _candidates(self, wanted: int) -> Iterator[list[Guess]]:
        """What each guesser thinks; behind what is forced, whoever agrees with it goes on."""
        matched = self._lookup.matched
        looked_up = self._lookup.guess(wanted)
        chances = [self._matches.of(matched + index).value for index in range(len(looked_up))]
        drafted = self._drafted[:wanted]
        for tokens, each in (looked_up, chances), (drafted, [self._draft_chance.value] * len(drafted)):
            yield self._beside_forced(tokens, each, wanted)

    def _beside_forced(self, tokens: list[int], chances: list[float], wanted: int) -> list[Guess]:
        forced = self._forced[:wanted]
        if tokens[: len(forced)] != forced:
            tokens, chances = forced, []
        guesses: list[Guess] = []
        chance = 1.0
        for index, token in enumerate(tokens):
            if token in self._ends:
                break
            chance *= self._forced_chance.value if index < len(forced) else chances[index]
            guesses.append(Guess(token, chance))
        return guesses


def _follow(tokens: list[int], token: int, chance: Chance) -> None:
    """Compare what came with the first of these, and keep the rest if it was right."""
    if not tokens:
        return
    right = tokens[0] == token
    chance.observe(right)
    del tokens[: 1 if right else None]
