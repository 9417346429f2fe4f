"""Planning a model onto machines: the placement, how each stage fits, how fast it will be, and why.

`plan` explains its result, for people (`cordee plan`); `Planner` is what `choose` asks, again and again.
"""

from collections.abc import Mapping, Sequence

import msgspec

from cordee.cluster.facts import Facts, ModelShape, Placement, StagePlace
from cordee.cluster.memory import CELLS_STEP, Demand, Fit, needed_bytes, needs, stage_of
from cordee.cluster.search import Search, Step, Unit, held_layers
from cordee.cluster.speed import (
    SECOND,
    STAGE_TIME,
    byte_time,
    device_of,
    hop_time,
    read_bytes,
    return_time,
    settled,
    token_time,
)

# Answers that a Planner keeps: a cluster asks the same few questions at every change.
ANSWERS_KEPT = 64
# A machine whose hop takes more than this times that of the others is said to be far away.
FAR = 2

Reserved = Mapping[tuple[str, str], int]  # bytes of (node, device) that are promised already


class StagePlan(msgspec.Struct, frozen=True):
    """A stage as planned. `needed_bytes` are `fit` and, on the host of a model that is cut, the embedding.

    `read_seconds` is what a token takes in it, `hop_seconds` the way to the next stage or back to the host.
    """

    node: str
    name: str
    device: str
    kind: str
    first: int
    last: int
    fit: Fit
    needed_bytes: int
    available_bytes: int
    fetch_bytes: int
    read_seconds: float
    hop_seconds: float


class MachinePlan(msgspec.Struct, frozen=True):
    """Why a machine is in or out."""

    node: str
    name: str
    used: bool
    why: str


class Plan(msgspec.Struct, frozen=True):
    """Where a model would run. Without a `placement`, `why` says what is missing and what to do."""

    placement: Placement | None
    why: str
    tokens_per_second: float
    stages: tuple[StagePlan, ...]
    machines: tuple[MachinePlan, ...]


def plan(
    shape: ModelShape, nodes: Mapping[str, Facts], demand: Demand, reserved: Reserved | None = None
) -> Plan:
    """The best placement of a model, explained. The same whatever the order of `nodes`."""
    facts = [nodes[node] for node in sorted(nodes)]
    units = _units(facts, reserved or {})
    steps = Search(shape, demand, units).best()
    stages = tuple(_stage_plan(shape, demand, steps, index) for index in range(len(steps)))
    machines = tuple(_machine_plan(shape, demand, one, units, stages, nodes) for one in facts)
    if not steps:
        return Plan(None, _refusal(shape, demand, units), 0.0, (), machines)
    placement = _placement(shape, demand, steps)
    speed = tokens_per_second(shape, placement, nodes)
    return Plan(placement, _summary(shape, stages), speed, stages, machines)


def tokens_per_second(shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
    """Predicted speed of one stream; 0 if a device is not there."""
    time = token_time(shape, placement, nodes)
    return SECOND / time if time else 0.0


class Planner:
    """`choose`'s view of the planner. Questions that differ only by noise get the same answer, at once."""

    def __init__(self) -> None:
        self._answers: dict[bytes, Placement | None] = {}

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        """The best placement on these nodes, whose devices' memory is what is free; None if none fits."""
        demand, names = Demand(context, sequences), {facts.node for facts in nodes}
        facts = [settled(shape, one, names) for one in sorted(nodes, key=lambda one: one.node)]
        question = msgspec.msgpack.encode((shape, demand, facts), order="sorted")
        if question not in self._answers:
            if len(self._answers) >= ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
            steps = Search(shape, demand, _units(facts, {})).best()
            self._answers[question] = _placement(shape, demand, steps) if steps else None
        return self._answers[question]

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        """Predicted tokens per second of one stream."""
        return tokens_per_second(shape, placement, nodes)

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        """Memory of the device that a stage takes."""
        place = placement.stages[index]
        return needed_bytes(shape, Demand(placement.context, placement.sequences), place.first, place.last)


def _units(facts: Sequence[Facts], reserved: Reserved) -> list[Unit]:
    return [
        Unit(one, device, device.memory_bytes - reserved.get((one.node, device.name), 0))
        for one in facts
        if not one.draining
        for device in one.devices
    ]


def _placement(shape: ModelShape, demand: Demand, steps: Sequence[Step]) -> Placement:
    stages = tuple(StagePlace(s.unit.facts.node, s.unit.device.name, s.first, s.last) for s in steps)
    return Placement(shape.digest, demand.context, demand.sequences, stages)


def _stage_plan(shape: ModelShape, demand: Demand, steps: Sequence[Step], index: int) -> StagePlan:
    unit, first, last = steps[index]
    held = held_layers(shape, unit.facts)
    if len(steps) == 1:
        hop = 0
    elif index + 1 < len(steps):
        hop = hop_time(shape, unit.facts, steps[index + 1].unit.facts)
    else:
        hop = return_time(unit.facts, steps[0].unit.facts)
    return StagePlan(
        node=unit.facts.node,
        name=unit.facts.name,
        device=unit.device.name,
        kind=unit.device.kind,
        first=first,
        last=last,
        fit=stage_of(shape, first, last).fit(demand),
        needed_bytes=needed_bytes(shape, demand, first, last),
        available_bytes=unit.available_bytes,
        fetch_bytes=sum(shape.layer_bytes[layer] for layer in range(first, last) if layer not in held),
        read_seconds=(STAGE_TIME + read_bytes(shape, first, last) * unit.byte_time) / SECOND,
        hop_seconds=hop / SECOND,
    )


def _summary(shape: ModelShape, stages: Sequence[StagePlan]) -> str:
    where = f"on {stages[0].name}" if len(stages) == 1 else f"in {len(stages)} stages"
    needed = sum(stage.needed_bytes for stage in stages)
    return f"It fits {where}: it needs {_gb(needed)} of memory in all."


def _machine_plan(
    shape: ModelShape,
    demand: Demand,
    facts: Facts,
    units: Sequence[Unit],
    stages: Sequence[StagePlan],
    nodes: Mapping[str, Facts],
) -> MachinePlan:
    own = [stage for stage in stages if stage.node == facts.node]
    if own:
        layers = [f"layers {stage.first}-{stage.last - 1} on {stage.device}" for stage in own]
        why = ", ".join(layers) + (" (host)" if own[0] is stages[0] and len(stages) > 1 else "")
    else:
        mine = [unit for unit in units if unit.facts.node == facts.node]
        why = _why_out(shape, demand, facts, mine, stages, nodes)
    return MachinePlan(facts.node, facts.name, bool(own), why)


def _why_out(
    shape: ModelShape,
    demand: Demand,
    facts: Facts,
    units: Sequence[Unit],
    stages: Sequence[StagePlan],
    nodes: Mapping[str, Facts],
) -> str:
    if facts.draining:
        return "it is being drained"
    units = [unit for unit in units if unit.byte_time]
    if not units:
        return "the speed of its devices is not known"
    able = [unit for unit in units if Search(shape, demand, [unit]).able]
    if not able:
        least, room = _least(shape, demand), max(unit.available_bytes for unit in units)
        return f"too small: a stage takes {_gb(least)} or more, and it has {_gb(max(room, 0))} free"
    if not stages:
        return f"it has room for a stage ({_gb(max(unit.available_bytes for unit in able))})"
    devices = [device_of(nodes, stage.node, stage.device) for stage in stages]
    used = [device for device in devices if device is not None]
    if min(unit.byte_time for unit in able) > max(map(byte_time, used)):
        own = max(unit.device.read_bytes_per_second for unit in able)
        slowest = min(device.read_bytes_per_second for device in used)
        return f"slower: it reads {_gb(own)}/s, the devices in use at least {_gb(slowest)}/s"
    hop = min(hop_time(shape, facts, nodes[stage.node]) for stage in stages)
    usual = max((stage.hop_seconds for stage in stages), default=0.0) or hop / SECOND
    if hop / SECOND > FAR * usual:
        return f"too far away: a hop to it takes about {1000 * hop / SECOND:.0f} ms"
    more = 1000 * (hop + STAGE_TIME) / SECOND
    return f"not needed: one more stage would add about {more:.1f} ms to each token"


def _least(shape: ModelShape, demand: Demand) -> int:
    """What the smallest stage takes."""
    return min(nbytes for row in needs(shape, demand) for nbytes in row if nbytes)


def _refusal(shape: ModelShape, demand: Demand, units: Sequence[Unit]) -> str:
    """Why no placement was found, and what to do about it."""
    rooms = [unit.available_bytes for unit in units if unit.byte_time and unit.available_bytes > 0]
    whole, have = needs(shape, demand)[0][shape.layers], sum(rooms)
    if not rooms:
        return f"No machine has memory for it: it needs {_gb(whole)}. Add machines, or free some memory."
    if shape.cuttable:
        fault = f"It needs {_gb(whole)} of memory in all, and the machines have {_gb(have)}"
        missing = whole - have
        if missing <= 0:
            fault += (
                f", but no way of cutting it fits (the smallest stage takes {_gb(_least(shape, demand))})"
            )
            missing = _least(shape, demand)
    else:
        fault = (
            f"It cannot be cut, so one device must hold its {_gb(whole)}; the largest has {_gb(max(rooms))}"
        )
        missing = whole
    context = _fitting_context(shape, demand, units)
    if context:
        return f"{fault}: with `--context {context}` it fits."
    return f"{fault}: add a machine with at least {_gb(missing)}, or take a smaller quantization."


def _fitting_context(shape: ModelShape, demand: Demand, units: Sequence[Unit]) -> int:
    """A shorter context that fits, 0 if none does; halved each time, as any is a guess at what is wanted."""
    context = demand.context // 2 // CELLS_STEP * CELLS_STEP
    while context:
        if Search(shape, demand._replace(context=context), units).best():
            return context
        context = context // 2 // CELLS_STEP * CELLS_STEP
    return 0


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
