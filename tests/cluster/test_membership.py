"""Membership: suspicion before death, order without counters, and nothing that a fault can poison."""

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from clusters import facts_of
from cordee.cluster.membership import (
    FORGET_SECONDS,
    HEARTBEAT_SECONDS,
    NODES_MAX,
    REORDER_SECONDS,
    SILENCE_SECONDS,
    SUSPICION_SECONDS,
    Heartbeat,
    Membership,
    Sighting,
)

times = st.one_of(st.floats(), st.sampled_from((0.0, 99.0, 100.0, 101.0, 1e30, -1e30, math.inf, math.nan)))


def heartbeat(
    node: str = "b", sent: float = 0.0, session: str = "s", clock: float = 0.0, name: str = ""
) -> Heartbeat:
    return Heartbeat(session, sent, clock, msgspec.structs.replace(facts_of(node), name=name))


def heard(*heartbeats: tuple[Heartbeat, float]) -> Membership:
    membership = Membership("a")
    for said, now in heartbeats:
        membership.hear(said, now)
    return membership


def test_a_silent_node_is_suspected_then_gone_then_forgotten() -> None:
    membership = heard((heartbeat(), 10.0))
    gone = 10 + SILENCE_SECONDS + SUSPICION_SECONDS
    assert membership.liveness("b", 10 + SILENCE_SECONDS - 0.1) == "alive"
    assert membership.liveness("b", 10 + SILENCE_SECONDS) == "suspect"
    assert membership.liveness("b", gone - 0.1) == "suspect"
    assert membership.liveness("b", gone) == "gone"
    membership.settle(gone)
    assert "b" in membership.facts(gone)
    membership.settle(gone + FORGET_SECONDS)
    assert membership.facts(gone + FORGET_SECONDS) == {}


def test_a_node_that_says_farewell_is_gone_at_once_and_back_with_its_next_start() -> None:
    membership = heard((heartbeat(sent=1), 10.0), (farewell("stops", sent=2), 11.0))
    assert membership.liveness("b", 11.0) == "gone"
    assert "b" in membership.facts(11.0)
    membership.liveliness("b", True, 11.1)  # of a link that is still to close
    membership.hear(heartbeat(sent=1.5), 11.2)  # held up on its way
    assert membership.liveness("b", 11.2) == "gone"
    membership.hear(heartbeat(session="t"), 11.3)
    assert membership.liveness("b", 11.3) == "alive"


def test_a_node_that_leaves_for_good_is_not_shown_any_more() -> None:
    membership = heard(
        (heartbeat(sent=1), 10.0), (farewell("leaves", sent=2), 11.0), (heartbeat(sent=1.5), 11.1)
    )
    assert membership.liveness("b", 11.1) == "gone"
    assert membership.facts(11.1) == {}
    membership.settle(11.0 + REORDER_SECONDS)
    membership.hear(heartbeat(session="t"), 20.0)
    assert list(membership.facts(20.0)) == ["b"]


def farewell(kind: str, sent: float) -> Heartbeat:
    return msgspec.structs.replace(heartbeat(sent=sent), farewell=kind)


def test_a_lost_token_is_a_suspicion_that_a_heartbeat_or_the_token_clears() -> None:
    membership = heard((heartbeat(sent=1), 10.0))
    membership.liveliness("b", False, 10.5)
    assert membership.liveness("b", 10.6) == "suspect"
    membership.liveliness("b", True, 11.0)
    assert membership.liveness("b", 11.0) == "alive"
    membership.liveliness("b", False, 11.1)
    membership.hear(heartbeat(sent=2), 11.2)
    assert membership.liveness("b", 11.2) == "alive"
    membership.liveliness("b", False, 11.5)
    assert membership.liveness("b", 11.5 + SUSPICION_SECONDS) == "gone"


def test_nodes_never_heard_are_gone_and_their_tokens_mean_nothing() -> None:
    membership = Membership("a")
    membership.liveliness("b", True, 1.0)
    assert membership.liveness("b", 1.0) == "gone"
    assert membership.liveness("a", 1.0) == "alive"


def test_late_and_doubled_heartbeats_change_nothing() -> None:
    membership = heard((heartbeat(sent=2, name="new"), 10.0))
    assert not membership.hear(heartbeat(sent=1, name="old"), 10.1)
    assert not membership.hear(heartbeat(sent=2, name="new"), 10.2)
    assert membership.facts(10.2)["b"][1].name == "new"


def test_a_late_heartbeat_of_the_session_before_does_not_undo_a_restart() -> None:
    membership = heard(
        (heartbeat(sent=500, session="first"), 10.0), (heartbeat(sent=1, session="second", name="2"), 11.0)
    )
    assert not membership.hear(heartbeat(sent=501, session="first"), 11.5)
    assert membership.facts(11.5)["b"][1].name == "2"


def test_our_own_heartbeat_is_not_heard() -> None:
    assert not Membership("a").hear(heartbeat("a"), 1.0)


def test_a_heartbeat_that_says_the_same_changes_nothing_but_keeps_the_node_alive() -> None:
    membership = heard((heartbeat(sent=1), 10.0))
    assert not membership.hear(heartbeat(sent=2), 13.0)
    assert membership.liveness("b", 13 + SILENCE_SECONDS - 0.1) == "alive"
    assert membership.hear(heartbeat(sent=3, name="new"), 14.0)


@given(times, times, st.one_of(st.none(), times), st.sampled_from(("s", "t")), times, times)
def test_whatever_is_remembered_of_a_live_node_it_is_heard_again(
    sent: float, at: float, lost: float | None, previous: str, replaced: float, offset: float
) -> None:
    membership = Membership("a")
    membership._seen["b"] = Sighting(heartbeat(sent=sent, name="wrong"), at, offset, lost, previous, replaced)
    now = 100.0
    while now < 100 + REORDER_SECONDS + 2 * HEARTBEAT_SECONDS:
        membership.settle(now)
        membership.hear(heartbeat(sent=now - 90, name="true"), now)
        now += HEARTBEAT_SECONDS
    assert membership.facts(now)["b"][0] == "alive"
    assert membership.facts(now)["b"][1].name == "true"
    assert math.isfinite(membership.clock(1.0, now))


@given(times, times, st.one_of(st.none(), times), times)
def test_whatever_is_remembered_of_a_dead_node_it_goes(
    sent: float, at: float, lost: float | None, replaced: float
) -> None:
    membership = Membership("a")
    membership._seen["b"] = Sighting(heartbeat(sent=sent), at, 0.0, lost, "x", replaced)
    for now in (100.0, 101.0, 100 + SILENCE_SECONDS + SUSPICION_SECONDS):
        membership.settle(now)
    assert membership.facts(now).get("b", ("gone", None))[0] == "gone"


def test_the_clusters_clock_is_not_moved_by_one_clock() -> None:
    membership = heard(
        (heartbeat("b", clock=1e9), 10.0),
        (heartbeat("c", clock=1000.5), 10.0),
        (heartbeat("d", clock=math.nan), 10.0),
    )
    assert membership.clock(1001.0, 10.0) == 1001.0
    assert membership.clock(-1e9, 10.0) == 1000.5
    assert membership.clock(1001.0, 12.0) == 1002.5  # clocks run


def test_only_so_many_nodes_are_known() -> None:
    membership = heard(*((heartbeat(f"n{index:04}"), float(index)) for index in range(NODES_MAX + 5)))
    membership.settle(NODES_MAX + 5.0)
    assert sorted(membership.facts(0.0)) == [f"n{index:04}" for index in range(5, NODES_MAX + 5)]


def test_a_heartbeat_travels_as_msgpack() -> None:
    said = heartbeat("b", 1.5, "session", 2.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Heartbeat) == said
