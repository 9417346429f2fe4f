"""`cordee up` on a first machine, and with addresses that cannot work: what it says, does and leaves."""

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from click.testing import CliRunner

from cluster_processes import Node, until
from cordee.cli.options import Share
from cordee.cli.up import up
from cordee.net import address
from default_port import default_port_taken

QUIET = ("--scouting", "off")
HELLO = {"model": "starter", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A machine that belongs to no cluster."""
    made = Node(tmp_path / "home")
    made.home.mkdir()
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def asked(node: Node, body: dict = HELLO) -> tuple[int, dict]:
    """Status and answer of one request, which is not repeated."""
    api = node.asked("/nodes")["nodes"][0]["api"]
    request = urllib.request.Request(
        f"{api}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_first_request_on_a_first_machine_is_answered(node: Node, starter_path: Path) -> None:
    log = node.home / "node.log"
    node.up("--listen", "127.0.0.1:0", "--log-file", log, *QUIET)
    status, answer = asked(node)
    assert status == 200 and answer["choices"][0]["message"]["content"]
    assert 'cordee run starter "Hello"' in node.said
    api = node.asked("/nodes")["nodes"][0]["api"]
    with urllib.request.urlopen(f"{api}/models") as response:
        [model] = json.load(response)["data"]
    # What an agent's first request fits, as the machine is no larger than the model.
    assert (model["state"], model["context_length"]) == ("ready", 8192)
    with urllib.request.urlopen(api.removesuffix("/v1") + "/metrics") as response:
        metrics = response.read().decode()
    for line in (
        'cordee_nodes{state="alive"} 1.0',
        'cordee_answers_total{ending="length",model="starter"} 1.0',
        'cordee_generated_tokens_total{model="starter"} 4.0',
        f'cordee_kv_cache_tokens_max{{model="starter"}} {4 * 8192}.0',
        "cordee_replans_total ",
    ):
        assert line in metrics, metrics
    written = log.read_text()
    assert " INFO cordee.agent.history: starter: " in written and "Hello" not in written


@pytest.mark.slow
def test_with_a_local_key_only_who_can_read_it_is_answered(node: Node, starter_path: Path) -> None:
    node.up("--listen", "127.0.0.1:0", "--local-key", *QUIET)
    kept = node.home / "local-key"
    assert f"its key is in {kept}" in node.said and kept.read_text().strip() not in node.said
    status, refused = asked(node)
    assert (status, refused["error"]["code"]) == (401, "invalid_api_key")
    assert str(kept) in refused["error"]["message"]
    assert node.do("run", "starter", "Hello", "--max-tokens", "2")  # reads it by itself
    kept.unlink()
    done = node.cordee("run", "starter", "Hello", "--max-tokens", "2")
    assert done.returncode == 14 and str(kept) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_cluster_without_a_model_says_which_verb_brings_one(node: Node, starter_path: Path) -> None:
    node.up("--listen", "127.0.0.1:0", *QUIET)
    node.do("rm", "starter", "--yes")
    until(lambda: not node.asked("/status")["models"])
    assert "cordee deploy starter" in node.do("status")
    status, answer = asked(node)
    assert status == 404 and "`cordee deploy starter`" in answer["error"]["message"]
    node.do("deploy", "starter")
    until(lambda: node.model("starter")["state"] == "serving")
    assert asked(node)[0] == 200
    status, answer = asked(node, HELLO | {"model": "gpt-4"})
    assert status == 404 and answer["error"]["message"].endswith("there is: starter")


def test_a_machine_that_has_a_model_is_not_given_another(node: Node, starter_path: Path) -> None:
    node.do("pull", starter_path, "--name", "ours")
    node.up("--listen", "127.0.0.1:0", *QUIET)
    assert [model["name"] for model in node.told("ls")] == ["ours"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--listen", "nosuchhost.invalid"), "No host called 'nosuchhost.invalid'"),
        (("--listen", "203.0.113.9"), "not an address of this machine"),
        (("--listen", "192.168.1"), "HOST:PORT"),
        (("--peer", "0.0.0.0"), "one machine"),
        (("--peer", "http://pc-1:7330"), "HOST:PORT"),
        (("--scouting", "nosuch"), "no network interface 'nosuch'"),
    ],
)
def test_what_cannot_work_is_said_at_once_and_leaves_nothing(
    node: Node, options: tuple[str, str], says: str
) -> None:
    refused = node.cordee("up", "--port", 0, *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    [line] = refused.stderr.splitlines()
    assert line.startswith("cordee: ") and says in line
    assert not (node.home / "cluster").exists()


@pytest.mark.parametrize("share", ["0", "3/2", "1/0", "-1", "of", "1/"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    refused = CliRunner().invoke(up, ["--spot-check", share])
    assert refused.exit_code == 2
    assert f"'{share}' is no share like 1/200" in refused.output


def test_shares_are_said_in_two_ways() -> None:
    assert [Share().convert(text, None, None) for text in ("1/200", "0.005", "1", "off")] == [
        0.005,
        0.005,
        1.0,
        0.0,
    ]


def test_a_chosen_port_that_is_taken_is_an_error_that_names_who_has_it(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = node.cordee("up", "--port", 0, "--listen", f"localhost:{port}", *QUIET)
        assert refused.returncode == 2
        assert f"127.0.0.1:{port}" in refused.stderr and f"(process {os.getpid()})" in refused.stderr
        api = node.cordee("up", "--port", port, *QUIET)
        assert api.returncode == 2
        assert f"Port {port}" in api.stderr and f"(process {os.getpid()})" in api.stderr
    assert not (node.home / "cluster" / "settings").exists()  # it is not tried again the next time


def test_what_may_be_wrong_is_said_and_looked_at_by_doctor(node: Node) -> None:
    """No other machine reaches it, its port is another, a peer's name is unknown; it runs all the same."""
    taken = contextlib.ExitStack()
    taken.enter_context(default_port_taken())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    node.up("--listen", "localhost", "--peer", "nosuchhost.invalid", "--peer", nobody, *QUIET)
    words = ("Port 7330 is taken by", "no other machine can reach it", "--peer nosuchhost.invalid")
    until(lambda: all(word in node.said for word in words))
    found = json.loads(node.cordee("doctor", "--json").stdout)["findings"]
    for word in (*words, f"answers at --peer {nobody}"):
        [finding] = [each for each in found if word in each["what"]]
        assert finding["remedy"] and not finding["problem"]
    taken.close()
    invited = node.cordee("invite")
    assert "no other machine can reach it" in invited.stderr
    node.down()
    joined = Node(node.home.parent / "other")
    joined.home.mkdir()
    refused = joined.cordee("join", invited.stdout.strip())
    assert refused.returncode == 12 and "for nodes on that machine itself" in refused.stderr


def test_all_that_a_node_listens_on_is_in_the_range_of_a_firewall(node: Node) -> None:
    node.up("--listen", "127.0.0.1", *QUIET)
    node.do("invite")
    api = urlsplit(node.asked("/nodes")["nodes"][0]["api"]).port
    connections = psutil.Process(node.process.pid).net_connections("tcp")
    listening = {each.laddr.port for each in connections if each.status == "LISTEN"} - {api}
    assert len(listening) == 4  # the bus, the inbox, the invitation, the renewal of old certificates
    assert listening <= {7330, *address.PORTS}
