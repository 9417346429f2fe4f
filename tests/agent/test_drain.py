"""A node is drained while it answers: its streams go on elsewhere, and nothing of them is computed again."""

import threading
from pathlib import Path

import pytest

from cluster_processes import Cluster, Node, until

PROMPT = "Once upon a time, in a village below the mountains, there lived a guide who"
CONTEXT = 2048
TOKENS_AFTER = 20  # that are wanted from the node that took over


def host(node: Node) -> str:
    """The node that hosts the model now; empty before one does."""
    serving = (each for each in node.model("starter")["placements"] if each["state"] == "serving")
    return next((each["host"] for each in serving), "")


def drained(leaving: Node, staying: Node) -> list[str]:
    """The pieces of an answer, during which the node that gives it is drained."""
    verb = threading.Thread(target=leaving.do, args=("drain",))
    pieces: list[str] = []
    moved = 0
    with staying.client() as client:
        chunks = client.completions.create(
            model="starter", prompt=PROMPT, max_tokens=CONTEXT - 100, temperature=0, stream=True
        )
        for chunk in chunks:
            pieces += [choice.text for choice in chunk.choices]
            if len(pieces) == 4:
                verb.start()
            moved = moved or len(pieces) * (host(staying) == staying.id)
            if moved and len(pieces) >= moved + TOKENS_AFTER:
                break
        chunks.close()
    verb.join()
    assert moved, "the answer had ended before"
    return pieces


@pytest.mark.slow
def test_streams_of_a_drained_node_go_on_where_it_left_them(tmp_path: Path, starter_path: Path) -> None:
    cluster = Cluster(tmp_path, starter_path, "--scouting", "lo")
    try:
        nodes = [cluster.add(name) for name in "ab"]
        nodes[0].do("deploy", "starter", "--context", CONTEXT, "--sequences", 2)
        until(lambda: all(host(node) for node in nodes))
        leaving, staying = sorted(nodes, key=lambda node: node.id != host(node))
        pieces = drained(leaving, staying)
        until(lambda: staying.model("starter")["placements"][0]["inherited_tokens"] > len(PROMPT.split()))
        with staying.client() as client:
            undisturbed = client.completions.create(
                model="starter", prompt=PROMPT, max_tokens=len(pieces), temperature=0
            )
        assert undisturbed.choices[0].text == "".join(pieces)
    finally:
        cluster.close()
