"""What one node should hold, run, wire and host now, from what the cluster chose: pure and level-triggered.

Goals say how things should be, not what to do: the reconciler compares them with what is there, so a goal
that comes twice, or was missed, does no harm. For each placement that was chosen, and for its successor:

    all stages              goal of a stage's node       goal of the host (node of the first stage)
    not all loaded          hold its slice, run it       host it, no wiring: wait
    all loaded              wire it to the next stage    the same
    all wired alike         stay                         host it with that wiring: rows may flow

The *wiring* is the hash of the placement and of its stages' workers (KV caches), so all nodes compute the
same one from the facts. When one worker is replaced the wiring changes, everybody wires anew with empty
caches, and the host replays its streams.

A successor's stages also learn where the layers of the placement that serves are, so that they can take its
KV caches over: then nothing is computed again when a machine is drained.

Workers of other placements are kept as they are while none that was chosen serves and memory allows: if the
node that was lost comes back first, the old placement goes on at once. Then they are to be stopped.

Once a placement serves, each of its slices (and the embedding that the host of a cut model looks rows up in)
is kept on a second node where disk allows, so that a loss costs no transfer; of a model that is to stay on
some nodes on one of them. A hash decides which node holds the copy, so a change elsewhere does not move it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cordee.cluster.choose import Chosen, Planning, Reports
from cordee.cluster.facts import Facts, KvSource, ModelShape, Placement, SliceHeld, placement_id
from cordee.cluster.membership import View

READ_BYTES_PER_SECOND_MIN = 20_000_000  # an old disk that something else uses, too
DISK_RESERVE_BYTES = 2 << 30  # a copy leaves this free: the node's owner needs disk more than we need copies


@dataclass(frozen=True, order=True)
class SliceGoal:
    """Layers of a model (its digest) to have on disk."""

    model: str
    first: int
    last: int


class StageSpec(NamedTuple):
    """What a worker holds, or is to hold: layers of a model on a device, with room for the KV cache."""

    model: str
    device: str
    first: int
    last: int
    context: int
    sequences: int

    @property
    def slice(self) -> SliceGoal:
        """What must be on disk to load it."""
        return SliceGoal(self.model, self.first, self.last)


def spec_of(placement: Placement, index: int) -> StageSpec:
    """What a stage's worker holds."""
    place = placement.stages[index]
    return StageSpec(
        placement.model, place.device, place.first, place.last, placement.context, placement.sequences
    )


@dataclass(frozen=True)
class StageGoal:
    """A stage to run. With a `wiring`: to be joined under that name to `downstream`, an endpoint.

    The last of several also to `first`, the endpoint of the first: micro-batches go round. A successor's
    stage takes sequences over from `sources`, which are those of the placement that still serves.
    """

    placement: Placement
    index: int
    wiring: str = ""
    downstream: str = ""
    first: str = ""
    sources: tuple[KvSource, ...] = ()

    @property
    def spec(self) -> StageSpec:
        """What its worker holds."""
        return spec_of(self.placement, self.index)


@dataclass(frozen=True)
class HostGoal:
    """A scheduler to run. With a `wiring`: rows go to `upstream`, the endpoint of the first stage.

    A row should take about `row_seconds`, and the weights be read for the first time in `read_seconds`.
    """

    placement: Placement
    wiring: str = ""
    upstream: str = ""
    row_seconds: float = 0.0
    read_seconds: float = 0.0


@dataclass(frozen=True)
class Route:
    """Where a model's streams go; it answers once there is a wiring."""

    host: str
    placement: Placement
    wiring: str = ""


@dataclass(frozen=True)
class Goals:
    """`slices` in the order of urgency; `keep` are ids of workers to leave alone; `routes` by model name.

    `readers`: by the wiring of stages of ours that serve, the nodes whose workers may take their sequences
    over, which are those of the placement's successor.
    """

    slices: tuple[SliceGoal, ...] = ()
    stages: tuple[StageGoal, ...] = ()
    keep: frozenset[str] = frozenset()
    hosts: tuple[HostGoal, ...] = ()
    routes: Mapping[str, tuple[Route, ...]] = field(default_factory=dict[str, tuple[Route, ...]])
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])


def holds(slices: Sequence[SliceHeld], goal: SliceGoal) -> bool:
    """Whether these layers lie in one of the slices; the embedding (0 to 0) lies in no slice of layers."""
    if goal.last == 0:
        return any(held.model == goal.model and (held.whole or held.last == 0) for held in slices)
    return any(
        held.model == goal.model and held.first <= goal.first < goal.last <= held.last for held in slices
    )


def goals(view: View, me: str, chosen: Mapping[str, tuple[Chosen, ...]], planning: Planning) -> Goals:
    """This node's goals. `chosen` is `choose(view, planning)`."""
    reports = Reports(view.facts)
    picks = {placement_id(pick.placement): pick for picks in chosen.values() for pick in picks}
    stages: dict[StageGoal, int] = {}  # and the bytes of each
    hosts: list[HostGoal] = []
    readers: dict[str, frozenset[str]] = {}
    for pick in picks.values():
        mine = _stages(view, reports, pick.placement, me)
        if pick.successor is not None:
            if mine and pick.wiring:
                readers[pick.wiring] = frozenset(place.node for place in pick.successor.stages)
            mine += [
                replace(goal, sources=_sources(reports, pick, goal)) if goal.wiring else goal
                for goal in _stages(view, reports, pick.successor, me)
            ]
        for goal in mine:
            stages[goal] = planning.stage_bytes(pick.shape, goal.placement, goal.index)
        if pick.placement.stages[0].node == me:
            hosts.append(_host(view, reports, pick, planning))
    slices = [goal.spec.slice for goal in stages]
    slices += _copies(view, list(picks.values()), me)
    return Goals(
        slices=tuple(dict.fromkeys(slices)),
        stages=tuple(stages),
        keep=_workers_to_keep(view.facts[me], stages, _unserved(view, chosen), planning),
        hosts=tuple(hosts),
        routes={model: tuple(map(_route, picks)) for model, picks in chosen.items()},
        readers=readers,
    )


def _stages(view: View, reports: Reports, placement: Placement, me: str) -> list[StageGoal]:
    mine = [index for index, place in enumerate(placement.stages) if place.node == me]
    wiring = reports.wiring(placement) if mine else ""
    found: list[StageGoal] = []
    for index in mine:
        downstream = first = ""
        if wiring and index + 1 < len(placement.stages):
            downstream = reports.by_stage[placement_id(placement), index + 1].endpoint
        elif wiring:
            downstream = view.facts[placement.stages[0].node].inbox
            first = reports.by_stage[placement_id(placement), 0].endpoint if index else ""
        found.append(StageGoal(placement, index, wiring, downstream, first))
    return found


def _sources(reports: Reports, pick: Chosen, goal: StageGoal) -> tuple[KvSource, ...]:
    """Where a successor's stage finds its layers in the placement that serves; none if that is broken."""
    wanted = goal.spec
    found: list[KvSource] = []
    for index, place in enumerate(pick.placement.stages):
        report = reports.by_stage.get((placement_id(pick.placement), index))
        first, last = max(wanted.first, place.first), min(wanted.last, place.last)
        if first >= last:
            continue
        if report is None or not report.endpoint or report.wiring != pick.wiring:
            return ()
        layers = (first - place.first, last - place.first)
        found.append(KvSource(report.endpoint, pick.wiring, *layers, place.node))
    return tuple(found)


def _host(view: View, reports: Reports, pick: Chosen, planning: Planning) -> HostGoal:
    placement = pick.placement
    if not pick.wiring:
        return HostGoal(placement)
    speed = planning.speed(pick.shape, placement, view.facts)
    stage_bytes = [
        planning.stage_bytes(pick.shape, placement, index) for index in range(len(placement.stages))
    ]
    return HostGoal(
        placement,
        pick.wiring,
        reports.by_stage[placement_id(placement), 0].endpoint,
        row_seconds=1 / speed if speed > 0 else 0.0,
        read_seconds=max(stage_bytes) / READ_BYTES_PER_SECOND_MIN,
    )


def _route(pick: Chosen) -> Route:
    return Route(pick.placement.stages[0].node, pick.placement, pick.wiring)


def _unserved(view: View, chosen: Mapping[str, tuple[Chosen, ...]]) -> dict[str, ModelShape]:
    """The deployed models, by digest, of which something chosen, or everything, does not serve."""
    return {
        deployment.shape.digest: deployment.shape
        for deployment in view.deployments
        if deployment.shape is not None
        and not (chosen.get(deployment.model) and all(pick.wiring for pick in chosen[deployment.model]))
    }


def _workers_to_keep(
    own: Facts, stages: Mapping[StageGoal, int], unserved: Mapping[str, ModelShape], planning: Planning
) -> frozenset[str]:
    """Workers of placements that were not chosen, while those chosen do not serve and memory is left."""
    free = {device.name: device.memory_bytes for device in own.devices}
    for goal, stage_bytes in stages.items():
        free[goal.spec.device] -= stage_bytes
    wanted = {(placement_id(goal.placement), goal.index) for goal in stages}
    keep: set[str] = set()
    for report in sorted(own.stages, key=lambda report: report.worker):
        placement, index = report.placement, report.index
        running = report.state in ("loading", "loaded", "wired") and 0 <= index < len(placement.stages)
        if placement.model not in unserved or not running or (placement_id(placement), index) in wanted:
            continue
        place, shape = placement.stages[index], unserved[placement.model]
        if not shape.allows(place.first, place.last):
            continue
        needed = planning.stage_bytes(shape, placement, index)
        if needed <= free.get(place.device, -1):
            free[place.device] -= needed
            keep.add(report.worker)
    return frozenset(keep)


def _copies(view: View, picks: Sequence[Chosen], me: str) -> list[SliceGoal]:
    """Slices of serving placements that this node should hold a second copy of."""
    found: list[SliceGoal] = []
    for pick in picks:
        if not pick.wiring:
            continue
        stages, only = pick.placement.stages, pick.placement.only
        facts = {node: own for node, own in view.facts.items() if not only or node in only}
        for index, place in enumerate(stages):
            goal = spec_of(pick.placement, index).slice
            size = sum(pick.shape.layer_bytes[goal.first : goal.last])
            if _copy_holder(facts, goal, place.node, size) == me:
                found.append(goal)
        embedding = SliceGoal(pick.placement.model, 0, 0)
        if (
            len(stages) > 1
            and _copy_holder(facts, embedding, stages[0].node, pick.shape.embedding_bytes) == me
        ):
            found.append(embedding)
    return found


def _copy_holder(facts: Mapping[str, Facts], goal: SliceGoal, runner: str, slice_bytes: int) -> str | None:
    """The node to hold the second copy: one that has it already, else one with the disk for it; by hash."""
    others = [own for node, own in facts.items() if node != runner and not own.draining]
    able = [own for own in others if holds(own.slices, goal)] or [
        own for own in others if own.disk_free_bytes >= slice_bytes + DISK_RESERVE_BYTES
    ]
    return min((own.node for own in able), key=lambda node: _lot(goal, node), default=None)


def _lot(goal: SliceGoal, node: str) -> bytes:
    return hashlib.sha256(f"{goal.model} {goal.first} {goal.last} {node}".encode()).digest()
