"""A worker process alone: it follows its control link, refuses rows of other wirings, and ends with it."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.engine.stage import StageConfig
from cordee.generation.request import SamplingParams
from cordee.worker import frames
from cordee.worker.compute import as_batch
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import (
    Broken,
    Join,
    Loaded,
    LoadFailed,
    LoadStage,
    Opening,
    Rows,
    Run,
    Tokens,
    Wire,
    Wired,
    WireFailed,
)
from cordee.worker.worker import PEERS_MAX
from lone_worker import Lone
from streams import SECONDS, tiny_model

CONFIG = StageConfig(context=128, sequences=2, threads=1)
GREEDY = SamplingParams(temperature=0.0)
segments = st.lists(
    st.builds(Run, st.integers(0, 9), st.integers(0, 999), st.integers(1, 5), st.booleans()),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny")).stored.path


@pytest.fixture
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lone]:
    with contextlib.closing(Lone(tmp_path_factory.mktemp("w"))) as worker:
        yield worker


def prompt(wiring: str, batch: int) -> tuple[Rows, bytes]:
    """Ten tokens from the start of sequence 0, the next of which is to be sampled."""
    tokens = np.arange(3, 13, dtype=np.int32)
    opens = {0: Opening(GREEDY, tokens.tolist(), [])}
    return Rows(wiring, batch, (Run(0, 0, 10, True),), opens), tokens.tobytes()


def answered(upstream: socket.socket, downstream: socket.socket, wiring: str, batch: int) -> int:
    """The token that follows `prompt`."""
    frames.send(upstream, *prompt(wiring, batch))
    message, _ = frames.receive(downstream)
    assert isinstance(message, Tokens)
    assert (message.wiring, message.batch) == (wiring, batch)
    return message.choices[0].token


def test_it_loads_answers_and_can_be_wired_again(lone: Lone, model_path: Path) -> None:
    loaded = lone.command(LoadStage(str(model_path), CONFIG, True))
    assert isinstance(loaded, Loaded)
    assert loaded.description.layers == 6
    links = lone.wire("one")
    token = answered(*links, "one", 1)
    assert answered(*links, "one", 2) == token
    again = lone.wire("two")
    with pytest.raises(LinkClosed):
        frames.receive(links[1])  # links of the old wiring are closed
    assert answered(*again, "two", 3) == token


def test_what_cannot_be_loaded_or_reached_is_reported(lone: Lone, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    failed = lone.command(LoadStage(str(tmp_path / "text.gguf"), CONFIG, True))
    assert isinstance(failed, LoadFailed)
    assert failed.error == "BadModelFile"
    lone.command(LoadStage(str(model_path), CONFIG, True))
    unreachable = lone.command(Wire("one", str(tmp_path / "nobody")))
    assert isinstance(unreachable, WireFailed)
    assert unreachable.wiring == "one"
    assert answered(*lone.wire("two"), "two", 1) > 0


def test_rows_of_another_wiring_are_refused(lone: Lone, model_path: Path) -> None:
    lone.command(LoadStage(str(model_path), CONFIG, True))
    upstream, downstream = lone.wire("mine")
    stranger = lone.connect()
    frames.send(stranger, Join("other"))
    frames.send(stranger, *prompt("other", 7))
    assert answered(upstream, downstream, "mine", 8) > 0  # and nothing of 7 before it
    frames.send(upstream, *prompt("other", 9))
    with pytest.raises(LinkClosed):
        frames.receive(upstream)
    assert frames.receive(lone.control)[0] == Broken("mine")
    assert answered(*lone.wire("next"), "next", 10) > 0


@pytest.mark.parametrize("side", [0, 1], ids=["upstream", "downstream"])
def test_a_link_that_ends_is_reported_to_the_parent(lone: Lone, model_path: Path, side: int) -> None:
    lone.command(LoadStage(str(model_path), CONFIG, True))
    links = lone.wire("mine")
    assert answered(*links, "mine", 1) > 0
    links[side].close()
    assert frames.receive(lone.control)[0] == Broken("mine")
    assert answered(*lone.wire("next"), "next", 2) > 0


def test_strangers_and_garbage_do_not_stop_it(lone: Lone, model_path: Path) -> None:
    lone.command(LoadStage(str(model_path), CONFIG, True))
    upstream, downstream = lone.wire("p")
    chance = random.Random(1)
    token = answered(upstream, downstream, "p", 1)
    silent: list[socket.socket] = []
    for batch in range(2, 30):
        silent.append(lone.connect())
        noisy = lone.connect()
        with contextlib.suppress(OSError):
            noisy.sendall(chance.randbytes(chance.randrange(1, 200)))
        noisy.close()
        assert answered(upstream, downstream, "p", batch) == token
    assert len(silent) > PEERS_MAX
    for peer in silent:
        peer.close()


def test_a_stage_that_joins_before_the_wire_message_is_not_lost(lone: Lone, model_path: Path) -> None:
    lone.command(LoadStage(str(model_path), CONFIG, True))
    early = lone.connect()
    frames.send(early, Join("soon"))
    frames.send(early, *prompt("soon", 1))
    assert lone.command(Wire("soon", str(lone.tokens))) == Wired("soon")
    downstream = lone.accepted(1)
    assert frames.receive(downstream)[0] == Join("soon")
    message, _ = frames.receive(downstream)
    assert isinstance(message, Tokens)
    assert message.batch == 1


def test_rows_that_make_no_sense_end_the_process(tmp_path: Path, model_path: Path) -> None:
    worker = Lone(tmp_path)
    worker.command(LoadStage(str(model_path), CONFIG, True))
    upstream, _ = worker.wire("p")
    rows, payload = prompt("p", 1)
    frames.send(upstream, rows, payload[:-4])
    assert worker.process.wait(SECONDS) == 1
    assert worker.control.recv(1) == b""  # so its parent notices


@given(segments)
def test_the_rows_of_a_batch_are_those_of_its_runs(runs: list[Run]) -> None:
    total = sum(run.rows for run in runs)
    batch = as_batch(Rows("p", 1, tuple(runs), {}), memoryview(os.urandom(4 * total)))
    rows = [(run, index) for run in runs for index in range(run.rows)]
    assert batch.positions.tolist() == [run.first_position + index for run, index in rows]
    assert batch.sequences.tolist() == [run.sequence for run, _ in rows]
    assert batch.outputs.tolist() == [run.output and index == run.rows - 1 for run, index in rows]
    assert batch.positions.dtype == batch.sequences.dtype == np.int32
