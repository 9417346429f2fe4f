"""Four machines from nothing to streamed answers, by the verbs that people type; each step is timed."""

import pytest

from netrope import Rope


def test_four_machines_become_one_that_answers(rope: Rope, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("", *(f"{seconds:6.2f} s  {step}" for step, seconds in rope.steps), sep="\n")
    assert all(rope.undisturbed.values())
    # The model is larger than any machine's memory: several took part.
    assert len(rope.stages()) > 1
