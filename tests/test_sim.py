"""Whole clusters under faults, from seeds; and bugs planted to show that the simulator finds them."""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sim.__main__ import attempt
from sim.mutations import MUTATIONS, STALL_MUTATIONS, found
from sim.run import Broken, play

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 500
# Those that take more seeds than others to be found.
RARE = (
    "serving before the links are made",
    "a node plans before it has listened",
    "heartbeats sent earlier are old for ever",
    "any gain is worth a move",
    "a prefix is copied from a slot that another stream got",
)
# And those that a change does not wait for.
SLOW = (
    "revoked nodes are allowed",
    "times from the future are believed",
    "memory is given out twice",
    "a wiring left is entered again",
    "the last deployment to arrive wins",
    "draining nodes keep their stages",
)


def test_clusters_come_to_rest_and_streams_are_whole_whatever_happens() -> None:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outcomes = list(pool.map(attempt, range(SEEDS), chunksize=50))
    broken = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not broken, "\n".join(broken[:3])
    streams = sum((outcome.streams for outcome in outcomes), start=type(outcomes[0].streams)())
    assert streams["stop"] > SEEDS and streams["length"] > SEEDS


def test_a_seed_is_a_run() -> None:
    assert play(7) == play(7)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.long if name in RARE else pytest.mark.slow if name in SLOW else ()
        )
        for name in MUTATIONS | STALL_MUTATIONS
    ],
)
def test_planted_bugs_are_found(name: str) -> None:
    assert found(name) is not None


def test_a_failure_names_its_seed_and_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.run.BOUND_LEASES", -1)
    with pytest.raises(Broken) as failure:
        play(11)
    text = str(failure.value).splitlines()
    assert text[0].startswith("seed 11: ")
    assert all(any(line.startswith(f"  {node}: ") for line in text) for node in ("n0", "n1"))


def test_the_command_plays_one_seed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sim", "--seed", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1 of 1 seeds hold")
