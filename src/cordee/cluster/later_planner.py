"""A planner that does not keep its caller waiting: what takes long is answered later, by somebody else. Pure.

    choose --asks--> LaterPlanner --due--> the shell computes `questions.answer` --tell--> LaterPlanner

What is answered within a few steps of the search is answered at once; that is all of it in a cluster of a few
machines. The rest are *open questions*: `choose` goes on without them, as a node does that still listens, and
once an answer is told, the shell has everything looked at again. An answer is a function of its question
alone, so it does not matter who computes it, and when.

A node whose facts change all the time must not keep a model from being planned, by making each answer that
of a question that is no longer asked. So while a model has an open question, answers to those that were asked
shortly before count as well, if they use only nodes that may be used now; `choose` looks whether they fit.
After LATE_KEPT of them that were of no use, the others no longer wait for that model.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cordee.cluster.choose import Unanswered
from cordee.cluster.facts import Facts, ModelShape, Placement
from cordee.cluster.memory import Demand
from cordee.cluster.planner import Planner
from cordee.cluster.questions import Answer, Asked, answer, asked

# What is computed at once between two calls of `settle`: it keeps the caller waiting for some 50 ms.
AT_ONCE_STEPS = 50_000
LATE_KEPT = 3  # answers to a model's questions of shortly before


class Job(NamedTuple):
    """What questions are about, whatever nodes there are."""

    model: str
    demand: Demand


class Turn(NamedTuple):
    """How many of a model's questions were told, and when the last was, by the count of all."""

    last: int = 0
    told: int = 0


class LaterPlanner(Planner):
    """See the module's docstring. `settle` is to be called after each look at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once_steps = AT_ONCE_STEPS
        self._taken = 0  # of these, since `settle`
        self._open: dict[bytes, tuple[Job, Asked]] = {}
        self._asked: set[bytes] = set()  # since `settle`
        self._late: dict[Job, list[Placement | None]] = {}
        self._turns: dict[Job, Turn] = {}
        self._told = 0

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        """As `Planner.plan`.

        Raises:
            Unanswered: the answer is not there yet.
            PlanningFailed, Unfound: as `Planner.plan`.
        """
        demand = Demand(context, sequences)
        question = asked(shape, demand, nodes)
        self._asked.add(question.key)
        found = self.known(question) or self._answered_at_once(question)
        if found is not None:
            return self.placement(shape, found)
        job = Job(shape.digest, demand)
        self._open.setdefault(question.key, (job, question))
        return self._late_answer(job, {facts.node for facts in nodes})

    def settle(self) -> None:
        """Forget what was not asked again since the last call, if anything was."""
        if self._asked:
            self._open = {key: held for key, held in self._open.items() if key in self._asked}
            jobs = {job for job, _ in self._open.values()}
            self._late = {job: late for job, late in self._late.items() if job in jobs}
            self._turns = {job: turn for job, turn in self._turns.items() if job in jobs}
        self._asked.clear()
        self._taken = 0

    def due(self) -> Asked | None:
        """The open question to answer next: of the model that has waited for longest one after the other."""
        if not self._open:
            return None
        waits = min((job for job, _ in self._open.values()), key=lambda job: self._turn(job).last)
        questions = [question for job, question in self._open.values() if job == waits]
        return questions[self._turn(waits).told % len(questions)]

    def tell(self, key: bytes, found: Answer) -> None:
        """The answer to an open question."""
        self.keep(key, found)
        if key not in self._open:
            return  # it is no longer asked
        job, _ = self._open.pop(key)
        self._told += 1
        self._turns[job] = Turn(self._told, self._turn(job).told + 1)
        self._late[job] = [*self._late.get(job, []), found.placement][-LATE_KEPT:]

    def is_open(self, shape: ModelShape) -> bool:
        """Whether a model waits for an answer."""
        return any(job.model == shape.digest for job, _ in self._open.values())

    def _turn(self, job: Job) -> Turn:
        return self._turns.get(job, Turn())

    def _answered_at_once(self, question: Asked) -> Answer | None:
        left = self.at_once_steps - self._taken
        if question.key in self._open or left <= 0:
            return None
        found, steps = answer(question.question, left)
        self._taken += steps
        if found is not None:
            self.keep(question.key, found)
        return found

    def _late_answer(self, job: Job, nodes: set[str]) -> Placement | None:
        late = self._late.get(job, [])
        for placement in reversed(late):
            if placement is not None and nodes.issuperset(place.node for place in placement.stages):
                return placement
        if len(late) < LATE_KEPT:
            raise Unanswered
        return None
