"""The plan: covers the model, fits every device, is the fastest there is, and explains itself."""

import re
from collections.abc import Mapping
from itertools import permutations, product
from random import Random
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.cluster.demand import CONTEXT_USEFUL, SizeRequest
from cordee.cluster.facts import Facts, ModelShape, Placement, StagePlace, StageReport
from cordee.cluster.memory import Demand, needed_bytes
from cordee.cluster.planner import COPIES_TOLD, Plan, Planner, copies, largest, plan
from cordee.cluster.search import BEAM_WIDTH, CPU_STAGE_TIME, FETCH_TIME, held_layers
from cordee.cluster.speed import coarse, token_time
from plans import GB, GBIT, device, machine, made_shape, named, slices

DEMAND = Demand(context=4096, sequences=2)
NAMES = ("ada", "bob", "cyd")


@st.composite
def shapes(draw) -> ModelShape:
    layers = draw(st.integers(1, 7))
    sizes = st.lists(st.integers(1, 4), min_size=layers, max_size=layers)
    layer_bytes = tuple(n * GB // 2 for n in draw(sizes))
    return made_shape(
        layers,
        layer_bytes=layer_bytes,
        active_bytes=tuple(n // draw(st.sampled_from([1, 1, 4])) for n in layer_bytes),
        windowed=tuple(draw(st.sampled_from([[False] * layers, [i % 2 == 0 for i in range(layers)]]))),
        cuttable=draw(st.sampled_from([True, True, True, False])),
        cut_step=draw(st.sampled_from([1, 1, 2])),
        minimum_layers=draw(st.sampled_from([1, 1, 2])),
    )


@st.composite
def clusters(draw) -> dict[str, Facts]:
    machines = []
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    for name in names:
        kinds = draw(st.sampled_from([("cpu",), ("gpu",), ("cpu", "gpu")]))
        devices = (
            device(draw(st.integers(0, 6)), draw(st.sampled_from([0, 10, 11, 40, 400])), kind)
            for kind in kinds
        )
        ranges = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7)), max_size=2))
        others = draw(st.dictionaries(st.sampled_from(names), st.sampled_from([0.0002, 0.001, 0.02])))
        facts = {"rtts": others, "slices": slices(*ranges), "draining": draw(st.integers(0, 9)) == 9}
        machines.append(machine(name, *devices, **facts))
    return named(*machines)


def cost(shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> int:
    """What the planner makes small: the token's time, and a little for fetching and for CPUs."""
    total = token_time(shape, placement, nodes)
    for place in placement.stages:
        held = held_layers(shape, nodes[place.node])
        total += FETCH_TIME * sum(
            shape.layer_bytes[i] for i in range(place.first, place.last) if i not in held
        )
        total += CPU_STAGE_TIME if place.device == "CPU" else 0
    return total


def every_placement(shape: ModelShape, nodes: Mapping[str, Facts]):
    """All placements that are feasible, by going through every one there is."""
    devices = [
        (facts.node, one)
        for facts in nodes.values()
        for one in facts.devices
        if one.read_bytes_per_second and not facts.draining
    ]
    for count in range(1, min(len(devices), shape.layers) + 1):
        for chosen in permutations(devices, count):
            for inner in product(range(1, shape.layers), repeat=count - 1):
                bounds = (0, *inner, shape.layers)
                if list(bounds) == sorted(set(bounds)) and fits(shape, chosen, bounds):
                    yield Placement(
                        shape.digest,
                        *DEMAND,
                        tuple(
                            StagePlace(node, one.name, bounds[i], bounds[i + 1])
                            for i, (node, one) in enumerate(chosen)
                        ),
                    )


def fits(shape: ModelShape, chosen, bounds: tuple[int, ...]) -> bool:
    return all(
        shape.allows(bounds[i], bounds[i + 1])
        and needed_bytes(shape, DEMAND, bounds[i], bounds[i + 1]) <= one.memory_bytes
        for i, (_, one) in enumerate(chosen)
    )


@pytest.mark.parametrize("beam_width", [BEAM_WIDTH, 0])  # the search alone finds what the first guess does
@settings(max_examples=150)
@given(shape=shapes(), nodes=clusters())
def test_no_placement_is_better_than_the_plan(beam_width, shape, nodes):
    best = min((cost(shape, one, nodes) for one in every_placement(shape, nodes)), default=None)
    with patch("cordee.cluster.search.BEAM_WIDTH", beam_width):
        found = plan(shape, nodes, DEMAND)
    if best is None:
        assert found.placement is None
        assert found.why.endswith((".", "` fits."))
    else:
        assert cost(shape, found.placement, nodes) == best


def check(shape: ModelShape, nodes: Mapping[str, Facts], demand: Demand, found: Plan) -> None:
    """A plan covers all layers once, on devices that are there, not drained, and have the room."""
    stages = found.placement.stages
    assert [stage.first for stage in stages] == [0, *(stage.last for stage in stages[:-1])]
    assert stages[-1].last == shape.layers
    assert len({(stage.node, stage.device) for stage in stages}) == len(stages)
    for stage, told in zip(stages, found.stages, strict=True):
        one = next(one for one in nodes[stage.node].devices if one.name == stage.device)
        needed = needed_bytes(shape, demand, stage.first, stage.last)
        assert shape.allows(stage.first, stage.last)
        assert needed == told.needed_bytes <= told.available_bytes == one.memory_bytes
        assert not nodes[stage.node].draining
    seconds = sum(stage.read_seconds + stage.hop_seconds for stage in found.stages)
    assert found.tokens_per_second == pytest.approx(1 / seconds)


big_shapes = st.builds(made_shape, st.integers(8, 80), st.sampled_from([GB // 4, GB]))


@st.composite
def big_clusters(draw) -> dict[str, Facts]:
    count = draw(st.integers(1, 12))
    machines = []
    for index in range(count):
        memory, speed = draw(st.sampled_from([(4, 20), (8, 40), (8, 300), (24, 900)]))
        kind = "gpu" if speed > 100 else "cpu"
        machines.append(machine(f"n{index:02d}", device(memory, speed, kind)))
    return named(*machines)


@settings(max_examples=60)
@given(big_shapes, big_clusters(), st.randoms(use_true_random=False))
def test_a_plan_is_sound_and_does_not_depend_on_the_order(shape, nodes, random):
    found = plan(shape, nodes, DEMAND)
    if found.placement:
        check(shape, nodes, DEMAND, found)
    shuffled = list(nodes.items())
    random.shuffle(shuffled)
    assert plan(shape, dict(shuffled), DEMAND) == found
    assert Planner().plan(shape, *DEMAND, [facts for _, facts in shuffled]) == found.placement


@settings(max_examples=60)
@given(big_shapes, big_clusters(), st.data())
def test_a_machine_that_is_not_used_might_as_well_not_be_there(shape, nodes, data):
    found = plan(shape, nodes, DEMAND)
    used = {stage.node for stage in found.stages}
    idle = sorted(set(nodes) - used)
    if idle and found.placement:
        gone = data.draw(st.sampled_from(idle))
        left = {name: facts for name, facts in nodes.items() if name != gone}
        assert plan(shape, left, DEMAND).placement == found.placement


@settings(max_examples=60)
@given(big_shapes, big_clusters(), st.integers(1, 24), st.sampled_from([5, 50, 900]))
def test_one_more_machine_never_makes_it_slower(shape, nodes, memory, speed):
    before = plan(shape, nodes, DEMAND)
    more = nodes | named(machine("another", device(memory, speed, "gpu")))
    assert plan(shape, more, DEMAND).tokens_per_second >= before.tokens_per_second * (1 - 1e-5)


def layers_of(found: Plan) -> list[tuple[str, int, int]]:
    return [(stage.node, stage.first, stage.last) for stage in found.stages]


def whys(found: Plan) -> dict[str, str]:
    return {one.node: one.why for one in found.machines}


def test_one_machine_that_holds_all_is_best_alone():
    nodes = named(*(machine(name, device(20, 100)) for name in NAMES))
    found = plan(made_shape(), nodes, DEMAND)
    assert layers_of(found) == [("ada", 0, 12)]
    assert whys(found)["ada"] == "layers 0-11 on GPU"
    assert whys(found)["bob"].startswith("not needed: one more stage would add about ")
    assert found.why.startswith("It fits on ada: it needs 13.")


def test_equal_machines_get_equal_slices():
    nodes = named(*(machine(name, device(6, 100)) for name in NAMES))
    assert layers_of(plan(made_shape(), nodes, DEMAND)) == [("ada", 0, 4), ("bob", 4, 8), ("cyd", 8, 12)]


def test_the_fastest_machines_get_what_they_can_hold_and_a_slow_one_is_left_out():
    nodes = named(
        machine("slow", device(64, 5, "cpu")),
        machine("mid", device(9, 50)),
        machine("fast", device(9, 500)),
    )
    found = plan(made_shape(), nodes, DEMAND)
    assert layers_of(found) == [("mid", 0, 4), ("fast", 4, 12)]  # the head is read by the faster one, too
    assert whys(found)["slow"] == "slower: it reads 5.0 GB/s, the devices in use at least 50.0 GB/s"


def test_a_gpu_goes_before_the_processor():
    both = machine("ada", device(30, 40, "cpu"), device(30, 40, "gpu"))
    assert plan(made_shape(), named(both), DEMAND).stages[0].device == "GPU"


def test_a_processor_takes_what_the_gpu_cannot_hold():
    both = machine("ada", device(30, 40, "cpu"), device(9, 400, "gpu"))
    found = plan(made_shape(), named(both), DEMAND)
    assert {stage.device: stage.last - stage.first for stage in found.stages} == {"GPU": 8, "CPU": 4}
    assert whys(found)["ada"].endswith("(host)")


def test_machines_near_each_other_go_together():
    rtts = {"ada": 0.0003, "bob": 0.03, "cyd": 0.0003}
    far = {"ada": 0.03, "cyd": 0.03}
    nodes = named(
        machine("ada", device(9, 100), rtts=rtts),
        machine("bob", device(9, 100), rtts=far),
        machine("cyd", device(9, 100), rtts=rtts),
    )
    found = plan(made_shape(), nodes, DEMAND)
    assert {stage.node for stage in found.stages} == {"ada", "cyd"}
    assert whys(found)["bob"] == "too far away: a hop to it takes about 15 ms"


def test_a_slow_link_counts_as_much_as_a_far_machine():
    slow = {"cyd": GBIT / 1000}
    nodes = named(*(machine(name, device(9, 100)) for name in ("bob", "cyd")))
    nodes |= named(machine("ada", device(9, 100), bytes_per_second=slow | {"bob": GBIT / 1000}))
    assert {stage.node for stage in plan(made_shape(), nodes, DEMAND).stages} == {"bob", "cyd"}


def test_slices_stay_where_they_lie():
    nodes = named(
        machine("ada", device(9, 100)),
        machine("bob", device(9, 100), slices=slices((0, 7))),
        machine("cyd", device(9, 103), slices=slices((7, 12))),
    )
    found = plan(made_shape(), nodes, DEMAND)
    assert layers_of(found) == [("bob", 0, 7), ("cyd", 7, 12)]
    assert sum(stage.fetch_bytes for stage in found.stages) == 0


def test_a_full_disk_takes_no_new_slice():
    nodes = named(
        machine("ada", device(30, 100), disk_free_bytes=GB - 1),
        machine("bob", device(30, 50), disk_free_bytes=20 * GB),
    )
    assert layers_of(plan(made_shape(), nodes, DEMAND)) == [("bob", 0, 12)]
    nodes["ada"] = machine("ada", device(30, 100), disk_free_bytes=0, slices=slices((0, 12)))
    assert layers_of(plan(made_shape(), nodes, DEMAND)) == [("ada", 0, 12)]


def test_memory_that_is_promised_to_others_is_not_given_out_again():
    nodes = named(machine("ada", device(20, 100)), machine("bob", device(20, 50)))
    assert layers_of(plan(made_shape(), nodes, DEMAND)) == [("ada", 0, 12)]
    shared = plan(made_shape(), nodes, DEMAND, {("ada", "GPU"): 10 * GB})
    assert {stage.node: stage.available_bytes for stage in shared.stages} == {"bob": 20 * GB, "ada": 10 * GB}
    assert layers_of(plan(made_shape(), nodes, DEMAND, {("ada", "GPU"): 19 * GB})) == [("bob", 0, 12)]
    everything = {("ada", "GPU"): 20 * GB, ("bob", "GPU"): 20 * GB}
    assert plan(made_shape(), nodes, DEMAND, everything).placement is None


def test_a_drained_machine_gets_nothing():
    nodes = named(machine("ada", device(20, 100), draining=True), machine("bob", device(20, 50)))
    found = plan(made_shape(), nodes, DEMAND)
    assert (layers_of(found), whys(found)["ada"]) == ([("bob", 0, 12)], "it is being drained")


def test_a_model_that_may_not_be_cut_needs_one_device():
    halves = named(*(machine(name, device(9, 100)) for name in NAMES))
    found = plan(made_shape(cuttable=False), halves, DEMAND)
    assert found.placement is None
    assert found.why.startswith("It cannot be cut, so one device must hold its 13.")
    assert "the largest has 9.0 GB: add a machine with at least 13." in found.why
    nodes = halves | named(machine("big", device(16, 20)))
    assert layers_of(plan(made_shape(cuttable=False), nodes, DEMAND)) == [("big", 0, 12)]


def test_too_small_says_what_is_missing():
    found = plan(
        made_shape(), named(machine("ada", device(9, 100)), machine("bob", device(0.5, 100))), DEMAND
    )
    assert found.placement is None
    assert found.why.startswith("It needs 13.")
    assert "the machines have 9.5 GB: add a machine with at least " in found.why
    assert found.why.endswith("or take a smaller quantization.")
    assert whys(found)["ada"] == "it has room for a stage (9.0 GB)"
    assert whys(found)["bob"].startswith("too small: a stage takes 1.")


def test_too_long_a_context_says_which_one_fits():
    nodes = named(machine("ada", device(14, 100)))
    found = plan(made_shape(), nodes, Demand(65_536, 4))
    assert found.placement is None
    assert plan(made_shape(), nodes, advised(found, Demand(65_536, 4))).placement is not None


def advised(found: Plan, asked: Demand, command: str = "cordee deploy MODEL") -> Demand | None:
    """What the refusal says to ask for instead."""
    match = re.search(f"`{command} --context (\\d+)(?: --sequences (\\d+))?` fits", found.why)
    return match and Demand(int(match[1]), int(match[2] or asked.sequences))


def with_the_machine_it_wants(found: Plan, nodes: Mapping[str, Facts]) -> dict[str, Facts]:
    """The nodes, and the machine that the refusal says to add."""
    wanted = re.search(r"add a machine with at least ([\d.]+) GB of memory for models", found.why)
    assert wanted, found.why
    return {**nodes, **named(machine("added", device(float(wanted[1]), 10, "cpu")))}


# Their KV caches take as much as their weights: an answer of 10,000 tokens 0.5 GB in each layer.
deep_shapes = shapes().map(lambda shape: msgspec.structs.replace(shape, cell_bytes=(50_000,) * shape.layers))


@settings(max_examples=150)
@given(deep_shapes, clusters(), st.integers(1, 40_000), st.integers(1, 16), st.sampled_from([GB, 10**13]))
def test_what_a_refusal_advises_works(shape, nodes, context, sequences, disk):
    asked = Demand(context, sequences)
    nodes = {n: msgspec.structs.replace(facts, disk_free_bytes=disk) for n, facts in nodes.items()}
    found = plan(shape, nodes, asked)
    if found.placement or not nodes or found.why.startswith("No machine has memory"):
        return
    instead = advised(found, asked)
    if instead:
        assert plan(shape, nodes, instead).placement
    elif "disks are too full" in found.why:
        roomy = {n: msgspec.structs.replace(facts, disk_free_bytes=10**15) for n, facts in nodes.items()}
        assert plan(shape, roomy, asked).placement
    else:
        assert plan(shape, with_the_machine_it_wants(found, nodes), asked).placement
        assert plan(shape, nodes, Demand(min(context, 256), 1)).placement is None


@settings(max_examples=100)
@given(
    deep_shapes,
    clusters(),
    st.none() | st.integers(16, 40_000),
    st.none() | st.integers(1, 16),
    st.integers(256, 8192),
)
def test_what_was_left_open_gives_way_and_what_was_asked_for_does_not(
    shape, nodes, context, sequences, usual
):
    requested = SizeRequest(context, sequences, usual)
    given_ = largest(shape, nodes, requested)
    if given_ is None:
        assert plan(shape, nodes, requested.least).placement is None
        return
    assert plan(shape, nodes, given_).placement
    assert context in (None, given_.context)
    assert sequences in (None, given_.sequences)
    assert given_.context >= min(usual, CONTEXT_USEFUL) or context
    if given_ != requested.full:
        more = given_._replace(sequences=given_.sequences + 1)
        if given_.context < requested.full.context:  # only one answer is left then
            assert given_.sequences == requested.least.sequences
            more = given_._replace(context=min(requested.full.context, (given_.context // 256 + 1) * 256))
        assert plan(shape, nodes, more).placement is None
    assert bool(requested.shortened(given_)) == (given_ != requested.full)


def test_by_a_hair_a_cluster_gives_fewer_answers():
    whole = needed_bytes(made_shape(), Demand(8192, 4), 0, 12)
    hair = named(machine("ada", device((whole - 1) / GB, 100)))
    requested = SizeRequest(None, None, 8192)
    assert largest(made_shape(), hair, requested) == (8192, 3)
    assert requested.shortened(Demand(8192, 3)) == "3 answers at a time instead of 4"
    refused = plan(made_shape(), hair, Demand(8192, 4), command="cordee deploy m")
    assert advised(refused, Demand(8192, 4), "cordee deploy m") == (8192, 3)
    wants, have = re.search(r"It needs ([\d.]+) GB .* the machines have ([\d.]+) GB", refused.why).groups()
    assert float(wants) > float(have)


def test_much_memory_in_a_cluster_is_left_for_copies():
    requested = SizeRequest(None, None, 8192, longest=32768)
    assert largest(made_shape(), named(machine("ada", device(1000, 100))), requested) == (8192, 4)


def test_what_little_is_left_of_a_disk_is_the_reason_that_is_told():
    full = named(machine("ada", device(30, 100), disk_free_bytes=GB - 1))
    found = plan(made_shape(), full, DEMAND)
    assert found.placement is None
    assert found.why.startswith(
        "The machines have the memory for it, but their disks are too full for its 12.0"
    )


def test_copies_are_counted_on_machines_of_their_own():
    nodes = named(*(machine(name, device(14, 100)) for name in NAMES))
    assert copies(made_shape(), nodes, DEMAND) == 3
    assert copies(made_shape(), nodes, DEMAND, {("ada", "GPU"): 10 * GB}) == 2
    halves = named(*(machine(name, device(9, 100)) for name in NAMES))
    assert copies(made_shape(), halves, DEMAND) == 1
    assert copies(made_shape(), {}, DEMAND) == 0
    many = named(*(machine(f"n{i}", device(14, 100)) for i in range(COPIES_TOLD + 3)))
    assert copies(made_shape(), many, DEMAND) == COPIES_TOLD


def test_prompts_are_read_faster_than_answers_are_written():
    for kind, ratio in (("cpu", 2), ("gpu", 8)):
        alone = plan(made_shape(), named(machine("ada", device(20, 100, kind))), DEMAND)
        assert alone.prompt_tokens_per_second > ratio * alone.tokens_per_second
    expert = made_shape(active_bytes=(GB // 100,) * 12)  # all experts are read for a batch of prompts
    mixture = plan(expert, named(machine("ada", device(20, 100, "gpu"))), DEMAND)
    assert mixture.prompt_tokens_per_second < 512 * 100 / 12
    slow = dict.fromkeys(NAMES, 1000.0)
    linked = named(*(machine(name, device(9, 100), bytes_per_second=slow) for name in NAMES[:2]))
    assert plan(made_shape(), linked, DEMAND).prompt_tokens_per_second < 1  # 4 kB a token on a link of 1 kB/s


def test_no_machines_at_all():
    found = plan(made_shape(), {}, DEMAND)
    assert (found.placement, found.machines) == (None, ())
    assert found.why.startswith("No machine has memory for it: it needs 13.")


def test_what_a_fault_made_of_the_facts_does_no_harm():
    nonsense = machine(
        "bob",
        device(-3, 100),
        device(9, float("nan"), name="b"),
        device(9, float("inf"), name="c"),
        device(9, -1, name="d"),
        rtts={"ada": float("nan"), "bob": -1.0, "nobody": 1e300},
        bytes_per_second={"ada": float("inf")},
        slices=slices((-5, 3), (9, 2), (4, 10**9)),
        disk_free_bytes=-1,
    )
    found = plan(made_shape(), named(nonsense, machine("ada", device(20, 100))), DEMAND)
    assert layers_of(found) == [("ada", 0, 12)]


@settings(max_examples=200)
@given(st.floats(1, 1e15), st.integers(2, 6))
def test_coarse_values_are_near_and_steady(value, digits):
    rounded = coarse(value, digits)
    assert rounded == pytest.approx(value, rel=2.0**-digits, abs=1)
    assert coarse(rounded, digits) == rounded


def test_noise_of_measurements_changes_nothing(monkeypatch):
    planner, shape = Planner(), made_shape()
    quiet = [machine(name, device(7, 100), rtts=dict.fromkeys(NAMES, 0.0004)) for name in NAMES]
    noisy = [machine(name, device(7, 101), rtts=dict.fromkeys(NAMES, 0.00041)) for name in NAMES]
    first = planner.plan(shape, *DEMAND, quiet)
    monkeypatch.setattr("cordee.cluster.search.Search.best", None)  # a search now would fail
    assert planner.plan(shape, *DEMAND, noisy) == first


def test_many_unlike_machines_are_planned():
    random = Random(3)
    nodes = named(
        *(
            machine(
                f"n{i:02d}",
                device(random.uniform(4, 24), random.uniform(20, 60), "cpu"),
                device(random.choice([6, 8, 12]), random.choice([200, 300, 500]), "gpu"),
                rtts={f"n{j:02d}": random.uniform(0.0002, 0.0006) for j in range(30)},
            )
            for i in range(30)
        )
    )
    check(made_shape(80), nodes, DEMAND, plan(made_shape(80), nodes, DEMAND))


@pytest.mark.parametrize("beam_width", [BEAM_WIDTH, 0])
def test_a_cheaper_start_on_other_machines_does_not_hide_the_best(beam_width):
    nodes = named(machine("fast", device(7.2, 500)), machine("mid", device(7.2, 50)))
    with patch("cordee.cluster.search.BEAM_WIDTH", beam_width):
        found = plan(made_shape(), nodes, Demand(1024, 1))
    assert layers_of(found) == [("mid", 0, 6), ("fast", 6, 12)]  # whose head is read faster


def test_what_is_in_memory_stays_where_it_is():
    """Of three machines one fell; the survivor's stage is the model's second half, and stays so."""
    demand, room = Demand(4096, 8), device(9, 100)
    fallen = Placement("m", 4096, 8, (StagePlace("bob", "GPU", 0, 6), StagePlace("ada", "GPU", 6, 12)))
    loaded = (StageReport(fallen, 1, "loaded", "w1"),)
    disk = slices((0, 12))
    nodes = named(machine("ada", room, slices=disk, stages=loaded), machine("cyd", room, slices=disk))
    assert layers_of(plan(made_shape(), nodes, demand)) == [("cyd", 0, 6), ("ada", 6, 12)]
    assert layers_of(plan(made_shape(), nodes, Demand(2048, 8)))[0][0] == "ada"  # that stage is no use there
