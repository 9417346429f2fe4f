"""An agent whose doors are full of connections that say nothing, little or nonsense: it serves, and stays small."""

import contextlib
import resource
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster_processes import Cluster, Node, until
from cordee.net import address
from cordee.net.enrolment import read_code

CONNECTIONS = 3000  # at all doors together
GROWTH_BYTES_MAX = 50_000_000  # of the agent's memory


def hello() -> bytes:
    """The first packet of a TLS handshake, after which nothing comes."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sent.read()


SAID = {
    "nothing": lambda: b"",
    "a byte": lambda: b"\x16",
    "a handshake": hello,
    "a header": lambda: b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
}


def doors(node: Node) -> dict[str, int]:
    """The ports that a node listens on, by address family and number."""
    found = psutil.Process(node.process.pid).net_connections("tcp")
    return sorted({each.laddr.port for each in found if each.status == psutil.CONN_LISTEN})


@contextlib.contextmanager
def flooded(ports: list[int], said: bytes) -> Iterator[None]:
    """CONNECTIONS that stay open, at all these ports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, CONNECTIONS + 1000), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(CONNECTIONS):
            link = socket.create_connection(("127.0.0.1", ports[number % len(ports)]), 60)
            stack.callback(link.close)
            with contextlib.suppress(OSError):  # it is closed already: there are too many
                link.sendall(said)
        yield


def memory(node: Node) -> int:
    return psutil.Process(node.process.pid).memory_info().rss


@pytest.mark.long
@pytest.mark.parametrize("kind", SAID)
def test_thousands_of_connections_cost_little_and_keep_nobody_out(tmp_path: Path, kind: str) -> None:
    cluster = Cluster(tmp_path, None)
    try:
        first = cluster.add("a")
        code = first.do("invite").strip()
        ports = doors(first)
        assert len(ports) >= 5  # bus, inbox, renewals, invitations, API
        before = memory(first)
        with flooded(ports, SAID[kind]()):
            t = time.monotonic()
            print("flooded", ports, (memory(first) - before) / 1e6)
            api = first.asked("/nodes")["nodes"][0]["api"]
            with urllib.request.urlopen(f"{api}/models", timeout=60) as answer:
                assert answer.status == 200
            print("api", time.monotonic() - t)
            second = Node(tmp_path / "b")
            second.home.mkdir()
            cluster.nodes["b"] = second
            second.do("join", code)
            print("joined", time.monotonic() - t)
            second.up("--name", "b", "--listen", "127.0.0.1:0", "--scouting", "off")
            until(lambda: first.states() == second.states() == {"a": "alive", "b": "alive"})
            print("alive", time.monotonic() - t)
            grown = memory(first) - before
            print("grown", grown / 1e6)
            assert grown < GROWTH_BYTES_MAX
    finally:
        cluster.close()
