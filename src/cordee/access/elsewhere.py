"""What keys use at the other gateways of the cluster, as these tell with their heartbeats.

A key's bounds hold for the cluster, so what it does at one gateway counts at all. A heartbeat comes once a
second, and so late is what it tells: somebody who asks at many gateways at the same moment gets that much
more, once. A node that is gone no longer counts.
"""

from collections.abc import Callable, Mapping, Sequence

from cordee.cluster.facts import KeyUse

# Tokens that were counted longer ago are forgotten: the budget of a minute has grown back since.
REMEMBERED_SECONDS = 60.0
# Counts that are remembered, the latest: each node tells 64 at most, which need not be the same keys.
SEEN_MAX = 4096


class Elsewhere:
    """`read` gives what each other node that is alive told last, by its id. `now` never jumps, in seconds."""

    def __init__(self, read: Callable[[], Mapping[str, Sequence[KeyUse]]]) -> None:
        self._read = read
        self._heard: frozenset[str] = frozenset()  # nodes
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
        told = self._read()
        for node, uses in told.items():
            for use in uses:
                tokens = use.tokens_in + use.tokens_out
                # A key that a known node tells for the first time was not used there before.
                before = self._seen.pop((node, use.name), 0 if node in self._heard else tokens)
                self._seen[node, use.name] = tokens
                if tokens > before:
                    self._news.setdefault(use.name, []).append((now, tokens - before))
        self._heard = frozenset(told)
        gone = [key for key in self._seen if key[0] not in told]
        for key in gone + list(self._seen)[: max(0, len(self._seen) - len(gone) - SEEN_MAX)]:
            self._seen.pop(key, None)
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
