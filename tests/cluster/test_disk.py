"""Which slices go when a disk is short: unneeded ones, oldest first, never the cluster's last copies."""

from hypothesis import given
from hypothesis import strategies as st

from cordee.cluster.disk import COPIES, StoredSlice, removable
from cordee.cluster.facts import SliceHeld
from cordee.cluster.goals import DISK_RESERVE_BYTES, SliceGoal

NODES = tuple("abcdef")
GB = 1 << 30


def held(first: int, last: int, model: str = "m") -> SliceHeld:
    return SliceHeld(model, first, last)


def stored(first: int, last: int, used: float = 0.0, model: str = "m") -> StoredSlice:
    return StoredSlice(held(first, last, model), GB, used)


WHOLES = {node: [SliceHeld("m", 0, 8, True), SliceHeld("n", 0, 8, True)] for node in "bc"}


def gone(slices, wanted=(), others=WHOLES, free=0) -> list[tuple[int, int]]:
    return [(each.first, each.last) for each in removable("a", slices, wanted, others, free)]


def test_the_oldest_go_and_no_more_than_the_reserve_needs() -> None:
    slices = [stored(0, 4, 3.0), stored(4, 8, 1.0), stored(2, 6, 2.0)]
    assert gone(slices) == [(4, 8), (2, 6)]  # two of a gigabyte make the reserve of two
    assert gone(slices, free=DISK_RESERVE_BYTES - 1) == [(4, 8)]
    assert gone(slices, free=DISK_RESERVE_BYTES) == []


def test_what_is_wanted_stays() -> None:
    assert gone([stored(0, 4), stored(4, 8)], [SliceGoal("m", 0, 4)]) == [(4, 8)]
    # A host needs the embedding.
    assert gone([stored(0, 0), stored(0, 4)], [SliceGoal("m", 4, 8)]) == [(0, 4)]
    assert gone([stored(0, 0), stored(0, 4)], [SliceGoal("n", 4, 8)]) == [(0, 0), (0, 4)]


def test_a_slice_that_a_wanted_one_can_be_made_of_stays_until_it_is_made() -> None:
    goal = SliceGoal("m", 0, 4)
    assert gone([stored(0, 6)], [goal]) == []
    assert gone([stored(0, 6), stored(0, 4)], [goal]) == [(0, 6)]


def test_layers_that_fewer_others_hold_stay() -> None:
    assert gone([stored(0, 4)], others={"b": WHOLES["b"]}) == []
    assert gone([stored(0, 4)], others={"b": WHOLES["b"], "c": [held(0, 3)]}) == []
    assert gone([stored(0, 0)], others={node: [held(0, 4)] for node in "bcdef"}) == []
    assert gone([stored(0, 4)], others={node: [held(0, 4, "n")] for node in "bcdef"}) == []


@given(st.sets(st.sampled_from(NODES), min_size=1), st.sets(st.sampled_from(NODES)))
def test_when_all_are_short_at_once_two_copies_are_left(holders: set[str], wanting: set[str]) -> None:
    """Each decides by the same view, none knows what the others do."""
    held_by = {node: [held(0, 4)] for node in holders}
    left = set()
    for node in holders:
        others = {other: held_by[other] for other in holders if other != node}
        wanted = [SliceGoal("m", 0, 4)] if node in wanting else []
        if not removable(node, [stored(0, 4)], wanted, others, 0):
            left.add(node)
    assert len(left) >= min(COPIES, len(holders))
    assert left <= holders
    assert len(left - wanting) <= COPIES
