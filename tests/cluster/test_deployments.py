"""Deployments: whatever stamps faults wrote, all nodes come to hold the same, and the last one counts."""

import math
from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from clusters import ME, signed
from cordee.cluster.deployments import (
    AHEAD_SECONDS,
    DEPLOYMENTS_MAX,
    SOURCE_CHARS_MAX,
    TICK_SECONDS,
    Deployment,
    Deployments,
)

NOW = 1.8e9
DAY = 86400.0
stamps = st.one_of(
    st.floats(),  # infinities and NaN too
    st.sampled_from(
        (0.0, -1.0, NOW, NOW + AHEAD_SECONDS, NOW + DAY, NOW - DAY, math.inf, -math.inf, math.nan)
    ),
    st.floats(NOW - 100, NOW + 100),
)
unsigned = st.builds(
    Deployment,
    model=st.sampled_from("abc"),
    shape=st.none(),
    context=st.integers(1, 3),
    sequences=st.just(1),
    replicas=st.integers(0, 2),
    stamp=stamps,
    source=st.sampled_from(("", "o/m/a.gguf", "o" * (SOURCE_CHARS_MAX + 1))),
)
deployments = st.builds(signed, unsigned, st.sampled_from("xyz"))
maps = st.lists(deployments, max_size=6)


def gossip(nodes: list[Deployments], clocks: list[float], random: Random) -> None:
    """Everybody hears everybody, in any order, for five seconds."""
    for _ in range(5):
        clocks[:] = [clock + 1 for clock in clocks]
        pairs = [(one, other) for one in range(len(nodes)) for other in range(len(nodes))]
        random.shuffle(pairs)
        for one, other in pairs:
            nodes[one].settle(clocks[one])
            nodes[one].merge(nodes[other].all, clocks[one])


@given(st.lists(maps, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_arbitrary_maps_converge_and_the_next_deployment_wins(
    held: list[list[Deployment]], random: Random
) -> None:
    nodes = [Deployments(ME, held_here) for held_here in held]
    clocks = [NOW + random.uniform(-1, 1) for _ in nodes]
    gossip(nodes, clocks, random)
    assert all(node.all == nodes[0].all for node in nodes)
    assert all(deployment.stamp <= max(clocks) + AHEAD_SECONDS for deployment in nodes[0].all)
    assert all(len(deployment.source) <= SOURCE_CHARS_MAX for deployment in nodes[0].all)
    writer = random.randrange(len(nodes))
    nodes[writer].write(Deployment("a", None, 77, 1), clocks[writer])
    gossip(nodes, clocks, random)
    assert all(node.all == nodes[0].all for node in nodes)
    assert next(deployment for deployment in nodes[0].all if deployment.model == "a").context == 77


@given(maps, maps, maps)
def test_hearing_is_associative_commutative_and_idempotent(a: list, b: list, c: list) -> None:
    def told(*said: list[Deployment]) -> tuple[Deployment, ...]:
        node = Deployments(ME)
        for one in said:
            node.merge(one, NOW)
        return node.all

    assert told(a, b, c) == told(c, b, a) == told(b, a, a, c, b) == told(a + b, c)


def test_a_machine_back_from_the_dead_with_a_future_stamp_undoes_nothing() -> None:
    cluster, returning = (
        Deployments(ME),
        Deployments(ME, [signed(Deployment("a", None, 1, 1, replicas=0, stamp=NOW + DAY))]),
    )
    cluster.write(Deployment("a", None, 2, 1), NOW)
    returning.settle(NOW)
    cluster.merge(returning.all, NOW)
    returning.merge(cluster.all, NOW)
    assert cluster.all == returning.all
    assert cluster.all[0].context == 2


def test_a_future_stamp_is_better_than_no_deployment_at_all() -> None:
    node = Deployments(ME, [signed(Deployment("a", None, 1, 1, stamp=NOW + DAY))])
    node.settle(NOW)
    assert [deployment.stamp for deployment in node.all] == [0.0]


def test_of_two_deployments_in_the_same_instant_the_second_counts() -> None:
    node, other = Deployments(ME), Deployments(ME)
    node.write(Deployment("a", None, 1, 1), NOW)
    other.merge(node.all, NOW)
    node.write(Deployment("a", None, 2, 1), NOW)
    other.merge(node.all, NOW)
    assert other.all == node.all
    assert (other.all[0].context, other.all[0].stamp) == (2, NOW + TICK_SECONDS)


def test_the_map_is_bounded_and_the_latest_stay() -> None:
    node = Deployments(ME)
    for index in range(DEPLOYMENTS_MAX + 10):
        node.write(Deployment(f"{index:04}", None, 1, 1), NOW + index)
    assert [deployment.model for deployment in node.all] == [
        f"{index:04}" for index in range(10, DEPLOYMENTS_MAX + 10)
    ]


def test_what_its_author_did_not_sign_changes_nothing() -> None:
    node, true = Deployments(ME), signed(Deployment("a", None, 1, 1, stamp=NOW), "ada")
    others = signed(Deployment("a", None, 2, 1, stamp=NOW + 1), "bob")
    change = msgspec.structs.replace
    forged = [
        change(true, context=2),  # altered on its way
        change(true, stamp=NOW + 1),  # younger than it is
        change(true, stamp=NOW + 1, written=NOW + 1),
        change(true, model="b"),
        change(true, only=("bob",)),
        change(others, author="ada"),  # another's words
        change(others, certificate=true.certificate),
        change(others, author="ada", certificate=true.certificate),
        change(true, signature=b"", stamp=NOW + 1, written=NOW + 1),
        Deployment("c", None, 1, 1, stamp=NOW, author="ada"),
    ]
    node.merge([true], NOW)
    for each in forged:
        assert node.merge([each], NOW + 1) != "" and node.all == (true,)
    assert node.merge([others], NOW + 1) == ""
    assert node.all == (others,)


def test_anybody_may_doubt_a_stamp_and_nobody_raise_it() -> None:
    true = signed(Deployment("a", None, 1, 1, stamp=NOW - 5), "ada")
    doubted = msgspec.structs.replace(true, stamp=0.0)
    node = Deployments(ME)
    node.merge([doubted], NOW)
    assert node.all == (doubted,)
    node.merge([true], NOW)
    node.merge([doubted], NOW)
    assert node.all == (true,)


def test_what_is_held_is_checked_as_well() -> None:
    node, true = Deployments(ME), signed(Deployment("a", None, 1, 1, stamp=NOW), "ada")
    node._put(msgspec.structs.replace(true, context=2))  # a fault of the memory
    node._put(signed(Deployment("b", None, 1, 1, stamp=NOW), "bob"))
    node.settle(NOW)
    assert [each.model for each in node.all] == ["b"]


def test_what_an_older_version_left_on_this_disk_is_signed_here() -> None:
    node = Deployments(ME, [Deployment("a", None, 1, 1, stamp=NOW, author="ada")])
    other = Deployments(ME)
    assert other.merge(node.all, NOW) == ""
    assert [(each.author, each.stamp) for each in other.all] == [("me", NOW)]


def test_what_a_removed_node_deployed_is_adopted_and_what_it_writes_later_is_passed_over() -> None:
    admin, other, back = Deployments(ME), Deployments(ME), Deployments(ME)
    old = [signed(Deployment(model, None, 1, 1, stamp=NOW), "eve") for model in "ab"]
    for node in (admin, other, back):
        node.merge(old, NOW)
    admin.adopt("eve", NOW + 1)
    other.merge(admin.all, NOW + 1, {"eve"})
    other.settle(NOW + 1, {"eve"})
    assert [(each.model, each.author) for each in other.all] == [("a", "me"), ("b", "me")]
    later = signed(Deployment("a", None, 9, 1, stamp=NOW + 50), "eve")
    assert other.merge([later, *back.all], NOW + 60, {"eve"}) == ""
    assert other.all == admin.all
    back.settle(NOW + 60, {"eve"})  # a node that did not hear the admin yet
    assert back.all == ()
    back.merge(admin.all, NOW + 60, {"eve"})
    assert back.all == admin.all


def test_one_author_does_not_crowd_out_what_others_deployed() -> None:
    node, other = Deployments(ME), Deployments(ME)
    true = [signed(Deployment(f"m{n}", None, 1, 1, stamp=NOW + n), f"author{n % 3}") for n in range(20)]
    true.append(signed(Deployment("gone", None, 1, 1, replicas=0, stamp=NOW), "author0"))
    node.merge(true, NOW + 30)
    for start in range(0, 6000, DEPLOYMENTS_MAX):
        wishes = [
            signed(Deployment(f"w{n:04}", None, 1, 1, stamp=NOW + 30), "eve")
            for n in range(start, start + DEPLOYMENTS_MAX)
        ]
        node.merge(wishes, NOW + 30)
    assert len(node.all) == DEPLOYMENTS_MAX
    assert {each for each in node.all if each.author != "eve"} == set(true)
    other.merge(node.all, NOW + 30)
    assert other.all == node.all


def test_of_one_authors_those_that_were_undeployed_go_first() -> None:
    node = Deployments(ME)
    for index in range(DEPLOYMENTS_MAX):
        node.write(Deployment(f"{index:04}", None, 1, 1, replicas=index % 2), NOW + index)
    node.write(Deployment("x", None, 1, 1), NOW + 100)
    node.write(Deployment("y", None, 1, 1), NOW + 101)
    gone = {f"{index:04}" for index in range(DEPLOYMENTS_MAX)} - {each.model for each in node.all}
    assert gone == {"0000", "0002"}
