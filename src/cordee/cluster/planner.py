"""Planning a model onto machines: the placement, how each stage fits, how fast it will be, and why.

`plan` explains its result, for people (`cordee plan`); `Planner` is what `choose` asks, again and again.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import msgspec

from cordee.cluster.choose import PlanningFailed, Unfound
from cordee.cluster.demand import SizeRequest, described, gigabytes, options, smaller
from cordee.cluster.facts import Device, Facts, ModelShape, Placement
from cordee.cluster.memory import Demand, Fit, needed_bytes, needs, stage_of
from cordee.cluster.questions import TOO_MANY, Asked, PlanAnswer, answer, asked, placement_of, units_of
from cordee.cluster.search import (
    STEPS_MAX,
    UNITS_MAX,
    Search,
    Step,
    Unit,
    able_units,
    considered,
    held_layers,
)
from cordee.cluster.speed import (
    SECOND,
    STAGE_TIME,
    byte_time,
    device_of,
    hop_time,
    prompt_time,
    read_bytes,
    return_time,
    token_time,
)

# Answers that a Planner keeps: a cluster asks the same questions at every change, some for each replica.
ANSWERS_KEPT = 2048
# A machine whose hop takes more than this times that of the others is said to be far away.
FAR = 2
# What a machine lacks is told in steps of 0.1 GB.
STEP_BYTES = 100_000_000
# Room on a disk that never runs short, of machines that are only imagined.
BOUNDLESS_BYTES = 1 << 62
# Steps of the searches that are made to say what would fit, of all together and of one: for people, who wait.
TRIALS_STEPS, TRIAL_STEPS = 3_000_000, 500_000
ADVICE_RATIO = 2
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
    steps_max: int = STEPS_MAX,
) -> Plan:
    """The best placement of a model, explained. The same whatever the order of `nodes`.

    `command` is what people would type to ask for another context or fewer answers at a time. A refusal's
    advice takes ADVICE_RATIO times as many steps as the search at most.
    """
    facts = [nodes[node] for node in sorted(nodes)]
    units = units_of(facts, reserved)
    search = Search(shape, demand, units, steps_max)
    steps = search.best()
    stages = tuple(_stage_plan(shape, demand, steps, index) for index in range(len(steps)))
    machines = tuple(_machine_plan(shape, demand, one, units, stages, nodes) for one in facts)
    if not steps:
        trials = _Trials(shape, ADVICE_RATIO * steps_max)
        why = _refusal(trials, demand, units, command, search.is_spent)
        return Plan(None, why, 0.0, 0.0, (), machines)
    placement = placement_of(shape, demand, steps)
    speed = tokens_per_second(shape, placement, nodes)
    reading = prompt_time(shape, placement, nodes)
    prompts = SECOND / reading if reading else 0.0
    return Plan(placement, _summary(shape, stages), speed, prompts, stages, machines)


def largest(
    shape: ModelShape, nodes: Mapping[str, Facts], requested: SizeRequest, reserved: Reserved | None = None
) -> Demand | None:
    """The most of what is asked of a model that fits, as far as is found in bounded time; None: nothing.

    No more than the usual: for longer contexts a model would need more machines, and its copies room.
    """
    units = units_of([nodes[node] for node in sorted(nodes)], reserved)
    trials = _Trials(shape)
    usual = requested._replace(longest=0)
    return usual.largest(lambda demand: trials.fits(demand, units))


def copies(
    shape: ModelShape, nodes: Mapping[str, Facts], demand: Demand, reserved: Reserved | None = None
) -> int:
    """How many times a model fits, each time on other nodes; at most COPIES_TOLD are counted."""
    left = {node: facts for node, facts in nodes.items() if not facts.draining}
    trials = _Trials(shape)
    for count in range(COPIES_TOLD):
        steps = trials.best(demand, units_of([left[node] for node in sorted(left)], reserved))
        if not steps:
            return count
        used = {step.unit.facts.node for step in steps}
        left = {node: facts for node, facts in left.items() if node not in used}
    return COPIES_TOLD


def tokens_per_second(shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
    """Predicted speed of one stream; 0 if a device is not there."""
    time = token_time(shape, placement, nodes)
    return SECOND / time if time else 0.0


class _Trials:
    """Searches that share a number of steps; what they do not find in these counts as what does not fit."""

    def __init__(self, shape: ModelShape, steps: int = TRIALS_STEPS) -> None:
        self.shape = shape
        self._left = steps

    def fits(self, demand: Demand, units: Sequence[Unit]) -> bool:
        if self._left <= 0:
            return False
        search = self._search(demand, units)
        found = search.fits()
        self._left -= search.steps
        return found

    def best(self, demand: Demand, units: Sequence[Unit]) -> list[Step]:
        if self._left <= 0:
            return []
        search = self._search(demand, units)
        found = search.best()
        self._left -= search.steps
        return found

    def _search(self, demand: Demand, units: Sequence[Unit]) -> Search:
        return Search(self.shape, demand, units, min(self._left, TRIAL_STEPS))


class Planner:
    """`choose`'s view of the planner. Questions that differ only by noise get the same answer, at once."""

    def __init__(self) -> None:
        self._answers: dict[bytes, PlanAnswer] = {}

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        """The best placement on these nodes, whose devices' memory is what is free; None if none fits.

        Raises:
            PlanningFailed: something was raised while it was looked for.
            Unfound: none was found within the bounds of a search, though some may fit.
        """
        question = asked(shape, Demand(context, sequences), nodes)
        found = self.known(question)
        if found is None:
            found, _ = answer(question.question)
            assert found is not None, "it has all steps that a search may take"
            self.keep(question.key, found)
        return self.placement(shape, found)

    def known(self, question: Asked) -> PlanAnswer | None:
        """An answer that is kept."""
        return self._answers.get(question.key)

    def keep(self, key: bytes, found: PlanAnswer) -> None:
        """Keep the answer to a question for as long as there is room."""
        if len(self._answers) >= ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]
        self._answers[key] = found

    def forget(self, key: bytes) -> None:
        """Have a question answered anew if it is asked again."""
        self._answers.pop(key, None)

    def placement(self, shape: ModelShape, found: PlanAnswer) -> Placement | None:
        """What `plan` gives, or raises, for an answer."""
        if found.fault:
            raise PlanningFailed(shape, found.fault)
        if found.unfound:
            raise Unfound(found.unfound)
        return found.placement

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        """Predicted tokens per second of one stream."""
        return tokens_per_second(shape, placement, nodes)

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        """Memory of the device that a stage takes."""
        place = placement.stages[index]
        return needed_bytes(shape, Demand(placement.context, placement.sequences), place.first, place.last)


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
        mine = [unit for unit in units if unit.facts is facts]
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
    able = able_units(shape, demand, considered(shape, units))
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


def _refusal(trials: _Trials, demand: Demand, units: Sequence[Unit], command: str, is_spent: bool) -> str:
    """Why no placement was found, and what to do about it. `is_spent`: for want of steps, perhaps."""
    shape = trials.shape
    rooms = [unit.available_bytes for unit in units if unit.byte_time and unit.available_bytes > 0]
    whole = needs(shape, demand)[0][-1]
    if not rooms:
        return f"No machine has memory for it: it needs {_gb(whole)}. Add machines, or free some memory."
    if shape.cuttable:
        wants, have = gigabytes(whole, sum(rooms))
        fault = f"It needs {wants} of memory in all for {described(demand)}, and the machines have {have}"
        if whole <= sum(rooms) and is_spent:
            fault += f", but {TOO_MANY}"
        elif whole <= sum(rooms):
            among = f" of {UNITS_MAX} devices" if len(units) > UNITS_MAX else ""
            smallest = _gb(_least(shape, demand))
            fault += f", but no way of cutting it{among} fits (the smallest stage takes {smallest})"
    else:
        wants, have = gigabytes(whole, max(rooms))
        fault = f"It cannot be cut, so one device must hold its {wants}; the largest has {have}"
    instead = smaller(demand, lambda demand: trials.fits(demand, units))
    if instead:
        return f"{fault}: `{command} {options(demand, instead)}` fits."
    roomy = [
        Unit(_with_disk(unit.facts), unit.device, unit.available_bytes) for unit in units if unit.byte_time
    ]
    if trials.fits(demand, roomy):
        return (
            "The machines have the memory for it, but their disks are too full for its "
            f"{_gb(sum(shape.layer_bytes))} of weights: free some space on them."
        )
    missing = f"{_gb(_missing(trials, demand, units))} of memory for models"
    return f"{fault}: add a machine with at least {missing}, or take a smaller quantization."


def _missing(trials: _Trials, demand: Demand, units: Sequence[Unit]) -> int:
    """The least memory of one more machine, as fast as the fastest and with a free disk, so that it fits."""
    speed = max((unit.device.read_bytes_per_second for unit in units if unit.byte_time), default=1e9)
    facts = _with_disk(Facts("", "", "", (), 0, "", {}, {}, (), ()))
    device = Device("", "cpu", 0, speed)

    def fits(steps: int) -> bool:
        return trials.fits(demand, [*units, Unit(facts, device, steps * STEP_BYTES)])

    alone = -(-needs(trials.shape, demand)[0][-1] // STEP_BYTES)
    return bisect_left(range(alone), True, key=fits) * STEP_BYTES


def _with_disk(facts: Facts) -> Facts:
    return msgspec.structs.replace(facts, disk_free_bytes=BOUNDLESS_BYTES)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
