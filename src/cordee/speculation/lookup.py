"""The guesser that looks up what a stream's own text contains: edits of code, quotes, forms, tables.

It follows a *place*: an earlier position of the text behind which the same tokens stood as stand at its end
now. What follows the place is the guess. A place is found by the last CONTEXT tokens; where an edit has ended
a match, any token that stands soon after the place where it ended is enough to go on.
(Saxena's prompt lookup decoding, 2023, is the first half of this.)
"""

from collections.abc import Iterable, Sequence

CONTEXT = 3  # tokens that must agree before a place is followed
# Tokens of a prompt that are looked at, the last ones; and as many more of the answer. About 130 bytes each.
TOKENS_MAX = 16_384
NEAR_TOKENS = 12  # behind the end of a match, where it may go on: an edit is a word or two
MATCHED_MAX = 32  # a longer match says no more
_GAP = -1  # no token: no match goes through it
_TOKEN_BITS = 21  # of a key of CONTEXT tokens; vocabularies have fewer than 2 million


class Lookup:
    """See the module's docstring. `prediction` is what the answer may be, if somebody has said so."""

    def __init__(self, text: Sequence[int], prediction: Sequence[int] = ()) -> None:
        self._text = [*prediction[:TOKENS_MAX], _GAP]
        self._index: dict[int, int] = {}  # by key, the place behind the last such tokens
        self._place: int | None = None
        self._near: int | None = None  # where the last match ended
        self._near_ends = 0  # the length of the text from which that is too long ago
        self.matched = 0  # tokens before the place that agree, up to MATCHED_MAX
        self._text += text[-TOKENS_MAX:]
        for end in range(CONTEXT, len(self._text)):
            self._note(end)
        self._find()
        self._note(len(self._text))
        if prediction and self._place is None:
            self._place = 0
        self._tokens_max = len(self._text) + TOKENS_MAX

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        if len(self._text) >= self._tokens_max:
            self._place, self.matched = None, 0
            return
        place = self._place
        if place is not None and self._text[place] == token:
            self._place, self.matched = place + 1, min(self.matched + 1, MATCHED_MAX)
        elif place is not None:
            self._near, self._near_ends = place, len(self._text) + NEAR_TOKENS
            self._place, self.matched = None, 0
        self._text.append(token)
        if self.matched < CONTEXT:
            self._find()
        self._note(len(self._text))

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens that may follow the text."""
        found: list[int] = []
        if self._place is None:
            return found
        for place in range(self._place, self._place + most):
            beyond = place - len(self._text)  # a text that repeats itself goes on with what was guessed
            token = self._text[place] if beyond < 0 else found[beyond]
            if token == _GAP:
                break
            found.append(token)
        return found

    def _find(self) -> None:
        """Follow the last place behind the text's last tokens, or one near the end of the last match."""
        end = len(self._text)
        place = self._index.get(_key(self._text[-CONTEXT:])) if end >= CONTEXT else None
        if place is not None:
            self._place, self.matched = place, self._agreeing(place)
        elif self._place is None and self._near is not None and end <= self._near_ends:
            near = self._text[self._near : min(self._near + NEAR_TOKENS, end - 1)]
            if self._text[-1] in near:
                self._place, self.matched = self._near + near.index(self._text[-1]) + 1, 1

    def _agreeing(self, place: int) -> int:
        end = len(self._text)
        matched = 0
        while (
            matched < min(MATCHED_MAX, place)
            and self._text[place - 1 - matched] == self._text[end - 1 - matched] != _GAP
        ):
            matched += 1
        return matched

    def _note(self, end: int) -> None:
        """Remember what stands before `end`."""
        last = self._text[end - CONTEXT : end]
        if end >= CONTEXT and _GAP not in last:
            self._index[_key(last)] = end


def _key(tokens: Iterable[int]) -> int:
    key = 0
    for token in tokens:
        key = key << _TOKEN_BITS | (token + 1)
    return key
