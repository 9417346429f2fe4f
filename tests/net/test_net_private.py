"""What others learn: whoever listens on the wire, and whoever knocks without being a member. Nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cordee.node import identity
from cordee.node.dataplane import WELCOME
from cordee.node.identity import Identity
from intruders import intruder_certificate
from members import at_home, newcomer
from netcapture import captured, conversations, is_tls
from netlab import NETWORK, Host, Lab, run
from netrope import Node, Rope, Stream, finish, until

MARK = "the owls are not what they seem"
TOKENS = 60


def test_no_host_of_the_lab_has_a_way_out(rope: Rope) -> None:
    """All that these tests show works on machines without the internet."""
    for node in rope.nodes:
        routes = run("ip", "-n", node.host.namespace, "route", "show").splitlines()
        assert [route.split()[0] for route in routes] == [f"{NETWORK}.0/24"]


def test_who_listens_on_the_wire_reads_neither_questions_nor_answers(rope: Rope) -> None:
    gateway = next(node for node in rope.nodes if node is not rope.stages()[0])
    with captured(rope.lab) as frames:
        stream = Stream(gateway, 1, tokens=TOKENS, prompt=f"{MARK} " * 8)
        stream.start()
        finish(stream)
    wire = b"".join(frames)
    assert len(wire) > 10_000  # the question and the answer did pass
    for secret in (MARK, *MARK.split()[-2:], *_pieces(stream.text), *(node.id for node in rope.nodes)):
        assert secret.encode() not in wire


def test_every_conversation_between_nodes_is_tls(rope: Rope) -> None:
    """From its first byte on; a node is lost and comes back meanwhile, so that all kinds of links begin."""
    with captured(rope.lab) as frames:
        node = rope.stages()[-1]
        node.host.kill()
        node.up()
        rope.settle()
    said = conversations(frames)
    assert len(said) > len(rope.nodes)  # at least one link of the node to each other
    assert all(is_tls(each) for each in said)


def _pieces(text: str) -> list[str]:
    """Parts of an answer that are long enough not to be found by chance."""
    return [text[at : at + 6] for at in range(0, len(text) - 6, 6)]


@pytest.fixture(scope="module")
def keeper(rope: Rope) -> Identity:
    """The identity of the cluster's first node."""
    at_home(rope.first.host.home)
    return identity.load()


@pytest.fixture(scope="module")
def removed(rope: Rope, lab: Lab) -> Identity:
    """Who was a member until a moment ago."""
    node = Node(lab.hosts[-1])
    rope.join(node)
    at_home(node.host.home)
    member = identity.load()
    rope.first.verb("remove", node.id)
    until(lambda: node.process.poll() is not None, "the removed node knows it, and ends")
    kept = lab.folder / "removed"
    node.host.home.rename(kept)
    node.host.home.mkdir()
    return replace(member, folder=kept / "cluster")


@pytest.mark.parametrize("kind", ["foreign", "expired", "self-made", "removed"])
def test_who_is_no_member_learns_nothing(
    rope: Rope, stranger: Node, keeper: Identity, removed: Identity, tmp_path: Path, kind: str
) -> None:
    """He knows every port of every node, and speaks the cluster's own protocols."""
    folder = intruder_certificate(kind, tmp_path, keeper, removed)
    learned = knocks(rope, stranger, keeper, folder)
    assert learned["heard"] == [] and learned["replies"] == 0
    assert set(learned["said"].values()) == {""}


def test_a_member_would_have_learned_it(rope: Rope, stranger: Node, keeper: Identity, tmp_path: Path) -> None:
    """The counterpart of the test above: without it that one could not fail."""
    learned = knocks(rope, stranger, keeper, newcomer(tmp_path / "member", keeper).folder)
    assert any("/beat/" in key for key in learned["heard"])
    assert WELCOME.hex() in learned["said"].values()


def knocks(rope: Rope, stranger: Node, keeper: Identity, folder: Path) -> dict[str, Any]:
    """What somebody with these papers learns on the cluster's network."""
    doors = [f"{node.host.address}:{port}" for node in rope.nodes for port in ports(node.host)]
    assert len(doors) >= 2 * len(rope.nodes) + 1  # each has the bus and its inbox, and somebody a stage
    tests = Path(__file__).parents[1]
    authority = str(keeper.folder / "ca.pem")
    script = str(Path(__file__).with_name("net_intruder.py"))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tests)])
    return json.loads(
        stranger.host.run(script, str(folder), authority, keeper.cluster, *doors, PYTHONPATH=path)
    )


def ports(host: Host) -> list[int]:
    """The TCP ports at which a host can be reached from outside."""
    listening = run("ip", "netns", "exec", host.namespace, "ss", "--no-header", "-tln").splitlines()
    where = [line.split()[3].rpartition(":") for line in listening]
    return [int(port) for address, _, port in where if not address.startswith("127.")]
