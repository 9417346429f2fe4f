"""The reconciler: what a node's agent does next so that its workers come to match its goals. Pure.

Theory of operation. The controller calls `step` with the node's goals and with what is really there, whenever
either may have changed and at least once a heartbeat. It gets actions, and the reports that the node's facts
should carry. Actions are what is missing between the two, computed anew each time; carrying out an action
twice must do no harm.

A stage goal goes through these states, which are also what is reported of it:

    state       when                                                action
    fetching    its slice is not on disk                            fetch
    loading     its worker is being started, or loads               start
    loaded      ready to be wired, or its links broke               wire, once all stages are loaded
    wired       joined to its neighbours under a wiring             none
    failed      its slice could not be had, or its worker           none for FAILED_SECONDS; the cluster
                could not load it                                   plans without this node

- A worker is told apart by what it holds (`StageSpec`), not by its placement: one that a new placement needs
  again keeps its weights.
- Workers without a goal are stopped, unless the goals keep them; and nothing is started on a device before
  what is to be stopped there is gone.
- A wiring stands for KV caches that grew together, so it is entered once: a worker that left a wiring and is
  needed in it again gets a new id first (`rename`), which changes the wiring for all.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cordee.cluster.facts import Placement, SliceHeld, StageReport, placement_id
from cordee.cluster.goals import Goals, SliceGoal, StageGoal, StageSpec, holds, spec_of
from cordee.cluster.soundness import plain

# A cause such as a full disk or too little memory does not go away by itself; trying again costs a load.
FAILED_SECONDS = 60.0
WIRINGS_MAX = 100  # that a worker remembers; then it gets a new id

WorkerState = Literal["loading", "loaded", "wired"]


@dataclass(frozen=True)
class WorkerStatus:
    """A worker as it really is. `wirings` are all that it was wired in since it has this id.

    A worker whose links broke, to either side, is `loaded` and no longer `wired`; so is the first stage's
    when the host stopped or restarted its scheduler.
    """

    id: str
    spec: StageSpec
    state: WorkerState
    endpoint: str = ""
    wiring: str = ""
    wirings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class WireAction:
    """Join a worker to the goal's `downstream`, with an empty KV cache, under the goal's `wiring`."""

    worker: str
    goal: StageGoal


@dataclass(frozen=True)
class Actions:
    """What is to be done, the most urgent of `fetch` first; `reports` are what the facts should say."""

    reports: tuple[StageReport, ...] = ()
    fetch: tuple[SliceGoal, ...] = ()
    stop: tuple[str, ...] = ()
    start: tuple[StageSpec, ...] = ()
    rename: tuple[str, ...] = ()
    wire: tuple[WireAction, ...] = ()


@dataclass(eq=False)
class _Failure:
    """What could not be done, until when it counts, and how it was last reported."""

    until: float
    detail: str
    report: StageReport | None = None


class Reconciler:
    """See the module's theory of operation. What it remembers is mended or forgotten if it is wrong."""

    def __init__(self) -> None:
        self._assignments: dict[str, tuple[Placement, int]] = {}  # by worker, the stage it was last run as
        self._failures: dict[StageSpec, _Failure] = {}

    @property
    def failures(self) -> Collection[StageSpec]:
        """The stages that count as failed."""
        return self._failures.keys()

    def failed(self, spec: StageSpec, detail: str, now: float) -> None:
        """A stage's slice could not be had, or its worker could not load it."""
        self._failures[spec] = _Failure(now + FAILED_SECONDS, plain(detail))

    def step(
        self, goals: Goals, workers: Mapping[str, WorkerStatus], slices: Sequence[SliceHeld], now: float
    ) -> Actions:
        """What to do now. `workers` by id are those that live; `slices` lie on disk."""
        self._forget(workers, now)
        assigned = self._assign_workers(goals, workers)
        at_work = {worker.id for worker in assigned if worker is not None}
        kept = goals.keep - at_work
        idle = workers.keys() - at_work - kept
        busy = {workers[name].spec.device for name in idle}
        reports: list[StageReport] = []
        start: list[StageSpec] = []
        rename: list[str] = []
        wire: list[WireAction] = []
        for goal, worker in zip(goals.stages, assigned, strict=True):
            reports.append(self._report(goal, worker, slices))
            if worker is None:
                if reports[-1].state == "loading" and goal.spec.device not in busy:
                    start.append(goal.spec)
            elif goal.wiring and (worker.state, worker.wiring) != ("wired", goal.wiring):
                if goal.wiring in worker.wirings or len(worker.wirings) >= WIRINGS_MAX:
                    rename.append(worker.id)
                else:
                    wire.append(WireAction(worker.id, goal))
        reports += self._other_reports(goals, workers, kept)
        fetch = tuple(goal for goal in goals.slices if not holds(slices, goal))
        return Actions(tuple(reports), fetch, tuple(sorted(idle)), tuple(start), tuple(rename), tuple(wire))

    def _forget(self, workers: Mapping[str, WorkerStatus], now: float) -> None:
        for spec, failure in list(self._failures.items()):
            if not 0 < failure.until - now <= FAILED_SECONDS:
                del self._failures[spec]
        for name, (placement, index) in list(self._assignments.items()):
            stages = placement.stages
            fits = name in workers and 0 <= index < len(stages)
            if not fits or spec_of(placement, index) != workers[name].spec:
                del self._assignments[name]

    def _assign_workers(self, goals: Goals, workers: Mapping[str, WorkerStatus]) -> list[WorkerStatus | None]:
        """Give each stage goal a worker: the one that runs it, else another that holds the same.

        Of those that are kept, too: weights that are loaded already are the shortest way to serving again.
        """
        by_stage = {
            (placement_id(placement), index): name for name, (placement, index) in self._assignments.items()
        }
        wanted = [(placement_id(goal.placement), goal.index) for goal in goals.stages]
        assigned = [workers.get(by_stage.get(key, "")) for key in wanted]
        others = workers.keys() - {worker.id for worker in assigned if worker is not None}
        free = sorted(others, key=lambda name: (name in goals.keep, name))
        for place, goal in enumerate(goals.stages):
            for name in free:
                if assigned[place] is None and workers[name].spec == goal.spec:
                    assigned[place] = workers[name]
                    free.remove(name)
                    break
        for goal, worker in zip(goals.stages, assigned, strict=True):
            if worker is not None:
                self._assignments[worker.id] = (goal.placement, goal.index)
        return assigned

    def _report(
        self, goal: StageGoal, worker: WorkerStatus | None, slices: Sequence[SliceHeld]
    ) -> StageReport:
        if worker is not None:
            return _worker_report(goal.placement, goal.index, worker)
        failure = self._failures.get(goal.spec)
        if failure is not None:
            failure.report = StageReport(goal.placement, goal.index, "failed", detail=failure.detail)
            return failure.report
        held = holds(slices, goal.spec.slice)
        return StageReport(goal.placement, goal.index, "loading" if held else "fetching")

    def _other_reports(
        self, goals: Goals, workers: Mapping[str, WorkerStatus], kept: frozenset[str]
    ) -> list[StageReport]:
        """Of workers that are kept, and of what failed: that must be known even when no goal needs it."""
        wanted = {goal.spec for goal in goals.stages}
        failed = [failure.report for spec, failure in self._failures.items() if spec not in wanted]
        assigned = sorted(kept & self._assignments.keys())
        return [_worker_report(*self._assignments[name], workers[name]) for name in assigned] + [
            report for report in failed if report is not None
        ]


def _worker_report(placement: Placement, index: int, worker: WorkerStatus) -> StageReport:
    return StageReport(placement, index, worker.state, worker.id, worker.endpoint, worker.wiring)
