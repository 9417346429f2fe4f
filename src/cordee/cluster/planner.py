"""Planning a model onto machines: the placement, how each stage fits, how fast it will be, and why.

`plan` explains its result, for people (`cordee plan`); `Planner` is what `choose` asks, again and again.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import msgspec

from cordee.cluster.demand import SizeRequest, described, gigabytes, options, smaller
from cordee.cluster.facts import Device, Facts, ModelShape, Placement, StagePlace
from cordee.cluster.memory import Demand, Fit, needed_bytes, needs, stage_of
from cordee.cluster.search import Search, Step, Unit, held_layers
from cordee.cluster.speed import (
    SECOND,
    STAGE_TIME,
    byte_time,
    device_of,
    hop_time,
    prompt_time,
    read_bytes,
    return_time,
    settled,
    token_time,
)

# Answers that a Planner keeps: a cluster asks the same few questions at every change.
ANSWERS_KEPT = 64
# A machine whose hop takes more than this times that of the others is said to be far away.
FAR = 2
# What a machine lacks is told in steps of 0.1 GB.
STEP_BYTES = 100_000_000
# Room on a disk that never runs short, of machines that are only imagined.
BOUNDLESS_BYTES = 1 << 62
COPIES_TOLD = 8  # of a model that would fit beside each other; more are not counted
COMMAND = "cordee deploy MODEL"

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
    """Where a model would run. Without a `placement`, `why` says what is missing and what to do.

    `tokens_per_second` is how fast an answer is written, `prompt_tokens_per_second` how fast a long prompt is
    read at least.
    """

    placement: Placement | None
    why: str
    tokens_per_second: float
    prompt_tokens_per_second: float
    stages: tuple[StagePlan, ...]
    machines: tuple[MachinePlan, ...]


def plan(
    shape: ModelShape,
    nodes: Mapping[str, Facts],
    demand: Demand,
    reserved: Reserved | None = None,
    command: str = COMMAND,
) -> Plan:
    """The best placement of a model, explained. The same whatever the order of `nodes`.

    `command` is what people would type to ask for another context or fewer answers at a time.
    """
    facts = [nodes[node] for node in sorted(nodes)]
    units = _units(facts, reserved or {})
    steps = Search(shape, demand, units).best()
    stages = tuple(_stage_plan(shape, demand, steps, index) for index in range(len(steps)))
    machines = tuple(_machine_plan(shape, demand, one, units, stages, nodes) for one in facts)
    if not steps:
        return Plan(None, _refusal(shape, demand, units, command), 0.0, 0.0, (), machines)
    placement = _placement(shape, demand, steps)
    speed = tokens_per_second(shape, placement, nodes)
    reading = prompt_time(shape, placement, nodes)
    prompts = SECOND / reading if reading else 0.0
    return Plan(placement, _summary(shape, stages), speed, prompts, stages, machines)


def largest(
    shape: ModelShape, nodes: Mapping[str, Facts], requested: SizeRequest, reserved: Reserved | None = None
) -> Demand | None:
    """The most of what is asked of a model that fits; None if not even the least of it does."""
    units = _units([nodes[node] for node in sorted(nodes)], reserved or {})
    return requested.largest(lambda demand: Search(shape, demand, units).fits())


def copies(
    shape: ModelShape, nodes: Mapping[str, Facts], demand: Demand, reserved: Reserved | None = None
) -> int:
    """How many times a model fits, each time on other nodes; at most COPIES_TOLD are counted."""
    left = {node: facts for node, facts in nodes.items() if not facts.draining}
    for count in range(COPIES_TOLD):
        steps = Search(shape, demand, _units([left[node] for node in sorted(left)], reserved or {})).best()
        if not steps:
            return count
        used = {step.unit.facts.node for step in steps}
        left = {node: facts for node, facts in left.items() if node not in used}
    return COPIES_TOLD


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


def _refusal(shape: ModelShape, demand: Demand, units: Sequence[Unit], command: str) -> str:
    """Why no placement was found, and what to do about it."""
    rooms = [unit.available_bytes for unit in units if unit.byte_time and unit.available_bytes > 0]
    whole = needs(shape, demand)[0][shape.layers]
    if not rooms:
        return f"No machine has memory for it: it needs {_gb(whole)}. Add machines, or free some memory."
    if shape.cuttable:
        wants, have = gigabytes(whole, sum(rooms))
        fault = f"It needs {wants} of memory in all for {described(demand)}, and the machines have {have}"
        if whole <= sum(rooms):
            fault += (
                f", but no way of cutting it fits (the smallest stage takes {_gb(_least(shape, demand))})"
            )
    else:
        wants, have = gigabytes(whole, max(rooms))
        fault = f"It cannot be cut, so one device must hold its {wants}; the largest has {have}"
    instead = smaller(demand, lambda demand: Search(shape, demand, units).fits())
    if instead:
        return f"{fault}: `{command} {options(demand, instead)}` fits."
    roomy = [
        Unit(_with_disk(unit.facts), unit.device, unit.available_bytes) for unit in units if unit.byte_time
    ]
    if Search(shape, demand, roomy).fits():
        return (
            "The machines have the memory for it, but their disks are too full for its "
            f"{_gb(sum(shape.layer_bytes))} of weights: free some space on them."
        )
    missing = f"{_gb(_missing(shape, demand, units))} of memory for models"
    return f"{fault}: add a machine with at least {missing}, or take a smaller quantization."


def _missing(shape: ModelShape, demand: Demand, units: Sequence[Unit]) -> int:
    """The least memory of one more machine, as fast as the fastest and with a free disk, so that it fits."""
    speed = max((unit.device.read_bytes_per_second for unit in units if unit.byte_time), default=1e9)
    facts = _with_disk(Facts("", "", "", (), 0, "", {}, {}, (), ()))
    device = Device("", "cpu", 0, speed)

    def fits(steps: int) -> bool:
        return Search(shape, demand, [*units, Unit(facts, device, steps * STEP_BYTES)]).fits()

    alone = -(-needs(shape, demand)[0][shape.layers] // STEP_BYTES)
    return bisect_left(range(alone), True, key=fits) * STEP_BYTES


def _with_disk(facts: Facts) -> Facts:
    return msgspec.structs.replace(facts, disk_free_bytes=BOUNDLESS_BYTES)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
