"""Models that are being fetched into this machine's store because somebody asked for it in the page."""

import asyncio
import contextlib
import itertools
import logging
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from cordee import children
from cordee.console.pull_child import PullLine
from cordee.errors import BadRequest, Overloaded
from cordee.models.store import Store

UNDER_WAY_MAX = 2  # at once: more only share the line
KEPT_MAX = 16  # of those that ended: people come back to see what became of them

log = logging.getLogger(__name__)


class PullState(msgspec.Struct):
    """How far a model is. `model` is its name in the store, once it is there; `error` why it is not."""

    number: int
    source: str
    state: Literal["running", "done", "failed", "stopped"] = "running"
    done_bytes: int = 0
    total_bytes: int = 0
    model: str = ""
    error: str = ""
    code: str = ""


@dataclass
class _Pull:
    state: PullState
    process: Process | None = None
    task: asyncio.Task[None] | None = None
    is_stopped: bool = False

    def stop(self) -> None:
        self.is_stopped = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.process.terminate()


class Pulls:
    """On one event loop; each pull is a child process. `came` is awaited when a model has come."""

    def __init__(self, store: Store, came: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._came = came
        self._numbers = itertools.count(1)
        self._pulls: dict[int, _Pull] = {}

    def states(self) -> list[dict[str, Any]]:
        """All of them, the last that was begun first."""
        return [msgspec.to_builtins(each.state) for each in reversed(self._pulls.values())]

    def begin(self, source: str, name: str = "") -> PullState:
        """Fetch what `cordee pull` takes from the hub, or a card; as `name` if that is not empty.

        Raises:
            Overloaded: others are under way.
            BadRequest: it is under way already.
        """
        running = [each.state for each in self._pulls.values() if each.state.state == "running"]
        if any(each.source == source for each in running):
            raise BadRequest(f"{source} is being fetched already.", "source")
        if len(running) >= UNDER_WAY_MAX:
            names = " and ".join(each.source for each in running)
            raise Overloaded(f"{names} are being fetched: begin with {source} when one of them is here.")
        begun = _Pull(PullState(next(self._numbers), source))
        self._pulls[begun.state.number] = begun
        ended = [number for number, each in self._pulls.items() if each.state.state != "running"]
        for number in ended[: max(0, len(self._pulls) - KEPT_MAX)]:
            del self._pulls[number]
        begun.task = asyncio.get_running_loop().create_task(self._run(begun, name))
        return begun.state

    def stop(self, number: int) -> str:
        """End one; what was fetched is kept for the next time. The source.

        Raises:
            BadRequest: it is not under way.
        """
        found = self._pulls.get(number)
        if found is None or found.state.state != "running":
            raise BadRequest("That model is no longer being fetched.", "number")
        found.stop()
        return found.state.source

    async def close(self) -> None:
        """End all of them."""
        for each in self._pulls.values():
            each.stop()
        tasks = [each.task for each in self._pulls.values() if each.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, begun: _Pull, name: str) -> None:
        state = begun.state
        try:
            command = children.command("cordee.console.pull_child", str(self._store.root), state.source, name)
            begun.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                stdout=PIPE,
                cwd=self._store.root,  # where no name of a model is that of a file
            )
            if begun.is_stopped:
                begun.stop()
            await _follow(begun.process, state)
        except (OSError, ValueError) as error:
            log.warning("the process that fetches %s failed: %s", state.source, error)
            begun.stop()
        if state.state == "done":
            await self._came()
        elif begun.is_stopped:
            state.state = "stopped"
        else:
            state.state = "failed"
            state.error = state.error or "The process that fetches it has ended: try again."
            log.warning("%s could not be fetched: %s", state.source, state.error)


async def _follow(process: Process, state: PullState) -> None:
    """Read what a child says until it ends.

    Raises:
        ValueError: that is not what it should say.
    """
    assert process.stdout is not None, "it is a pipe"
    decoder = msgspec.json.Decoder(PullLine)
    async for data in process.stdout:
        line = decoder.decode(data)
        state.done_bytes, state.total_bytes = line.done_bytes, line.total_bytes
        state.model, state.error, state.code = line.model, line.error, line.code
        if line.model:
            state.state = "done"
    await process.wait()
