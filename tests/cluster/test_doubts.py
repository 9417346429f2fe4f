"""Doubts: what a node says of others that disappointed it, and which placements follow from that."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.cluster.doubts import DOUBT_SECONDS, DOUBT_SECONDS_MAX, REASON_CHARS_MAX, Doubts, Exclusions
from cordee.cluster.facts import NODES_MAX, Doubt, Facts

NODES = "abcdef"
PAIRS = st.sets(st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)), max_size=12)


def facts(said: set[tuple[str, str]]) -> dict[str, Facts]:
    """The facts of NODES, of which the first of each pair doubts the second."""
    return {
        node: Facts(
            node,
            node,
            "",
            (),
            0,
            "",
            {},
            {},
            (),
            (),
            doubts=tuple(Doubt(b, "") for a, b in said if a == node),
        )
        for node in NODES
    }


def test_a_doubt_is_said_for_a_while_and_for_longer_the_next_time() -> None:
    doubts, now = Doubts(), 5.0
    for seconds in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        doubts.note("b", "it is late", now)
        doubts.note("b", "later still", now + 1)  # which is no second time
        assert doubts.said(now + seconds - 0.1) == (Doubt("b", "it is late"),)
        assert doubts.said(now + seconds) == ()
        now += seconds + 1
        doubts.settle(now)
    doubts.settle(now + 3 * DOUBT_SECONDS_MAX)
    doubts.note("b", "again", now)
    assert doubts.said(now + DOUBT_SECONDS) == ()


def test_a_doubt_that_lasts_longer_takes_the_place_of_a_shorter_one() -> None:
    doubts = Doubts()
    doubts.note("b", "late", 0)
    doubts.note("b", "wrong", 1, seconds=DOUBT_SECONDS_MAX)
    doubts.note("b", "late", 2)
    assert doubts.said(DOUBT_SECONDS_MAX) == (Doubt("b", "wrong"),)


def test_there_is_a_bound() -> None:
    doubts = Doubts()
    for index in range(2 * NODES_MAX):
        doubts.note(str(index), "\x1b[31m" + "x" * 1000, 0)
    said = doubts.said(0)
    assert len(said) == NODES_MAX
    assert all(len(doubt.reason) <= REASON_CHARS_MAX and doubt.reason.isprintable() for doubt in said)


def test_who_cannot_be_reached_is_doubted_until_it_can() -> None:
    doubts = Doubts()
    doubts.unreachable({"b": "no connection"})
    doubts.note("c", "late", 0)
    assert [doubt.node for doubt in doubts.said(1)] == ["b", "c"]
    doubts.unreachable({})
    assert [doubt.node for doubt in doubts.said(1)] == ["c"]


@pytest.mark.parametrize("until", [math.nan, math.inf, 1e30])
def test_impossible_times_are_forgotten(until: float) -> None:
    doubts = Doubts()
    doubts.note("b", "", 0)
    doubts._doubted["b"].until = until
    doubts.settle(1)
    assert doubts.said(1) == ()


def test_one_doubter_loses_what_it_doubts_and_two_exclude() -> None:
    one = Exclusions(facts({("a", "b")}))
    assert one.concern({"a", "b"}) and not one.concern({"b", "c"}) and not one.concern({"a", "c"})
    two = Exclusions(facts({("a", "b"), ("c", "b")}))
    assert two.concern({"b"}) and two.concern({"b", "d"}) and not two.concern({"a", "c"})


def test_who_doubts_itself_is_out() -> None:
    own = Exclusions(facts({("a", "a")}))
    assert own.concern({"a"}) and not own.concern(set("bcdef"))
    assert list(own.groups(NODES)) == [frozenset("bcdef")]


def test_a_node_that_doubts_all_others_is_left_alone() -> None:
    liar = Exclusions(facts({("a", other) for other in "bcdef"}))
    assert list(liar.groups(NODES)) == [frozenset("bcdef")]
    assert list(liar.groups(NODES, last_resort=True)) == [frozenset("bcdef"), frozenset(NODES)]


def test_of_two_that_cannot_work_together_either_may_go() -> None:
    found = set(Exclusions(facts({("a", "b")})).groups("abc"))
    assert found == {frozenset("bc"), frozenset("ac"), frozenset("c")}


def test_who_is_not_there_is_not_doubted_and_has_no_say() -> None:
    exclusions = Exclusions({"a": facts({("a", "b")})["a"]})
    assert not exclusions.concern({"a", "b"})


@given(PAIRS, st.sets(st.sampled_from(NODES), min_size=1))
def test_groups_work_together_and_are_few(said: set[tuple[str, str]], nodes: set[str]) -> None:
    exclusions = Exclusions(facts(said))
    groups = list(exclusions.groups(nodes))
    assert 1 <= len(groups) <= 3**2
    for group in groups:
        assert group <= nodes and not exclusions.concern(group)
    if not exclusions.concern(nodes):
        assert groups == [frozenset(nodes)]


@given(PAIRS)
def test_one_liar_more_excludes_nobody_that_all_others_trust(said: set[tuple[str, str]]) -> None:
    """What one node says about others that nobody else doubts keeps at most itself from working."""
    honest = {(a, b) for a, b in said if a != "a" and b != "a"}
    lies = {("a", other) for other in "bcdef"}
    doubted = {b for _, b in honest}
    found = Exclusions(facts(honest | lies))
    assert all(not found.concern({node}) for node in set("bcdef") - doubted)
