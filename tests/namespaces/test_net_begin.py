"""Four machines from nothing to streamed answers, by the verbs that people type; each step is timed."""

import pytest

from netcluster import Cluster, Node

# A check of an empty slice; this computer has far more memory than the host may use.
SPOT_CHECK = """
import os, pathlib, types
from cordee.agent.spot_checker import _require_memory
from cordee.errors import StageFailed
try:
    _require_memory(types.SimpleNamespace(slice=pathlib.Path(os.devnull)))
except StageFailed as error:
    print(error.message)
"""


def test_four_machines_become_one_that_answers(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("", *(f"{seconds:6.2f} s  {step}" for step, seconds in cluster.steps), sep="\n")
    assert all(cluster.undisturbed.values())
    # The model is larger than any machine's memory: several took part.
    assert len(cluster.stages()) > 1


def test_a_spot_check_does_not_take_memory_that_its_host_may_not_use(stranger: Node) -> None:
    """A system that bounds a program's memory ends it otherwise: the whole node, as it happened."""
    assert stranger.host.run("-c", SPOT_CHECK) == "there is no memory to spare for a spot check\n"
