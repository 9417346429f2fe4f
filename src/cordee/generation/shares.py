"""Fair shares: slots go round by who asks, so that who floods makes nobody else wait for long."""

from collections import Counter
from collections.abc import Collection, Iterable


class Shares:
    """When each share was served last; the counts of slots are handed in."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}

    def serve(self, share: str, turn: int) -> None:
        """A stream of it got a slot; `turn` rises with each."""
        self._served[share] = turn

    def next(self, waiting: Iterable[str], held: Counter[str]) -> str:
        """Whose turn it is of those that wait: who has least, and of these who was served least lately."""
        return min(waiting, key=lambda share: (held[share], self._served.get(share, 0)))

    def forget(self, here: Collection[str]) -> None:
        """Keep only who is here, so that this stays as small as the queue."""
        if len(self._served) > 2 * len(here):
            self._served = {share: turn for share, turn in self._served.items() if share in here}


def surplus(waiting: Iterable[str], held: Counter[str]) -> str | None:
    """The share that has to give a slot to one that waits, if so: it has two more, or more than that."""
    least = min((held[share] for share in waiting), default=None)
    if least is None or not held:
        return None
    share, most = max(held.items(), key=lambda item: item[1])
    return share if most >= least + 2 else None
