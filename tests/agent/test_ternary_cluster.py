"""Ternary models in a cluster: cut over nodes, and answered as by one machine, whoever falls."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_files import vocabulary_size, write_checkpoint
from cluster_processes import Cluster, Node, until
from cordee.convert.ternary_file import write
from cordee.distribution.pull import pull
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.engine.vocabulary import Vocabulary
from cordee.models.store import Store
from ternary_models import FAMILIES, Weights
from tiny import add_byte_tokenizer

PROMPT, TOKENS = "Three climbers on one rope", 24
MANY = 300  # enough that a node falls in the middle
# Room for the cache of two or three of the four layers.
MEMORY = "250MB"
SERVED = ("--context", 512, "--sequences", 64)


def answer(path: Path, count: int = TOKENS) -> str:
    """What one stage in this process goes on with."""
    vocabulary = Vocabulary(path)
    tokens = vocabulary.tokenize(PROMPT, add_bos=True)
    stage = TernaryStage(path, StageConfig(context=512, sequences=1, batch_rows=64, threads=1))
    found = [int(stage.decode(batch_of_one(tokens)).argmax())]
    for position in range(len(tokens), len(tokens) + count - 1):
        found.append(int(stage.decode(batch_of_one(found[-1:], position)).argmax()))
    stage.close()
    ends = (number for number, token in enumerate(found) if token in vocabulary.end_of_generation)
    found = found[: next(ends, count)]
    assert len(set(found)) > min(count // 2, 20)
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ("bonsai", "maple"))
def test_an_answer_goes_on_when_a_node_of_a_cut_model_is_killed(family: str, tmp_path: Path) -> None:
    """Groups of inputs that share a scale, and experts, which travel with their layers."""
    shape: dict[str, object] = {"heads": 8, "kv_heads": 8, "head_dim": 64}
    if family == "maple":
        shape["rope_dims"] = 32
    weights = Weights(replace(FAMILIES[family], **shape), 3)
    path = tmp_path / "model.gguf"
    write(path, weights.model, weights, describe=add_byte_tokenizer)
    expected = answer(path, MANY)
    cluster = Cluster(tmp_path, path, "--memory", MEMORY, "--scouting", "lo")
    try:
        nodes = [cluster.add(name) for name in "abc"]
        nodes[0].do("deploy", "starter", *SERVED)
        until(lambda: all(stages(node) for node in nodes))
        cut = stages(nodes[0])
        assert len({stage["node"] for stage in cut}) == len(cut) > 1
        victim = next(node for node in nodes[1:] if node.id in {stage["node"] for stage in cut})
        lost = victim.id
        with nodes[0].client() as client:
            asked = {"model": "starter", "prompt": PROMPT, "max_tokens": MANY, "temperature": 0}
            parts = []
            for part in client.completions.create(**asked, stream=True):
                parts.append(part.choices[0].text)
                if victim.process.poll() is None:
                    victim.process.kill()
                    victim.process.wait()
            assert "".join(parts) == expected
            until(lambda: lost not in {stage["node"] for stage in stages(nodes[0])} != set())
            assert client.completions.create(**asked).choices[0].text == expected
    finally:
        cluster.close()
