"""Clones: two machines that speak as one node are noticed, restarts are not taken for them."""

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import ME, Simple, facts_of
from cordee.cluster.clones import KEPT_SECONDS, OVERLAP_SECONDS, RUNS_MAX, Clones
from cordee.cluster.controller import Controller
from cordee.cluster.membership import HEARTBEAT_SECONDS, NODES_MAX, REORDER_SECONDS, Heartbeat

ENOUGH_SECONDS = OVERLAP_SECONDS + 2 * HEARTBEAT_SECONDS


def said(node: str, session: str, age_seconds: float = 0.0) -> Heartbeat:
    return Heartbeat(session, 0.0, 0.0, facts_of(node), age_seconds=age_seconds)


def test_two_machines_that_take_turns_are_clones_and_a_restart_is_not() -> None:
    clones = Clones("me", "own")
    clones.settle(0.0)
    for second in range(10):
        clones.hear(said("b", "first" if second < 5 else "second"), float(second))
        clones.hear(said("c", "first"), second + 0.1)
        clones.hear(said("c", "second"), second + 0.5)
    assert clones.nodes(10.0) == {"c"}


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.floats(0.5, 900), st.booleans()), min_size=1, max_size=12),
    st.floats(0, REORDER_SECONDS),
    st.integers(0, 99),
)
def test_a_node_may_restart_as_often_as_it_likes(
    runs: list[tuple[float, bool]], late: float, seed: int
) -> None:
    """Also with messages that a network holds back for as long as networks do, and doubles."""
    random, clones, now = Random(seed), Clones("me", "own"), 100.0
    clones.settle(now)
    heard: list[tuple[float, Heartbeat]] = []
    for number, (seconds, doubled) in enumerate(runs):
        ends = now + seconds
        while now < ends:
            message = said("b", f"run {number}")
            heard += [(now + late * random.random(), message) for _ in range(1 + doubled)]
            now += HEARTBEAT_SECONDS
    for when, message in sorted(heard, key=lambda each: each[0]):
        clones.settle(when)
        clones.hear(message, when)
        assert clones.nodes(when) == frozenset()


def test_the_newer_of_two_ends_and_the_older_stays() -> None:
    """Each hears the other in its own name."""
    for mine, other, newer in ((10.0, 500.0, True), (500.0, 10.0, False)):
        clones = Clones("me", "own")
        clones.settle(1000.0 - mine)
        now = 1000.0
        while now < 1000.0 + ENOUGH_SECONDS:
            clones.settle(now)
            clones.hear(said("me", "twin", other + now - 1000.0), now)
            clones.hear(said("me", "own", mine), now)  # a bus brings back what was sent
            now += HEARTBEAT_SECONDS
        assert clones.nodes(now) == {"me"}
        assert clones.is_newer(now) == newer


def test_of_two_that_start_at_the_same_moment_exactly_one_ends() -> None:
    ends = []
    for own, twin in (("a", "b"), ("b", "a")):
        clones = Clones("me", own)
        for second in range(8):
            clones.settle(float(second))
            clones.hear(said("me", twin, float(second)), float(second))
        ends.append(clones.is_newer(8.0))
    assert sorted(ends) == [False, True]


def test_what_the_last_run_said_of_itself_is_no_clone() -> None:
    """A message of our own last run that comes late, perhaps twice."""
    clones = Clones("me", "second")
    clones.settle(50.0)
    for now in (50.1, 50.2, 50.0 + REORDER_SECONDS):
        clones.hear(said("me", "first", 900.0), now)
    clones.settle(60.0)
    assert clones.nodes(60.0) == frozenset()
    assert not clones.is_newer(60.0)


def test_a_clone_is_named_for_a_while_and_then_forgotten() -> None:
    clones = Clones("me", "own")
    for second in range(10):
        clones.settle(float(second))
        clones.hear(said("b", "first"), float(second))
        if second < 6:
            clones.hear(said("b", "second"), float(second))
    clones.settle(9.0)
    assert clones.nodes(9.0) == {"b"}
    for second in range(10, int(KEPT_SECONDS) + 10):
        clones.settle(float(second))
        clones.hear(said("b", "first"), float(second))
    assert clones.nodes(KEPT_SECONDS + 10) == frozenset()


@given(
    st.lists(
        st.tuples(st.floats(), st.floats(), st.floats()) | st.just((math.nan, 1e30, -1e30)),
        min_size=1,
        max_size=4,
    ),
    st.floats(),
)
def test_whatever_is_remembered_it_passes(runs: list[tuple[float, float, float]], began: float) -> None:
    """Self-stabilising: impossible times do not name a clone for ever."""
    from cordee.cluster.clones import _Run

    clones = Clones("me", "own")
    clones._began = began
    clones._runs = {node: {f"s{n}": _Run(*run) for n, run in enumerate(runs)} for node in ("b", "me")}
    now = 100.0
    while now < 100.0 + KEPT_SECONDS + 10:
        clones.settle(now)
        clones.hear(said("b", "true"), now)
        now += 5.0
    assert clones.nodes(now) == frozenset()
    assert not clones.is_newer(now)


def test_so_many_nodes_and_runs_are_kept() -> None:
    clones = Clones("me", "own")
    for number in range(NODES_MAX + 20):
        for run in range(RUNS_MAX + 3):
            clones.hear(said(f"n{number:04}", f"s{run}"), number + run / 100)
    clones.settle(float(NODES_MAX + 21))
    assert len(clones._runs) <= NODES_MAX
    assert max(map(len, clones._runs.values())) <= RUNS_MAX


def test_the_controller_hears_its_twin_but_believes_nothing_of_it() -> None:
    controller = Controller("me", "own", Simple(), ME)
    for second in range(9):
        controller.observe(facts_of("me"), float(second), 0.0)
        twin = msgspec.structs.replace(said("me", "twin", 1000.0 + second), sent=float(second))
        assert not controller.hear(twin, float(second))
    assert list(controller.nodes(9.0)) == ["me"]
    assert controller.clones(9.0) == {"me"}
    assert controller.is_newer_clone(9.0)
    assert controller.heartbeat(9.0).age_seconds == 9.0
