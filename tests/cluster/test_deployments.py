"""Deployments: whatever stamps faults wrote, all nodes come to hold the same, and the last one counts."""

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from cordee.cluster import deployments as module
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
deployments = st.builds(
    Deployment,
    model=st.sampled_from("abc"),
    shape=st.none(),
    context=st.integers(1, 3),
    sequences=st.just(1),
    replicas=st.integers(0, 2),
    stamp=stamps,
    author=st.sampled_from("xyz"),
    source=st.sampled_from(("", "o/m/a.gguf", "o" * (SOURCE_CHARS_MAX + 1))),
)
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
    nodes = [Deployments(held_here) for held_here in held]
    clocks = [NOW + random.uniform(-1, 1) for _ in nodes]
    gossip(nodes, clocks, random)
    assert all(node.all == nodes[0].all for node in nodes)
    assert all(deployment.stamp <= max(clocks) + AHEAD_SECONDS for deployment in nodes[0].all)
    assert all(len(deployment.source) <= SOURCE_CHARS_MAX for deployment in nodes[0].all)
    writer = random.randrange(len(nodes))
    nodes[writer].write(Deployment("a", None, 77, 1, author="w"), clocks[writer])
    gossip(nodes, clocks, random)
    assert all(node.all == nodes[0].all for node in nodes)
    assert next(deployment for deployment in nodes[0].all if deployment.model == "a").context == 77


@given(maps, maps, maps)
def test_hearing_is_associative_commutative_and_idempotent(a: list, b: list, c: list) -> None:
    def told(*said: list[Deployment]) -> tuple[Deployment, ...]:
        node = Deployments()
        for one in said:
            node.merge(one, NOW)
        return node.all

    assert told(a, b, c) == told(c, b, a) == told(b, a, a, c, b) == told(a + b, c)


def test_a_machine_back_from_the_dead_with_a_future_stamp_undoes_nothing() -> None:
    cluster, returning = (
        Deployments(),
        Deployments([Deployment("a", None, 1, 1, replicas=0, stamp=NOW + DAY)]),
    )
    cluster.write(Deployment("a", None, 2, 1), NOW)
    returning.settle(NOW)
    cluster.merge(returning.all, NOW)
    returning.merge(cluster.all, NOW)
    assert cluster.all == returning.all
    assert cluster.all[0].context == 2


def test_a_future_stamp_is_better_than_no_deployment_at_all() -> None:
    node = Deployments([Deployment("a", None, 1, 1, stamp=NOW + DAY)])
    node.settle(NOW)
    assert [deployment.stamp for deployment in node.all] == [0.0]


def test_of_two_deployments_in_the_same_instant_the_second_counts() -> None:
    node, other = Deployments(), Deployments()
    node.write(Deployment("a", None, 1, 1), NOW)
    other.merge(node.all, NOW)
    node.write(Deployment("a", None, 2, 1), NOW)
    other.merge(node.all, NOW)
    assert other.all == node.all
    assert (other.all[0].context, other.all[0].stamp) == (2, NOW + TICK_SECONDS)


def test_the_map_is_bounded_and_the_latest_stay() -> None:
    node = Deployments()
    for index in range(DEPLOYMENTS_MAX + 10):
        node.write(Deployment(f"{index:04}", None, 1, 1), NOW + index)
    assert [deployment.model for deployment in node.all] == [
        f"{index:04}" for index in range(10, DEPLOYMENTS_MAX + 10)
    ]


def test_forgetting_looks_at_each_deployment_once_however_many_came(monkeypatch) -> None:
    looked = []
    rank = module._rank
    monkeypatch.setattr(module, "_rank", lambda one: (looked.append(one), rank(one))[1])
    many = [Deployment(f"{index:04}", None, 64, 1, stamp=float(index)) for index in range(3000)]
    kept = Deployments(many)
    kept.merge(many[:5], 1e9)
    assert [each.model for each in kept.all] == [f"{index:04}" for index in range(2936, 3000)]
    assert len(looked) <= len(many) + 2 * 5
