"""Goals: each node's share of what was chosen; and the reconciler, which says how to get there."""

import msgspec

from clusters import (
    CONTEXT,
    LAYER_BYTES,
    SEQUENCES,
    Simple,
    facts_of,
    placed,
    running,
    shape_of,
    view_of,
)
from cordee.cluster.choose import choose
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import KvSource, SliceHeld, StageReport, wiring_id
from cordee.cluster.goals import (
    DISK_RESERVE_BYTES,
    Goals,
    SliceGoal,
    StageGoal,
    StageSpec,
    goals,
    holds,
    spec_of,
)
from cordee.cluster.membership import View
from cordee.cluster.reconcile import FAILED_SECONDS, WIRINGS_MAX, Actions, Reconciler, WorkerStatus

HALVES = placed(("a", 0, 2), ("b", 2, 4))
WHOLE = SliceHeld("m", 0, 4, whole=True)


def goals_of(view: View, me: str) -> Goals:
    return goals(view, me, choose(view, Simple()), Simple())


def halves(state: str = "wired", **more: object) -> View:
    reports = running(HALVES, state)
    return view_of(*(facts_of(node, 2, stages=reports[node]) for node in "ab"))


def test_stages_are_run_before_they_are_wired() -> None:
    loading = goals_of(halves("loading"), "a")
    assert loading.stages == (StageGoal(HALVES, 0),)
    assert loading.slices[0] == SliceGoal("m", 0, 2)
    assert loading.hosts[0].wiring == loading.routes["m"][0].wiring == ""


def test_once_all_are_loaded_each_is_wired_to_the_next_and_the_last_to_the_host() -> None:
    view = halves("loaded")
    wiring = wiring_id(HALVES, ["w0a", "w1b"])
    assert goals_of(view, "a").stages == (StageGoal(HALVES, 0, wiring, "b/1"),)
    assert goals_of(view, "b").stages == (StageGoal(HALVES, 1, wiring, "a/inbox", first="a/0"),)
    assert goals_of(view, "a").hosts[0].wiring == ""


def test_once_all_are_wired_rows_may_flow_and_every_node_knows_the_way() -> None:
    view = halves("wired")
    (host,) = goals_of(view, "a").hosts
    assert (host.wiring, host.upstream) == (wiring_id(HALVES, ["w0a", "w1b"]), "a/0")
    assert goals_of(view, "b").hosts == ()
    for node in "ab":
        (route,) = goals_of(view, node).routes["m"]
        assert (route.host, route.placement, route.wiring) == ("a", HALVES, host.wiring)


def test_a_new_worker_makes_a_new_wiring() -> None:
    reports = running(HALVES)
    fresh = StageReport(HALVES, 1, "loaded", "fresh", "b/9")
    view = view_of(facts_of("a", 2, stages=reports["a"]), facts_of("b", 2, stages=[fresh]))
    goal = goals_of(view, "a").stages[0]
    assert (goal.wiring, goal.downstream) == (wiring_id(HALVES, ["w0a", "fresh"]), "b/9")
    assert goal.wiring != reports["a"][0].wiring


def test_a_successor_takes_over_from_the_stages_that_serve() -> None:
    serving = running(HALVES)
    thirds = placed(("c", 0, 1), ("d", 1, 3), ("c", 3, 4))
    loaded = running(thirds, "loaded")
    nodes = [
        facts_of(node, 4, stages=[*serving.get(node, ()), *loaded.get(node, ())], draining=node == "a")
        for node in "abcd"
    ]
    goals = {goal.index: goal for node in "cd" for goal in goals_of(view_of(*nodes), node).stages}
    wiring = serving["a"][0].wiring
    assert goals[0].sources == (KvSource("a/0", wiring, 0, 1, "a"),)
    assert goals[1].sources == (KvSource("a/0", wiring, 1, 2, "a"), KvSource("b/1", wiring, 0, 1, "b"))
    assert goals[2].sources == (KvSource("b/1", wiring, 1, 2, "b"),)
    assert all(not goal.sources for goal in goals_of(view_of(*nodes), "b").stages)
    readers = {node: goals_of(view_of(*nodes), node).readers for node in "abcd"}
    assert readers == {"a": {wiring: {"c", "d"}}, "b": {wiring: {"c", "d"}}, "c": {}, "d": {}}


def test_workers_of_a_lost_placement_are_kept_until_another_serves_if_memory_allows() -> None:
    mine = running(HALVES)["a"]
    for layers, kept in ((6, {"w0a"}), (4, set())):
        view = view_of(facts_of("a", layers, stages=mine))
        assert goals_of(view, "a").keep == kept
    whole = running(placed(("a", 0, 4)))["a"]
    assert goals_of(view_of(facts_of("a", 6, stages=[*mine, *whole])), "a").keep == frozenset()


def test_workers_of_a_lost_placement_are_kept_where_nothing_else_is_possible() -> None:
    assert goals_of(view_of(facts_of("a", 2, stages=running(HALVES)["a"])), "a").keep == {"w0a"}
    undeployed = view_of(facts_of("a", 2, stages=running(HALVES)["a"]), deployments=[])
    assert goals_of(undeployed, "a").keep == frozenset()


def test_each_slice_of_what_serves_is_kept_twice_by_one_other_node() -> None:
    reports = running(HALVES)
    nodes = [facts_of(node, 2, stages=reports.get(node, ()), speed=50) for node in "abcd"]
    copies = {node: goals_of(view_of(*nodes), node).slices for node in "abcd"}
    extra = [goal for node in "cd" for goal in copies[node]]
    extra += [goal for node in "ab" for goal in copies[node][1:]]
    assert sorted(extra) == [SliceGoal("m", 0, 0), SliceGoal("m", 0, 2), SliceGoal("m", 2, 4)]
    assert all(not copies[node] for node in "cd") or extra
    loading = running(HALVES, "loading")
    waiting = [facts_of(node, 2, stages=loading.get(node, ()), speed=50) for node in "abcd"]
    assert all(goals_of(view_of(*waiting), node).slices == () for node in "cd")


def test_the_embedding_lies_in_no_slice_of_layers() -> None:
    embedding = SliceGoal("m", 0, 0)
    assert not holds([SliceHeld("m", 0, 2), SliceHeld("n", 0, 0)], embedding)
    assert holds([SliceHeld("m", 0, 0)], embedding)
    assert holds([WHOLE], embedding)


def test_a_model_that_is_kept_on_some_nodes_is_copied_to_those_alone() -> None:
    for others in ("d", "cd"):
        only = ("a", "b", *others)
        reports = running(msgspec.structs.replace(HALVES, only=only))
        deployment = Deployment("m", shape_of(), CONTEXT, SEQUENCES, only=only)
        nodes = [facts_of(node, 2, stages=reports.get(node, ())) for node in "abcd"]
        view = view_of(*nodes, deployments=[deployment])
        copies = {node: goals_of(view, node).slices for node in "abcd"}
        assert bool(copies["c"]) <= ("c" in only)
        assert sum(len(goals) for goals in copies.values()) == 2 + 3  # stages, their copies, the embedding


def test_a_copy_that_lies_somewhere_stays_and_full_disks_get_none() -> None:
    reports = running(placed(("a", 0, 4)))
    a = facts_of("a", stages=reports["a"])
    for node in "bc":
        other = "c" if node == "b" else "b"
        holder = facts_of(node, slices=[WHOLE], disk_free_bytes=0)
        view = view_of(a, holder, facts_of(other))
        assert goals_of(view, node).slices == (SliceGoal("m", 0, 4),)
        assert goals_of(view, other).slices == ()
    room = 4 * LAYER_BYTES + DISK_RESERVE_BYTES
    for disk_free_bytes, expected in ((room, (SliceGoal("m", 0, 4),)), (room - 1, ())):
        view = view_of(a, facts_of("b", disk_free_bytes=disk_free_bytes))
        assert goals_of(view, "b").slices == expected


# The reconciler.

GOAL = StageGoal(HALVES, 0)
SPEC = spec_of(HALVES, 0)


def steps(
    reconciler: Reconciler, *stages: StageGoal, keep: str = "", now: float = 0.0, held: bool = True
) -> Actions:
    return step(
        reconciler, Goals(stages=stages, keep=frozenset(keep.split()), slices=(SPEC.slice,)), {}, now, held
    )


def step(
    reconciler: Reconciler,
    wanted: Goals,
    workers: dict[str, WorkerStatus],
    now: float = 0.0,
    held: bool = True,
) -> Actions:
    return reconciler.step(wanted, workers, (WHOLE,) if held else (), now)


def worker(
    name: str = "w", state: str = "loaded", spec: StageSpec = SPEC, **more: object
) -> dict[str, WorkerStatus]:
    return {name: WorkerStatus(name, spec, state, "a/1", **more)}  # type: ignore[arg-type]


def only(*stages: StageGoal, keep: str = "") -> Goals:
    return Goals(stages=stages, keep=frozenset(keep.split()))


def test_a_stage_is_fetched_started_and_wired() -> None:
    reconciler = Reconciler()
    fetching = steps(reconciler, GOAL, held=False)
    assert (fetching.fetch, fetching.start) == ((SPEC.slice,), ())
    assert [report.state for report in fetching.reports] == ["fetching"]
    starting = steps(reconciler, GOAL)
    assert (starting.fetch, starting.start) == ((), (SPEC,))
    assert [report.state for report in starting.reports] == ["loading"]
    assert step(reconciler, only(GOAL), worker(state="loading")).start == ()
    wanted = only(StageGoal(HALVES, 0, "W", "b/1"))
    (action,) = step(reconciler, wanted, worker()).wire
    assert (action.worker, action.goal.wiring, action.goal.downstream) == ("w", "W", "b/1")
    done = step(reconciler, wanted, worker(state="wired", wiring="W", wirings=frozenset("W")))
    assert (done.wire, done.rename) == ((), ())
    assert (done.reports[0].state, done.reports[0].wiring) == ("wired", "W")


def test_a_wiring_is_entered_once() -> None:
    wanted = only(StageGoal(HALVES, 0, "W", "b/1"))
    left = step(Reconciler(), wanted, worker(wirings=frozenset("W")))
    assert (left.wire, left.rename) == ((), ("w",))
    many = frozenset(f"{index}" for index in range(WIRINGS_MAX))
    assert step(Reconciler(), wanted, worker(wirings=many)).rename == ("w",)


def test_a_new_placement_that_needs_the_same_layers_takes_the_worker_over() -> None:
    reconciler = Reconciler()
    step(reconciler, only(GOAL), worker())
    other = StageGoal(placed(("a", 0, 2), ("c", 2, 4)), 0)
    actions = step(reconciler, only(other), worker())
    assert (actions.start, actions.stop) == ((), ())
    assert actions.reports[0].placement == other.placement


def test_two_stages_alike_need_two_workers() -> None:
    reconciler = Reconciler()
    successor = StageGoal(placed(("a", 0, 2), ("c", 2, 4)), 0)
    step(reconciler, only(GOAL), worker())
    actions = step(reconciler, only(successor, GOAL), worker())
    assert actions.start == (SPEC,)
    assert [(report.placement, report.worker) for report in actions.reports] == [
        (successor.placement, ""),
        (HALVES, "w"),
    ]


def test_what_is_to_be_stopped_is_gone_before_its_device_is_used_again() -> None:
    old = worker("old", spec=SPEC._replace(first=1))
    busy = step(Reconciler(), only(GOAL), old)
    assert (busy.stop, busy.start) == (("old",), ())
    elsewhere = worker("old", spec=SPEC._replace(first=1, device="gpu"))
    assert step(Reconciler(), only(GOAL), elsewhere).start == (SPEC,)
    kept = step(Reconciler(), only(GOAL, keep="old"), old)
    assert (kept.stop, kept.start) == ((), (SPEC,))


def test_kept_workers_are_still_reported_as_what_they_were() -> None:
    reconciler = Reconciler()
    step(reconciler, only(GOAL), worker())
    actions = step(reconciler, only(keep="w"), worker())
    assert [(report.placement, report.worker) for report in actions.reports] == [(HALVES, "w")]


def test_a_kept_worker_that_holds_what_a_new_placement_needs_is_taken_over() -> None:
    reconciler = Reconciler()
    step(reconciler, only(GOAL), worker())
    other = StageGoal(placed(("a", 0, 2), ("c", 2, 4)), 0)
    actions = step(reconciler, only(other, keep="w"), worker())
    assert (actions.start, actions.stop) == ((), ())
    assert [(report.placement, report.worker) for report in actions.reports] == [(other.placement, "w")]


def test_a_failure_is_reported_for_a_while_even_if_the_stage_is_wanted_no_more() -> None:
    reconciler = Reconciler()
    reconciler.failed(SPEC, "the disk is full", 10.0)
    for wanted in (only(GOAL), only()):
        actions = step(reconciler, wanted, {}, 11.0)
        assert actions.start == ()
        assert [(r.state, r.detail, r.placement) for r in actions.reports] == [
            ("failed", "the disk is full", HALVES)
        ]
    assert step(reconciler, only(GOAL), {}, 10 + FAILED_SECONDS).start == (SPEC,)


def test_what_the_reconciler_remembers_wrongly_is_mended() -> None:
    reconciler = Reconciler()
    reconciler.failed(SPEC, "corrupted", 1e30)
    reconciler._assignments = {"w": (HALVES, 7), "x": (HALVES, 0)}
    actions = step(reconciler, only(GOAL), worker(), 5.0)
    assert [report.worker for report in actions.reports] == ["w"]
    wrong = worker("v", spec=SPEC._replace(first=1))
    reconciler._assignments = {"v": (HALVES, 0)}
    actions = step(reconciler, only(GOAL), wrong, 5.0)
    assert (actions.stop, [report.worker for report in actions.reports]) == (("v",), [""])


def test_reports_travel_in_facts() -> None:
    report = step(Reconciler(), only(GOAL), worker()).reports[0]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=StageReport) == report
    assert shape_of().allows(0, 2)
