"""Round-trip times to other nodes over the bus, smoothed, and rounded so that they seldom change."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from cordee.net.bus import Bus

PING_SECONDS = 5.0  # how often each node is measured
PATIENCE_SECONDS = 2.0  # for an answer: a slower node is not worth a stage
# The best of several pings at once, and of the last few rounds, counts: a busy moment makes no node slow, and
# neither does its start, when every machine is busy.
PINGS = 5
SAMPLES_KEPT = 8
# Rounded to powers of this factor, so that microseconds change no decision and cause no extra heartbeat.
STEP = 1.25


class Distances:
    """Measures the round-trip time to other nodes, and answers their pings. `changed` is called on news."""

    def __init__(self, bus: Bus, node: str, changed: Callable[[], None]) -> None:
        self.rtts: dict[str, float] = {}  # seconds of a round trip, by node
        self._bus = bus
        self._changed = changed
        self._samples: dict[str, list[float]] = {}
        bus.serve(f"ping/{node}", _answer)

    async def watch(self, nodes: Callable[[], Sequence[str]]) -> None:
        """Measure the round-trip times to `nodes`, again and again."""
        while True:
            for node in nodes():
                await self._measure(node)
            known = set(nodes())
            found = {node: _coarse(min(each)) for node, each in self._samples.items() if node in known}
            if found != self.rtts:
                self.rtts = found
                self._changed()
            await asyncio.sleep(PING_SECONDS)

    async def _measure(self, node: str) -> None:
        took: list[float] = []
        for _ in range(PINGS):
            began = time.perf_counter()
            if not await self._bus.query(f"ping/{node}", b"", seconds=PATIENCE_SECONDS):
                return
            took.append(time.perf_counter() - began)
        samples = self._samples.setdefault(node, [])
        samples.append(min(took))
        del samples[:-SAMPLES_KEPT]


async def _answer(_: bytes) -> bytes:
    return b"."


def _coarse(seconds: float) -> float:
    return round(STEP ** round(math.log(max(seconds, 1e-6), STEP)), 7)
