"""A cluster of four hosts, and a stranger, for all tests of this folder; skipped where none can be made."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import cordee
from netcluster import MACHINE, Cluster, Node
from netlab import MEGABYTE, Lab, Unable, check_able

DISK_BYTES = 64 * MEGABYTE  # of one host, to be filled


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    try:
        check_able()
    except Unable as error:
        pytest.skip(f"no hosts: {error}")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Five hosts; the fourth has a small disk, the fifth is for strangers."""
    os.environ["PYTHONFAULTHANDLER"] = "1"  # a crash of a library says where
    os.environ["PYTHONPATH"] = str(Path(cordee.__file__).parents[1])
    machines = [MACHINE] * 3 + [replace(MACHINE, disk_bytes=DISK_BYTES)] + [MACHINE]
    with Lab(machines) as lab:
        yield lab


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Cluster:
    """A cluster of the first four hosts that serves the model.

    Two of them are told to listen on all interfaces, each as people write that.
    """
    cluster = Cluster(lab, lab.hosts[:4])
    for node, everywhere in zip(cluster.nodes, ("0.0.0.0", "::"), strict=False):
        node.options = ("--listen", everywhere)
    cluster.build()
    return cluster


@pytest.fixture(autouse=True)
def nodes_that_ended(request: pytest.FixtureRequest) -> Iterator[None]:
    """A node of the shared cluster that ended by itself fails this test alone, with its last words."""
    yield
    if "cluster" not in request.fixturenames:
        return
    cluster = request.getfixturevalue("cluster")
    ended = [node for node in cluster.nodes if node.has_ended]
    states = [node.state() for node in ended]
    for node in ended:
        node.host.kill()
        node.up()
    assert not ended, "\n".join(states)


@pytest.fixture
def stranger(lab: Lab) -> Iterator[Node]:
    """The fifth host, which is in no cluster."""
    node = Node(lab.hosts[4])
    yield node
    node.host.kill()
    shutil.rmtree(node.host.home)
    node.host.home.mkdir()
