"""A ternary checkpoint in a cluster: pulled, cut over two nodes, and answered by each as by one machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_files import vocabulary_size, write_checkpoint
from cluster_processes import Cluster, Node, until
from cordee.distribution.pull import pull
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.engine.vocabulary import Vocabulary
from cordee.models.store import Store
from ternary_models import FAMILIES, Weights

PROMPT, TOKENS = "Three climbers on one rope", 24
# Room for the cache of two or three of the four layers.
MEMORY = "250MB"
SERVED = ("--context", 512, "--sequences", 64)


def answer(path: Path) -> str:
    """What one stage in this process goes on with."""
    vocabulary = Vocabulary(path)
    tokens = vocabulary.tokenize(PROMPT, add_bos=True)
    stage = TernaryStage(path, StageConfig(context=512, sequences=1, batch_rows=64, threads=1))
    found = [int(stage.decode(batch_of_one(tokens)).argmax())]
    for position in range(len(tokens), len(tokens) + TOKENS - 1):
        found.append(int(stage.decode(batch_of_one(found[-1:], position)).argmax()))
    stage.close()
    assert len(set(found)) > TOKENS // 2
    return vocabulary.detokenize(found).decode(errors="replace")


def stages(node: Node) -> list[dict]:
    """The stages of the placement that serves the model; empty before it does."""
    placements = node.model("starter")["placements"]
    return next((each["stages"] for each in placements if each["state"] == "serving"), [])


@pytest.mark.slow
def test_a_ternary_checkpoint_is_served_by_two_nodes_as_by_one(tmp_path: Path) -> None:
    shape = {"rope": "neox", "kv_heads": 8, "head_dim": 64, "n_vocab": vocabulary_size()}
    weights = Weights(replace(FAMILIES["llama"], **shape), 3)
    path = pull(str(write_checkpoint(tmp_path / "hub", weights, "divided")), store=Store(tmp_path)).path
    cluster = Cluster(tmp_path, path, "--memory", MEMORY, "--scouting", "lo")
    try:
        nodes = [cluster.add(name) for name in "ab"]
        nodes[0].do("deploy", "starter", *SERVED)
        until(lambda: all(stages(node) for node in nodes))
        assert {stage["node"] for stage in stages(nodes[0])} == {node.id for node in nodes}
        for node in nodes:
            with node.client() as client:
                done = client.completions.create(
                    model="starter", prompt=PROMPT, max_tokens=TOKENS, temperature=0
                )
            assert done.choices[0].text == answer(path)
    finally:
        cluster.close()
