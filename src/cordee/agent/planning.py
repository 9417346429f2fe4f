"""What takes long to plan is planned by a process of its own: the agent's loop, and its tokens, go on.

The planner (cluster/later_planner.py) answers at once what takes a few milliseconds; in a cluster of a few
machines that is everything, and no process is started. For what is left there is one, for as long as anything
is open. A search takes a bounded number of steps; that it takes longer than PLANNING_SECONDS nevertheless, or
that its process ends, is the answer then: the model is set aside with that reason, and planned again later.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

import msgspec

from cordee import children
from cordee.agent.planning_child import LENGTH_BYTES, framed
from cordee.cluster.later_planner import LaterPlanner
from cordee.cluster.questions import Asked, PlanAnswer
from cordee.system import processes

# A search takes a second of a desktop's core; more than this not even an old machine that is busy needs.
PLANNING_SECONDS = 30.0
RETRY_SECONDS = 60.0  # until what could not be answered is tried again: the machine may be less busy
LINGER_SECONDS = 2.0  # an answer mostly raises the next question
ENDED_SECONDS = 1.0  # for a process whose links closed to end

log = logging.getLogger(__name__)


class PlanningProcess:
    """See the module's docstring. All methods on one event loop; `answered` is called for each answer."""

    def __init__(self, answered: Callable[[], None]) -> None:
        self.planner = LaterPlanner()
        self._answered = answered
        self._pursued = asyncio.Event()

    def pursue(self) -> None:
        """Everything was looked at: go on with what is open now."""
        self.planner.settle()
        self._pursued.set()

    async def watch(self) -> None:
        """Answer what is open, for as long as the agent lives."""
        while True:
            await self._pursued.wait()
            self._pursued.clear()
            asked = self.planner.due()
            if asked is None:
                continue
            try:
                async with _started() as process:
                    await self._answer_with(process)
            except OSError as error:
                self._failed(asked, f"no process to plan it could be started: {error}")

    async def _answer_with(self, process: asyncio.subprocess.Process) -> None:
        """Answer with this process until nothing has been open for LINGER_SECONDS, or it ended."""
        loop = asyncio.get_running_loop()
        used = loop.time()
        while True:
            asked = self.planner.due()
            if asked is None and loop.time() - used >= LINGER_SECONDS:
                return
            if asked is not None:
                try:
                    async with asyncio.timeout(PLANNING_SECONDS):
                        found = await _ask(process, asked)
                except TimeoutError:
                    self._failed(asked, f"planning it takes longer than {PLANNING_SECONDS:.0f} s here")
                    return
                except (EOFError, ConnectionError, msgspec.MsgspecError):
                    self._failed(asked, f"the process that plans it ended ({await _status(process)})")
                    return
                self.planner.tell(asked, found)
                self._answered()
                used = loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await self._pursued.wait()
                    self._pursued.clear()

    def _failed(self, asked: Asked, why: str) -> None:
        log.warning("a model with %d layers is not planned: %s", asked.question.shape.layers, why)
        self.planner.tell(asked, PlanAnswer(unfound=f"{why}. It is tried again in a minute"))
        asyncio.get_running_loop().call_later(RETRY_SECONDS, self.planner.forget, asked.key)
        self._answered()


@contextlib.asynccontextmanager
async def _started() -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *children.command("cordee.agent.planning_child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd="/",
        **processes.APART,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ask(process: asyncio.subprocess.Process, asked: Asked) -> PlanAnswer:
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    process.stdin.write(framed(asked.encoded))
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=PlanAnswer)


async def _status(process: asyncio.subprocess.Process) -> str:
    """How a process ended whose links closed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ENDED_SECONDS):
            return f"status {await process.wait()}"
    return "it closed its links"
