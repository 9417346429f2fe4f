"""The shell around a Host: its micro-batches go to the first stage, tokens come from the last."""

from random import Random
from typing import Protocol

from cordee.cluster.facts import Placement
from cordee.cluster.goals import HostGoal
from cordee.generation.batches import Limits, MicroBatch, Segment
from cordee.generation.host import Host
from cordee.generation.request import Choice
from cordee.generation.results import Expectation, Results
from cordee.generation.scheduler import Scheduler
from sim import guesses, stages
from sim.world import World

BATCH_ROWS, QUEUE = 16, 100
IN_FLIGHT = (1, 2, 2, 4)
GUESSING = 0.7  # of the schedulers


class Shell(Protocol):
    """The agent around a pipeline."""

    @property
    def name(self) -> str:
        """Its machine."""
        ...

    @property
    def world(self) -> World:
        """Where it lives."""
        ...

    @property
    def now(self) -> float:
        """Its steady clock."""
        ...

    def unwire(self, wiring: str) -> None:
        """The first stage leaves this wiring."""
        ...

    def doubt(self, nodes: set[str], reason: str) -> None:
        """Other nodes disappointed."""
        ...


class Pipeline:
    """A host's scheduler and what it has under way; outlives wirings and placements of its job."""

    def __init__(self, agent: Shell, placement: Placement) -> None:
        self._sequences = sequences = placement.sequences
        random = Random(agent.world.random.getrandbits(32))
        limits = Limits(
            sequences, placement.context, max(BATCH_ROWS, sequences), QUEUE, random.choice(IN_FLIGHT)
        )
        self._scheduler = Scheduler(limits, stages.ENDS)
        self._scheduler.guessing.is_on = random.random() < GUESSING
        self._scheduler.guessing.make = guesses.guesser_of
        self.host = Host(self._scheduler, stages.VOCABULARY, random)
        self._agent = agent
        self.goal: HostGoal | None = None
        self.wiring = ""  # whose caches grew under this scheduler
        self._under_way: dict[int, MicroBatch] = {}
        self._results = Results()
        self._halted: set[int] = set()

    def fits(self, goal: HostGoal | None) -> bool:
        """Whether this scheduler does for a goal."""
        return goal is not None and goal.placement.sequences == self._sequences

    def follow(self, goal: HostGoal) -> None:
        """Take up a wiring, or wait for one."""
        self.goal = goal
        if goal.wiring != self.wiring:
            self.leave()
            self.wiring = goal.wiring
            places = frozenset(place.node for place in goal.placement.stages)
            expectation = (
                Expectation(goal.row_seconds, goal.read_seconds) if len(places) > 1 else Expectation()
            )
            self._results.expect(places, expectation)
            self.host.ready = bool(goal.wiring)

    def leave(self) -> None:
        """Nothing that is under way will be answered; the wiring is never used again."""
        if self.wiring:
            self._agent.unwire(self.wiring)
            self.host.lost()
        self.wiring, self.host.ready = "", False
        self._under_way.clear()
        self._results.clear()
        self._halted.clear()

    def tick(self) -> None:
        """Let time pass; a result that is late is waited for no longer."""
        self.host.tick(self._agent.now)
        if self._results.late_seconds(self._agent.now) and self.goal is not None:
            nodes = {place.node for place in self.goal.placement.stages} - {self._agent.name}
            self._agent.doubt(nodes, "no result")
            self.leave()
        self.pump()

    def pump(self) -> None:
        """Send what can be sent: rows to the first stage, news to gateways."""
        if self.host.ready:
            while (batch := self.host.next_batch()) is not None:
                self._send(batch)
            self._halted.update(self.host.halts())
        for node, said in self.host.drain():
            self._agent.world.send(self._agent.name, node, "said", (self._agent.name, said))

    def _send(self, batch: MicroBatch) -> None:
        assert self.goal is not None
        self._under_way[batch.id] = batch
        self._results.sent(batch.id, sum(len(s.tokens) for s in batch.segments), self._agent.now)
        rows = stages.Rows(self.wiring, 0, self.goal.upstream, batch.id, stages.rows_of(batch), batch.copies)
        self._agent.world.carry(self._agent.name, self._agent.name, self.wiring, 0, "rows", rows)

    def take(self, tokens: stages.Tokens) -> None:
        """A micro-batch came through."""
        batch = self._under_way.get(tokens.batch)
        if tokens.wiring != self.wiring or batch is None:
            return
        choices = {sequence: own[0] for sequence, own in tokens.choices.items()}
        guessed = {sequence: own[1:] for sequence, own in tokens.choices.items()}
        ended = any(choice.token in stages.ENDS for choice in choices.values())
        last = batch.steps == 1 or ended or batch.id in self._halted
        del self._under_way[batch.id]
        self._results.came(batch.id, True, self._agent.now)
        self.host.complete(batch.id, choices, {}, last=last, guessed=guessed)
        self._scheduler.check_slots()
        if not last:
            self._send(_again(batch, choices))
        self.pump()


def _again(batch: MicroBatch, choices: dict[int, Choice]) -> MicroBatch:
    segments = tuple(
        Segment(s.stream, s.sequence, s.first_position + 1, [choices[s.sequence].token], True)
        for s in batch.segments
    )
    return MicroBatch(batch.id, segments, {}, batch.steps - 1)
