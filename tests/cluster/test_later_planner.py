"""A planner whose answers come later: in the end the same is chosen, and meanwhile nothing is lost."""

import contextlib
from collections.abc import Iterable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusters import running
from cordee.cluster import later_planner
from cordee.cluster.choose import PLANS_MAX, Evaluation, Unanswered, choose, choose_apart
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Facts, Placement, StagePlace
from cordee.cluster.later_planner import LATE_KEPT, LaterPlanner
from cordee.cluster.membership import View
from cordee.cluster.planner import Planner
from cordee.cluster.questions import TOO_MANY, PlanAnswer, answer
from plans import device, machine, made_shape, named

DEMAND = (4096, 2)


@pytest.fixture(autouse=True)
def nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is open, however small."""
    monkeypatch.setattr(later_planner, "AT_ONCE_STEPS", 0)


def view(nodes: Iterable[Facts], *deployments: Deployment) -> View:
    return View(named(*nodes), frozenset(), deployments)


def deployed(name: str, layers: int = 12, replicas: int = 1) -> Deployment:
    return Deployment(name, made_shape(layers, digest=name), *DEMAND, replicas)


def answered(planner: LaterPlanner) -> bool:
    """Answer the question that is due, as the shell does; False if there is none."""
    planner.settle()
    due = planner.due()
    if due is None:
        return False
    found, _ = answer(due.question)
    assert found is not None
    planner.tell(due, found)
    return True


def steps(one: View, planner: LaterPlanner) -> Iterator[Evaluation]:
    """What is chosen, look by look, until no question is open."""
    for _ in range(100):
        yield choose_apart(one, planner)
        if not answered(planner):
            return
    pytest.fail("there is always another question")


machines = st.lists(
    st.builds(
        lambda memory, speed, draining: (device(memory, speed), draining),
        st.integers(0, 30),
        st.sampled_from([10, 40, 400]),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(machines, st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=3))
def test_in_the_end_all_nodes_choose_what_one_that_plans_at_once_chooses(have, wanted):
    nodes = [machine(f"n{i}", one, draining=draining) for i, (one, draining) in enumerate(have)]
    deployments = [deployed(f"m{i}", *each) for i, each in enumerate(wanted)]
    made = list(steps(view(nodes, *deployments), LaterPlanner()))
    assert made[-1] == choose_apart(view(nodes, *deployments), Planner())
    for earlier in made:  # what was chosen before is a part of it
        for model, picks in earlier.made.items():
            assert set(picks) <= set(made[-1].made[model])


def serving(nodes: dict[str, Facts], placement: Placement) -> list[Facts]:
    """The nodes, of which some serve a placement."""
    reports = running(placement)
    return [
        msgspec.structs.replace(facts, stages=tuple(reports.get(node, ()))) for node, facts in nodes.items()
    ]


def alone(node: str) -> Placement:
    return Placement("m", *DEMAND, (StagePlace(node, "GPU", 0, 5),))


def test_while_a_question_is_open_nothing_that_serves_is_touched():
    """A node that drains is relieved with a pause only once it is known that nothing else is possible."""
    nodes = named(machine("ada", device(9, 100), draining=True), machine("bob", device(9, 100)))
    now = view(serving(nodes, alone("ada")), deployed("m", 5))
    first, *_, last = steps(now, LaterPlanner())
    (kept,) = first.made["m"]
    assert (kept.placement, kept.successor) == (alone("ada"), None)
    (kept,) = last.made["m"]
    assert (kept.placement, kept.successor) == (alone("ada"), alone("bob"))


def test_while_a_question_is_open_no_pause_is_taken_for_what_may_need_none():
    """A reported placement would fit in the place of the serving one; the answer fits beside it."""
    nodes = named(
        machine("ada", device(9, 100), draining=True),
        machine("bob", device(9, 100)),
        machine("cyd", device(9, 100)),
    )
    halves = Placement("m", *DEMAND, (StagePlace("ada", "GPU", 0, 2), StagePlace("bob", "GPU", 2, 5)))
    loading = running(alone("bob"), "loading")["bob"]
    nodes = named(*serving(nodes, halves))
    nodes["bob"] = msgspec.structs.replace(nodes["bob"], stages=(*nodes["bob"].stages, *loading))
    first, *_, last = steps(view(nodes.values(), deployed("m", 5)), LaterPlanner())
    assert [(pick.placement, pick.successor) for pick in first.made["m"]] == [(halves, None)]
    assert [(pick.placement, pick.successor) for pick in last.made["m"]] == [(halves, alone("cyd"))]


def test_what_is_small_is_answered_at_once(monkeypatch):
    monkeypatch.setattr(later_planner, "AT_ONCE_STEPS", 50_000)
    planner = LaterPlanner()
    nodes = [machine(name, device(9, 100)) for name in ("ada", "bob", "cyd")]
    assert planner.plan(made_shape(), *DEMAND, nodes) == Planner().plan(made_shape(), *DEMAND, nodes)
    planner.settle()
    assert planner.due() is None


def test_what_is_large_is_left_open_and_said_to_be(monkeypatch):
    monkeypatch.setattr(later_planner, "AT_ONCE_STEPS", 50_000)
    nodes = [machine(f"n{i}", device(8 + i / 10, 20 + i)) for i in range(16)]
    planner, shape = LaterPlanner(), made_shape(80)
    with pytest.raises(Unanswered):
        planner.plan(shape, *DEMAND, nodes)
    assert planner.is_open(shape)
    assert answered(planner)
    assert not planner.is_open(shape)
    assert planner.plan(shape, *DEMAND, nodes) == Planner().plan(shape, *DEMAND, nodes)


def restless(count: int) -> Facts:
    """A node that has other memory each time it is looked at."""
    return machine("evil", device(5 + count % 50 / 100, 5))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("looks", [1, 3])  # for each answer
def test_a_node_that_changes_all_the_time_keeps_no_model_from_being_planned(replicas, looks):
    planner, honest = LaterPlanner(), [machine("ada", device(20, 100)), machine("bob", device(20, 100))]
    deployments = [deployed(name, 5, replicas) for name in ("first", "second")]
    due = None
    for count in range(40 * looks):
        now = view([*honest, restless(count)], *deployments)
        made = choose(now, planner)
        if all(len(made[each.model]) == replicas for each in deployments):
            return
        planner.settle()
        if due is not None and count % looks == 0:
            planner.tell(due, answer(due.question)[0])  # which is never that of the next question
            due = None
        due = due or planner.due()
    pytest.fail(f"not planned: {made}")


def test_a_model_that_never_fits_where_a_node_changes_all_the_time_does_not_hold_up_the_others():
    planner, honest = LaterPlanner(), [machine("ada", device(20, 100))]
    for count in range(3 * LATE_KEPT):
        made = choose(view([*honest, restless(count)], deployed("a giant", 80), deployed("m", 5)), planner)
        if made["m"]:
            return
        answered(planner)
    pytest.fail("not planned")


def test_what_is_no_longer_asked_is_forgotten():
    planner, nodes = LaterPlanner(), [machine("ada", device(20, 100))]
    for layers in (3, 4):
        with pytest.raises(Unanswered):
            planner.plan(made_shape(layers), *DEMAND, nodes)
        planner.settle()
    due = planner.due()
    assert due.question.shape.layers == 4
    planner.tell(due, PlanAnswer())
    assert planner.due() is None


def test_models_take_turns_however_many_questions_one_raises():
    planner, nodes, turns = LaterPlanner(), [machine("ada", device(20, 100))], []
    for count in range(6):
        for model in ("greedy", "m"):
            context = 256 * (count + 1) if model == "greedy" else 4096
            with contextlib.suppress(Unanswered):
                planner.plan(made_shape(5, digest=model), 4096, 2, [*nodes, restless(context)])
        planner.settle()
        due = planner.due()
        turns.append(due.question.shape.digest)
        planner.tell(due, PlanAnswer())
        if "m" in turns:
            return
    pytest.fail(f"one model is never planned: {turns}")


def test_what_finds_nothing_in_bounded_time_is_named_and_serves_on_where_it_serves():
    class Exhausted(Planner):
        def known(self, question):
            return PlanAnswer(unfound=TOO_MANY)

    nodes, model = named(machine("ada", device(9, 100))), deployed("m", 5)
    made, aside, unfound = choose_apart(view(nodes.values(), model), Exhausted())
    assert (made["m"], aside, unfound) == ((), {}, {model.shape: TOO_MANY})
    made, aside, unfound = choose_apart(view(serving(nodes, alone("ada")), model), Exhausted())
    assert [pick.placement for pick in made["m"]] == [alone("ada")]
    assert (aside, unfound) == ({}, {})


def test_a_question_that_cannot_be_answered_is_set_aside_by_name():
    broken = made_shape(4, digest="bad", cut_step=0)
    now = view([machine("ada", device(20, 100))], Deployment("bad", broken, *DEMAND), deployed("m", 5))
    for planner in (Planner(), LaterPlanner()):
        made = choose_apart(now, planner)
        if isinstance(planner, LaterPlanner):
            *_, made = steps(now, planner)
        assert made.aside == {broken: "ZeroDivisionError: integer division or modulo by zero"}
        assert made.made["bad"] == ()
        assert made.made["m"]


def test_a_model_with_very_many_replicas_is_planned_a_few_at_a_time_until_all_are_there():
    """One wish for 256 replicas must not have each look ask 256 questions."""
    asked: list[str] = []

    class Counted(Planner):
        def plan(self, shape, *given):
            asked.append(shape.digest)
            return super().plan(shape, *given)

    nodes = named(*(machine(f"n{i:02d}", device(9, 100)) for i in range(40)))
    many, planner = deployed("m", 5, 256), Counted()
    for _ in range(4):
        made = choose(view(nodes.values(), many), planner)["m"]
        assert len(asked) <= PLANS_MAX
        asked.clear()
        for pick in made:
            (place,) = pick.placement.stages
            reports = running(pick.placement, "loading")[place.node]
            nodes[place.node] = msgspec.structs.replace(nodes[place.node], stages=tuple(reports))
    assert len(made) == 40
