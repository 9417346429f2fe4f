"""What is heard is sound, or dropped: any value of a heartbeat, made absurd, is found and named."""

import math
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import ME, Simple, facts_of, placed, running, shape_of, signed
from cordee.cluster import soundness
from cordee.cluster.controller import Controller
from cordee.cluster.deployments import DEPLOYMENTS_MAX, SOURCE_CHARS_MAX, Deployment, Deployments
from cordee.cluster.facts import NODES_MAX, Fetching, Gauges, Hosted, Offer, Reading, SliceHeld
from cordee.cluster.membership import Heartbeat
from cordee.cluster.soundness import COUNTS, INTEGER_MAX, ITEMS_MAX, PLACES_MAX, TEXT_CHARS_MAX, fault, plain

SHAPE = shape_of()
HALVES = placed(("a", 0, 2), ("b", 2, 4))


def full_heartbeat() -> Heartbeat:
    """A heartbeat with something in every field."""
    facts = facts_of("a", stages=running(HALVES)["a"], slices=[SliceHeld("m", 0, 2)])
    facts = msgspec.structs.replace(
        facts,
        offers=(Offer("tiny", SHAPE, 64, "owner/name/file.gguf"),),
        rtts={"b": 0.001},
        bytes_per_second={"b": 1e8},
    )
    gauges = Gauges(
        (Hosted("m/64", 1, 0, 20.0),),
        (Fetching("m", 0, 2, 5, 10),),
        30.0,
        (Reading("tiny", "", 1, 2),),
    )
    return Heartbeat("session", 1.0, 1e9, facts, (), (bytes(72),), gauges)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a tree of builtins."""
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, each in items:
        found += paths(each, (*path, key))
    return found


TREE = msgspec.to_builtins(full_heartbeat(), builtin_types=(bytes,))
PATHS = [path for path in paths(TREE) if path]
ABSURD = (
    -1,
    1 << 62,
    math.nan,
    -math.inf,
    "\x1b[2J",
    "x" * (TEXT_CHARS_MAX + 1),
    "\n",
    "\u202e",
    bytes(5000),
)


def changed(path: tuple[Any, ...], value: Any) -> Heartbeat | None:
    """The heartbeat with one value replaced; None if it would not be decoded."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(TREE))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=Heartbeat)
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return None


def test_an_honest_heartbeat_is_sound() -> None:
    assert fault(full_heartbeat()) == ""


@given(st.sampled_from(PATHS), st.sampled_from(ABSURD))
def test_an_absurd_value_anywhere_is_refused_by_its_type_or_named(path: tuple[Any, ...], value: Any) -> None:
    heartbeat = changed(path, value)
    if heartbeat is not None and heartbeat != full_heartbeat():
        assert fault(heartbeat), (path, value)


@pytest.mark.parametrize("count", [ITEMS_MAX, 5000])
@pytest.mark.parametrize("path", [path for path in PATHS if isinstance(path[-1], int)], ids=str)
def test_more_items_than_can_be_are_refused(path: tuple[Any, ...], count: int) -> None:
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(TREE))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[:] = [node[0]] * (count + 1)
    try:
        heartbeat = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=Heartbeat)
    except (msgspec.MsgspecError, ValueError):
        return  # as a shape whose tuples differ in length
    assert "items" in fault(heartbeat)


def test_a_thousand_placements_of_a_thousand_stages_are_too_many() -> None:
    wide = placed(*(("a", layer, layer + 1) for layer in range(200)))
    report = running(wide)["a"][0]
    facts = msgspec.structs.replace(full_heartbeat().facts, stages=(report,) * (PLACES_MAX // 200))
    assert fault(facts) == ""
    facts = msgspec.structs.replace(facts, stages=(*facts.stages, report))
    assert fault(facts) == f"Facts.stages names 8200 stages, at most {PLACES_MAX} are expected"


def test_two_devices_of_one_name_are_refused() -> None:
    """Memory is given out by name, so what is planned on one would never fit, and hide what does."""
    facts = full_heartbeat().facts
    assert "two of one name" in fault(msgspec.structs.replace(facts, devices=facts.devices * 2))


def test_a_model_that_is_cut_at_no_step_is_refused() -> None:
    assert fault(msgspec.structs.replace(SHAPE, cut_step=0)) == "ModelShape.cut_step is 0"


@given(st.integers(0, 1), st.sampled_from((-1, INTEGER_MAX + 1)))
def test_one_wrong_number_among_those_of_all_layers_is_found(index: int, wrong: int) -> None:
    numbers = list(SHAPE.layer_bytes)
    numbers[-index] = wrong
    shape = msgspec.structs.replace(SHAPE, layer_bytes=tuple(numbers))
    assert fault(shape) == f"ModelShape.layer_bytes is {wrong}, which is no count"


def test_what_a_node_says_again_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is new beside it is."""
    controller = Controller("a", "session", Simple(), ME)
    controller.observe(facts_of("a"), 0.0, 1e9)
    said = msgspec.structs.replace(full_heartbeat(), facts=facts_of("b"))
    looked: list[object] = []
    faults = soundness._faults

    def noted(value: object, *args: Any, **given: Any) -> Any:
        looked.append(value)
        return faults(value, *args, **given)

    monkeypatch.setattr(soundness, "_faults", noted)

    def hear(sent: float, **changes: Any) -> bool:
        looked.clear()
        heartbeat = msgspec.structs.replace(said, sent=sent, **changes)
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(heartbeat), type=Heartbeat)
        return controller.hear(again, sent)

    assert hear(1.0)
    kept = controller.nodes(1.0)["b"][1]
    assert kept.devices in looked
    assert not hear(2.0)
    assert kept.devices not in looked
    assert controller.nodes(2.0)["b"][1] is kept
    assert controller.unsound == {}
    assert not hear(3.0, gauges=Gauges(watts=-1.0))
    assert controller.unsound["b"] == (1, "Heartbeat.gauges.watts is -1.0")
    assert not hear(4.0, facts=facts_of("b", speed=-1.0))
    assert controller.unsound["b"][0] == 2


@given(st.text())
def test_a_plain_text_is_sound(text: str) -> None:
    heartbeat = full_heartbeat()
    facts = msgspec.structs.replace(heartbeat.facts, name=plain(text))
    assert fault(msgspec.structs.replace(heartbeat, facts=facts)) == ""


def test_an_unsound_deployment_spoils_no_other() -> None:
    good = signed(Deployment("tiny", SHAPE, 64, 3))
    bad = [
        msgspec.structs.replace(good, **change)
        for change in (
            {"context": 0},
            {"context": 1 << 40},
            {"sequences": -1},
            {"sequences": 1 << 20},
            {"replicas": 5000},
            {"source": "o" * (SOURCE_CHARS_MAX + 1)},
            {"only": ("a",) * (NODES_MAX + 1)},
            {"only": ("\x1b",)},
            {"model": "\x1b]0;title"},
            {"shape": msgspec.structs.replace(SHAPE, embedding_bytes=-5)},
        )
    ]
    bad = [signed(msgspec.structs.replace(each, model=each.model + str(n))) for n, each in enumerate(bad)]
    heard = Deployments(ME)
    assert heard.merge((*bad, good, *bad), 1e9) != ""
    assert heard.all == (good,)
    heard.merge((signed(msgspec.structs.replace(good, model=str(n))) for n in range(6000)), 1e9)
    assert len(heard.all) == DEPLOYMENTS_MAX
    damaged = Deployments(ME, [good])
    for each in bad:  # a fault of this node's memory
        damaged._put(each)
    damaged.settle(1e9)
    assert damaged.all == (good,)


def test_a_controller_drops_what_is_unsound_counts_it_and_goes_on() -> None:
    controller = Controller("a", "session", Simple(), ME, [Deployment("x", SHAPE, -1, 3)])
    assert controller.deployments == ()
    now = time.monotonic()
    controller.observe(facts_of("a"), now, time.time())
    said = msgspec.structs.replace(full_heartbeat(), facts=facts_of("b"))
    title = msgspec.structs.replace(said, facts=msgspec.structs.replace(said.facts, name="\x1b]0;title"))
    good = signed(Deployment("tiny", SHAPE, 64, 3))
    for _ in range(3):
        assert not controller.hear(title, now)
    assert controller.nodes(now).keys() == {"a"}
    assert controller.unsound["b"][0] == 3 and "Heartbeat.facts.name" in controller.unsound["b"][1]
    mixed = (good, signed(msgspec.structs.replace(good, model="y", context=-1)))
    assert controller.hear(msgspec.structs.replace(said, deployments=mixed), now)
    assert [each.model for each in controller.deployments] == ["tiny"]
    assert controller.nodes(now).keys() == {"a", "b"}
    assert controller.unsound["b"] == (4, "a deployment that is none")


def test_the_bounds_are_of_fields_that_exist() -> None:
    for kind, name in COUNTS:
        assert name in kind.__struct_fields__
