"""Which placements the cluster should run: a pure function that every node evaluates on its own view.

Theory of operation. Nobody is in charge and nothing is counted. What nodes *report running* is the memory of
the cluster; `choose` only selects from it, and plans afresh where it finds nothing. For each deployed model:

1. Reported placements that are infeasible in this view are dropped: a node gone or revoked, a stage that
   failed, layers not covered once, another shape or context than deployed, memory or disk short.
2. Of the rest the best are kept, as many as there are replicas, by `Candidate.rank`:
   serving first; then those without a draining node; then those that wait for no slice; then the better
   class of predicted speed (coarse, so that noise never decides); then the smallest id.
3. Replicas still missing are planned, on alive nodes that are not draining and have not just failed at it;
   not by a node that has just started, since what it has not heard of yet may serve already. Nodes that
   could not work together (doubts.py) are planned together only where nothing else is possible.
4. A serving placement may get a *successor*, loaded beside it and preferred by rank once it serves: if it
   uses a draining node, or nodes that do not work together, any placement without them; else only one faster
   by UPGRADE_RATIO. Where its stages fit nowhere beside the serving ones, it is relieved in their place, with
   a pause.

Memory is given out in a fixed order: to all that serves, to what loads, to fresh plans, to successors, each
by rank and model; those that come later get what is left. So a new deployment never takes the memory of a
model that serves.

The planner may owe an answer for a while (cluster/later_planner.py). Then this evaluation plans nothing more,
as if the node were listening still: it keeps what is reported, and once the answer is there all is evaluated
anew. What it selects meanwhile are the first of those placements that it will select then; a node that is
slower at planning than others differs from them for a moment, as one whose view is older does.

Convergence: once views agree, all nodes select the same reported placements; the others' stages are stopped,
so their reports vanish. A fresh plan is made only where nothing is reported; should nodes make different ones
because their views differ for a moment, or one has an answer that another still waits for, all of these are
reported next, and all nodes select the same. The planner's steps are counted, not timed: with one view all
get the same answer, and each question is answered, as those of a model wait for a bounded number of others.

Closure: loading what was selected only raises its rank (waiting < loading < serving), and that of no other
placement changes meanwhile. A successor is faster by more than a class when it is taken up, so it has the
better rank once it serves, and the way back would need the same gain again.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import msgspec

from cordee.cluster.doubts import Exclusions
from cordee.cluster.facts import (
    Facts,
    ModelShape,
    Placement,
    StagePlace,
    StageReport,
    placement_id,
    wiring_id,
)
from cordee.cluster.membership import View
from cordee.cluster.search import held_layers

# A serving model is moved for this gain only; classes of speed are as wide. Predictions are good to 20 %.
UPGRADE_RATIO = 1.5

# Plans that are asked for at once for each model: those of its replicas, and their successors. More come as
# these are reported.
PLANS_MAX = 16

Free = dict[tuple[str, str], int]  # bytes by (node, device)


class Planning(Protocol):
    """What the choice asks of the planner. All of it deterministic."""

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        """The best placement on these nodes, whose devices' memory is what is free; None if none fits.

        Raises:
            Unanswered: the answer is not there yet: ask again.
            Unfound: none was found within the bounds of planning, though some may fit.
        """

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        """Predicted tokens per second of one stream."""
        ...

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        """Memory of the device that a stage takes."""
        ...


class Workload(NamedTuple):
    """A model as it is deployed. A placement for another context does not count for it.

    Deployments that disagree about a model's shape are different workloads: a wrong one spoils no other.
    """

    shape: ModelShape
    context: int
    sequences: int
    only: tuple[str, ...] = ()  # the nodes that may run it; empty: all


@dataclass(frozen=True)
class Chosen:
    """A placement to run; `wiring` names its links while it serves. `successor` is loaded beside it."""

    shape: ModelShape
    placement: Placement
    wiring: str = ""
    successor: Placement | None = None


@dataclass(frozen=True)
class Candidate:
    """A placement that is reported, or was just planned.

    One with a draining node is to be left, and so is a `doubted` one, whose nodes do not work together.
    """

    placement: Placement
    id: str
    wiring: str
    leaving: bool
    doubted: bool
    waiting: bool
    speed: float

    @property
    def rank(self) -> tuple[bool, bool, bool, int, str]:
        """The smallest is the best."""
        return not self.wiring, self.leaving, self.waiting, -speed_class(self.speed), self.id


def speed_class(speed: float) -> int:
    """Speeds that differ by UPGRADE_RATIO are in different classes; nonsense is in the lowest."""
    if not (speed > 0 and math.isfinite(speed)):
        return -1000
    return math.floor(math.log(speed) / math.log(UPGRADE_RATIO))


class Reports:
    """The stages that a view's nodes report, by placement and index."""

    def __init__(self, facts: Mapping[str, Facts]) -> None:
        self.by_stage: dict[tuple[str, int], StageReport] = {}
        self.placements: dict[str, Placement] = {}
        self.failed: set[tuple[str, str]] = set()  # (node, model)
        for node in sorted(facts):
            for report in facts[node].stages:
                self._add(node, report)

    def _add(self, node: str, report: StageReport) -> None:
        stages = report.placement.stages
        if not (0 <= report.index < len(stages) and stages[report.index].node == node):
            return
        name = placement_id(report.placement)
        key = (name, report.index)
        if report.state == "failed":
            self.failed.add((node, report.placement.model))
        self.placements[name] = report.placement
        if key not in self.by_stage or report.worker < self.by_stage[key].worker:
            self.by_stage[key] = report

    def stages(self, placement: Placement) -> list[StageReport | None]:
        """What is reported of each stage."""
        name = placement_id(placement)
        return [self.by_stage.get((name, index)) for index in range(len(placement.stages))]

    def wiring(self, placement: Placement) -> str:
        """The id that its links should have; empty unless all stages are loaded."""
        workers: list[str] = []
        for report in self.stages(placement):
            if report is None or report.state not in ("loaded", "wired"):
                return ""
            workers.append(report.worker)
        return wiring_id(placement, workers)

    def serving(self, placement: Placement) -> str:
        """The wiring that all of its stages are joined by; empty if there is none."""
        wiring = self.wiring(placement)
        stages = self.stages(placement)
        joined = all(report.state == "wired" and report.wiring == wiring for report in stages if report)
        return wiring if joined else ""

    def waiting(self, placement: Placement) -> bool:
        """Whether a stage is not reported, or has no slice yet."""
        return any(report is None or report.state == "fetching" for report in self.stages(placement))


def covers(shape: ModelShape, placement: Placement) -> bool:
    """Whether the stages cover all layers once, in order, and the model may be cut like that."""
    edge = 0
    for place in placement.stages:
        if place.first != edge or not shape.allows(place.first, place.last):
            return False
        edge = place.last
    return edge == shape.layers


class Unanswered(Exception):
    """The planner's answer is not there yet."""


class Unfound(Exception):
    """The planner found nothing within its bounds; the text says why, for people."""


class PlanningFailed(Exception):
    """The planner raised for a model; the cause says what."""

    def __init__(self, shape: ModelShape, reason: str) -> None:
        super().__init__(reason)
        self.shape = shape
        self.reason = reason


class _Guarded(Planning):
    """A planner whose faults name the model, and which is asked PLANS_MAX times about each at most.

    `unfound` are the models of which it found nothing within its bounds, with the reason.
    """

    def __init__(self, planning: Planning) -> None:
        self._planning = planning
        self._plans: Counter[ModelShape] = Counter()
        self.unfound: dict[ModelShape, str] = {}

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        self._plans[shape] += 1
        if self._plans[shape] > PLANS_MAX:
            return None
        try:
            with _blaming(shape):
                return self._planning.plan(shape, context, sequences, nodes)
        except Unfound as reason:
            self.unfound[shape] = str(reason)
            return None

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        with _blaming(shape):
            return self._planning.speed(shape, placement, nodes)

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        with _blaming(shape):
            return self._planning.stage_bytes(shape, placement, index)


@contextlib.contextmanager
def _blaming(shape: ModelShape) -> Generator[None]:
    try:
        yield
    except (Unanswered, Unfound, PlanningFailed):
        raise
    except Exception as error:
        raise PlanningFailed(shape, f"{type(error).__name__}: {error}") from error


def choose(view: View, planning: Planning) -> dict[str, tuple[Chosen, ...]]:
    """What should run for each deployed model, by its name. Total: nonsense in the view is passed over."""
    return choose_apart(view, planning)[0]


class Evaluation(NamedTuple):
    """What `choose` chose, by model. Models that nothing runs of although somebody deployed them, with the
    reason: `aside` because planning them failed, `unfound` because no placement was found in bounded time."""

    made: dict[str, tuple[Chosen, ...]]
    aside: dict[ModelShape, str]
    unfound: dict[ModelShape, str]


def choose_apart(view: View, planning: Planning) -> Evaluation:
    """`choose`, and the models that are not planned, with the reason.

    A model that somebody deployed with a shape at which the planner raises hides no other: nothing of it
    runs, and the rest is chosen as if it were not there. All nodes set the same models aside. What serves of
    one for which no placement is found in bounded time goes on.
    """
    aside: dict[ModelShape, str] = {}
    while True:  # each turn sets one of the deployments aside, at least
        sound = without(view, aside)
        guarded = _Guarded(planning)
        try:
            made = Selection(sound, guarded).made()
        except PlanningFailed as failed:
            aside[failed.shape] = failed.reason
            continue
        left = [each.model for each in view.deployments if each.shape in aside and each.replicas > 0]
        unfound = {
            each.shape: guarded.unfound[each.shape]
            for each in sound.deployments
            if each.shape in guarded.unfound and not made.get(each.model)
        }
        return Evaluation(made | dict.fromkeys(left, ()), aside, unfound)


def without(view: View, aside: Collection[ModelShape]) -> View:
    """The view without the deployments of some models."""
    if not aside:
        return view
    kept = tuple(each for each in view.deployments if each.shape not in aside)
    return replace(view, deployments=kept)


class Selection:
    """One evaluation of `choose`."""

    def __init__(self, view: View, planning: Planning) -> None:
        self._view = view
        self._planning = planning
        self._reports = Reports(view.facts)
        self._exclusions = Exclusions(view.facts)
        self._free: Free = {
            (node, device.name): device.memory_bytes
            for node, facts in view.facts.items()
            for device in facts.devices
        }
        self._wanted: dict[str, Workload] = {}
        self._replicas: dict[Workload, int] = {}
        for deployment in view.deployments:
            if deployment.shape is not None and deployment.replicas > 0:
                job = Workload(deployment.shape, deployment.context, deployment.sequences, deployment.only)
                self._wanted[deployment.model] = job
                self._replicas[job] = max(deployment.replicas, self._replicas.get(job, 0))
        self._kept: dict[Workload, list[Candidate]] = {job: [] for job in self._replicas}
        self._successors: dict[str, Placement] = {}  # by the id of the placement they follow
        self._held: dict[tuple[str, str], frozenset[int]] = {}  # layers on a node's disk, by node and model
        self._is_open = False  # whether the planner owes an answer

    def made(self) -> dict[str, tuple[Chosen, ...]]:
        """Choose; see the module's docstring for the steps."""
        found = {job: self._candidates(job) for job in self._replicas}
        for wanted in ((True, False), (True, True), (False, False)):  # (serving, leaving)
            for job, candidates in found.items():
                self._keep(job, [c for c in candidates if (bool(c.wiring), c.leaving) == wanted])
        for job in self._replicas:
            self._plan_missing(job)
        for job, candidates in found.items():
            # Better than nothing, but nothing new for a node that is draining.
            self._keep(job, [c for c in candidates if not c.wiring and c.leaving and not c.waiting])
        for job, candidates in found.items():
            self._keep(job, [c for c in candidates if not c.wiring and c.doubted])
            self._plan_missing(job, last_resort=True)
        for job, candidates in found.items():
            for kept in list(self._kept[job]):
                self._succeed(job, kept, candidates)
        return {model: self._chosen(job) for model, job in self._wanted.items()}

    def _chosen(self, job: Workload) -> tuple[Chosen, ...]:
        kept = sorted(self._kept[job], key=lambda candidate: candidate.rank)
        return tuple(Chosen(job.shape, c.placement, c.wiring, self._successors.get(c.id)) for c in kept)

    def _candidates(self, job: Workload) -> list[Candidate]:
        """The feasible ones of those that are reported, the best first."""
        placements = self._reports.placements.values()
        found = [self._candidate(job, p) for p in placements if self._feasible(job, p)]
        return sorted(found, key=lambda candidate: candidate.rank)

    def _candidate(self, job: Workload, placement: Placement) -> Candidate:
        facts = self._view.facts
        nodes = {place.node for place in placement.stages}
        doubted = self._exclusions.concern(nodes)
        return Candidate(
            placement,
            placement_id(placement),
            self._reports.serving(placement),
            doubted or any(facts[node].draining for node in nodes),
            doubted,
            self._reports.waiting(placement),
            self._planning.speed(job.shape, placement, facts),
        )

    def _feasible(self, job: Workload, placement: Placement) -> bool:
        deployed = (job.shape.digest, job.context, job.sequences, job.only)
        if (placement.model, placement.context, placement.sequences, placement.only) != deployed:
            return False
        if job.only and any(place.node not in job.only for place in placement.stages):
            return False
        if any((place.node, place.device) not in self._free for place in placement.stages):
            return False
        reports = self._reports.stages(placement)
        if any(report is not None and report.state == "failed" for report in reports):
            return False
        return covers(job.shape, placement) and all(
            (report is not None and report.state != "fetching") or self._has_disk(job.shape, place)
            for place, report in zip(placement.stages, reports, strict=True)
        )

    def _has_disk(self, shape: ModelShape, place: StagePlace) -> bool:
        """Whether a node has a stage's layers, or disk for those that are missing."""
        facts, key = self._view.facts[place.node], (place.node, shape.digest)
        if key not in self._held:
            self._held[key] = held_layers(shape, facts)
        held = self._held[key]
        missing = (shape.layer_bytes[layer] for layer in range(place.first, place.last) if layer not in held)
        return sum(missing) <= facts.disk_free_bytes

    def _keep(self, job: Workload, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            if len(self._kept[job]) >= self._replicas[job]:
                return
            apart = self._nodes(job).isdisjoint(place.node for place in candidate.placement.stages)
            if apart and self._reserve_memory(job, candidate.placement):
                self._kept[job].append(candidate)

    def _plan_missing(self, job: Workload, last_resort: bool = False) -> None:
        while len(self._kept[job]) < self._replicas[job]:
            planned = self._plan(job, self._nodes(job), last_resort)
            if planned is None or not self._reserve_memory(job, planned.placement):
                return
            self._kept[job].append(planned)

    def _succeed(self, job: Workload, kept: Candidate, candidates: Sequence[Candidate]) -> None:
        """Find what a serving placement should be followed by, or replaced with."""
        if not kept.wiring:
            return
        if kept.leaving:
            successor = self._successor(job, kept, candidates, 0.0)
            if successor is None and self._is_open:
                return  # the answer may be one that needs no pause
            if successor is None:
                self._release_memory(job, kept.placement)
                self._kept[job].remove(kept)
                successor = self._successor(job, kept, candidates, 0.0) or kept
                self._reserve_memory(job, successor.placement)
                self._kept[job].append(successor)
                return
        else:
            successor = self._successor(job, kept, candidates, kept.speed * UPGRADE_RATIO)
        if successor is not None and self._reserve_memory(job, successor.placement):
            self._successors[kept.id] = successor.placement

    def _successor(
        self, job: Workload, kept: Candidate, candidates: Sequence[Candidate], speed: float
    ) -> Candidate | None:
        """The best reported placement that fits and is at least as fast as `speed`; else a planned one."""
        others = {place.node for c in self._kept[job] if c is not kept for place in c.placement.stages}
        for candidate in candidates:
            fast = candidate.speed >= speed and candidate.id != kept.id and not candidate.leaving
            apart = others.isdisjoint(place.node for place in candidate.placement.stages)
            if fast and apart and self._fits(job, candidate.placement):
                return candidate
        planned = self._plan(job, others)
        if planned is None or planned.id == kept.id or not planned.speed >= speed:
            return None
        return planned

    def _plan(self, job: Workload, taken: set[str], last_resort: bool = False) -> Candidate | None:
        """The best of the nodes that work together; as a `last_resort` also of those that did not."""
        if self._view.listening or self._is_open:  # what is asked for later depends on the answer
            return None
        nodes: dict[str, Facts] = {}
        for node, facts in self._view.facts.items():
            failed = (node, job.shape.digest) in self._reports.failed
            barred = node in self._view.suspects or node in taken or (job.only and node not in job.only)
            if not (failed or facts.draining or barred):
                nodes[node] = self._with_free_memory(facts)
        found: list[Candidate] = []
        for group in self._exclusions.groups(nodes, last_resort):
            together = [facts for node, facts in nodes.items() if node in group]
            try:
                placement = self._planning.plan(job.shape, job.context, job.sequences, together)
            except Unanswered:
                self._is_open = True
                return None
            if placement is not None and job.only:
                placement = msgspec.structs.replace(placement, only=job.only)
            if placement is not None and self._feasible(job, placement) and self._fits(job, placement):
                found.append(self._candidate(job, placement))
        return min(found, key=self._promise, default=None)

    def _promise(self, candidate: Candidate) -> tuple[bool, int, int, float, str]:
        """The smallest is the best: of fresh plans about as fast that whose nodes have the fewest doubts."""
        pairs = self._exclusions.in_pairs({place.node for place in candidate.placement.stages})
        return candidate.doubted, -speed_class(candidate.speed), pairs, -candidate.speed, candidate.id

    def _with_free_memory(self, facts: Facts) -> Facts:
        devices = tuple(
            msgspec.structs.replace(device, memory_bytes=self._free[facts.node, device.name])
            for device in facts.devices
        )
        return facts if devices == facts.devices else msgspec.structs.replace(facts, devices=devices)

    def _nodes(self, job: Workload) -> set[str]:
        """Nodes of this model's kept placements: replicas share none, so one loss costs one."""
        return {place.node for candidate in self._kept[job] for place in candidate.placement.stages}

    def _needed(self, job: Workload, placement: Placement) -> Free:
        needed: Free = {}
        for index, place in enumerate(placement.stages):
            key = (place.node, place.device)
            stage_bytes = self._planning.stage_bytes(job.shape, placement, index)
            needed[key] = needed.get(key, 0) + stage_bytes
        return needed

    def _fits(self, job: Workload, placement: Placement) -> bool:
        return all(self._free[key] >= size for key, size in self._needed(job, placement).items())

    def _reserve_memory(self, job: Workload, placement: Placement) -> bool:
        if not self._fits(job, placement):
            return False
        for key, size in self._needed(job, placement).items():
            self._free[key] -= size
        return True

    def _release_memory(self, job: Workload, placement: Placement) -> None:
        for key, size in self._needed(job, placement).items():
            self._free[key] += size
