"""Planning in a process of its own: the same answers, and every way in which it may fail has a reason."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import cluster_processes
from cluster_processes import Cluster, until
from clusters import ME
from cordee.agent import planning
from cordee.agent.history import History
from cordee.agent.planning import PlanningProcess
from cordee.agent.status import ClusterStatus
from cordee.cluster import later_planner
from cordee.cluster.choose import Unanswered, Unfound
from cordee.cluster.controller import Controller, Running
from cordee.cluster.facts import Facts, Gauges, Placement
from cordee.cluster.planner import Planner
from cordee.cluster.questions import PlanAnswer
from plans import device, machine, made_shape

DEMAND = (4096, 2)
ANSWER_SECONDS = 120.0


@pytest.fixture(autouse=True)
def nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is open, however small."""
    monkeypatch.setattr(later_planner, "AT_ONCE_STEPS", 0)


def in_a_loop(story: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    @functools.wraps(story)
    def run(*args: object, **given: object) -> None:
        asyncio.run(story(*args, **given))

    return run


def machines(count: int) -> list[Facts]:
    return [machine(f"n{i}", device(9 + i / 10, 100 + 10 * i)) for i in range(count)]


class Looking:
    """An agent that does nothing but plan one model."""

    def __init__(self, layers: int = 12, count: int = 3) -> None:
        self.shape, self.nodes = made_shape(layers), machines(count)
        self.answers: asyncio.Queue[None] = asyncio.Queue()
        self.process = PlanningProcess(lambda: self.answers.put_nowait(None))

    def look(self) -> Placement | None:
        try:
            return self.process.planner.plan(self.shape, *DEMAND, self.nodes)
        finally:
            self.process.pursue()

    async def answer(self) -> Placement | None:
        """What is planned once an answer came."""
        with suppress(Unanswered):
            return self.look()
        async with asyncio.timeout(ANSWER_SECONDS):
            await self.answers.get()
        return self.look()


@asynccontextmanager
async def looking(layers: int = 12, count: int = 3) -> AsyncGenerator[Looking]:
    one = Looking(layers, count)
    watching = asyncio.create_task(one.process.watch())
    try:
        yield one
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def children() -> list[int]:
    """Processes that plan; tests of other files have children of other kinds."""
    found: list[int] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("planning_child" in word for word in child.cmdline()):
                found.append(child.pid)
    return found


@in_a_loop
async def test_the_process_answers_as_this_one_would_and_the_loop_goes_on_meanwhile():
    async with looking(80, 16) as one:
        turns: list[int] = []
        turning = asyncio.create_task(turn_always(turns))
        found = await one.answer()
        turning.cancel()
        assert found == Planner().plan(one.shape, *DEMAND, one.nodes)
        assert len(turns) > 20  # planned on the loop itself, it would be one or two
        one.shape = made_shape(20)  # the next question goes to the same process
        (child,) = children()
        assert await one.answer() == Planner().plan(one.shape, *DEMAND, one.nodes)
        assert children() == [child]
    assert child not in children()


async def turn_always(turns: list[int]) -> None:
    while True:
        await asyncio.sleep(0.001)
        turns.append(len(turns))


@in_a_loop
async def test_it_ends_when_there_is_nothing_to_plan(monkeypatch):
    monkeypatch.setattr(planning, "LINGER_SECONDS", 0.05)
    async with looking() as one:
        before = children()
        assert await one.answer()
        async with asyncio.timeout(ANSWER_SECONDS):
            while children() != before:
                one.process.pursue()
                await asyncio.sleep(0.01)


@in_a_loop
async def test_what_is_asked_as_the_process_ends_is_answered_by_another():
    async with looking() as one:
        assert await one.answer()
        time.sleep(1.1 * planning.LINGER_SECONDS)  # the loop stands still: both come at once
        one.shape = made_shape(11)
        assert await one.answer()


@in_a_loop
async def test_what_takes_too_long_is_set_aside_and_planned_again_later(monkeypatch, caplog):
    monkeypatch.setattr(planning, "PLANNING_SECONDS", 0.0)
    monkeypatch.setattr(planning, "RETRY_SECONDS", 0.2)
    async with looking() as one:
        with pytest.raises(Unfound, match="planning it takes longer than 0 s here"):
            await one.answer()
        assert "a model with 12 layers is not planned" in caplog.text
        monkeypatch.setattr(planning, "PLANNING_SECONDS", ANSWER_SECONDS)
        await planned_again(one)


async def planned_again(one: Looking) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            with suppress(Unanswered, Unfound):
                assert one.look() == Planner().plan(one.shape, *DEMAND, one.nodes)
                return
            await asyncio.sleep(0.02)


@pytest.mark.slow
@in_a_loop
async def test_a_process_that_is_killed_is_a_reason_and_another_answers(monkeypatch):
    monkeypatch.setattr(planning, "RETRY_SECONDS", 0.2)
    async with looking(126, 40) as one:  # it takes a while
        before = children()
        with pytest.raises(Unanswered):
            one.look()
        async with asyncio.timeout(ANSWER_SECONDS):
            while children() == before:
                await asyncio.sleep(0.001)
            (child,) = set(children()) - set(before)
            os.kill(child, signal.SIGKILL)
            await one.answers.get()
        with pytest.raises(Unfound, match=r"the process that plans it ended \(status -9\)"):
            one.look()
        await planned_again(one)


@in_a_loop
async def test_no_process_to_start_is_a_reason(monkeypatch):
    monkeypatch.setattr(planning.children, "command", lambda *_: ["/no/such/python"])
    async with looking() as one:
        with pytest.raises(Unfound, match="no process to plan it could be started"):
            await one.answer()


def listened(controller: Controller, facts: Facts) -> None:
    """Have a controller step until it has listened for long enough to plan."""
    now = time.monotonic()
    for passed in range(-5, 1):
        controller.step(facts, Running({}, {}, {}), now + passed, 1e9 + passed)


def models_of(controller: Controller, process: PlanningProcess) -> dict[str, dict[str, Any]]:
    """What `cordee status --json` says of each model."""
    agent = SimpleNamespace(
        controller=controller,
        node=controller.me,
        gauges=Gauges(),
        identity=SimpleNamespace(cluster="c"),
        history=History(),
        planning=process,
        offers=dict,
    )
    status = asyncio.run(ClusterStatus(agent).status())
    return {model["name"]: model for model in status["models"]}


def test_status_names_what_is_being_planned_and_what_was_given_up(monkeypatch):
    monkeypatch.setattr("cordee.agent.status.warnings", lambda *_: [])
    process = PlanningProcess(lambda: None)
    controller = Controller("ada", "s", process.planner, ME)
    for name in ("first", "second"):
        controller.deploy(name, made_shape(5, digest=name), *DEMAND, time.monotonic() - 9)
    listened(controller, machine("ada", device(9, 100)))
    models = models_of(controller, process)
    assert models["first"]["why"] == "It is being planned, which takes a moment in a large cluster."
    assert (models["first"]["state"], models["first"]["placements"]) == ("unplaced", [])

    process.planner.tell(process.planner.due(), PlanAnswer(unfound="it takes longer than 30 s here"))
    controller.rethink()
    listened(controller, machine("ada", device(9, 100)))
    models = models_of(controller, process)
    assert models["first"]["why"] == "It is set aside: it takes longer than 30 s here."
    assert models["second"]["why"] == "It is being planned, which takes a moment in a large cluster."

    process.planner.tell(process.planner.due(), PlanAnswer(fault="ZeroDivisionError: by zero"))
    controller.rethink()
    listened(controller, machine("ada", device(9, 100)))
    why = models_of(controller, process)["second"]["why"]
    assert why.startswith("Planning it failed (ZeroDivisionError: by zero), so it was set aside")


def test_an_agent_serves_what_was_planned_in_its_process(tmp_path, starter_path, monkeypatch):
    program = Path(cluster_processes.__file__).with_name("patient_cordee.py")
    monkeypatch.setattr(cluster_processes, "PROGRAM", (sys.executable, str(program)))
    cluster = Cluster(tmp_path, starter_path, "--scouting", "lo")
    try:
        node = cluster.add("a")
        node.do("deploy", "starter", "--context", 512)
        until(lambda: node.model("starter")["state"] == "serving")
    finally:
        cluster.close()
