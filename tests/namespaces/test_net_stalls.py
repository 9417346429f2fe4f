"""What was chosen and does not come up, or creeps, is given up, and it is said why: answers go on elsewhere.

None of these is a loss: the node is there, and says that all is well.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import netfaults
from cordee.cluster.doubts import DOUBT_SECONDS
from netcluster import MODEL, Cluster, Node, until
from netfaults import fake_clock

HELPERS = Path(__file__).parents[1] / "helpers"
SERVED_SECONDS = 30.0
BUS_ALONE = """table inet office {
    chain input {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        iif lo accept
        tcp dport 7330 accept
    }
}"""
NO_LARGE_PACKETS = """table inet office {
    chain input {
        type filter hook input priority 0;
        ip length > 576 tcp dport != 7330 tcp sport != 7330 drop
    }
    chain output {
        type filter hook output priority 0;
        ip length > 576 tcp dport != 7330 tcp sport != 7330 drop
    }
}"""


@contextmanager
def rules(node: Node, text: str) -> Iterator[None]:
    """A firewall on a node's host."""
    if not shutil.which("nft"):
        pytest.skip("needs `nft` (Debian: nftables)")
    inside = ["ip", "netns", "exec", node.host.namespace, "nft"]
    subprocess.run([*inside, "-f", "-"], input=text.encode(), check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "flush", "ruleset"], check=True)


def reasons(node: Node) -> str:
    """Why the model is not, or was not, served as planned, as `cordee status` on a node has it."""
    models = {each["name"]: each for each in node.ask("/status")["models"]}
    return "\n".join(models[MODEL]["reasons"])


def placed(node: Node) -> set[str]:
    """The nodes of the model's stages, as a node sees it; those of what follows, too."""
    placement = node.placement()
    if placement is None:
        return set()
    return {stage["node"] for stage in placement["stages"] + (placement["successor"] or [])}


def served_without(victim: Node, others: list[Node], *words: str) -> None:
    """Within SERVED_SECONDS the model is served by others, who say why."""
    asked = others[0]

    def is_served() -> bool:
        placement = asked.placement()
        return bool(placement and placement["wiring"]) and victim.id not in placed(asked)

    def is_said() -> bool:
        said = [line for line in reasons(asked).splitlines() if f"without {victim.host.name} " in line]
        return all(any(word in line for line in said) for word in words)

    began = time.monotonic()
    for condition in (is_said, is_served):
        left = began + SERVED_SECONDS - time.monotonic()
        until(condition, f"served without {victim.host.name}, {words}; {reasons(asked)}", left)


@contextmanager
def restarted(node: Node, program: tuple[str, ...] | None = None, **environment: str) -> Iterator[None]:
    """The node's processes are another program, or have another environment, for a while."""
    node.host.kill()
    was = node.host.machine.environment.copy()
    node.host.machine.environment.update(environment)
    usual = node.program
    node.program = program or usual
    try:
        node.up()
        yield
    finally:
        node.program = usual
        node.host.machine.environment.clear()
        node.host.machine.environment.update(was)
        node.host.kill()
        node.up()


def last_stage(cluster: Cluster) -> tuple[Node, list[Node]]:
    """The node of the last stage, and the others."""
    victim = cluster.stages()[-1]
    return victim, [node for node in cluster.nodes if node is not victim]


def kill_worker(cluster: Cluster, node: Node) -> None:
    netfaults.kill_worker(cluster, node, random.Random(0)).__enter__()


@pytest.mark.slow
def test_a_node_that_is_open_for_the_bus_alone_is_left_out(cluster: Cluster) -> None:
    victim, others = last_stage(cluster)
    with rules(victim, BUS_ALONE), cluster.streams(others):
        kill_worker(cluster, victim)
        served_without(victim, others, "no connection to", "a firewall?")
    cluster.settle()


@pytest.mark.long
def test_a_network_that_loses_large_packets_is_left(cluster: Cluster) -> None:
    victim, others = last_stage(cluster)
    with cluster.streams(others), rules(victim, NO_LARGE_PACKETS):
        served_without(victim, others)
    cluster.settle()


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "word"), [("loads", "it says that it loads"), ("trickles", "has not come within")]
)
def test_a_member_that_only_says_that_it_works_is_left_out(cluster: Cluster, how: str, word: str) -> None:
    """It is needed when another one is lost, which comes back a moment later."""
    until(lambda: not any(map(reasons, cluster.nodes)), "old doubts are over", 3 * DOUBT_SECONDS)
    able = cluster.nodes[:3]  # the fourth has a small disk
    victim = next(node for node in reversed(able) if node not in cluster.stages())
    lost = next(node for node in reversed(cluster.stages()) if node is not cluster.first)
    others = [node for node in cluster.nodes if node not in (victim, lost)]
    path = os.pathsep.join((os.environ["PYTHONPATH"], str(HELPERS)))
    with cluster.streams(others):
        stuck = restarted(victim, ("-m", "stuck_node"), PYTHONPATH=path, CORDEE_TEST_STUCK=how)
        with stuck:
            lost.host.kill()
            until(lambda: victim.id in placed(others[0]), f"{victim.host.name} is chosen")
            lost.up()
            served_without(victim, others, word)
    cluster.settle()


@pytest.mark.long
def test_a_node_whose_clock_jumps_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    if not fake_clock("+1d"):
        pytest.skip("needs libfaketime (Debian: libfaketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    fake = fake_clock("") | {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    del fake["FAKETIME"]
    victim, others = last_stage(cluster)
    with restarted(victim, **fake):
        cluster.settle()
        for lost in others:  # which are started again until it is needed
            if victim not in cluster.stages():
                lost.host.kill()
                lost.up()
                cluster.settle()
        assert victim in cluster.stages()
        with cluster.streams(others):
            clock.write_text("+40d")
            kill_worker(cluster, victim)
            served_without(victim, others, "is a clock wrong?")
    cluster.settle()
