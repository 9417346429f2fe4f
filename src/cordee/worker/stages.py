"""The stages of a node: real worker processes, started, stopped and wired by the reconciler's actions
(cluster/reconcile.py).

A worker is known to the cluster by an id that names its KV cache; a new id is drawn when the cache is in
doubt (`rename`), without a new process. Each action is tried once: a failure shows in `workers`, so that the
reconciler asks for it again, or is reported to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from cordee.cluster.facts import Placement
from cordee.cluster.goals import SliceGoal, StageGoal, StageSpec
from cordee.cluster.reconcile import WireAction, WorkerStatus
from cordee.engine.stage import EngineName, StageConfig, StageDescription
from cordee.errors import CordeeError, StageFailed
from cordee.net import address
from cordee.worker import messages
from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, WorkerProcess, Workers

WATCH_SECONDS = 1.0  # how often workers are checked: a stopped process holds up the whole pipeline
# How long a worker with KV readers stays after it was told to stop: the host's KV_QUERY_SECONDS, and time to
# transfer the largest states. Its memory was planned for beside that of its successors.
LINGER_SECONDS = 15.0
LOWEST_PRIORITY = 19  # nice(2)
LINGER_POLL_SECONDS = 0.2  # how often it is checked whether all readers are gone

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """What a stage is loaded from.

    `embedding` is for the first of several stages. `is_last`: the slice has the head. `ends` are the tokens
    that end an answer. `config` is how it is loaded. `name` is what messages call the stage (`stage_name`).
    """

    config: StageConfig
    engine: EngineName
    slice: Path
    embedding: Path | None
    is_last: bool
    ends: tuple[int, ...]
    name: str


def stage_name(model: str, spec: StageSpec, layers: int) -> str:
    """What to call a stage of a model that people call `model`, and that has so many layers."""
    if (spec.first, spec.last) == (0, layers):
        return model
    return f"layers {spec.first} to {spec.last - 1} of {model}"


class StagesOwner(Protocol):
    """What `Stages` needs of its owner; called on the event loop."""

    async def prepare(self, spec: StageSpec, /) -> Files:
        """Bring the files of a stage to this disk.

        Raises:
            CordeeError: that cannot be done.
        """
        ...

    def changed(self) -> None:
        """`Stages.workers` has changed."""

    def failed(self, spec: StageSpec, error: CordeeError, /) -> None:
        """A stage could not be loaded."""

    def doubt(self, node: str, reason: str, /) -> None:
        """Another node cannot be worked with."""

    def report(self, line: str, /) -> None:
        """A line for people: a worker ended, or hangs."""


@dataclass(eq=False)
class _Process:
    """A worker process and its state, as the reconciler should know it."""

    id: str
    spec: StageSpec
    worker: WorkerProcess | None = None  # once it has started
    is_loaded: bool = False
    wiring: str = ""
    wirings: set[str] = field(default_factory=set[str])  # all that this KV cache was in
    placement: Placement | None = None  # of the wiring
    index: int = 0  # of its stage in it
    inherits: bool = False  # it may take over sequences of the wiring before
    readers: frozenset[str] = frozenset()  # the nodes that may take over those of this wiring
    running: asyncio.Task[None] | None = None
    joining: asyncio.Task[None] | None = None
    joins: str = ""  # the wiring that it is being connected in

    def status(self, endpoint: str) -> WorkerStatus:
        """As the reconciler takes it; `endpoint` is where it takes rows."""
        state = "loading" if not self.is_loaded else "wired" if self.wiring else "loaded"
        return WorkerStatus(self.id, self.spec, state, endpoint, self.wiring, frozenset(self.wirings))


class _Nobody:
    """The owner of a worker that is waited for anyway."""

    def on_ended(self, worker: WorkerProcess) -> None:
        """See WorkerOwner."""

    def on_broken(self, worker: WorkerProcess, wiring: str) -> None:
        """See WorkerOwner."""

    def on_late(self, node: str, reason: str) -> None:
        """See WorkerOwner."""


class Stages:
    """See the module's docstring. Made by `Stages.open`; all methods on one event loop.

    `identity` is the folder of this node's identity, `listen` the host at which other machines reach workers.
    Without an identity no other machine does, and all links are Unix sockets.
    """

    def __init__(self, owner: StagesOwner, sockets: Workers, identity: Path | None, listen: str) -> None:
        self._owner = owner
        self._sockets = sockets
        self._identity = identity
        self._listen = listen
        self._processes: dict[str, _Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.losses = 0  # workers that ended by themselves, or hung

    @classmethod
    async def open(cls, owner: StagesOwner, identity: Path | None = None, listen: str = "") -> Stages:
        """A node's stages, none of them running yet."""
        stages = cls(owner, await Workers.open(), identity, listen)
        stages._keep(stages._watch())
        return stages

    @property
    def workers(self) -> dict[str, WorkerStatus]:
        """The state of each worker, by id."""
        running = self._processes.items()
        return {name: process.status(self._endpoint(process.worker)) for name, process in running}

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the workers that have started, by the worker's id."""
        running = self._processes.items()
        started = ((name, process.worker) for name, process in running if process.worker is not None)
        return {name: worker.pid for name, worker in started if worker.alive}

    @property
    def descriptions(self) -> list[StageDescription]:
        """Those of the stages that are loaded."""
        workers = (process.worker for process in self._processes.values())
        return [each.description for each in workers if each is not None and each.description is not None]

    async def listen(self, accept: Accept) -> str:
        """Open the inbox for the tokens of last stages on this machine: a Unix socket; its path."""
        return await self._sockets.listen("tokens", accept)

    def first(self, wiring: str) -> WorkerProcess | None:
        """The worker that takes a wiring's micro-batches first, if it is here and wired."""
        process = self._first(wiring)
        return None if process is None else process.worker

    def inherits(self, wiring: str) -> bool:
        """Whether that worker may take over sequences of the wiring before."""
        process = self._first(wiring)
        return process is not None and process.inherits

    def start(self, spec: StageSpec) -> None:
        """Start a worker that loads a stage."""
        process = _Process(secrets.token_hex(8), spec)
        self._processes[process.id] = process
        process.running = self._keep(self._run(process))
        self._owner.changed()

    def stop(self, name: str) -> None:
        """End a worker."""
        process = self._processes.pop(name, None)
        if process is not None:
            for task in (process.running, process.joining):
                if task is not None:
                    task.cancel()
            self._owner.changed()

    def stop_slice(self, goal: SliceGoal) -> None:
        """End the workers that have loaded a slice."""
        for name, process in list(self._processes.items()):
            if process.is_loaded and process.spec.slice == goal:
                self.stop(name)

    def rename(self, name: str) -> None:
        """Give a worker a new id: from now on its KV cache counts as another one."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.id, process.wirings = secrets.token_hex(8), set()
            self._processes[process.id] = process
            self._unwire(process)

    def unwire(self, wiring: str) -> None:
        """The scheduler left this wiring: its first stage has to be wired again."""
        for process in self._processes.values():
            if process.wiring == wiring and process.index == 0:
                self._unwire(process)

    def kill(self, wiring: str) -> None:
        """Kill the workers of a wiring that are here: one of its stages hangs."""
        for process in self._processes.values():
            if process.wiring == wiring and process.worker is not None:
                self._kill(process.worker)

    def wire(self, action: WireAction) -> None:
        """Connect a worker to its neighbours, unless that is under way already."""
        process, wiring = self._processes.get(action.worker), action.goal.wiring
        if process is None or process.worker is None or not process.is_loaded:
            return
        if process.joining is not None and not process.joining.done():
            if process.joins == wiring:
                return
            process.joining.cancel()
        process.wiring, process.joins = "", wiring
        process.joining = self._keep(self._join(process, process.worker, action))

    def admit_readers(self, readers: Mapping[str, frozenset[str]]) -> None:
        """Let the workers on these nodes, by wiring, take over what ours hold of it. It is not taken back:
        once a successor serves, nobody asks for it any more, but its workers may still be reading."""
        for process in self._processes.values():
            nodes = readers.get(process.wiring, frozenset()) - process.readers
            if process.wiring and nodes and process.worker is not None and process.worker.alive:
                process.readers |= nodes
                process.worker.admit_readers(process.wiring, process.readers)

    def placement(self, wiring: str) -> Placement | None:
        """The placement of a wiring that a worker here is in."""
        found = (process.placement for process in self._processes.values() if process.wiring == wiring)
        return next(found, None) if wiring else None

    def n_embd(self, wiring: str) -> int:
        """The width of the rows of a wiring that a worker here is in; 0 if there is none."""
        for process in self._processes.values():
            if process.wiring == wiring and process.worker and process.worker.description:
                return process.worker.description.n_embd
        return 0

    async def record(self, query: messages.RecordQuery) -> tuple[messages.Record, bytes]:
        """What a stage here received and sent.

        Raises:
            StageFailed: it is not here, or its worker does not answer.
        """
        for process in self._processes.values():
            if process.worker is not None and (process.wiring, process.index) == (query.wiring, query.index):
                return await process.worker.record(query)
        raise StageFailed("this stage does not run here")

    async def recompute(
        self, files: Files, message: messages.Recompute, payload: bytes
    ) -> tuple[messages.Recomputed, bytes]:
        """Compute rows in a worker that is there for nothing else, when nobody else wants the processors.

        Raises:
            CordeeError: it cannot be started or loaded, or refuses the rows.
        """
        environment = BATCH_INVARIANT_ENVIRONMENT if files.config.batch_invariant else {}
        worker = await self._sockets.spawn(environment, _Nobody(), self._keep)
        try:
            with contextlib.suppress(psutil.Error):
                psutil.Process(worker.pid).nice(LOWEST_PRIORITY)
            await worker.load(msgspec.structs.replace(self._load_message(files), identity=None, listen=""))
            return await worker.recompute(message, payload)
        finally:
            await worker.end()

    async def close(self) -> None:
        """End all workers; closing twice is harmless."""
        self._closing = True
        for name in list(self._processes):
            self.stop(name)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sockets.close()

    def on_ended(self, worker: WorkerProcess) -> None:
        """Workers' owner: a process is gone."""
        for name, process in list(self._processes.items()):
            if process.worker is worker:
                spec = process.spec
                self.losses += 1
                self.stop(name)
                ended = f"process {worker.pid} ended with status {worker.status}"
                self._owner.report(f"layers {spec.first} to {spec.last - 1}: {ended}")

    def on_broken(self, worker: WorkerProcess, wiring: str) -> None:
        """Workers' owner: a link is gone."""
        for process in self._processes.values():
            if process.worker is worker and process.joins == wiring != "":
                process.wirings.add(wiring)
                self._unwire(process)

    def on_late(self, node: str, reason: str) -> None:
        """Workers' owner: another node is too slow, or cannot be reached."""
        self._owner.doubt(node, reason)

    def _first(self, wiring: str) -> _Process | None:
        for process in self._processes.values():
            if process.wiring == wiring and process.index == 0:
                return process
        return None

    def _endpoint(self, worker: WorkerProcess | None) -> str:
        """Where a worker takes rows; empty before it is known."""
        if worker is None:
            return ""
        if self._identity is None:
            return worker.inbox
        # This machine's addresses may have changed since it was loaded.
        return worker.endpoint and address.renewed(worker.endpoint, self._listen)

    def _kill(self, worker: WorkerProcess) -> None:
        self._owner.report(f"process {worker.pid} hangs: it is replaced")
        worker.kill()

    def _unwire(self, process: _Process) -> None:
        process.wiring = process.joins = ""
        self._owner.changed()

    def _keep(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the stages failed", exc_info=task.exception())

    async def _run(self, process: _Process) -> None:
        """A worker's life, from its start to its end, or until it is stopped."""
        try:
            files = await self._owner.prepare(process.spec)
            environment = BATCH_INVARIANT_ENVIRONMENT if files.config.batch_invariant else {}
            process.worker = await self._sockets.spawn(environment, self, self._keep)
            await process.worker.load(self._load_message(files))
            process.is_loaded = True
            self._owner.changed()
            await asyncio.Event().wait()
        except Exception as error:
            if not isinstance(error, CordeeError | OSError):
                log.exception("starting a stage failed unexpectedly")
            if self._processes.pop(process.id, None) is not None:
                known = error if isinstance(error, CordeeError) else StageFailed(f"it cannot start: {error}")
                self._owner.failed(process.spec, known)
        except asyncio.CancelledError:  # it is to stop
            if process.worker is not None and not self._closing:
                await self._linger(process.worker)
            raise
        finally:
            if process.worker is not None:
                await process.worker.end()

    async def _linger(self, worker: WorkerProcess) -> None:
        """Let a worker run on for its KV readers, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while worker.kv_readers and worker.alive:
                    await asyncio.sleep(LINGER_POLL_SECONDS)

    def _load_message(self, files: Files) -> messages.LoadStage:
        return messages.LoadStage(
            path=str(files.slice),
            config=files.config,
            is_last=files.is_last,
            engine=files.engine,
            embedding=None if files.embedding is None else str(files.embedding),
            ends=files.ends,
            identity=None if self._identity is None else str(self._identity),
            listen=self._listen,
            name=files.name,
        )

    def _wire_message(self, goal: StageGoal) -> messages.Wire:
        wire = messages.Wire(goal.wiring, goal.downstream, goal.first or None, sources=goal.sources)
        if self._identity is None:
            return wire  # all are on this machine
        nodes, index = [place.node for place in goal.placement.stages], goal.index
        me, is_last = nodes[index], index + 1 == len(nodes)
        downstream_node = nodes[0] if is_last else nodes[index + 1]
        return msgspec.structs.replace(
            wire,
            downstream=_seen_from(me, downstream_node, goal.downstream),
            first=_seen_from(me, nodes[0], goal.first) or None,
            sources=tuple(
                each._replace(endpoint=_seen_from(me, each.node, each.endpoint)) for each in goal.sources
            ),
            downstream_node=downstream_node,
            first_node=nodes[0],
            upstream_node=nodes[index - 1] if index else "",  # the first one's is the host, by a Unix socket
            again_node=nodes[-1],
        )

    async def _join(self, process: _Process, worker: WorkerProcess, action: WireAction) -> None:
        goal = action.goal
        try:
            await worker.wire(self._wire_message(goal))
        except CordeeError as error:
            log.info("stage %d is not wired yet: %s", goal.index, error.message)
            return
        process.wirings.add(goal.wiring)
        if process.joins == goal.wiring:  # no link was lost meanwhile
            process.wiring, process.index, process.readers = goal.wiring, goal.index, frozenset()
            process.placement = goal.placement
            process.inherits = bool(goal.sources)
            self._owner.changed()

    async def _watch(self) -> None:
        """Kill workers whose process is stopped: nothing else would show it but their silence."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for process in self._processes.values():
                if process.worker is not None and process.worker.stopped:
                    self._kill(process.worker)


def _seen_from(me: str, node: str, endpoint: str) -> str:
    """How a node reaches an endpoint of a node, which may be itself."""
    return address.from_here(endpoint) if endpoint and node == me else endpoint
