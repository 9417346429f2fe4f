"""A stage that computes wrongly is named by those who saw it, with the evidence; honest ones are not."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.vocabulary import Vocabulary

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
LYING = (sys.executable, "-m", "lying_node")
PROMPT, TOKENS = "Three climbers on one rope", 40
THREE = "140MB"  # a third of the starter model with SMALL
SMALL = ("--context", 512, "--sequences", 2)


def lying(how: str) -> dict[str, object]:
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    return {"program": LYING, "environment": {"PYTHONPATH": path, "CORDEE_TEST_LIE": how}}


def right_answer(path: Path) -> str:
    vocabulary = Vocabulary(path)
    tokens = vocabulary.tokenize(PROMPT, add_bos=True)
    stage = LlamaStage(path, StageConfig(context=512, sequences=1))
    found = [int(stage.decode(batch_of_one(tokens)).argmax())]
    for position in range(len(tokens), len(tokens) + TOKENS - 1):
        found.append(int(stage.decode(batch_of_one(found[-1:], position)).argmax()))
    stage.close()
    text = vocabulary.detokenize(found).decode(errors="replace")
    vocabulary.close()
    return text


def answer(node: Node) -> str:
    with node.client() as client:
        done = client.completions.create(model="starter", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    return done.choices[0].text


def serving(node: Node) -> dict[str, object] | None:
    """The placement that serves the model, as `status --json` has it."""
    placements = node.model("starter").get("placements", [])
    return next((each for each in placements if each["state"] == "serving"), None)


def names(node: Node) -> list[str]:
    """Names of the nodes of the placement that serves, in the order of its stages."""
    placement = serving(node)
    return [] if placement is None else [stage["name"] for stage in placement["stages"]]


@pytest.fixture
def make(tmp_path: Path, starter_path: Path, request: pytest.FixtureRequest) -> Cluster:
    def made(memory: str, *options: str) -> Cluster:
        cluster = Cluster(tmp_path, starter_path, "--memory", memory, "--scouting", "lo", *options)
        request.addfinalizer(cluster.close)
        return cluster

    return made


@pytest.mark.slow
def test_a_stage_that_computes_wrongly_is_named_and_left_out(make, starter_path: Path) -> None:
    cluster = make(MEMORY)
    a = cluster.add("a")
    b = cluster.add("b", **lying("computes"))
    a.do("deploy", "starter", *SERVED)
    until(lambda: sorted(names(a)) == ["a", "b"])
    assert answer(a) != right_answer(starter_path)  # nobody could have seen that
    evidence = (
        r"does without .*: layers .* of starter on b: .*(differ|cannot follow).*, computed again by a",
        r"does without .*: b says that a computes wrongly: .* (rows|tokens) agree, computed again by a here",
    )
    until(lambda: re.search("|".join(evidence), a.said))
    c = cluster.add("c")
    for honest in (a, c):
        assert not re.search(r"does without [ac] for now", honest.said)

    def is_without_it() -> bool:
        answer(a)  # where b works with c now, c finds it, too
        return sorted(names(a)) == ["a", "c"]

    until(is_without_it)
    assert answer(a) == answer(c) == right_answer(starter_path)
    assert b.runs


def with_a_liar(cluster: Cluster, how: str, index: int) -> tuple[list[Node], str]:
    """Three nodes that serve the starter model, in the order of their stages, and the name of the liar, who
    has the stage of that index."""
    for name in "abc":
        cluster.add(name)
    cluster.nodes["a"].do("deploy", "starter", *SMALL)
    until(lambda: len(names(cluster.nodes["a"])) == 3)
    found = names(cluster.nodes["a"])
    liar = cluster.nodes[found[index]]
    liar.down()
    changed = lying(how)
    liar.program, liar.environment = changed["program"], changed["environment"]
    liar.up("--name", found[index], "--memory", THREE, "--scouting", "lo")
    return [cluster.nodes[name] for name in found], found[index]


@pytest.mark.long
def test_a_worker_that_hides_what_it_sends_is_known_to_its_neighbour(make) -> None:
    (before, _, after), name = with_a_liar(make(THREE), "sends", 1)

    def is_known() -> bool:
        answer(before)
        return f": {name} says that it sent other rows than came from it" in after.said

    until(is_known)
    assert "does without" not in before.said


@pytest.mark.slow
def test_a_checker_that_accuses_an_honest_stage_is_left_out_itself(make) -> None:
    (host, accused, _), name = with_a_liar(make(THREE, "--spot-check", "1"), "accuses", 2)
    wanted = re.compile(rf"does without {name} for now: {name} says that \w computes wrongly: .* here")

    def is_found() -> bool:
        answer(host)
        time.sleep(2)  # in which nothing takes the place of its rows
        return wanted.search(host.said) is not None

    until(is_found)
    for node in (host, accused):
        assert set(re.findall(r"does without (\w) for now", node.said)) <= {name}


@pytest.mark.long
def test_a_stage_that_never_shows_what_it_computed_is_left_out(make) -> None:
    (host, *_), name = with_a_liar(make(THREE, "--spot-check", "1"), "hides", 1)

    def is_found() -> bool:
        answer(host)
        time.sleep(5)  # in which nothing takes the place of its rows
        return f"does without {name} for now: its stage does not show what it computed" in host.said

    until(is_found)


@pytest.mark.long
def test_honest_stages_are_checked_and_nobody_is_left_out(make) -> None:
    cluster = make(MEMORY)
    nodes = [cluster.add(name, "--spot-check", "1") for name in "ab"]
    nodes[0].do("deploy", "starter", *SERVED)
    until(lambda: len(names(nodes[0])) == 2)

    def is_checked() -> bool:
        answer(nodes[0])
        return serving(nodes[0])["spot_checks"] >= 2

    until(is_checked)
    for node in nodes:
        assert "does without" not in node.said
