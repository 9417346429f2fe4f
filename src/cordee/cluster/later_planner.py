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
from cordee.cluster.questions import Asked, PlanAnswer, Question, answer, asked

# What is computed at once between two calls of `settle`: it keeps the caller waiting for some 50 ms.
AT_ONCE_STEPS = 50_000
LATE_KEPT = 3  # answers to a model's questions of shortly before


class Topic(NamedTuple):
    """What questions are about, whatever nodes there are."""

    model: str
    demand: Demand


class Turn(NamedTuple):
    """How many of a model's questions were told, and when the last was, by the count of all."""

    last: int = 0
    told: int = 0


def _topic(question: Question) -> Topic:
    return Topic(question.shape.digest, question.demand)


class LaterPlanner(Planner):
    """See the module's docstring. `settle` is to be called after each look at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once_steps = AT_ONCE_STEPS
        self._taken = 0  # of these, since `settle`
        self._open: dict[bytes, Asked] = {}
        self._asked: set[bytes] = set()  # since `settle`
        self._late: dict[Topic, list[Placement | None]] = {}
        self._turns: dict[Topic, Turn] = {}
        self._told = 0

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        """As `Planner.plan`.

        Raises:
            Unanswered: the answer is not there yet.
            PlanningFailed, Unfound: as `Planner.plan`.
        """
        question = asked(shape, Demand(context, sequences), nodes)
        self._asked.add(question.key)
        found = self.known(question) or self._answered_at_once(question)
        if found is not None:
            return self.placement(shape, found)
        self._open.setdefault(question.key, question)
        return self._late_answer(_topic(question.question), {facts.node for facts in nodes})

    def settle(self) -> None:
        """Forget what was not asked again since the last call, if anything was."""
        if self._asked:
            self._open = {key: held for key, held in self._open.items() if key in self._asked}
            topics = {_topic(held.question) for held in self._open.values()}
            self._late = {topic: late for topic, late in self._late.items() if topic in topics}
            self._turns = {topic: turn for topic, turn in self._turns.items() if topic in topics}
        self._asked.clear()
        self._taken = 0

    def due(self) -> Asked | None:
        """The open question to answer next: of the model that has waited for longest one after the other."""
        if not self._open:
            return None
        topics = [_topic(held.question) for held in self._open.values()]
        waits = min(topics, key=lambda topic: self._turn(topic).last)
        questions = [held for held, topic in zip(self._open.values(), topics, strict=True) if topic == waits]
        return questions[self._turn(waits).told % len(questions)]

    def tell(self, question: Asked, found: PlanAnswer) -> None:
        """The answer to a question that was due, though another may be asked by now."""
        self.keep(question.key, found)
        topic = _topic(question.question)
        if all(_topic(held.question) != topic for held in self._open.values()):
            return  # nobody asks any more
        self._open.pop(question.key, None)
        self._told += 1
        self._turns[topic] = Turn(self._told, self._turn(topic).told + 1)
        self._late[topic] = [*self._late.get(topic, []), found.placement][-LATE_KEPT:]

    def is_open(self, shape: ModelShape) -> bool:
        """Whether a model waits for an answer."""
        return any(held.question.shape == shape for held in self._open.values())

    def _turn(self, topic: Topic) -> Turn:
        return self._turns.get(topic, Turn())

    def _answered_at_once(self, question: Asked) -> PlanAnswer | None:
        left = self.at_once_steps - self._taken
        if question.key in self._open or left <= 0:
            return None
        found, steps = answer(question.question, left)
        self._taken += steps
        if found is not None:
            self.keep(question.key, found)
        return found

    def _late_answer(self, topic: Topic, nodes: set[str]) -> Placement | None:
        late = self._late.get(topic, [])
        for placement in reversed(late):
            if placement is not None and nodes.issuperset(place.node for place in placement.stages):
                return placement
        if len(late) < LATE_KEPT:
            raise Unanswered
        return None
