"""The verbs of a cluster as people use them: real nodes on this machine, the starter model on two of them."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from terminal import Terminal

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Iterator[Cluster]:
    """Nodes a (admin, has the model), b (found by multicast), c (found by its address)."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), starter_path, "--memory", MEMORY)
    try:
        made.add("a", "--scouting", "lo")
        made.add("b", "--scouting", "lo")
        made.add("c", "--scouting", "off", "--peer", f"127.0.0.1:{made.port}")
        yield made
    finally:
        made.close()


@pytest.fixture
def nodes(cluster: Cluster) -> list[Node]:
    """All three; the cluster serves the starter model."""
    found = list(cluster.nodes.values())
    found[1].do("deploy", "starter", *SERVED)
    until(lambda: all(serves(node) for node in found))
    return found


def serves(node: Node) -> bool:
    return node.model("starter").get("state") == "serving"


def stages(node: Node) -> list[dict]:
    [placement] = node.model("starter")["placements"]
    return placement["stages"]


def hello(node: Node) -> str:
    with node.client() as client:
        done = client.chat.completions.create(model="starter", messages=HELLO, max_tokens=8, temperature=0)
    return done.choices[0].message.content


def test_three_nodes_see_each_other(cluster: Cluster) -> None:
    everybody = {"a": "alive", "b": "alive", "c": "alive"}
    for name, node in cluster.nodes.items():
        until(lambda node=node: node.states() == everybody)
        told = node.told("nodes")
        assert told["nodes"][0]["name"] == name  # itself first
        assert [each["self"] for each in told["nodes"]] == [True, False, False]
        assert {each["name"] for each in told["nodes"] if each["admin"]} == {"a"}
    assert len({node.told("nodes")["cluster"] for node in cluster.nodes.values()}) == 1


@pytest.mark.slow
def test_a_model_that_fits_no_node_is_answered_through_each(nodes: list[Node]) -> None:
    assert {hello(node) for node in nodes} == {hello(nodes[0])}
    placed = stages(nodes[0])
    assert [stages(node) for node in nodes[1:]] == [placed, placed]
    assert len({stage["node"] for stage in placed}) == 2
    assert [stage["state"] for stage in placed] == ["wired", "wired"]
    assert (placed[0]["layers"][0], placed[-1]["layers"][1]) == (0, 30)
    told = nodes[0].told("status")
    assert [model["state"] for model in told["models"]] == ["serving"]
    assert "serves" in [change["text"] for change in told["changes"]]


@pytest.mark.slow
def test_status_says_whether_an_answer_keeps_its_tokens_when_a_machine_fails(nodes: list[Node]) -> None:
    until(lambda: nodes[1].model("starter")["placements"][0]["batch_invariant"] is not None)
    assert "if a machine fails, an answer goes on with exactly the same tokens" in nodes[1].do("status")
    assert hello(nodes[2]) == hello(nodes[0])


def test_ps_shows_the_stages_of_this_machine(nodes: list[Node]) -> None:
    placed = stages(nodes[0])
    for node in nodes:
        own = [stage["layers"] for stage in placed if stage["node"] == node.id]
        shown = [stage for service in node.told("ps") for stage in service["stages"]]
        assert [stage["layers"] for stage in shown] == own
        assert all(stage["pid"] and stage["rss_bytes"] > 0 for stage in shown)


def test_run_is_answered_by_the_cluster(nodes: list[Node]) -> None:
    [listed] = nodes[1].told("ls")
    assert (listed["path"], listed["nodes"]) == (None, ["a"])  # it has no model of its own
    told = nodes[1].do("run", "starter", "Say hello.", "--max-tokens", 8, "--temperature", 0)
    assert told.strip() == hello(nodes[0]).strip()


def test_plan_is_for_the_cluster_as_it_is(nodes: list[Node]) -> None:
    planned = json.loads(nodes[2].do("plan", "starter", *SERVED, "--json"))
    assert {machine["name"] for machine in planned["machines"]} == {"a", "b", "c"}
    assert len(planned["stages"]) == 2
    refused = nodes[2].cordee("plan", "apertus-8b")
    assert refused.returncode == 6
    assert "the machines have 0.4 GB" in refused.stderr  # beside what runs


@pytest.mark.slow
def test_a_model_can_be_kept_on_some_nodes(nodes: list[Node]) -> None:
    """It moves there; where it does not fit, people are told; a node that nobody knows is refused."""
    refused = nodes[0].cordee("deploy", "starter", *SERVED, "--only", "a,bb")
    assert refused.returncode == 2
    assert "No node is called 'bb' (did you mean b?): `cordee nodes` lists them." in refused.stderr
    ids = {node.asked("/nodes")["nodes"][0]["name"]: node.id for node in nodes}
    for only in ("a,c", f"b,{ids['c']}"):
        names = sorted(name for name in "abc" if name in only.split(",") or ids[name] in only)
        nodes[0].do("deploy", "starter", *SERVED, "--only", only)
        until(
            lambda names=names: all(
                serves(node) and sorted({stage["name"] for stage in stages(node)}) == names for node in nodes
            )
        )
        assert hello(nodes[1]) == hello(nodes[0])
        assert sorted(nodes[2].model("starter")["only"]) == names
        assert "kept on" in nodes[2].do("status")
    said = nodes[0].cordee("deploy", "starter", *SERVED, "--only", "a").stderr
    assert "cannot run for now. It may run only on a (`--only`)." in said
    until(lambda: "may run only on a" in nodes[1].model("starter")["why"])
    nodes[0].do("undeploy", "starter")
    nodes[0].do("deploy", "starter", *SERVED)
    until(lambda: all(serves(node) for node in nodes))
    assert nodes[1].model("starter")["only"] == []


def test_no_model_is_deployed_for_more_than_it_was_made_for(nodes: list[Node]) -> None:
    refused = nodes[2].cordee("deploy", "starter", "--context", 8193)
    assert (refused.returncode, "at most 8192 tokens" in refused.stderr) == (2, True)
    assert nodes[2].model("starter")["context"] == 1024


def test_status_says_why_a_model_runs_nowhere(nodes: list[Node]) -> None:
    told = nodes[0].cordee("deploy", "starter", "--context", 8192, "--sequences", 16)
    assert told.returncode == 0
    assert "starter is deployed, but cannot run for now. It needs" in told.stderr
    until(lambda: nodes[2].model("starter")["state"] == "unplaced")
    assert "It needs" in nodes[2].model("starter")["why"]
    assert "runs nowhere. It needs" in nodes[2].do("status")
    advised = re.search(r"`cordee (deploy starter --context 8192 --sequences \d+)` fits", told.stderr)
    assert advised, told.stderr
    nodes[0].do(*advised[1].split())
    until(lambda: all(serves(node) for node in nodes))
    nodes[0].do("undeploy", "starter")
    until(lambda: not nodes[2].model("starter")["deployed"])
    assert nodes[0].cordee("undeploy", "starter").returncode == 3
    assert "(did you mean starter?)" in nodes[0].cordee("deploy", "startr").stderr


@pytest.mark.slow
def test_where_memory_is_short_a_deployed_model_gets_fewer_answers(nodes: list[Node]) -> None:
    """Four answers of 8192 tokens take more than the three nodes lend."""
    told = nodes[1].cordee("deploy", "starter")
    assert told.returncode == 0, told.stderr
    short = re.search(r"memory is short: starter has (\d) answers? at a time instead of 4", told.stderr)
    assert short, told.stderr
    until(lambda: all(node.model("starter").get("sequences") == int(short[1]) for node in nodes))
    until(lambda: all(serves(node) for node in nodes))
    assert nodes[0].model("starter")["context"] == 8192
    refused = nodes[1].cordee("deploy", "starter", "--sequences", 8, "--context", 4096)
    assert "cannot run for now. It needs" in refused.stderr  # what was asked for is not changed
    nodes[1].do("undeploy", "starter")
    until(lambda: not any(node.model("starter")["deployed"] for node in nodes))
    assert hello(nodes[2])  # a request chooses as well
    assert nodes[2].model("starter")["sequences"] == int(short[1])


def test_verbs_know_the_models_that_only_another_node_has(nodes: list[Node]) -> None:
    other = nodes[1]
    listed = other.do("ls").splitlines()
    assert [line.split()[0] for line in listed] == ["NAME", "starter"]
    assert listed[1].split()[-1] == "a"
    removed = other.cordee("rm", "starter")
    assert (removed.returncode, "a has it: `cordee rm` there" in removed.stderr) == (3, True)
    shown = json.loads(other.do("show", "starter", "--json"))
    assert (shown["path"], shown["layers"]) == (None, 30)
    assert "a has it" in other.do("show", "starter")
    near = other.cordee("export", "startr", other.home / "out", "--for", "pentium2")
    assert "(did you mean starter" in near.stderr
    unknown = other.cordee("plan", "startr")
    assert (unknown.returncode, "(did you mean starter" in unknown.stderr) == (3, True)
    [line] = [line for line in other.do("models").splitlines() if line.startswith("starter ")]
    assert line.split()[-1] in ("yes", "a")  # set-up may have put a copy beside the program


@pytest.mark.long
def test_the_last_whole_copy_is_removed_only_if_that_is_confirmed(
    cluster: Cluster, nodes: list[Node], starter_path: Path
) -> None:
    """A second copy, under another name, goes without a question; so does a second name."""
    a, c = cluster.nodes["a"], cluster.nodes["c"]
    refused = a.cordee("rm", "starter")
    assert refused.returncode == 2
    assert "the cluster's last whole copy of starter" in refused.stderr
    assert "which it serves: confirm with `cordee rm starter --yes`" in refused.stderr
    c.do("pull", starter_path, "--name", "copy")
    until(lambda: "copy" in {model["name"] for model in a.told("status")["models"]})
    c.do("rm", "copy")
    until(lambda: "copy" not in {model["name"] for model in a.told("status")["models"]})
    a.do("pull", starter_path, "--name", "second")
    a.do("rm", "second")
    asked = Terminal("rm", "starter", home=a.home)
    asked.until("Remove it? [y/N]")
    asked.type("n\n")
    assert asked.exit_code() == 1
    assert [model["name"] for model in a.told("ls")] == ["starter"]


def test_the_old_names_of_deploy_and_undeploy_still_work(nodes: list[Node]) -> None:
    nodes[0].do("unshare", "starter")
    until(lambda: not nodes[2].model("starter")["deployed"])
    nodes[0].do("share", "starter", *SERVED)
    until(lambda: nodes[2].model("starter")["deployed"])


def test_a_watched_verb_goes_on_until_ctrl_c(cluster: Cluster) -> None:
    watched = cluster.nodes["a"].start("nodes", "--watch", "--json")
    lines = [json.loads(watched.stdout.readline()) for _ in range(2)]
    watched.send_signal(signal.SIGINT)
    assert watched.wait(60) == 0
    assert [[node["name"] for node in line["nodes"]] for line in lines] == [["a", "b", "c"]] * 2
    watched.stdout.close()


def test_one_agent_for_a_folder(cluster: Cluster) -> None:
    refused = cluster.nodes["a"].cordee("up", "--port", 0)
    assert refused.returncode == 2
    assert f"process {cluster.nodes['a'].process.pid}" in refused.stderr


def test_only_admins_invite_and_remove(cluster: Cluster) -> None:
    for verb in (("invite",), ("remove", "c")):
        refused = cluster.nodes["b"].cordee(*verb)
        assert refused.returncode in (2, 12)
        assert "admin" in refused.stderr
    refused = cluster.nodes["a"].cordee("remove", "nobody")
    assert (refused.returncode, "'nobody'" in refused.stderr) == (2, True)
    assert "cordee leave" in cluster.nodes["a"].cordee("remove", "a").stderr


@pytest.mark.parametrize("verb", ["nodes", "status", "invite", "drain"])
def test_without_an_agent_the_verbs_say_how_to_start_one(tmp_path: Path, verb: str) -> None:
    done = Node(tmp_path).cordee(verb)
    assert (done.returncode, done.stdout) == (13, "")
    assert "`cordee up`" in done.stderr


def test_a_code_with_a_slip_joins_nothing(tmp_path: Path) -> None:
    done = Node(tmp_path).cordee("join", "cordeeabcdef")
    assert (done.returncode, (tmp_path / "cluster").exists()) == (12, False)


@pytest.mark.slow
def test_a_drained_node_gives_its_stages_away(nodes: list[Node]) -> None:
    """What fits on no other node stays, and the verb says so."""
    before = hello(nodes[0])
    ids = [node.id for node in nodes]
    leaving = nodes[ids.index(stages(nodes[0])[1]["node"])]
    leaving.do("drain")
    assert leaving.id not in {stage["node"] for stage in stages(nodes[0])}
    assert hello(leaving) == before
    staying = nodes[ids.index(stages(nodes[0])[1]["node"])]
    stuck = staying.cordee("drain")
    assert stuck.returncode == 6
    assert "No other node can take layers" in stuck.stderr
    for node in (leaving, staying):
        node.do("drain", "--off")
    assert not any(node["draining"] for node in staying.told("nodes")["nodes"] if node["self"])


def test_a_restarted_node_is_the_same_node(cluster: Cluster) -> None:
    node, other = cluster.nodes["b"], cluster.nodes["a"]
    id_before = node.id
    assert node.down() == 0
    until(lambda: other.states()["b"] == "gone")
    node.up("--scouting", "lo", "--memory", MEMORY)  # its name and where it listens are remembered
    assert node.id == id_before
    until(lambda: other.states() == {"a": "alive", "b": "alive", "c": "alive"})
    assert len(other.told("nodes")["nodes"]) == 3


def test_an_agent_that_was_killed_makes_room_for_the_next(cluster: Cluster) -> None:
    node = cluster.nodes["b"]
    node.process.kill()
    node.process.wait()
    assert node.cordee("nodes").returncode == 13  # its socket is still there
    node.up("--scouting", "lo", "--memory", MEMORY)
    until(lambda: node.states() == {"a": "alive", "b": "alive", "c": "alive"})


def test_a_removed_node_hears_it_and_says_so(cluster: Cluster) -> None:
    node = cluster.nodes["b"]
    cluster.nodes["a"].do("remove", "b")
    assert node.process.wait(60) == 12
    assert "removed from the cluster for good" in node.said
    for other in ("a", "c"):
        until(lambda other=other: "b" not in cluster.nodes[other].states())
    again = node.cordee("up", "--port", 0)
    assert again.returncode == 12
    node.do("leave", "--yes")
    assert not (node.home / "cluster").exists()


@pytest.mark.long
def test_a_node_that_leaves_belongs_to_no_cluster(cluster: Cluster) -> None:
    node, stays = cluster.nodes["c"], cluster.nodes["a"]
    known = stays.home / "cluster" / "peers"
    node_id = node.id
    assert node_id in known.read_text()
    assert node.cordee("leave").returncode == 2  # it asks only on a terminal
    node.do("leave", "--yes")
    assert node.process.wait(60) == 0
    assert not (node.home / "cluster").exists()
    until(lambda: "c" not in stays.states())
    until(lambda: node_id not in known.read_text())
