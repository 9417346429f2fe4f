"""The choice: what serves stays, what is better is prepared beside it, and everybody chooses the same."""

from collections.abc import Mapping, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import (
    CONTEXT,
    SEQUENCES,
    Simple,
    chosen,
    facts_of,
    placed,
    running,
    shape_of,
    view_of,
    where,
)
from cordee.cluster.choose import UPGRADE_RATIO, Reports, choose, choose_apart, covers, speed_class
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import (
    Device,
    Doubt,
    Facts,
    ModelShape,
    Placement,
    SliceHeld,
    StagePlace,
    StageReport,
    placement_id,
)
from cordee.cluster.membership import View
from cordee.cluster.planner import Planner

ALL = placed(("a", 0, 4))
HALVES = placed(("a", 0, 2), ("b", 2, 4))


def test_nothing_runs_yet_so_it_is_planned() -> None:
    (only,) = chosen(view_of(facts_of("a", 2), facts_of("b", 3, speed=200)))
    assert where(only) == [("b", 0, 3), ("a", 3, 4)]
    assert only.wiring == ""


def test_a_node_that_just_started_plans_nothing_but_takes_part() -> None:
    assert chosen(view_of(facts_of("a"), listening=True)) == ()
    reports = running(HALVES)
    view = view_of(facts_of("a", stages=reports["a"]), facts_of("b", stages=reports["b"]), listening=True)
    assert chosen(view)[0].placement == HALVES


def test_new_placements_avoid_suspects_draining_nodes_and_those_that_failed() -> None:
    failed = StageReport(placed(("c", 0, 4)), 0, "failed")
    nodes = facts_of("a"), facts_of("b", draining=True), facts_of("c", stages=[failed]), facts_of("d")
    assert where(chosen(view_of(*nodes, suspects=["a"]))[0]) == [("d", 0, 4)]


def doubting(facts: Facts, *nodes: str) -> Facts:
    """The facts of a node that doubts others."""
    return msgspec.structs.replace(facts, doubts=tuple(Doubt(node, "late") for node in nodes))


def test_who_could_not_work_together_is_not_placed_together_if_anything_else_is_possible() -> None:
    a, b, c = facts_of("a", 2, speed=300), facts_of("b", 2, speed=200), facts_of("c", 2)
    assert where(chosen(view_of(a, b, c))[0]) == [("a", 0, 2), ("b", 2, 4)]
    assert where(chosen(view_of(doubting(a, "b"), b, c))[0]) == [("a", 0, 2), ("c", 2, 4)]
    assert where(chosen(view_of(a, doubting(b, "a"), c))[0]) == [("a", 0, 2), ("c", 2, 4)]
    twice = chosen(view_of(a, doubting(b, "a"), doubting(c, "a")))
    assert where(twice[0]) == [("b", 0, 2), ("c", 2, 4)]
    nothing_else = chosen(view_of(doubting(a, "b"), b))
    assert where(nothing_else[0]) == [("a", 0, 2), ("b", 2, 4)]


def test_a_placement_that_does_not_come_up_gives_way_and_one_that_serves_gets_a_successor() -> None:
    for state in ("fetching", "loaded", "wired"):
        reports = running(HALVES, state)
        a = doubting(facts_of("a", 2, stages=reports["a"]), "b")
        b = facts_of("b", 2, stages=reports["b"])
        (only,) = chosen(view_of(a, b))
        assert only.placement == HALVES and only.successor is None  # better than nothing
        (only,) = chosen(view_of(a, b, facts_of("c", 4, speed=101)))
        if state == "wired":
            assert only.placement == HALVES and only.successor == placed(("c", 0, 4))
        else:
            assert only.placement == placed(("c", 0, 4))


def test_one_node_that_doubts_all_others_moves_nothing_of_theirs() -> None:
    reports = running(HALVES)
    a, b = facts_of("a", 2, stages=reports["a"]), facts_of("b", 2, stages=reports["b"])
    before = chosen(view_of(a, b, facts_of("c", 4, speed=100)))
    assert chosen(view_of(a, b, doubting(facts_of("c", 4, speed=100), "a", "b"))) == before


def test_what_serves_stays_though_something_faster_by_a_little_is_possible() -> None:
    serving = running(ALL)["a"]
    fast = facts_of("b", speed=100 * (UPGRADE_RATIO - 0.01))
    (only,) = chosen(view_of(facts_of("a", stages=serving), fast))
    assert (where(only), only.successor) == ([("a", 0, 4)], None)
    assert only.wiring


def test_a_clear_gain_is_prepared_beside_and_preferred_once_it_serves() -> None:
    old, new = running(ALL)["a"], placed(("b", 0, 4))
    slow, fast = facts_of("a", stages=old), facts_of("b", speed=100 * UPGRADE_RATIO)
    (only,) = chosen(view_of(slow, fast))
    assert (only.placement, only.successor) == (ALL, new)
    loading = msgspec.structs.replace(fast, stages=tuple(running(new, "loading")["b"]))
    (only,) = chosen(view_of(slow, loading))
    assert (only.placement, only.successor) == (ALL, new)
    serving = msgspec.structs.replace(fast, stages=tuple(running(new)["b"]))
    (only,) = chosen(view_of(slow, serving))
    assert (only.placement, only.successor) == (new, None)


def test_a_serving_model_is_not_stopped_to_make_room_for_a_faster_placement_of_itself() -> None:
    view = view_of(facts_of("a", 4, stages=running(ALL)["a"]), facts_of("b", 2, speed=1000))
    (only,) = chosen(view)  # two layers on b would need two of a, which is full
    assert (only.placement, only.successor) == (ALL, None)


def test_a_suspect_keeps_its_placement_and_a_gone_node_loses_it() -> None:
    reports = running(HALVES)
    a, b = facts_of("a", stages=reports["a"]), facts_of("b", stages=reports["b"])
    assert chosen(view_of(a, b, suspects=["b"]))[0].placement == HALVES
    assert where(chosen(view_of(a))[0]) == [("a", 0, 4)]


@pytest.mark.parametrize(
    "broken",
    [
        placed(("a", 0, 2), ("a", 3, 4)),
        placed(("a", 0, 2), ("a", 1, 4)),
        placed(("a", 0, 2)),
        placed(("a", 0, 5)),
        placed(("a", 2, 4), ("a", 0, 2)),
        placed(),
        placed(("ghost", 0, 4)),
        placed(("a", 0, 4), context=CONTEXT + 1),
        placed(("a", 0, 4), model="other"),
        Placement("m", CONTEXT, SEQUENCES, (StagePlace("a", "no such device", 0, 4),)),
    ],
)
def test_reported_placements_that_cannot_serve_are_dropped(broken: Placement) -> None:
    reports = [StageReport(broken, index, "wired", f"w{index}") for index in range(len(broken.stages))]
    assert where(chosen(view_of(facts_of("a", stages=reports)))[0]) == [("a", 0, 4)]


def test_serving_goes_before_loading_and_loading_before_fetching() -> None:
    other = placed(("b", 0, 4))
    for better, worse in (("wired", "loaded"), ("loading", "fetching"), ("loaded", "fetching")):
        a = facts_of("a", speed=1, stages=running(ALL, better)["a"])
        b = facts_of("b", speed=1.1, stages=running(other, worse)["b"])
        assert chosen(view_of(a, b))[0].placement == ALL, (better, worse)


def test_of_equals_the_smallest_id_is_chosen_and_noise_in_speeds_decides_nothing() -> None:
    other = placed(("b", 0, 4))
    for speed in (80, 81, 84):
        a, b = (
            facts_of("a", stages=running(ALL)["a"], speed=speed),
            facts_of("b", stages=running(other)["b"], speed=80),
        )
        assert chosen(view_of(a, b))[0].placement == min(ALL, other, key=placement_id)


def test_stages_wired_differently_do_not_serve() -> None:
    reports = running(HALVES)
    odd = msgspec.structs.replace(reports["b"][0], wiring="another")
    view = view_of(facts_of("a", stages=reports["a"]), facts_of("b", stages=[odd]))
    assert chosen(view)[0].wiring == ""
    assert chosen(view)[0].placement == HALVES


def test_a_stage_that_waits_for_a_slice_which_the_disk_cannot_take_is_dropped() -> None:
    a = facts_of("a", 2, stages=running(HALVES, "loaded")["a"])
    fetching = running(HALVES, "fetching")["b"]
    for slices, expected in (([], []), ([SliceHeld("m", 2, 4)], [HALVES])):
        full = facts_of("b", 2, stages=fetching, slices=slices, disk_free_bytes=0)
        made = chosen(view_of(a, full, suspects=["a", "b"]))  # so that nothing is planned
        assert [choice.placement for choice in made] == expected


def test_what_a_node_says_of_anothers_stages_does_not_count() -> None:
    reports = running(HALVES)
    assert Reports({"c": facts_of("c", stages=[*reports["a"], *reports["b"]])}).placements == {}


def test_a_draining_node_is_relieved_beside_or_else_in_its_place_or_else_not_at_all() -> None:
    reports = running(HALVES)
    b = facts_of("b", 2, stages=reports["b"], draining=True)
    beside = chosen(view_of(facts_of("a", 2, stages=reports["a"]), b, facts_of("c", 4, speed=1)))[0]
    assert (beside.placement, where_of(beside.successor)) == (HALVES, [("c", 0, 4)])
    in_place = chosen(view_of(facts_of("a", 4, stages=reports["a"]), b))[0]
    assert where(in_place) == [("a", 0, 4)]
    stuck = chosen(view_of(facts_of("a", 2, stages=reports["a"]), b))[0]
    assert (stuck.placement, stuck.successor) == (HALVES, None)


def where_of(placement: Placement | None) -> list[tuple[str, int, int]]:
    return [(place.node, place.first, place.last) for place in placement.stages] if placement else []


def deployment(name: str, layers: int = 4, replicas: int = 1) -> Deployment:
    return Deployment(name, shape_of(name, layers), CONTEXT, SEQUENCES, replicas)


def test_a_new_deployment_never_takes_the_memory_of_a_model_that_serves() -> None:
    serving = running(placed(("a", 0, 4), model="z"))["a"]
    view = view_of(facts_of("a", 4, stages=serving), deployments=[deployment("b"), deployment("z")])
    assert chosen(view, "b") == ()
    assert where(chosen(view, "z")[0]) == [("a", 0, 4)]


def test_models_share_what_memory_there_is() -> None:
    view = view_of(
        facts_of("a", 6), facts_of("b", 4, speed=50), deployments=[deployment("m"), deployment("z")]
    )
    assert where(chosen(view, "m")[0]) == [("a", 0, 4)]
    assert where(chosen(view, "z")[0]) == [("a", 0, 2), ("b", 2, 4)]


def test_replicas_share_no_node() -> None:
    view = view_of(
        facts_of("a", 8), facts_of("b", 8), facts_of("c", 2), deployments=[deployment("m", replicas=3)]
    )
    assert sorted(where(choice) for choice in chosen(view)) == [[("a", 0, 4)], [("b", 0, 4)]]


def test_two_names_of_one_model_share_its_placement() -> None:
    view = view_of(
        facts_of("a"),
        deployments=[Deployment(name, shape_of(), CONTEXT, SEQUENCES) for name in ("nick", "name")],
    )
    assert chosen(view, "nick") == chosen(view, "name") != ()


def test_a_deployment_with_a_wrong_shape_spoils_no_other() -> None:
    wrong = Deployment(
        "a", msgspec.structs.replace(shape_of("x", 6), digest="m"), CONTEXT, SEQUENCES, stamp=2e9
    )
    view = view_of(facts_of("a", 9, stages=running(ALL)["a"]), deployments=[wrong, deployment("m")])
    assert chosen(view, "m")[0].wiring
    assert chosen(view, "a") == ()  # six layers where five are free


def test_draining_nodes_get_nothing_new_even_if_nothing_else_is_possible() -> None:
    for state, expected in (("loaded", [HALVES]), ("fetching", [])):
        reports = running(HALVES, state)
        a = facts_of("a", 2, stages=running(HALVES, "loaded")["a"])
        b = facts_of("b", 2, stages=reports["b"], draining=True)
        assert [choice.placement for choice in chosen(view_of(a, b))] == expected


def test_models_that_were_undeployed_are_not_chosen() -> None:
    assert choose(view_of(facts_of("a"), deployments=[deployment("m", replicas=0)]), Simple()) == {}


def test_classes_of_speed_are_as_wide_as_a_clear_gain() -> None:
    assert speed_class(10 * UPGRADE_RATIO**2) >= speed_class(10) + 1
    assert speed_class(10.0) == speed_class(10.1)
    assert speed_class(float("nan")) == speed_class(0.0) == speed_class(float("inf")) < speed_class(1e-9)


def test_a_model_that_may_not_be_cut_is_not_run_in_slices() -> None:
    whole = msgspec.structs.replace(shape_of(), cuttable=False)
    assert covers(whole, ALL)
    assert not covers(whole, HALVES)


MB = 1_000_000
LARGE = msgspec.structs.replace(shape_of(), layer_bytes=(100 * MB,) * 4)
names = st.sampled_from(("a", "b", "c", "ghost"))
places = st.builds(StagePlace, names, st.sampled_from(("cpu", "gpu")), st.integers(-1, 5), st.integers(-1, 6))
placements = st.builds(
    Placement,
    st.sampled_from(("m", "other")),
    st.sampled_from((CONTEXT, 0, -1)),
    st.just(SEQUENCES),
    st.lists(places, max_size=3).map(tuple),
)
reports = st.builds(
    StageReport,
    st.one_of(st.sampled_from((ALL, HALVES, placed(("c", 0, 1), ("b", 1, 4)))), placements),
    st.integers(-1, 3),
    st.sampled_from(("fetching", "loading", "loaded", "wired", "failed")),
    st.sampled_from(("w", "v", "")),
    st.just("e"),
    st.sampled_from(("", "x")),
)


@st.composite
def garbled(draw: st.DrawFn, node: str) -> Facts:
    """A node that says anything of the right types."""
    facts = facts_of(node, stages=draw(st.lists(reports, max_size=4)), draining=draw(st.booleans()))
    speed = draw(st.sampled_from((1e9, 3e9, 0.0, -1.0, float("nan"), float("inf"))))
    memory_bytes = draw(st.integers(-1, 6)) * 110 * MB + 60 * MB
    device = Device("cpu", "cpu", memory_bytes, speed)
    return msgspec.structs.replace(facts, devices=draw(st.sampled_from(((device,), ()))))


clusters = st.sets(st.sampled_from("abc"), min_size=1).flatmap(
    lambda nodes: st.tuples(*map(garbled, sorted(nodes)))
)


@given(clusters)
def test_any_facts_give_a_choice_that_fits_and_is_the_same_in_any_order(
    nodes: tuple[Facts, ...],
) -> None:
    deployments = [Deployment("m", LARGE, CONTEXT, SEQUENCES)]
    view = view_of(*nodes, deployments=deployments)
    made = choose(view, Planner())
    backwards = View(dict(reversed(view.facts.items())), view.suspects, view.deployments)
    assert choose(backwards, Planner()) == made
    used: dict[str, int] = {}
    for choice in made["m"]:
        for placement in filter(None, (choice.placement, choice.successor)):
            assert covers(LARGE, placement)
            for index, place in enumerate(placement.stages):
                stage_bytes = Planner().stage_bytes(LARGE, placement, index)
                used[place.node] = used.get(place.node, 0) + stage_bytes
    assert all(size <= view.facts[node].devices[0].memory_bytes for node, size in used.items())


class Fragile(Simple):
    """Fails at models whose digest begins with "bad", as a planner at a shape that cannot be."""

    def __init__(self, at: str) -> None:
        self._at = at

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        self._fail("plan", shape)
        return super().plan(shape, context, sequences, nodes)

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        self._fail("speed", shape)
        return super().speed(shape, placement, nodes)

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        self._fail("stage_bytes", shape)
        return super().stage_bytes(shape, placement, index)

    def _fail(self, at: str, shape: ModelShape) -> None:
        if at == self._at and shape.digest.startswith("bad"):
            raise OverflowError("layers without end")


@pytest.mark.parametrize("at", ["plan", "speed", "stage_bytes"])
def test_a_model_at_which_planning_fails_hides_no_other(at: str) -> None:
    deployments = [
        Deployment(name, shape_of(name), CONTEXT, SEQUENCES) for name in ("bad1", "m", "bad2", "n")
    ]
    view = view_of(facts_of("a", 4), facts_of("b", 4), deployments=deployments)
    made, aside, _ = choose_apart(view, Fragile(at))
    assert {shape.digest: reason for shape, reason in aside.items()} == {
        "bad1": "OverflowError: layers without end",
        "bad2": "OverflowError: layers without end",
    }
    good = view_of(facts_of("a", 4), facts_of("b", 4), deployments=[deployments[1], deployments[3]])
    assert made == choose(good, Simple()) | {"bad1": (), "bad2": ()}
    assert made["m"] and made["n"]


def kept_on(*nodes: str, name: str = "m", shape: ModelShape | None = None) -> Deployment:
    return Deployment(name, shape or shape_of(), CONTEXT, SEQUENCES, only=tuple(sorted(nodes)))


def test_a_model_that_is_kept_on_some_nodes_runs_on_no_other() -> None:
    nodes = [facts_of("a", speed=1.0), facts_of("b", speed=1000.0), facts_of("c", layers=1)]
    [choice] = chosen(view_of(*nodes, deployments=[kept_on("a", "c")]))
    assert where(choice) == [("c", 0, 1), ("a", 1, 4)] and choice.placement.only == ("a", "c")
    assert chosen(view_of(*nodes, deployments=[kept_on("c")])) == ()
    assert chosen(view_of(*nodes, deployments=[kept_on("nobody")])) == ()


def test_what_runs_elsewhere_does_not_count_for_it_nor_what_only_says_so() -> None:
    everywhere = placed(("b", 0, 4))
    lying = msgspec.structs.replace(everywhere, only=("a",))
    for running_now in (everywhere, lying):
        nodes = [facts_of("a"), facts_of("b", stages=running(running_now)["b"])]
        [choice] = chosen(view_of(*nodes, deployments=[kept_on("a")]))
        assert where(choice) == [("a", 0, 4)] and not choice.wiring


def test_two_names_of_a_model_that_are_kept_on_different_nodes_share_no_placement() -> None:
    nodes = [facts_of("a", layers=8), facts_of("b", layers=8)]
    names = [kept_on(name="free"), kept_on("b", name="kept")]
    found = choose(view_of(*nodes, deployments=names), Simple())
    [free], [kept] = found["free"], found["kept"]
    assert where(kept) == [("b", 0, 4)] and kept.placement != free.placement
    served = running(kept.placement)
    again = [facts_of("a", layers=8), facts_of("b", layers=8, stages=served["b"])]
    found = choose(view_of(*again, deployments=names), Simple())
    assert found["kept"][0].wiring and not found["free"][0].wiring


def test_a_draining_node_hands_over_to_no_node_that_may_not_have_the_model() -> None:
    kept = msgspec.structs.replace(placed(("a", 0, 4)), only=("a", "c"))
    nodes = [
        facts_of("a", stages=running(kept)["a"], draining=True),
        facts_of("b", speed=1000.0),
        facts_of("c", speed=1.0),
    ]
    [choice] = chosen(view_of(*nodes, deployments=[kept_on("a", "c")]))
    assert choice.successor is not None
    assert [place.node for place in choice.successor.stages] == ["c"]
    [choice] = chosen(view_of(*nodes[:2], deployments=[kept_on("a", "c")]))
    assert choice.successor is None and choice.wiring


@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(1, 1000), st.booleans()), min_size=1, max_size=5),
    st.lists(st.sets(st.sampled_from("abcdex")), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde"), st.integers(0, 3)), max_size=4),
)
def test_no_choice_uses_a_node_that_may_not_have_the_model(
    machines: list[tuple[int, float, bool]],
    keeps: list[set[str]],
    reported: list[tuple[str, str, int]],
) -> None:
    reports: dict[str, list[StageReport]] = {}
    for first, second, which in reported:
        only = tuple(sorted(keeps[which % len(keeps)]))
        placement = msgspec.structs.replace(placed((first, 0, 2), (second, 2, 4)), only=only)
        for node, said in running(placement).items():
            reports.setdefault(node, []).extend(said)
    nodes = [
        facts_of(node, layers, speed, stages=reports.get(node, ()), draining=draining)
        for node, (layers, speed, draining) in zip("abcde", machines, strict=False)
    ]
    names = [kept_on(*nodes_of_it, name=f"m{n}") for n, nodes_of_it in enumerate(keeps)]
    found = choose(view_of(*nodes, deployments=names), Simple())
    for name, allowed in zip(names, keeps, strict=True):
        for choice in found[name.model]:
            for placement in filter(None, (choice.placement, choice.successor)):
                used = {place.node for place in placement.stages}
                assert placement.only == name.only and (not allowed or used <= allowed)
