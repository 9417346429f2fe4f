"""The stages of a node, with worker processes that follow a script: what the reconciler is told of them."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import scripted_worker
from cordee.cluster.facts import Placement, StagePlace
from cordee.cluster.goals import StageGoal, StageSpec, spec_of
from cordee.cluster.reconcile import WireAction
from cordee.engine.stage import StageConfig
from cordee.errors import CordeeError
from cordee.worker import process
from cordee.worker.stages import Files, Stages

PLACEMENT = Placement("digest", 64, 1, (StagePlace("a", "CPU", 0, 1),))
PATIENCE_SECONDS = 30.0


class Owner:
    """What a node's agent is to its stages."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.lines: list[str] = []

    async def prepare(self, spec: StageSpec) -> Files:
        return Files(StageConfig(), "llama", Path("none"), None, is_last=True, ends=(), name="tiny")

    def changed(self) -> None:
        self.news.set()

    def failed(self, spec: StageSpec, error: CordeeError) -> None:
        pytest.fail(error.message)

    def report(self, line: str) -> None:
        self.lines.append(line)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for news after which it holds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                self.news.clear()
                await self.news.wait()


Script = Callable[[Owner, Stages, str], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], None]:
    """Plays a script with a stage that has loaded; it gets the owner, the stages and the worker's id."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(Path(scripted_worker.__file__))))

    async def run(script: Script) -> None:
        owner = Owner()
        stages = await Stages.open(owner)
        try:
            stages.start(spec_of(PLACEMENT, 0))
            await owner.until(lambda: any(each.state == "loaded" for each in stages.workers.values()))
            (name,) = stages.workers
            await script(owner, stages, name)
        finally:
            await stages.close()

    return lambda script: asyncio.run(run(script))


def wire(stages: Stages, name: str, wiring: str) -> None:
    stages.wire(WireAction(name, StageGoal(PLACEMENT, 0, wiring, "nowhere")))


def test_a_worker_is_wired_and_its_cache_remembers_it(play: Callable[[Script], None]) -> None:
    async def script(owner: Owner, stages: Stages, name: str) -> None:
        wire(stages, name, "one")
        await owner.until(lambda: stages.workers[name].wiring == "one")
        stages.rename(name)
        ((renamed, worker),) = stages.workers.items()
        assert renamed != name
        assert (worker.state, worker.wirings) == ("loaded", frozenset())

    play(script)


def test_a_link_that_breaks_before_its_wiring_is_noted_leaves_the_worker_unwired(
    play: Callable[[Script], None],
) -> None:
    """Both messages come in one read: that it is broken is handled first, that it is wired must not win."""

    async def script(owner: Owner, stages: Stages, name: str) -> None:
        wire(stages, name, scripted_worker.BREAKING)
        await owner.until(lambda: scripted_worker.BREAKING in stages.workers[name].wirings)
        await asyncio.sleep(0.1)  # for the task that waits for `Wired` to end
        assert (stages.workers[name].state, stages.workers[name].wiring) == ("loaded", "")
        wire(stages, name, "next")
        await owner.until(lambda: stages.workers[name].wiring == "next")
        assert stages.workers[name].wirings == {scripted_worker.BREAKING, "next"}

    play(script)


def test_a_worker_that_is_stopped_while_it_is_wired_anew_is_killed(play: Callable[[Script], None]) -> None:
    async def script(owner: Owner, stages: Stages, name: str) -> None:
        wire(stages, name, "one")
        await owner.until(lambda: stages.workers[name].wiring == "one")
        pid = stages.pids[name]
        os.kill(pid, signal.SIGSTOP)
        wire(stages, name, "two")
        await owner.until(lambda: name not in stages.workers)
        assert [line for line in owner.lines if f"process {pid} hangs" in line], owner.lines

    play(script)
