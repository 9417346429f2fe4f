"""Four machines from nothing to streamed answers, by the verbs that people type; each step is timed."""

import pytest

from netcluster import Cluster


def test_four_machines_become_one_that_answers(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("", *(f"{seconds:6.2f} s  {step}" for step, seconds in cluster.steps), sep="\n")
    assert all(cluster.undisturbed.values())
    # The model is larger than any machine's memory: several took part.
    assert len(cluster.stages()) > 1
