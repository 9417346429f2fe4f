"""Workers of the next placement, cut at other layers, take sequences over: real processes."""

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cordee.cluster.facts import KvSource
from cordee.engine.stage import StageConfig
from cordee.generation.request import SamplingParams
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.net.identity import Identity
from cordee.worker import frames, kv_transfer
from cordee.worker.kv_transfer import KvSources
from cordee.worker.messages import (
    AdmitReaders,
    Broken,
    HeldSequence,
    Join,
    KvAnswer,
    KvQuery,
    KvReaders,
    Loaded,
    LoadStage,
    Message,
    Opening,
    ReaderJoin,
    Rows,
    Run,
    Tokens,
    Wire,
    Wired,
)
from lone_worker import Lone
from members import founder, newcomer
from streams import SECONDS
from tiny import make_tiny

CONFIG = StageConfig(context=128, sequences=2, threads=1)
PROMPT = list(range(5, 45))
OLD, NEW = [0, 4, 9], [0, 2, 7, 9]


class Stages:
    """The workers of a placement, fed by the test."""

    def __init__(self, model: Path, bounds: list[int], member: Identity, folder: Path) -> None:
        self.node = member.node
        self.bounds, self.ranges = bounds, list(itertools.pairwise(bounds))
        self.workers: list[Lone] = []
        self.endpoints: list[str] = []
        header = read_header(model)
        for first, last in self.ranges:
            home = folder / f"{first}-{last}"
            home.mkdir(parents=True)
            worker = Lone(home)
            self.workers.append(worker)
            loaded = worker.command(
                LoadStage(
                    path=str(cut(header, first, last, home / "slice.gguf").path),
                    config=CONFIG,
                    is_last=last == bounds[-1],
                    embedding=str(model) if first == 0 else None,
                    identity=str(member.folder),
                    listen="127.0.0.1",
                )
            )
            assert isinstance(loaded, Loaded), loaded
            self.endpoints.append(loaded.endpoint)

    def wire(
        self, wiring: str, before: "Stages | None" = None, name: str = "old", *, admit: bool = False
    ) -> None:
        """Wire them, last first; with the sources that their layers have in the wiring `name` before.

        `admit`: those before are told that this node's workers may read.
        """
        self.wiring = wiring
        if before is not None and admit:
            for worker in before.workers:
                frames.send(worker.control, AdmitReaders(name, (self.node,)))
        for index in reversed(range(len(self.workers))):
            last = index + 1 == len(self.workers)
            target = self.workers[index].tokens if last else self.workers[index + 1].inbox
            sources = () if before is None else before.sources(name, *self.ranges[index])
            first = str(self.workers[0].inbox) if last else None
            wire = Wire(wiring, str(target), first, sources=sources)
            if last:
                frames.send(self.workers[index].control, wire)
                self.down = self.workers[index].accepted(1)
                assert frames.receive(self.down)[0] == Join(wiring)
                assert reported(self.workers[index]) == Wired(wiring)
            else:
                assert self.workers[index].command(wire) == Wired(wiring)
        self.up = self.workers[0].connect()
        frames.send(self.up, Join(wiring))

    def sources(self, name: str, first: int, last: int) -> tuple[KvSource, ...]:
        """Where these layers are."""
        return tuple(
            KvSource(endpoint, name, max(first, low) - low, min(last, high) - low, self.node)
            for endpoint, (low, high) in zip(self.endpoints, self.ranges, strict=True)
            if max(first, low) < min(last, high)
        )

    def run(self, batch: int, tokens: list[int], first: int, *, inherit: bool = False, log: int = 0) -> int:
        """Compute tokens of sequence 1 from position `first` on; gives the next token. The last `log` of them
        are of the answer."""
        opening = Opening(SamplingParams(temperature=0), PROMPT, tokens[len(tokens) - log :])
        runs = (Run(1, first, len(tokens), True, 7, inherit),)
        payload = np.array(tokens, np.int32).tobytes()
        frames.send(self.up, Rows(self.wiring, batch, runs, {1: opening}), payload)
        message = self.result()
        assert isinstance(message, Tokens), message
        return message.choices[1].token

    def result(self) -> Message:
        """The next message of the last stage."""
        return frames.receive(self.down)[0]

    def query(self) -> dict[int, HeldSequence]:
        """What all stages could take over."""
        frames.send(self.up, KvQuery(self.wiring))
        message = self.result()
        assert isinstance(message, KvAnswer), message
        return message.held

    def close(self) -> None:
        """End them all."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.close()


def reported(worker: Lone) -> Message:
    """The next message of a worker to its parent."""
    return frames.receive(worker.control)[0]


@pytest.fixture(params=["llama", "gpt-oss"])
def stages(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Stages, Stages]]:
    """A placement that has computed a prompt and four tokens of its answer, and its successor."""
    model = make_tiny(request.param, tmp_path / "whole.gguf", layers=9)
    member = founder(tmp_path / "node")
    made = [Stages(model, bounds, member, tmp_path / name) for bounds, name in ((OLD, "old"), (NEW, "new"))]
    made[0].wire("old")
    yield made[0], made[1]
    for each in made:
        each.close()


def answer(stages: Stages, count: int) -> list[int]:
    """The first tokens of the answer to PROMPT."""
    found = [stages.run(1, PROMPT, 0)]
    while len(found) < count:
        found.append(stages.run(1 + len(found), found[-1:], len(PROMPT) + len(found) - 1, log=1))
    return found


def test_a_sequence_goes_on_in_the_next_placement(stages: tuple[Stages, Stages]) -> None:
    old, new = stages
    undisturbed = answer(old, 8)
    assert answer(old, 4) == undisturbed[:4]
    new.wire("new", old, admit=True)
    kv_readers = [reported(old.workers[0]) for _ in range(2)] + [reported(old.workers[1]) for _ in range(2)]
    assert kv_readers == [KvReaders(1), KvReaders(2), KvReaders(1), KvReaders(2)]
    assert old.run(5, undisturbed[3:4], 43, log=1) == undisturbed[4]  # it still serves, and computes one more
    held = new.query()
    assert {reported(worker) for worker in old.workers} == {Broken("old")}
    assert held[1].tokens == PROMPT + undisturbed[:4]
    # The last token was computed but has not arrived: what is taken over may end anywhere.
    assert new.run(1, undisturbed[2:4], 42, inherit=True, log=2) == undisturbed[4]
    for index in range(4, 7):
        assert new.run(index, undisturbed[index : index + 1], 40 + index, log=1) == undisturbed[index + 1]


def test_a_worker_whose_source_is_gone_reports_it_and_computes_again(stages: tuple[Stages, Stages]) -> None:
    old, new = stages
    undisturbed = answer(old, 3)
    new.wire("new", old, admit=True)
    assert 1 in new.query()
    old.workers[0].process.send_signal(signal.SIGKILL)
    old.workers[0].process.wait()
    runs = (Run(1, 40, 1, True, 7, True),)
    frames.send(new.up, Rows("new", 1, runs, {}), np.array(undisturbed[:1], np.int32).tobytes())
    assert reported(new.workers[0]) == Broken("new")
    assert [reported(worker) for worker in new.workers[1:]] == [Broken("new")] * 2
    new.down.close()
    new.wire("newer")
    assert new.query() == {}
    assert new.run(1, PROMPT, 0) == undisturbed[0]


def test_nothing_is_taken_over_from_another_wiring(stages: tuple[Stages, Stages]) -> None:
    old, new = stages
    undisturbed = answer(old, 2)
    new.wire("new", old, name="another")
    assert new.query() == {}
    assert old.run(3, undisturbed[1:], 41, log=1) >= 0, "nothing made it leave its wiring"


def test_strangers_at_a_worker_get_no_sequence(stages: tuple[Stages, Stages]) -> None:
    old, _ = stages
    undisturbed = answer(old, 2)
    frames.send(old.workers[0].control, AdmitReaders("old", ("",)))  # this machine, by a Unix socket
    for first, second in (
        (ReaderJoin("another"), KvQuery("another")),
        (KvQuery("old"), KvQuery("old")),
        (ReaderJoin("old"), Join("old")),
    ):
        stranger = old.workers[0].connect()
        for message in (first, second):
            try:
                frames.send(stranger, message)
            except frames.LinkClosed:
                break
        with pytest.raises(frames.LinkClosed):
            while True:
                assert frames.receive(stranger)[0] == ReaderJoin("old")
        stranger.close()
    assert old.run(9, undisturbed[:1], 40, log=1) == undisturbed[1], "nothing made it leave its wiring"


def test_another_member_than_those_of_the_next_placement_gets_no_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfer, "ANSWER_SECONDS", 1.0)
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path))  # which the members change
    model = make_tiny("llama", tmp_path / "whole.gguf", layers=9)
    member = founder(tmp_path / "node")
    spy, late = newcomer(tmp_path / "spy", member), newcomer(tmp_path / "late", member)
    stages = Stages(model, OLD, member, tmp_path / "old")
    try:
        stages.wire("old")
        answer(stages, 2)
        sources = stages.sources("old", 0, 9)
        assert KvSources.of(spy.folder, sources) is None
        for worker in stages.workers:
            frames.send(worker.control, AdmitReaders("old", (late.node,)))
        assert KvSources.of(spy.folder, sources) is None
        opened = KvSources.of(late.folder, sources)
        assert opened is not None
        assert opened.held()[1].length == len(PROMPT) + 1
        opened.close()
    finally:
        stages.close()


def test_a_reader_may_come_before_it_is_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path))
    model = make_tiny("llama", tmp_path / "whole.gguf", layers=9)
    member = founder(tmp_path / "node")
    reader = newcomer(tmp_path / "reader", member)
    stages = Stages(model, [0, 9], member, tmp_path / "old")
    try:
        stages.wire("old")
        (worker,) = stages.workers
        found: list[KvSources | None] = []
        waiting = threading.Thread(
            target=lambda: found.append(KvSources.of(reader.folder, stages.sources("old", 0, 9)))
        )
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        frames.send(worker.control, AdmitReaders("old", (reader.node,)))
        waiting.join(SECONDS)
        assert found[0] is not None
        found[0].close()
    finally:
        stages.close()
