"""Eight answers stream while something happens to a machine that has a slice of the model: none is harmed.

Every answer has to be, letter for letter, what it is on an undisturbed cluster.
"""

import random

import pytest

import netfaults
from netcluster import Cluster, Node
from netfaults import Fault
from netlab import PATIENCE_SECONDS, Lab

FIRST, LAST = 0, -1  # stages: the first one's node is the host, with the scheduler
FAULTS = [
    (netfaults.crash, LAST),
    (netfaults.move, FIRST),
    (netfaults.garbage, LAST),
]
LONG_FAULTS = [
    (netfaults.kill, FIRST),
    (netfaults.kill_worker, FIRST),
    (netfaults.long_pause, FIRST),
    (netfaults.cut, LAST),
    (netfaults.short_cut, FIRST),
    (netfaults.wrong_clock, FIRST),
]
IN_A_ROW = 50
LAYERS_OF_ONE = 4  # so few that one machine holds them
SEED = 20


def strike(cluster: Cluster, fault: Fault, victim: Node, draw: random.Random) -> None:
    """Let a fault happen to a node while streams run through all others; then wait until all is well."""
    gateways = [node for node in cluster.nodes if node is not victim]
    with cluster.streams(gateways):
        mended = fault(cluster, victim, draw)
        mended.__enter__()
    mended.__exit__(None, None, None)
    cluster.settle()


def id_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("fault", "stage"),
    [*FAULTS, *(pytest.param(*each, marks=pytest.mark.long) for each in LONG_FAULTS)],
    ids=id_of,
)
def test_answers_hold_when_a_machine_of_theirs_fails(cluster: Cluster, fault: Fault, stage: int) -> None:
    if fault is netfaults.wrong_clock and not netfaults.fake_clock("+1d"):
        pytest.skip("needs libfaketime (Debian: libfaketime)")
    strike(cluster, fault, cluster.stages()[stage], random.Random(SEED))


@pytest.mark.slow
def test_answers_hold_when_a_disk_runs_full(cluster: Cluster) -> None:
    """And the node of the full disk may be needed at once, since another is lost."""
    small = cluster.nodes[3]
    with netfaults.full_disk(cluster, small, random.Random(SEED)):
        victim = next(node for node in reversed(cluster.stages()) if node is not small)
        strike(cluster, netfaults.kill, victim, random.Random(SEED))
    cluster.settle()


def test_answers_hold_when_a_second_cluster_starts_on_the_same_network(
    cluster: Cluster, stranger: Node
) -> None:
    with cluster.streams(cluster.nodes):
        stranger.up()
        assert stranger.ask("/nodes")["cluster"] != cluster.first.ask("/nodes")["cluster"]
    assert set(stranger.states()) == {stranger.id}
    assert stranger.id not in cluster.first.states()


@pytest.mark.slow
def test_a_machine_that_answers_alone_gets_another_address(lab: Lab, stranger: Node) -> None:
    """All links of its answers begin and end in it: no other node is there to notice that one is broken."""
    alone = Cluster(lab, [stranger.host])
    alone.build(layers=LAYERS_OF_ONE)
    assert alone.stages() == alone.nodes
    with alone.streams(alone.nodes), netfaults.move(alone, alone.first, random.Random(SEED)):
        pass


@pytest.mark.long
def test_answers_hold_through_fifty_faults_in_a_row(cluster: Cluster) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number in range(IN_A_ROW):
        fault, victim = draw.choice(netfaults.RANDOM), draw.choice(cluster.nodes)
        print(f"{number}: {fault.__name__} of {victim.host.name}", flush=True)
        strike(cluster, fault, victim, draw)


@pytest.mark.long
def test_a_machine_that_is_left_alone_can_leave(cluster: Cluster) -> None:
    """It holds a stage that fits nowhere else; it says so, and goes all the same."""
    left = next(node for node in reversed(cluster.stages()) if node is not cluster.first)
    others = [node for node in cluster.nodes if node is not left]
    for node in others:
        node.host.crash()
    left.verb("leave", "--yes")
    assert left.process is not None
    left.process.wait(PATIENCE_SECONDS)
    for node in others:
        node.host.plug()
        node.up()
    cluster.join(left)
    cluster.settle()
