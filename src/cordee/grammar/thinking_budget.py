"""The tokens that a model may think: when they are used up, the mark that ends thinking is forced.

llguidance has `max_tokens` for that; with a mark of several tokens it panics (1.9.1), so the tokens are
counted here. What is known follows from the tokens so far, so a replayed answer goes on as the first would.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class ThinkingBudget:
    """How much of the budget of one answer is left, after the tokens so far.

    `tokens` may be thought; `opening` tokens come before. `mark` ends thinking, and `close` are its tokens.
    """

    def __init__(self, tokens: int, opening: int, mark: bytes, close: Sequence[int]) -> None:
        self._left = tokens + opening
        self._mark = mark
        self._close = tuple(close)
        self._end = b""  # of what was thought: what the mark may lie in
        self._open = True

    @classmethod
    def read(cls, parts: Mapping[str, Any]) -> "ThinkingBudget":
        """From JSON, as `parts` gives it."""
        return cls(parts["tokens"], parts["opening"], parts["mark"].encode(), parts["close"])

    @property
    def forced(self) -> int | None:
        """The token that must come now, if one must."""
        if not self._open or self._left > 0:
            return None
        return self._close[-self._left]

    def accept(self, piece: bytes) -> None:
        """Go on by a token, whose bytes are given."""
        if not self._open:
            return
        self._left -= 1
        text = self._end + piece
        self._open = self._mark not in text and self._left > -len(self._close)
        self._end = text[-len(self._mark) :]
