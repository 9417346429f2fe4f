"""Stages in virtual time under a real scheduler: each computes one micro-batch after the other, in order.

A call of an engine costs CALL seconds, and each row one second, of all stages together; a micro-batch takes
as many calls as the llama engine needs for it (engine/llama/stage.py).
"""

import heapq
from itertools import count, pairwise

from cordee.generation.batches import Limits, MicroBatch, Segment
from cordee.generation.request import Choice, Request
from cordee.generation.scheduler import Scheduler

CALL = 2.0  # the starter model on a CPU: a token alone takes 24 ms, one of 256 in a batch 6.3 ms
HOP = 0.2


class VirtualPipeline:
    """`tokens` came so far at the time `now`; `first` is when each stream's first one did."""

    def __init__(self, limits: Limits, stages: int, call: float = CALL, hop: float = HOP) -> None:
        self.scheduler = Scheduler(limits, ())
        self.call, self.hop = call, hop
        self.free = [0.0] * stages
        self.now, self.tokens, self.ended = 0.0, 0, 0
        self.first: dict[str, float] = {}
        self.calls: list[tuple[int, int]] = []  # rows and calls of each micro-batch of decode rows alone
        self._halted: set[int] = set()
        self._results: list[tuple[float, int, MicroBatch, list[tuple[int, int, bool]], int]] = []
        self._numbers = count()

    def submit(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.scheduler.submit(Request(id=name, prompt=prompt, max_tokens=max_tokens))

    def step(self) -> None:
        """Send what can be sent; take the next result."""
        while (batch := self.scheduler.next_batch()) is not None:
            self._send(batch, [_row(segment) for segment in batch.segments], batch.steps)
        self._halted.update(self.scheduler.halts())
        self.now, _, batch, rows, steps = heapq.heappop(self._results)
        choices = {sequence: Choice(1) for sequence, _, sample in rows if sample}
        last = steps == 1 or batch.id in self._halted
        for event in self.scheduler.complete(batch.id, choices, {}, last=last):
            self.tokens += 1
            self.first.setdefault(event.stream, self.now)
            self.ended += event.finish_reason is not None
        if not last:
            self._send(batch, [(sequence, 1, True) for sequence, _, _ in rows], steps - 1)

    def _send(self, batch: MicroBatch, rows: list[tuple[int, int, bool]], steps: int) -> None:
        runs = sorted(rows)
        breaks = (b[0] != a[0] + 1 or b[1] != a[1] for a, b in pairwise(runs))
        calls = 1 + sum(breaks)
        if all(each[1] == 1 for each in rows):
            self.calls.append((len(rows), calls))
        seconds = (self.call * calls + sum(each[1] for each in rows)) / len(self.free)
        moment = self.now
        for stage, free in enumerate(self.free):
            moment = self.free[stage] = max(moment, free) + seconds
            moment += self.hop
        heapq.heappush(self._results, (moment, next(self._numbers), batch, rows, steps))


def _row(segment: Segment) -> tuple[int, int, bool]:
    return segment.sequence, len(segment.tokens), segment.sample
