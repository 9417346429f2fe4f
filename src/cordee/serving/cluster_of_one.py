"""A cluster of one: the workers and the scheduler of a model that this machine serves by itself.

    loading -> ready <-> replacing -> failed
       |         |           |          |
       '---------'-----------'----------'--> closed

It is what an agent (agent/agent.py) has around the same workers, less all that is for other nodes: the
placement is fixed, so the goals follow from it, and links are Unix sockets.

- A worker that ends, for any reason, is replaced; the others keep their loaded stages. All then get a new
  wiring and start without any sequence: the scheduler replays its token logs.
- Replacing is tried again after a pause that doubles up to RETRY_SECONDS_MAX, for as long as it takes; after
  FAILURES_MAX in a row the state is `failed` until one succeeds. (Nodes of a cluster wait longer, because the
  others plan without them meanwhile. Here there are no others.)
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, Protocol

from cordee.cluster.facts import Placement, SliceHeld, StagePlace, wiring_id
from cordee.cluster.goals import Goals, HostGoal, StageGoal, StageSpec, spec_of
from cordee.cluster.reconcile import Actions, Reconciler
from cordee.engine.stage import EngineName, StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError, StageFailed
from cordee.generation.streams import Said
from cordee.models.slices import SliceFile
from cordee.serving.scheduler_host import SchedulerHost
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Join, KvAnswer, Prepared, Tokens
from cordee.worker.process import opening
from cordee.worker.stages import Files, Stages, stage_name

State = Literal["loading", "ready", "replacing", "failed", "closed"]

NODE = "local"  # what this machine is called in its placement
TICK_SECONDS = 0.5  # how often everything is looked at, even if nothing was heard
HOST_SECONDS = 0.25  # how often the scheduler lets time pass
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 30.0
FAILURES_MAX = 3  # failed replacements in a row before the state is `failed`

P = ParamSpec("P")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlicedModel:
    """The model behind the slices.

    `name` is what people call it, `digest` what the cluster does; `path` is its file, which has the
    embedding; `engine` what it is laid out for; the tokens `ends` end an answer. `slices` cover all
    layers, in order.
    """

    name: str
    digest: str
    path: Path
    engine: EngineName
    ends: tuple[int, ...]
    slices: tuple[SliceFile, ...]


@dataclass(frozen=True)
class StageNow:
    """A stage as it is now: its layers, and the process that runs it, None while there is none."""

    layers: tuple[int, int]
    pid: int | None
    restarts: int


class Listener(Protocol):
    """Who is told what happens; called on the event loop."""

    def on_ready(self) -> None:
        """Streams are worked on, from now on or again."""

    def on_failed(self, error: CordeeError) -> None:
        """A stage could not be replaced so far; it is tried again and again."""


class ClusterOfOne:
    """See the module's docstring. All methods on one event loop.

    `report` gets lines for people; `host` is there once it is open.
    """

    def __init__(
        self, model: SlicedModel, config: StageConfig, listener: Listener, report: Callable[[str], None]
    ) -> None:
        device = "+".join(config.devices) or "CPU"
        places = tuple(StagePlace(NODE, device, each.first, each.last) for each in model.slices)
        self.state: State = "loading"
        self.placement = Placement(model.digest, config.context, config.sequences, places)
        self._specs = [spec_of(self.placement, index) for index in range(len(places))]
        self._slices_held = (SliceHeld(model.digest, 0, places[-1].last, whole=True),)
        self._model = model
        self._config = config
        self._listener = listener
        self._report = report
        self._reconciler = Reconciler()
        self._stages: Stages | None = None
        self._host: SchedulerHost | None = None
        self._inbox = ""  # the socket to which the last stage sends tokens
        self._links: set[asyncio.StreamWriter] = set()  # that bring tokens
        self._loaded: list[int | None] = [None] * len(places)  # the process that loaded each stage last
        self._restarts = [0] * len(places)
        self._failures, self._pause = 0, RETRY_SECONDS_MIN
        self._retry_at = 0.0  # when a stage may be started again
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(
        self,
        vocabulary: Vocabulary,
        say: Callable[[str, Said], None],
        *,
        queue: int,
        in_flight: int,
        speculates: bool,
    ) -> None:
        """Load the stages and join them; then streams are worked on.

        Raises:
            CordeeError: the error of the first worker that could not load, or why none could be started.
        """
        try:
            self._stages = await Stages.open(self)
            self._inbox = await self._stages.listen(self._accept)
        except OSError as error:
            raise StageFailed(f"the stages cannot be started: {error}") from error
        self._host = SchedulerHost(
            HostGoal(self.placement),
            vocabulary,
            self._stages,
            say,
            queue=queue,
            in_flight=in_flight,
            speculates=speculates,
            joined=self.changed,
        )
        self._keep(self._act_always())
        self._keep(self._tick_always())
        await self._opened

    @property
    def host(self) -> SchedulerHost:
        """The scheduler."""
        assert self._host is not None, "it was opened"
        return self._host

    @property
    def stages(self) -> Stages:
        """The workers."""
        assert self._stages is not None, "it was opened"
        return self._stages

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now."""
        return self.state == "ready" and self.host.is_joined

    @property
    def wiring(self) -> str:
        """The id of the present wiring; empty while there is none."""
        return "" if self._host is None else self._host.wiring

    def stages_now(self) -> list[StageNow]:
        """The stages, in order."""
        pids = self._pids()
        return [
            StageNow((spec.first, spec.last), pids.get(spec), restarts)
            for spec, restarts in zip(self._specs, self._restarts, strict=True)
        ]

    async def close(self) -> None:
        """End all workers and remove the sockets; closing twice is harmless."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._host is not None:
            self._host.close()
        links = list(self._links)
        for writer in links:
            writer.transport.abort()
        if self._stages is not None:
            await self._stages.close()
        await asyncio.gather(*(writer.wait_closed() for writer in links), return_exceptions=True)

    # What its stages ask of it.

    async def prepare(self, spec: StageSpec) -> Files:
        """Stages' owner: the slices are on disk already."""
        model, index = self._model, self._specs.index(spec)
        is_cut_first = index == 0 and len(self._specs) > 1
        return Files(
            config=self._config,
            engine=model.engine,
            slice=model.slices[index].path,
            embedding=model.path if is_cut_first else None,
            is_last=index == len(self._specs) - 1,
            ends=model.ends,
            name=stage_name(model.name, spec, self._specs[-1].last),
        )

    def changed(self) -> None:
        """Stages' owner, and the scheduler's: look at everything soon."""
        self._news.set()

    def failed(self, spec: StageSpec, error: CordeeError) -> None:
        """Stages' owner: a worker could not load. Those that fail at the same time count as one."""
        self.changed()
        if self.state == "loading":
            if not self._opened.done():
                self._opened.set_exception(error)
            return
        now = time.monotonic()
        if now < self._retry_at:
            return
        pause, self._pause = self._pause, min(2 * self._pause, RETRY_SECONDS_MAX)
        self._failures += 1
        self._retry_at = now + pause
        self.report(f"a stage could not be replaced ({error}); trying again in {pause:.2g} s")
        self._keep(self._look_after(pause))
        if self._failures == FAILURES_MAX:
            self.state = "failed"
            self._call(self._listener.on_failed, error)

    def doubt(self, node: str, reason: str) -> None:
        """There is no other node."""

    def report(self, line: str) -> None:
        """Stages' owner: a line for people."""
        log.info("%s: %s", self._model.name, line)
        self._call(self._report, line)

    # What it does.

    async def _act_always(self) -> None:
        while True:
            self._call(self._act)  # if it fails the next look starts afresh
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    def _act(self) -> None:
        """Look at everything, decide, and carry it out."""
        actions, wiring = self._decide()
        for name in actions.rename:  # which changes the wiring for all, so that is decided again
            self.stages.rename(name)
        if actions.rename:
            actions, wiring = self._decide()
        for name in actions.stop:
            self.stages.stop(name)
        if time.monotonic() >= self._retry_at:
            for spec in actions.start:
                self.stages.start(spec)
        for action in actions.wire:
            self.stages.wire(action)
        self._note_loaded()
        self.host.follow(HostGoal(self.placement, wiring))
        self._note_state()

    def _decide(self) -> tuple[Actions, str]:
        """What is to be done, and the wiring that all stages are joined in; empty if they are not."""
        now, workers = time.monotonic(), self.stages.workers
        goals = [StageGoal(self.placement, index) for index in range(len(self._specs))]
        actions = self._reconciler.step(Goals(stages=tuple(goals)), workers, self._slices_held, now)
        reports = actions.reports[: len(goals)]
        if not all(report.state in ("loaded", "wired") for report in reports):
            return actions, ""
        wiring = wiring_id(self.placement, [report.worker for report in reports])
        inboxes = [*(report.endpoint for report in reports[1:]), self._inbox]
        goals = [
            StageGoal(self.placement, index, wiring, downstream)
            for index, downstream in enumerate(inboxes[:-1])
        ]
        first = reports[0].endpoint if goals else ""
        goals.append(StageGoal(self.placement, len(goals), wiring, self._inbox, first))
        actions = self._reconciler.step(Goals(stages=tuple(goals)), workers, self._slices_held, now)
        joined = all((report.state, report.wiring) == ("wired", wiring) for report in reports)
        return actions, wiring if joined else ""

    def _note_loaded(self) -> None:
        """Count and tell what was loaded since the last look."""
        pids = self._pids(loaded=True)
        for index, spec in enumerate(self._specs):
            pid, before = pids.get(spec), self._loaded[index]
            if pid is not None and pid != before:
                self._restarts[index] += before is not None
                self._loaded[index] = pid
                self.report(f"layers {spec.first} to {spec.last - 1} loaded (process {pid})")

    def _note_state(self) -> None:
        if not self.host.is_joined:
            if self.state == "ready":
                self.state = "replacing"
        elif self.state != "ready":
            self.state = "ready"
            self._failures, self._pause, self._retry_at = 0, RETRY_SECONDS_MIN, 0.0
            if not self._opened.done():
                self._opened.set_result(None)
            self._call(self._listener.on_ready)

    def _pids(self, *, loaded: bool = False) -> dict[StageSpec, int]:
        """The processes that run stages, or only those that have loaded them."""
        if self._stages is None:
            return {}
        workers, pids = self._stages.workers, self._stages.pids
        return {
            workers[name].spec: pid
            for name, pid in pids.items()
            if not loaded or workers[name].state != "loading"
        }

    async def _look_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.changed()

    async def _tick_always(self) -> None:
        while True:
            await asyncio.sleep(HOST_SECONDS)
            self._call(self.host.tick, time.monotonic())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The last stage brings tokens."""
        self._links.add(writer)
        try:
            if isinstance(await opening(reader), Join):
                while True:
                    message, _ = await frames.read(reader)
                    if isinstance(message, Tokens | KvAnswer | Prepared):
                        self._call(self.host.on_result, NODE, message)
        except LinkClosed:
            pass  # that worker was wired anew, or ended
        finally:
            self._links.discard(writer)
            writer.transport.abort()

    def _keep(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _call(self, function: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> None:
        """Call a function whose failure must not stop the service."""
        try:
            function(*arguments, **options)
        except Exception:
            log.exception("a call of the local service failed")
