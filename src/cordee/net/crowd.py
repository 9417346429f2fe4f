"""Who has to go when too many are waiting: the oldest of those that hold the most places.

So nobody keeps others out by being many: whoever opens thousands of connections from one address loses their
own. From many addresses at once they lose each other, the oldest first; a newcomer that does at once what it
came for is served before its turn to go comes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # a worker starts sooner without
    from collections.abc import Iterator

T = TypeVar("T")


class Crowd(Generic[T]):
    """Things by whom they belong to: at most `most` in all, and `each` of one owner."""

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._owners: dict[T, str] = {}  # the oldest first
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._owners))

    def __contains__(self, item: object) -> bool:
        return item in self._owners

    def add(self, item: T, owner: str) -> T | None:
        """Let one in; gives the one that had to go for it."""
        out = None
        if self._counts[owner] >= self._each:
            out = self._oldest(owner)
        elif len(self._owners) >= self._most:
            out = self.heaviest()
        if out is not None:
            self.discard(out)
        self._owners[item] = owner
        self._counts[owner] += 1
        return out

    def discard(self, item: T) -> None:
        """One is gone; it may have gone before."""
        owner = self._owners.pop(item, None)
        if owner is not None:
            self._counts[owner] -= 1
            if not self._counts[owner]:
                del self._counts[owner]

    def heaviest(self) -> T | None:
        """The oldest of whoever has the most; None if nobody is here."""
        most = max(self._counts.values(), default=0)
        return next((item for item, owner in self._owners.items() if self._counts[owner] == most), None)

    def _oldest(self, owner: str) -> T:
        return next(item for item, its in self._owners.items() if its == owner)
