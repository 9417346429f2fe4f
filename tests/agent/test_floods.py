"""An agent whose doors are full of connections that say little or nonsense: it serves, and stays small."""

import contextlib
import http.client
import os
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

import cluster_processes
from cluster_processes import PROGRAM, Cluster, Node, until

CONNECTIONS = 3000  # at all doors together
GROWTH_BYTES_MAX = 64 << 20  # of the agent's memory: 9 to 50 MB were measured, most with half-sent bodies
FEW_DESCRIPTORS = 500  # the most that the agent may have; its doors alone could use thousands


def hello() -> bytes:
    """The first packet of a TLS handshake, after which nothing comes."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sent.read()


POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SAID = {
    "nothing": b"",
    "a byte": b"\x16",
    "a handshake": hello(),
    "a header": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "a body": f"{POST}Content-Length: 100000\r\n\r\n{{".encode(),
}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without nodes, which ends with the test."""
    with contextlib.closing(Cluster(tmp_path, None)) as cluster:
        yield cluster


def doors(node: Node) -> list[int]:
    """The ports that a node listens on."""
    found = psutil.Process(node.process.pid).net_connections("tcp")
    return sorted({each.laddr.port for each in found if each.status == psutil.CONN_LISTEN})


@contextlib.contextmanager
def flooded(ports: list[int], *said: bytes) -> Iterator[None]:
    """CONNECTIONS that stay open, at all these ports, some of which say this and others that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 500:
        pytest.skip(f"needs {CONNECTIONS + 500} open files: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 500), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(CONNECTIONS):
            link = socket.create_connection(("127.0.0.1", ports[number % len(ports)]), 60)
            stack.callback(link.close)
            with contextlib.suppress(OSError):  # it is closed already: there are too many
                link.sendall(said[number // len(ports) % len(said)])
        yield


def answered(node: Node) -> None:
    """A client of the API is served, at the first attempt."""
    api = urlsplit(node.asked("/nodes")["nodes"][0]["api"])
    with contextlib.closing(http.client.HTTPConnection(api.hostname, api.port, timeout=60)) as client:
        client.request("GET", "/v1/models")
        assert client.getresponse().status == 200


@pytest.mark.long
@pytest.mark.parametrize("kind", SAID)
def test_thousands_of_connections_cost_little_and_keep_nobody_out(nodes: Cluster, kind: str) -> None:
    """What is no TLS is not sent to the bus: there each costs the next a tenth of a second (SECURITY.md)."""
    first = nodes.add("a")
    code = first.do("invite").strip()
    ports = doors(first)
    assert len(ports) == 5  # bus, inbox, renewals, invitations, API
    if kind in ("a header", "a body"):
        ports.remove(nodes.port)
    answered(first)
    before = memory(first)
    with flooded(ports, SAID[kind]):
        answered(first)
        second = Node(first.home.parent / "b")
        second.home.mkdir()
        nodes.nodes["b"] = second
        second.do("join", code)
        second.up("--name", "b", "--listen", "127.0.0.1:0", "--scouting", "off")
        until(lambda: first.states() == second.states() == {"a": "alive", "b": "alive"})
        answered(first)
        assert memory(first) - before < GROWTH_BYTES_MAX
    assert "Traceback" not in first.said


def memory(node: Node) -> int:
    return psutil.Process(node.process.pid).memory_info().rss


@pytest.mark.long
def test_a_dead_worker_is_replaced_however_many_connections_there_are(
    tmp_path: Path, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ("/bin/sh", "-c", f'ulimit -n {FEW_DESCRIPTORS}; exec "$@"', "sh", *PROGRAM)
    monkeypatch.setattr(cluster_processes, "PROGRAM", limited)
    with contextlib.closing(Cluster(tmp_path, starter_path)) as cluster:
        node = cluster.add("a")
        node.do("deploy", "starter", "--context", 1024, "--sequences", 2)
        until(lambda: node.model("starter")["state"] == "serving")
        old = worker(node)
        ports = [port for port in doors(node) if port != cluster.port]  # the bus: see above
        with flooded(ports, SAID["a body"], SAID["nothing"]):
            os.kill(old, signal.SIGKILL)
            until(lambda: worker(node) not in (None, old) and node.model("starter")["state"] == "serving")
            answered(node)
        with node.client() as client:
            said = client.completions.create(model="starter", prompt="Once", max_tokens=4)
            assert said.usage.completion_tokens == 4
        assert "Traceback" not in node.said


def worker(node: Node) -> int | None:
    """The process of the one stage, if it has started."""
    stages = [stage for service in node.told("ps") for stage in service["stages"]]
    return stages[0]["pid"] if stages else None
