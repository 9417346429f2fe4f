"""`cordee key`, `usage` and `up --lan`: as people type them, on the nodes of a cluster."""

import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from cluster_processes import MEMORY, SECONDS, Cluster, Node, free_port, until

QUIET = ("--scouting", "off", "--memory", MEMORY)
ASK = {"model": "starter", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A state folder of its own, where nothing runs yet."""
    node = Node(tmp_path)
    yield node
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def test_keys_are_made_listed_and_revoked(node: Node) -> None:
    assert node.do("key", "ls") == ""
    shown = node.do("key", "add", "marie", "--limit", "requests=2,tokens=900/min", "--expires", "30d").strip()
    made = json.loads(node.do("key", "add", "chef", "--admin", "--json"))
    assert made["name"] == "chef" and made["key"] != shown
    chef, marie = json.loads(node.do("key", "ls", "--json"))
    assert (chef["admin"], chef["limit"], chef["expires"]) == (True, None, None)
    assert (marie["admin"], marie["limit"], marie["state"]) == (False, "requests=2,tokens=900/min", "valid")
    assert 29 * 86400 < marie["expires"] - time.time() <= 30 * 86400
    listed = node.do("key", "ls")
    kept = b"".join(path.read_bytes() for path in node.home.rglob("*") if path.is_file())
    for text in (shown, shown.split("-", 2)[2]):
        assert text not in listed and text.encode() not in kept
    node.do("key", "limit", "marie", "requests=3")
    changed = json.loads(node.do("key", "ls", "--json"))[1]
    assert changed == marie | {"limit": "requests=3"}
    node.do("key", "limit", "marie", "none")
    assert json.loads(node.do("key", "ls", "--json"))[1]["limit"] is None
    node.do("key", "rm", "marie")
    assert [each["name"] for each in json.loads(node.do("key", "ls", "--json"))] == ["chef"]
    assert json.loads(node.do("usage", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("key", "add", "a b"), "without blanks"),
        (("key", "add", "marie", "--limit", "4"), "requests=4"),
        (("key", "add", "marie", "--expires", "soon"), "2027-06-30"),
        (("key", "add", "marie", "--expires", "2001-01-01"), "over already"),
        (("key", "rm", "marie"), "cordee key ls"),
        (("key", "limit", "marie", "none"), "cordee key ls"),
        (("key", "limit", "marie", "much"), "requests=4"),
        (("serve", "--lan"), "cordee key add"),
        (("up", "--lan"), "cordee key add"),
        (("up", "--allow-host", "ai.lan"), "cordee key add"),
        (("serve", "--plain"), "--lan"),
        (("serve", "--lan", "--plain", "--cert", "x.pem"), "choose one"),
        (("serve", "--lan", "--key-file", "x.pem"), "--cert"),
        (("serve", "--allow-host", "http://x"), "without http://"),
        (("serve", "--allow-origin", "*"), "no origin"),
        (("serve", "--host", "0.0.0.0"), "--lan 0.0.0.0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(
    node: Node, arguments: tuple[str, ...], said: str
) -> None:
    refused = node.cordee(*arguments)
    assert refused.returncode == 2 and said in refused.stderr
    assert list(node.home.glob("cluster")) == []


def test_what_is_no_certificate_or_address_is_refused(node: Node, tmp_path: Path) -> None:
    node.do("key", "add", "marie")
    (tmp_path / "x.pem").write_text("nothing")
    refused = node.cordee("serve", "--port", 0, "--lan", "127.0.0.1:0", "--cert", tmp_path / "x.pem")
    assert refused.returncode == 2 and "PEM file" in refused.stderr
    refused = node.cordee("serve", "--port", 0, "--lan", "starter")
    assert refused.returncode == 2 and "'starter'" in refused.stderr


@pytest.fixture(scope="module")
def cluster(starter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An admin and a member, both of which serve other machines; the admin's key was there before."""
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder, starter_path, "--scouting", "off")
    (folder / "a").mkdir()
    early = Node(folder / "a")
    (folder / "early").write_text(early.do("key", "add", "early", "--admin").strip())
    ports = [free_port(), free_port()]
    cluster.add("a", "--lan", f"127.0.0.1:{ports[0]}", "--allow-host", "ai.lan")
    cluster.add("b", "--lan", f"127.0.0.1:{ports[1]}", "--peer", f"127.0.0.1:{cluster.port}")
    cluster.ports = ports  # type: ignore[attr-defined]
    yield cluster
    cluster.close()


def lan(cluster: Cluster, name: str, path: str, key: str, body: Any = None) -> httpx.Response:
    port = cluster.ports["ab".index(name)]  # type: ignore[attr-defined]
    context = ssl.create_default_context(cafile=cluster.nodes[name].home / "cluster" / "ca.pem")
    headers = {"Authorization": f"Bearer {key}"}
    method = "GET" if body is None else "POST"
    with httpx.Client(verify=context, timeout=SECONDS) as client:
        return client.request(method, f"https://127.0.0.1:{port}{path}", headers=headers, json=body)


def test_a_key_opens_all_nodes_and_a_revoked_one_none(cluster: Cluster) -> None:
    first, second = cluster.nodes["a"], cluster.nodes["b"]
    key = first.do("key", "add", "marie").strip()
    until(lambda: lan(cluster, "b", "/v1/models", key).status_code == 200)
    for name in "ab":
        until(lambda name=name: lan(cluster, name, "/v1/completions", key, ASK).status_code == 200)
    first.do("key", "rm", "marie")
    revoked = time.monotonic()
    until(lambda: lan(cluster, "b", "/v1/models", key).status_code == 401)
    print(f"refused by the other node {time.monotonic() - revoked:.2f} s later")
    assert lan(cluster, "a", "/v1/models", key).status_code == 401

    def tokens_out() -> int:
        used = json.loads(second.do("usage", "--json"))
        return sum(row["tokens_out"] for row in used if row["key"] == "marie")

    until(lambda: tokens_out() == 6)  # of both nodes together


def test_new_limits_of_a_key_hold_on_all_nodes(cluster: Cluster) -> None:
    first = cluster.nodes["a"]
    key = first.do("key", "add", "paul").strip()
    until(lambda: lan(cluster, "b", "/v1/completions", key, ASK).status_code == 200)
    first.do("key", "limit", "paul", "tokens=1/min")
    until(lambda: lan(cluster, "b", "/v1/completions", key, ASK).status_code == 429)
    first.do("key", "limit", "paul", "none")
    until(lambda: lan(cluster, "b", "/v1/completions", key, ASK).status_code == 200)


def test_what_a_key_uses_at_one_node_counts_at_all(cluster: Cluster) -> None:
    first = cluster.nodes["a"]
    key = first.do("key", "add", "zoe", "--limit", "tokens=1/min").strip()
    until(lambda: lan(cluster, "b", "/v1/models", key).status_code == 200)
    assert lan(cluster, "b", "/v1/completions", key, ASK).status_code == 200

    def used() -> dict[str, Any]:
        rows = {row["key"]: row for row in json.loads(first.do("usage", "--json"))}
        return rows.get("zoe", {"requests": 0, "tokens_out": 0})

    until(lambda: used()["tokens_out"] == 3)  # node a has heard of it
    refused = lan(cluster, "a", "/v1/completions", key, ASK)
    assert (refused.status_code, used()["requests"]) == (429, 1)


def test_the_key_of_a_machine_that_founds_a_cluster_goes_along(cluster: Cluster, tmp_path: Path) -> None:
    key = (cluster.nodes["a"].home.parent / "early").read_text()
    for name in "ab":
        until(lambda name=name: lan(cluster, name, "/v1/usage", key).status_code == 200)


def test_only_admins_make_and_revoke_keys(cluster: Cluster) -> None:
    for arguments in (("key", "add", "paul"), ("key", "rm", "early")):
        refused = cluster.nodes["b"].cordee(*arguments)
        assert refused.returncode == 2 and "Only admins can" in refused.stderr and "on a" in refused.stderr
    assert "early" in cluster.nodes["b"].do("key", "ls")


def test_people_are_told_where_it_is_and_how_to_trust_it(cluster: Cluster) -> None:
    said = cluster.nodes["a"].said
    assert "https://ai.lan:" in said and "SHA-256 fingerprint" in said and "authority.pem" in said
    assert "curl --cacert" in said and "SSL_CERT_FILE" in said
