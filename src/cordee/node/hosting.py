"""Hosting: the scheduler of a model on the node of its first stage, and its links to the pipeline.

    gateways --asks--> Host (generation/host.py) --micro-batches--> first stage ... last stage
    gateways <--said--   '------------------------tokens, through the node's inbox------'

A `Hosting` follows the goal of its model: it takes up a wiring once the first stage is wired so, and never
enters one again that it left. Tokens of other wirings are nobody's.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from random import Random

import numpy as np

from cordee.cluster.goals import HostGoal
from cordee.cluster.memory import BATCH_ROWS
from cordee.engine.vocabulary import Vocabulary
from cordee.generation.host import Host
from cordee.generation.scheduler import Limits, MicroBatch, Scheduler
from cordee.generation.streams import Ask, Assert, Said
from cordee.node import link
from cordee.node.answers import Rate
from cordee.node.messages import Halt, Join, Opening, Rows, Run, Tokens
from cordee.node.stages import Stages

QUEUE = 256  # streams that wait while others are answered
IN_FLIGHT_MAX = 8  # micro-batches that travel at once: one for each machine keeps all of them busy

log = logging.getLogger(__name__)


class Hosting:
    """The scheduler of one placement's job. `send` takes a gateway's node and what is said to it."""

    def __init__(
        self,
        goal: HostGoal,
        vocabulary: Vocabulary,
        stages: Stages,
        send: Callable[[str, Said], None],
    ) -> None:
        placement = goal.placement
        self._limits = limits = Limits(
            sequences=placement.sequences,
            context=placement.context,
            batch_rows=max(BATCH_ROWS, placement.sequences),
            queue=QUEUE,
            in_flight=_in_flight(goal),
        )
        scheduler = Scheduler(limits, vocabulary.end_of_generation)
        self._host = Host(scheduler, vocabulary.size, Random(secrets.randbits(64)))
        self._stages = stages
        self._send = send
        self._wiring = ""
        self._first: asyncio.StreamWriter | None = None
        self._joining: asyncio.Task | None = None
        self.rate = Rate()

    def fits(self, goal: HostGoal) -> bool:
        """Whether this scheduler does for a goal: its slots are as many and as long."""
        wanted = (goal.placement.sequences, goal.placement.context, _in_flight(goal))
        return wanted == (self._limits.sequences, self._limits.context, self._limits.in_flight)

    @property
    def active(self) -> int:
        """Streams that are being answered."""
        return self._host.active

    @property
    def waiting(self) -> int:
        """Streams that wait for one of them to end."""
        return self._host.waiting

    def follow(self, goal: HostGoal) -> None:
        """Take up the goal's wiring, or wait for one."""
        wiring = goal.wiring if self._stages.first(goal.wiring) is not None else ""
        if wiring == self._wiring:
            return
        self.leave()
        if wiring:
            self._wiring = wiring
            self._joining = asyncio.get_running_loop().create_task(self._join(wiring))

    def leave(self) -> None:
        """Give the wiring up: what is under way will not be answered."""
        if self._joining is not None:
            self._joining.cancel()
        if self._first is not None:
            self._first.transport.abort()
            self._first = None
        if self._wiring:
            wiring, self._wiring = self._wiring, ""
            self._host.lost()
            self._stages.unwire(wiring)
        self._host.ready = False

    def receive(self, message: Ask | Assert) -> None:
        """A gateway wants something."""
        self._host.receive(message)
        self.pump()

    def tick(self, now: float) -> None:
        """Let time pass; several times a second."""
        self._host.tick(now)
        self.pump()

    def take(self, tokens: Tokens) -> None:
        """The last stage of some wiring has a result."""
        if tokens.placement != self._wiring:
            return
        self.rate.count(len(tokens.choices))
        self._host.complete(tokens.batch, tokens.choices, tokens.failures, last=tokens.last)
        self.pump()

    def pump(self) -> None:
        """Send what can be sent: micro-batches to the first stage, news to gateways."""
        if self._host.ready and self._first is not None:
            while (batch := self._host.next_batch()) is not None:
                self._feed(self._first, batch)
            for number in self._host.halts():
                link.write(self._first, Halt(self._wiring, number))
        for node, said in self._host.drain():
            self._send(node, said)

    async def _join(self, wiring: str) -> None:
        worker = self._stages.first(wiring)
        try:
            if worker is None:
                raise OSError("its first stage is gone")
            _, writer = await asyncio.open_unix_connection(worker.inbox)
        except OSError as error:
            log.info("the first stage cannot be reached: %s", error)
            self.leave()
            return
        link.write(writer, Join(wiring))
        self._first, self._host.ready = writer, True
        self.pump()

    def _feed(self, first: asyncio.StreamWriter, batch: MicroBatch) -> None:
        runs = tuple(
            Run(segment.sequence, segment.first_position, len(segment.tokens), segment.sample)
            for segment in batch.segments
        )
        opens = {
            sequence: Opening(each.sampling, each.prompt, list(each.generated))
            for sequence, each in batch.opens.items()
        }
        tokens = np.array([token for segment in batch.segments for token in segment.tokens], dtype=np.int32)
        rows = Rows(self._wiring, batch.id, runs, opens, steps=batch.steps)
        link.write(first, rows, memoryview(tokens).cast("B"))


def _in_flight(goal: HostGoal) -> int:
    return min(len({stage.node for stage in goal.placement.stages}), IN_FLIGHT_MAX)
