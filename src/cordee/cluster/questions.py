"""What is asked of the planner, and its answer, as values: they may be kept, compared, and sent to a process.

A question holds all that its answer depends on and nothing else, without the noise of measurements; so nodes
that ask the same get the same answer, whoever computes it, and when. An answer takes a bounded time
(cluster/search.py), whatever nodes say of themselves.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from cordee.cluster.facts import Device, Facts, ModelShape, Placement, StagePlace
from cordee.cluster.memory import Demand
from cordee.cluster.search import STEPS_MAX, Search, Step, Unit, considered
from cordee.cluster.speed import settled

TOO_MANY = (
    "no way of cutting it was found in the time that planning may take, as there are many machines, unlike "
    "and hardly large enough"
)
EASIER = "free memory on them, or deploy it anew with fewer answers at a time (--sequences)"


class Question(msgspec.Struct, frozen=True):
    """Where to run a model: `nodes` are those to choose from, whose devices' memory is what is free."""

    shape: ModelShape
    context: int
    sequences: int
    nodes: tuple[Facts, ...]

    @property
    def demand(self) -> Demand:
        """What is asked of the model."""
        return Demand(self.context, self.sequences)


class PlanAnswer(msgspec.Struct, frozen=True):
    """The best placement, None if none fits.

    `unfound` says why none was found although some may fit; `fault` what was raised by a question that
    cannot be answered.
    """

    placement: Placement | None = None
    unfound: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Asked:
    """A question as it is kept and sent: `key` is the hash of `encoded`."""

    question: Question
    encoded: bytes
    key: bytes


def asked(shape: ModelShape, demand: Demand, nodes: Sequence[Facts]) -> Asked:
    """The question where to run a model on these nodes; the same whatever their order."""
    devices: dict[str, list[Device]] = {}
    for unit in considered(shape, units_of(nodes)):
        devices.setdefault(unit.facts.node, []).append(unit.device)
    facts = tuple(
        settled(shape, msgspec.structs.replace(one, devices=tuple(devices[one.node])), devices)
        for one in sorted(nodes, key=lambda one: one.node)
        if one.node in devices
    )
    question = Question(shape, *demand, facts)
    encoded = msgspec.msgpack.encode(question, order="sorted")
    return Asked(question, encoded, hashlib.sha256(encoded).digest())


def answer(question: Question, steps: int = STEPS_MAX) -> tuple[PlanAnswer | None, int]:
    """The answer, and how many steps it took; None if `steps`, fewer than a search may take, do not do."""
    taken = 0
    try:
        search = Search(question.shape, question.demand, units_of(question.nodes), steps)
        found, taken = search.best(), search.steps
    except Exception as error:  # a shape that cannot be: whoever deployed it hides no other model
        return PlanAnswer(fault=f"{type(error).__name__}: {error}"), taken
    if search.is_spent and steps < STEPS_MAX:
        return None, taken
    if found:
        return PlanAnswer(placement_of(question.shape, question.demand, found)), taken
    return PlanAnswer(unfound=f"{TOO_MANY}: {EASIER}" if search.is_spent else ""), taken


def units_of(facts: Iterable[Facts], reserved: Mapping[tuple[str, str], int] | None = None) -> list[Unit]:
    """The devices that a model may run on, less the bytes of (node, device) that are promised already."""
    promised = reserved or {}
    return [
        Unit(one, device, device.memory_bytes - promised.get((one.node, device.name), 0))
        for one in facts
        if not one.draining
        for device in one.devices
    ]


def placement_of(shape: ModelShape, demand: Demand, steps: Sequence[Step]) -> Placement:
    """What a search found."""
    stages = tuple(StagePlace(s.unit.facts.node, s.unit.device.name, s.first, s.last) for s in steps)
    return Placement(shape.digest, demand.context, demand.sequences, stages)
