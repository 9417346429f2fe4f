"""Models that are being fetched into this machine's store because somebody asked for it in the page."""

import asyncio
import itertools
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from cordee.distribution.pull import pull
from cordee.errors import BadRequest, CordeeError, Overloaded
from cordee.models.store import Store

UNDER_WAY_MAX = 2  # at once: more only share the line
KEPT_MAX = 16  # of those that ended: people come back to see what became of them

log = logging.getLogger(__name__)


class PullStopped(Exception):
    """The model is no longer wanted."""


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
    stopped: threading.Event = field(default_factory=threading.Event)
    task: asyncio.Task[None] | None = None


class Pulls:
    """On one event loop; each pull works in a thread. `came` is awaited when a model has come."""

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
        found.stopped.set()
        return found.state.source

    async def close(self) -> None:
        """End all of them."""
        for each in self._pulls.values():
            each.stopped.set()
        tasks = [each.task for each in self._pulls.values() if each.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, begun: _Pull, name: str) -> None:
        state = begun.state

        def progress(done_bytes: int, total_bytes: int) -> None:
            if begun.stopped.is_set():
                raise PullStopped
            state.done_bytes, state.total_bytes = done_bytes, total_bytes

        def report(text: str) -> None:
            log.info("%s", text)

        try:
            model = await asyncio.to_thread(pull, state.source, name or None, self._store, progress, report)
        except PullStopped:
            state.state = "stopped"
        except CordeeError as error:
            state.state, state.error, state.code = "failed", error.message, error.code
            log.warning("%s could not be fetched: %s", state.source, error.message)
        except Exception:
            state.state, state.error = "failed", "the server failed at this; its log says why"
            log.exception("%s could not be fetched", state.source)
        else:
            state.state, state.model = "done", model.name
            await self._came()
