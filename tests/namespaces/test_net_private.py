"""What outsiders learn who listen on the wire, or connect without being members: nothing."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import msgspec
import pytest

from cordee.engine.vocabulary import Vocabulary
from cordee.net import identity
from cordee.net.enrolment import SECRET_BYTES, read_code
from cordee.net.identity import Identity
from cordee.net.invitations import FAILED_ATTEMPTS_MAX
from cordee.net.zenoh_config import SCOUTING_PORTS
from cordee.worker.tls_link import WELCOME
from intruders import intruder_certificate
from members import at_home, newcomer
from netcapture import captured, conversations, datagrams, is_known, is_tls
from netcluster import CORDEE, MODEL, Cluster, Node, Stream, finish, make_model, until
from netlab import NETWORK, PATIENCE_SECONDS, Host, Lab, run

STRANGERS = ("foreign", "expired", "self-made", "removed")
MARK = "the owls are not what they seem"
TOKENS = 60


def test_no_host_of_the_lab_has_a_way_out(cluster: Cluster) -> None:
    """All that these tests show works on machines without the internet."""
    for node in cluster.nodes:
        routes = run("ip", "-n", node.host.namespace, "route", "show").splitlines()
        assert [route.split()[0] for route in routes] == [f"{NETWORK}.0/24"]


def test_a_listener_on_the_wire_reads_neither_questions_nor_answers(cluster: Cluster) -> None:
    gateway = next(node for node in cluster.nodes if node is not cluster.stages()[0])
    with captured(cluster.lab) as frames:
        stream = Stream(gateway, 1, tokens=TOKENS, prompt=f"{MARK} " * 8)
        stream.start()
        finish(stream)
    wire = b"".join(frames)
    assert len(wire) > 10_000  # the question and the answer did pass
    for secret in (MARK, *MARK.split()[-2:], *_pieces(stream.text), *(node.id for node in cluster.nodes)):
        assert secret.encode() not in wire


def test_a_member_that_listens_to_everything_reads_neither_questions_nor_answers(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Only the gateway and the nodes of the placement do: not a third one with a true certificate."""
    stages = cluster.stages()
    spy, gateway = [node for node in cluster.nodes if node not in stages][:2]
    folder, heard = spy.host.home / "cluster", tmp_path / "heard"
    buses = [f"{node.host.address}:7330" for node in cluster.nodes if node is not spy]
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).resolve().parents[1] / "helpers")])
    script = str(Path(__file__).with_name("net_member.py"))
    listener = spy.host.popen(
        [script, str(folder), str(heard), *buses], {"PYTHONPATH": path}, stdin=PIPE, stdout=PIPE
    )
    assert listener.stdin is not None and listener.stdout is not None
    assert listener.stdout.readline() == b"ready\n"
    question = f"{MARK} " * 8
    until(lambda: b"heartbeat/" in heard.read_bytes(), "it hears what members hear")
    stream = Stream(gateway, 1, tokens=TOKENS, prompt=question)
    stream.start()
    finish(stream)
    listener.stdin.close()
    assert listener.wait(PATIENCE_SECONDS) == 0
    said = heard.read_bytes()
    vocabulary = Vocabulary(make_model(tmp_path / "model.gguf"))
    asked, answered = (vocabulary.tokenize(text, add_bos=False) for text in (question, stream.text))
    vocabulary.close()
    secrets = [MARK.encode(), stream.text.encode()[:20]]
    secrets += [msgspec.msgpack.encode(tokens[2:10])[1:] for tokens in (asked, answered)]
    assert all(len(secret) >= 8 for secret in secrets)
    assert not [secret for secret in secrets if secret in said]


@pytest.fixture(scope="module")
def traffic(cluster: Cluster) -> list[bytes]:
    """What passes while a node is lost and comes back, so that all kinds of links begin."""
    with captured(cluster.lab) as frames:
        node = cluster.stages()[-1]
        node.host.kill()
        node.up()
        cluster.settle()
    return frames


def test_every_conversation_between_nodes_is_tls(cluster: Cluster, traffic: list[bytes]) -> None:
    """From its first byte on."""
    said = conversations(traffic)
    assert len(said) > len(cluster.nodes)  # at least one link of the node to each other
    assert all(is_tls(each) for each in said)


def test_beside_tls_the_wire_has_only_the_search_for_nodes(cluster: Cluster, traffic: list[bytes]) -> None:
    """And that names no node: a searcher says nothing, and gets a random id and addresses as the answer."""
    assert all(map(is_known, traffic))
    first, count = SCOUTING_PORTS
    found = datagrams(traffic)
    searches = [ports for ports, _ in found if ports & set(range(first, first + count))]
    searchers = set().union(*searches)
    assert searches
    assert all(ports & searchers for ports, _ in found)
    names = [MODEL, cluster.first.ask("/nodes")["cluster"], *(node.id for node in cluster.nodes)]
    assert not any(name.encode() in payload for name in names for _, payload in found)


def _pieces(text: str) -> list[str]:
    """Pieces of an answer that are long enough not to be found by chance."""
    return [text[at : at + 6] for at in range(0, len(text) - 6, 6)]


@pytest.fixture(scope="module")
def admin(cluster: Cluster) -> Identity:
    """The identity of the cluster's first node."""
    at_home(cluster.first.host.home)
    return identity.load()


@pytest.fixture(scope="module")
def removed(cluster: Cluster, lab: Lab) -> Identity:
    """A node that was a member until a moment ago."""
    node = Node(lab.hosts[-1])
    cluster.join(node)
    at_home(node.host.home)
    member = identity.load()
    cluster.first.verb("remove", node.id)
    until(lambda: node.process.poll() is not None, "the removed node knows it, and ends")
    kept = lab.folder / "removed"
    node.host.home.rename(kept)
    node.host.home.mkdir()
    return replace(member, folder=kept / "cluster")


@pytest.fixture(scope="module")
def learned(
    cluster: Cluster, lab: Lab, admin: Identity, removed: Identity, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each kind of stranger learns that knows every port of every node; and what a member would."""
    folder = tmp_path_factory.mktemp("certificates")
    strangers = [intruder_certificate(kind, folder, admin, removed) for kind in STRANGERS]
    member = newcomer(folder / "member", admin).folder
    return intrude(cluster, lab.hosts[-1], admin, strangers) | intrude(
        cluster, lab.hosts[-1], admin, [member]
    )


@pytest.mark.parametrize("kind", [*STRANGERS, "none"])
def test_a_stranger_learns_nothing(learned: dict[str, dict[str, Any]], kind: str) -> None:
    """Neither on the bus nor on the data plane nor anywhere else; a removed node only that it was removed."""
    heard = [key for key in learned[kind]["heard"] if not (kind == "removed" and "/removed/" in key)]
    assert heard == [] and learned[kind]["replies"] == 0
    assert set(learned[kind]["said"].values()) == {""}


def test_a_member_would_have_learned_it(learned: dict[str, dict[str, Any]]) -> None:
    """The counterpart of the test above: without it that one could not fail."""
    assert any("/heartbeat/" in key for key in learned["member"]["heard"])
    assert WELCOME.hex() in learned["member"]["said"].values()


def intrude(cluster: Cluster, where: Host, admin: Identity, folders: list[Path]) -> dict[str, dict[str, Any]]:
    """What intruders with the certificates of these folders learn on the cluster's network."""
    listeners = [f"{node.host.address}:{port}" for node in cluster.nodes for port in ports(node.host)]
    assert len(listeners) >= 2 * len(cluster.nodes) + 1  # each has the bus and its inbox, and one a stage
    tests = Path(__file__).resolve().parents[1] / "helpers"
    authority = str(admin.folder / "ca.pem")
    script = str(Path(__file__).with_name("net_intruder.py"))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tests)])
    return json.loads(
        where.run(script, authority, admin.cluster, ",".join(map(str, folders)), *listeners, PYTHONPATH=path)
    )


def ports(host: Host) -> list[int]:
    """The TCP ports at which a host can be reached from outside."""
    listening = run("ip", "netns", "exec", host.namespace, "ss", "--no-header", "-tln").splitlines()
    where = [line.split()[3].rpartition(":") for line in listening]
    return [int(port) for address, _, port in where if not address.startswith("127.")]


@pytest.mark.long
def test_a_machine_that_is_removed_while_it_sleeps_is_out_and_is_told(cluster: Cluster) -> None:
    """It stood still with a slice of the model; the answers go on, and no link to it is left."""
    node = next(each for each in reversed(cluster.stages()) if each is not cluster.first)
    others = [each for each in cluster.nodes if each is not node]
    with cluster.streams(others):
        node.host.signal(signal.SIGSTOP)
        cluster.first.verb("remove", node.id)
        until(lambda: not any(node.id in each.states() for each in others), "all know that it was removed")
        until(lambda: not any(linked(each.host, node.host) for each in others), "its links are closed")
    node.host.signal(signal.SIGCONT)
    with cluster.streams(others):
        assert not any(node.id in each.states() for each in others)
        assert node.id not in {stage["node"] for stage in cluster.first.placement()["stages"]}
    until(lambda: node.process.poll() is not None, "the removed node knows it, and ends")
    assert "was removed" in node.tail()
    node.verb("leave", "--yes")
    cluster.join(node)
    cluster.settle()


def linked(host: Host, other: Host) -> bool:
    """Whether a TCP connection between two hosts is open, as the first sees it."""
    command = ("ss", "--no-header", "-tn", "state", "established", "dst", other.address)
    return bool(run("ip", "netns", "exec", host.namespace, *command).strip())


def test_a_code_is_good_once_and_cannot_be_guessed(cluster: Cluster, stranger: Node) -> None:
    """A machine that tries is not listened to any more, whatever it then comes with."""
    join, host = (*CORDEE, "join"), stranger.host
    code = cluster.first.verb("invite").strip()
    stranger.verb("join", code)
    shutil.rmtree(host.home / "cluster")
    assert "used already" in host.refused(*join, code)
    for _ in range(FAILED_ATTEMPTS_MAX):
        guess = replace_secret(code, os.urandom(SECRET_BYTES))
        assert "not (or no longer) known" in host.refused(*join, guess)
    assert "Too many wrong codes" in host.refused(*join, replace_secret(code, os.urandom(SECRET_BYTES)))
    assert "Too many wrong codes" in host.refused(*join, cluster.first.verb("invite").strip())


def replace_secret(code: str, secret: bytes) -> str:
    """A code of the same cluster and endpoint with another secret."""
    return msgspec.structs.replace(read_code(code), secret=secret).text()
