"""The API to a colleague's machine, which is in no cluster: keys, certificates, what passes on the wire."""

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cordee.access.lan import PORT
from cordee.net.server_certificates import OwnAuthority
from netcapture import captured, conversations, is_tls
from netcluster import ENDS, MODEL, Cluster, Node, until
from netlab import PATIENCE_SECONDS, Host, Lab, inside

pytestmark = pytest.mark.long
MARK = "the owls are not what they seem"


class Colleague:
    """A machine that asks at a node, over TLS with an authority that it trusts."""

    def __init__(self, host: Host, authority: Path) -> None:
        self.host = host
        self.context = ssl.create_default_context(cafile=authority)

    def connect(self, node: Node) -> socket.socket:
        with inside(self.host.namespace):
            return socket.create_connection((node.host.address, PORT), PATIENCE_SECONDS)

    def ask(self, node: Node, path: str, key: str = "", body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(node.host.address, PORT)
        connection.sock = self.context.wrap_socket(self.connect(node), server_hostname=node.host.address)
        headers = {"Content-Type": "application/json"} | ({"x-api-key": key} if key else {})
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    return cluster.first.verb("key", "add", "marie").strip()


@pytest.fixture(scope="module")
def open_nodes(cluster: Cluster, key: str) -> Iterator[list[Node]]:
    """The admin and a member, which serve other machines meanwhile."""
    nodes = [cluster.first, cluster.nodes[2]]
    before = [node.options for node in nodes]
    for node in nodes:
        restart(node, (*node.options, "--lan"))
    cluster.settle()
    yield nodes
    for node, options in zip(nodes, before, strict=True):
        restart(node, options)
    cluster.settle()


def restart(node: Node, options: tuple[str, ...]) -> None:
    node.host.kill()
    node.options = options
    node.up()


@pytest.fixture(scope="module")
def colleague(cluster: Cluster, lab: Lab) -> Colleague:
    return Colleague(lab.hosts[4], cluster.first.host.home / "cluster" / "ca.pem")


def test_a_colleague_with_a_key_asks_any_node_and_a_listener_reads_nothing(
    cluster: Cluster, open_nodes: list[Node], colleague: Colleague, key: str
) -> None:
    for node in open_nodes:
        until(lambda node=node: colleague.ask(node, "/v1/models", key)[0] == 200, "the node answers")
        body = {"model": MODEL, "prompt": f"{MARK} " * 8, "max_tokens": 30, "logit_bias": ENDS}
        with captured(cluster.lab) as frames:
            status, answer = colleague.ask(node, "/v1/completions", key, body)
        assert status == 200
        text = json.loads(answer)["choices"][0]["text"]
        wire = b"".join(frames)
        assert len(wire) > 3000
        for secret in (MARK, *MARK.split()[-2:], key, key.split("-", 2)[2], text[:12]):
            assert secret.encode() not in wire
        assert all(is_tls(said) for said in conversations(frames))


def test_without_a_key_or_with_a_wrong_one_nothing_is_answered(
    open_nodes: list[Node], colleague: Colleague, key: str
) -> None:
    for node in open_nodes:
        for wrong in ("", "none", key[:-1] + ("a" if key[-1] != "a" else "b")):
            for path in ("/v1/models", "/health", "/v1/usage", "/nosuch"):
                assert colleague.ask(node, path, wrong)[0] == 401


def test_a_certificate_of_another_authority_is_refused_and_plain_http_is_told_so(
    open_nodes: list[Node], colleague: Colleague, tmp_path: Path
) -> None:
    foreign = Colleague(colleague.host, OwnAuthority(tmp_path / "authority").folder / "ca.pem")
    for node in open_nodes:
        with pytest.raises(ssl.SSLCertVerificationError):
            foreign.ask(node, "/v1/models")
        with contextlib.closing(colleague.connect(node)) as plain:
            plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"https://" in plain.recv(4096)


def test_a_revoked_key_stops_on_every_node_also_one_that_slept(
    cluster: Cluster, open_nodes: list[Node], colleague: Colleague
) -> None:
    key = cluster.first.verb("key", "add", "paul").strip()
    admin, member = open_nodes
    until(lambda: colleague.ask(member, "/v1/models", key)[0] == 200, "the member knows the key")
    member.host.unplug()
    cluster.first.verb("key", "rm", "paul")
    assert colleague.ask(admin, "/v1/models", key)[0] == 401
    member.host.plug()

    def refused() -> bool:
        with contextlib.suppress(OSError):  # the network has only just come back
            return colleague.ask(member, "/v1/models", key)[0] == 401
        return False

    until(refused, "the member knows that it is revoked")
    cluster.settle()
