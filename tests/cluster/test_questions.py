"""Questions and answers of planning: the same for all nodes, and bounded work whatever anybody says."""

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calls import calls_of
from cordee.cluster import memory, planner
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import Facts, ModelShape, Offer, SliceHeld
from cordee.cluster.memory import PIECES_MAX, Demand, edges_of, needed_bytes, needs
from cordee.cluster.planner import ADVICE_RATIO, TRIAL_STEPS, TRIALS_STEPS, copies, largest, plan
from cordee.cluster.questions import TOO_MANY, Question, answer, asked
from cordee.cluster.search import (
    NODE_UNITS_MAX,
    STEPS_MAX,
    UNITS_MAX,
    Search,
    Unit,
    considered,
    held_layers,
)
from cordee.cluster.soundness import ITEMS_MAX, fault
from plans import GB, device, machine, made_shape, named, slices

DEMAND = Demand(4096, 2)


def unlike(count: int, devices: int, seed: int = 0, memory_gb: tuple[float, float] = (2, 24)) -> list[Facts]:
    """Machines of which no two are alike, nor any two links."""
    random = Random(seed)
    names = [f"n{i:03d}" for i in range(count)]
    return [
        machine(
            name,
            *(
                device(random.uniform(*memory_gb), random.uniform(5, 500), name=f"d{k}")
                for k in range(devices)
            ),
            rtts={other: random.uniform(0.0001, 0.01) for other in names},
            bytes_per_second={other: random.uniform(1e6, 1e9) for other in names},
        )
        for name in names
    ]


numbers = st.sampled_from((0, 1, 7, 4096, GB // 3, GB, 1 << 40, 1 << 56))


@st.composite
def absurd_shapes(draw: st.DrawFn) -> ModelShape:
    """Whatever soundness lets in."""
    layers = draw(st.sampled_from((1, 2, 31, 127, 128, 129, 500, ITEMS_MAX)))
    random = draw(st.randoms(use_true_random=False))
    sizes = draw(st.lists(numbers, min_size=1, max_size=3))

    def by_layer() -> tuple[int, ...]:
        return tuple(random.choice(sizes) for _ in range(layers))

    shape = made_shape(
        layers,
        n_embd=draw(numbers),
        n_vocab=draw(numbers),
        layer_bytes=by_layer(),
        active_bytes=by_layer(),
        cell_bytes=by_layer(),
        row_floats=by_layer(),
        windowed=tuple(random.random() < 0.5 for _ in range(layers)),
        cuttable=draw(st.booleans()) or draw(st.booleans()),
        cut_step=draw(st.sampled_from((1, 1, 1, 2, 3, 1 << 56))),
        minimum_layers=draw(st.sampled_from((0, 1, 2, 600, 1 << 56))),
        refused_counts=tuple(random.sample(range(2000), draw(st.sampled_from((0, 3, ITEMS_MAX))))),
    )
    assert fault(shape) == ""
    return shape


@pytest.mark.parametrize(("count", "devices"), [(3, 1), (5, 64), (30, 2), (256, 2)])
@settings(max_examples=6)
@given(absurd_shapes(), st.integers(1, 1 << 24), st.integers(1, 4096), st.integers(0, 9))
def test_the_work_is_bounded_whatever_models_and_machines_are_said_to_be(
    count, devices, shape, context, sequences, seed
):
    nodes = unlike(count, devices, seed, (2, 1000))
    memory.needs.cache_clear()
    question = asked(shape, Demand(context, sequences), nodes).question
    (found, steps), calls = calls_of(lambda: answer(question, STEPS_MAX // 10))
    assert steps <= STEPS_MAX // 10 + PIECES_MAX + UNITS_MAX or found is None
    assert calls <= STEPS_MAX // 10 * 3
    assert found is None or not found.fault


@pytest.mark.parametrize("seed", range(3))
def test_a_search_among_many_unlike_machines_ends_at_its_last_step_with_the_best_so_far(seed):
    nodes = unlike(32, 2, seed, (2, 6))
    found, steps = answer(asked(made_shape(100), DEMAND, nodes).question)
    assert STEPS_MAX <= steps <= STEPS_MAX + PIECES_MAX + UNITS_MAX
    assert found.placement
    assert found == answer(asked(made_shape(100), DEMAND, nodes[::-1]).question)[0]


@settings(max_examples=8)
@given(st.integers(0, 99), st.integers(2, 6), st.integers(10, 40))
def test_a_question_that_was_sent_has_the_same_answer_elsewhere(seed, count, layers):
    nodes = unlike(count, 2, seed)
    question = asked(made_shape(layers), DEMAND, nodes)
    sent = msgspec.msgpack.decode(question.encoded, type=Question)
    assert sent == question.question
    assert answer(sent) == answer(question.question)
    again = asked(made_shape(layers), DEMAND, [msgspec.structs.replace(one) for one in nodes[::-1]])
    assert again.key == question.key


def test_what_does_not_matter_to_the_answer_is_not_in_the_question():
    nodes = unlike(3, 1)
    key = asked(made_shape(), DEMAND, nodes).key
    nodes[0] = msgspec.structs.replace(
        nodes[0],
        name="other",
        build="b2",
        api="http://x",
        disk_free_bytes=nodes[0].disk_free_bytes - 1,
        inbox="x",
        offers=(Offer("m", made_shape(), 4096),),
        admin=True,
        version="9",
        renewals="x",
        certificate_ends=1.0,
    )
    assert asked(made_shape(), DEMAND, [*nodes, machine("tiny", device(0.01, 900))]).key == key


def units_of_one(node: str, count: int, memory_gb: float, speed: float) -> list[Unit]:
    facts = machine(node, *(device(memory_gb, speed + i, name=f"d{i}") for i in range(count)))
    return [Unit(facts, one, one.memory_bytes) for one in facts.devices]


def test_one_node_with_dozens_of_devices_does_not_hide_the_others():
    """It may say that they are faster and roomier than all others; of it NODE_UNITS_MAX are looked at."""
    honest = [unit for i in range(20) for unit in units_of_one(f"n{i}", 1, 9, 100)]
    kept = considered(made_shape(), [*units_of_one("evil", 64, 1000, 9000), *honest])
    assert sum(unit.facts.node == "evil" for unit in kept) == NODE_UNITS_MAX
    assert {unit.facts.node for unit in kept} == {"evil", *(f"n{i}" for i in range(20))}
    assert considered(made_shape(), kept) == kept


def test_of_very_many_devices_the_fastest_and_the_roomiest_are_looked_at():
    many = [unit for i in range(300) for unit in units_of_one(f"n{i:03d}", 1, 1.5 + i / 100, 500 - i)]
    kept = considered(made_shape(), many)
    names = {unit.facts.node for unit in kept}
    assert len(kept) == UNITS_MAX
    assert names > {f"n{i:03d}" for i in range(300 - UNITS_MAX // 2, 300)}
    slowest = max(unit.byte_time for unit in kept if unit.facts.node < "n200")
    assert all(unit.facts.node in names for unit in many if unit.byte_time < slowest)
    assert considered(made_shape(), many[::-1]) == kept


def test_a_deep_model_is_cut_at_some_of_its_layers_and_covers_all():
    shape = made_shape(1000, GB // 100, cell_bytes=(1,) * 1000)
    assert len(edges_of(shape)) <= PIECES_MAX + 1
    nodes = [machine(name, device(4, 100)) for name in ("ada", "bob", "cyd")]
    found, _ = answer(asked(shape, DEMAND, nodes).question)
    stages = found.placement.stages
    assert [stage.first for stage in stages] == [0, *(stage.last for stage in stages[:-1])]
    assert stages[-1].last == 1000


@settings(max_examples=40)
@given(st.integers(1, 140), st.sampled_from((1, 1, 2, 3)), st.randoms(use_true_random=False), st.booleans())
def test_the_table_of_needs_has_the_one_formula(layers, cut_step, random, cuttable):
    shape = made_shape(
        layers,
        layer_bytes=tuple(random.randrange(1, GB) for _ in range(layers)),
        cell_bytes=tuple(random.randrange(1, 9999) for _ in range(layers)),
        row_floats=tuple(random.randrange(1, 99999) for _ in range(layers)),
        windowed=tuple(random.random() < 0.4 for _ in range(layers)),
        cut_step=cut_step,
        cuttable=cuttable,
    )
    table, edges = needs(shape, DEMAND), edges_of(shape)
    for _ in range(30):
        i, j = sorted(random.sample(range(len(edges)), 2))
        allowed = shape.allows(edges[i], edges[j])
        assert table[i][j] == (needed_bytes(shape, DEMAND, edges[i], edges[j]) if allowed else 0)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=6))
def test_layers_held_are_those_of_all_slices_however_they_overlap(ranges):
    facts = machine("ada", slices=slices(*ranges))
    wanted = {layer for first, last in ranges for layer in range(first, min(last, 8))}
    assert held_layers(made_shape(8), facts) == wanted


def test_a_thousand_slices_that_overlap_are_looked_at_once():
    whole = tuple(SliceHeld("m", i % 3, ITEMS_MAX) for i in range(ITEMS_MAX))
    found, calls = calls_of(lambda: held_layers(made_shape(ITEMS_MAX), machine("ada", slices=whole)))
    assert (len(found), calls < 5 * ITEMS_MAX) == (ITEMS_MAX, True)


def test_what_people_ask_takes_a_bounded_number_of_steps(monkeypatch):
    """Also where nothing fits, so that advice is sought: `cordee plan` and `deploy` answer in seconds."""
    taken: list[int] = []

    class Counted(Search):
        def best(self):
            found = super().best()
            taken.append(self.steps)
            return found

        def fits(self):
            found = super().fits()
            taken.append(self.steps)
            return found

    monkeypatch.setattr(planner, "Search", Counted)
    nodes = named(*unlike(30, 2, memory_gb=(2, 4)))
    shape = made_shape(126)
    assert plan(shape, nodes, Demand(4096, 8), steps_max=300_000).placement is None
    assert sum(taken) <= (1 + ADVICE_RATIO) * 300_000 + TRIAL_STEPS
    taken.clear()
    largest(shape, nodes, SizeRequest(None, None, 8192))
    assert sum(taken) <= TRIALS_STEPS + TRIAL_STEPS
    taken.clear()
    copies(made_shape(20), nodes, DEMAND)
    assert sum(taken) <= TRIALS_STEPS + TRIAL_STEPS


def test_a_refusal_says_that_planning_was_given_up():
    nodes = named(*unlike(40, 2, memory_gb=(2, 4)))
    found = plan(made_shape(100), nodes, DEMAND, steps_max=110_000)
    assert found.placement is None
    assert TOO_MANY in found.why
