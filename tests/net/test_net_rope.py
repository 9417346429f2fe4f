"""Four machines from nothing to a streamed answer, by the verbs that people type; each step is timed."""

import time

import pytest

from netlab import Lab
from netrope import STREAMS, Rope, Stream, finish, until


def test_four_machines_become_one_that_answers(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    rope = Rope(lab, 4)
    steps: list[tuple[str, float]] = []
    began = time.monotonic()

    def done(step: str) -> None:
        steps.append((step, time.monotonic() - began - sum(seconds for _, seconds in steps)))

    rope.found()
    done("first node: pull the model, up")
    for node in rope.nodes[1:]:
        rope.join(node)
        done(f"node {node.host.name}: invite, join, up")
    until(rope.nodes[-1].offers, "the last node has heard of the model")
    done("the last node knows the model")
    first = Stream(rope.nodes[-1], 0, tokens=1)
    first.start()
    finish(first)
    done("first token: slices travel, stages load")
    streams = rope.start(rope.nodes)
    for stream in streams:
        finish(stream)
    done(f"{STREAMS} answers through all nodes")
    with capsys.disabled():
        print("", *(f"{seconds:6.2f} s  {step}" for step, seconds in steps), sep="\n")
    # The model is larger than any machine's memory: several took part.
    assert len({node.id for node in rope.stages()}) > 1
