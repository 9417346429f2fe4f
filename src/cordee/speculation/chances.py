"""How often guesses are right: learnt from every token, whether the guess travelled or not."""

# How much an observation counts beside the one after it: what was seen 20 tokens ago still counts a third.
DECAY = 0.95
PRIOR_WEIGHT = 4.0  # observations that the first belief is worth


class Chance:
    """The chance that the guesses of one kind are right."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right = self._seen = 0.0

    def observe(self, right: bool) -> None:
        """One such guess was right, or was not."""
        self._right = self._right * DECAY + right
        self._seen = self._seen * DECAY + 1.0

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return (self._right + self._prior * PRIOR_WEIGHT) / (self._seen + PRIOR_WEIGHT)


class MatchChances:
    """The chances of look-ups, by the number of tokens that agreed before the guess."""

    # Up to so many; and what is believed of them at first: the longer a match, the more likely it goes on.
    STEPS = ((0, 0.6), (2, 0.3), (4, 0.4), (8, 0.6), (16, 0.8), (1 << 30, 0.9))

    def __init__(self) -> None:
        self._chances = [(most, Chance(prior)) for most, prior in self.STEPS]

    def of(self, matched: int) -> Chance:
        """That of a guess behind so many tokens."""
        return next(chance for most, chance in self._chances if matched <= most)
