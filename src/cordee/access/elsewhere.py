"""What keys use at the other gateways of the cluster, as these tell with their heartbeats.

A key's bounds hold for the cluster, so what it does at one gateway counts at all. A heartbeat comes once a
second, and so late is what it tells: somebody who asks at many gateways at the same moment gets that much
more, once. A node that is gone no longer counts.
"""

from collections.abc import Callable, Mapping, Sequence

from cordee.cluster.facts import KeyUse

# Tokens that were counted longer ago are forgotten: the budget of a minute has grown back since.
REMEMBERED_SECONDS = 60.0


class Elsewhere:
    """`read` gives what each other node that is alive told last, by its id. `now` never jumps, in seconds."""

    def __init__(self, read: Callable[[], Mapping[str, Sequence[KeyUse]]]) -> None:
        self._read = read
        self._seen: dict[tuple[str, str], int] = {}  # all tokens, by node and key
        self._news: dict[str, list[tuple[float, int]]] = {}  # by key: tokens that are new, and since when

    def all(self) -> list[KeyUse]:
        """What is told, of all keys."""
        return [use for uses in self._read().values() for use in uses]

    def at_once(self, name: str) -> int:
        """Requests of a key that are under way elsewhere."""
        return sum(use.at_once for use in self.all() if use.name == name)

    def look(self, now: float) -> None:
        """Note what is new; to be called with each heartbeat. What a node counted before it was heard for the
        first time is not held against anybody."""
        seen: dict[tuple[str, str], int] = {}
        for node, uses in self._read().items():
            for use in uses:
                tokens = seen[node, use.name] = use.tokens_in + use.tokens_out
                if (more := tokens - self._seen.get((node, use.name), tokens)) > 0:
                    self._news.setdefault(use.name, []).append((now, more))
        self._seen = seen
        recent = {
            name: [each for each in news if now - each[0] < REMEMBERED_SECONDS]
            for name, news in self._news.items()
        }
        self._news = {name: news for name, news in recent.items() if news}

    def spent(self, name: str, now: float) -> int:
        """Tokens of a key that were counted elsewhere lately, each once."""
        self.look(now)
        return sum(tokens for _, tokens in self._news.pop(name, []))


NOWHERE = Elsewhere(dict[str, Sequence[KeyUse]])  # of a machine by itself
