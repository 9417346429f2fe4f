"""The pipeline: stage workers of one model on this machine, supervised; micro-batches in, tokens out.

    loading -> ready <-> replacing -> failed
       |         |           |          |
       '---------'-----------'----------'--> closed

- One worker process per stage. The pipeline sends micro-batches to the first and gets tokens from the last;
  between them rows go from worker to worker, and micro-batches that go round go from the last to the first.
- A worker that ends, for any reason, is replaced; the others keep their loaded stages. All then get a new
  wiring, whose id is the hash of the slices and of the workers that run them, and start without any sequence:
  the listener's `on_lost` has told the scheduler to replay its token logs.
- A worker that hangs (its process is stopped while work waits for it, or it is silent for STALL_SECONDS with
  work under way) is killed, and then replaced. So is one that closes its control link or garbles it.
- Replacing is tried again after a pause that doubles up to RETRY_SECONDS_MAX, for as long as the pipeline
  lives; after FAILURES_MAX in a row its state is `failed` until one succeeds.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, Protocol

import msgspec

from cordee.engine.stage import EngineName, StageConfig, StageDescription
from cordee.errors import CordeeError, StageFailed
from cordee.models.slices import SliceFile
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Halt, Join, LoadStage, Rows, Tokens, Wire
from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, WorkerProcess, Workers, opening

State = Literal["loading", "ready", "replacing", "failed", "closed"]

STALL_SECONDS = 600.0  # 512 rows of prefill take this long on a machine that does one row a second
WATCH_SECONDS = 1.0  # how often workers that owe an answer are checked
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 30.0
FAILURES_MAX = 3  # failed replacements in a row before the state is `failed`

P = ParamSpec("P")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlicedModel:
    """The model behind the slices.

    `path` is its file, which has the embedding; `engine` what it is laid out for; the tokens `ends` end an
    answer.
    """

    path: Path
    engine: EngineName
    ends: tuple[int, ...]


class Listener(Protocol):
    """Who is told what happens in the pipeline; called on the event loop, and must not raise."""

    def on_tokens(self, tokens: Tokens) -> None:
        """A result of a micro-batch came."""

    def on_lost(self) -> None:
        """Nothing that was sent will be answered, and all sequences are forgotten."""

    def on_ready(self) -> None:
        """Micro-batches may be sent."""

    def on_failed(self, error: CordeeError) -> None:
        """A stage could not be replaced so far; the pipeline goes on trying."""


@dataclass
class PipelineStage:
    """A stage of the pipeline: its slice, and the worker that runs it now."""

    slice: SliceFile
    worker: WorkerProcess | None = None
    restarts: int = 0

    @property
    def alive(self) -> bool:
        """Whether a worker is there, loaded or loading."""
        return self.worker is not None and self.worker.alive

    @property
    def layers(self) -> str:
        """Its layers as messages call them."""
        return f"layers {self.slice.first} to {self.slice.last - 1}"

    @property
    def pid(self) -> int | None:
        """The process of the worker that runs it; None while there is none."""
        worker = self.worker
        return worker.pid if worker is not None and worker.alive else None

    @property
    def description(self) -> StageDescription | None:
        """The description of the loaded stage; None before it is loaded."""
        return None if self.worker is None else self.worker.description


class Pipeline:
    """See the module's theory of operation. Made by `Pipeline.start`; all methods on one event loop."""

    def __init__(
        self,
        slices: Sequence[SliceFile],
        config: StageConfig,
        source: SlicedModel,
        listener: Listener,
        report: Callable[[str], None],
    ) -> None:
        self.state: State = "loading"
        self.stages = [PipelineStage(each) for each in slices]
        self._config = config
        self._source = source
        self._listener = listener
        self._report = report
        self._wiring = ""
        self._workers: Workers | None = None
        self._tokens = ""  # the socket to which the last stage sends
        self._first: asyncio.StreamWriter | None = None
        self._links: set[asyncio.StreamWriter] = set()  # all that bring tokens
        self._changed = asyncio.Event()  # a worker ended, or a link broke
        self._broken = False
        self._owed = 0
        self._heard = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        slices: Sequence[SliceFile],
        config: StageConfig,
        source: SlicedModel,
        listener: Listener,
        report: Callable[[str], None],
    ) -> "Pipeline":
        """Start the workers, load the slices of the model `source`, wire them.

        Raises:
            CordeeError: the error of the first worker that could not load, or why none could be started.
        """
        pipeline = cls(slices, config, source, listener, report)
        pipeline._keep(pipeline._watch())
        try:
            pipeline._workers = await Workers.open()
            pipeline._tokens = await pipeline._workers.listen("tokens", pipeline._accept_tokens)
            await pipeline._raise_workers()
            await pipeline._wire()
        except BaseException as error:
            await pipeline.close()
            if isinstance(error, OSError):
                raise StageFailed(f"the stages cannot be started: {error}") from error
            raise
        pipeline.state = "ready"
        pipeline._keep(pipeline._supervise())
        return pipeline

    @property
    def wiring(self) -> str:
        """The id of the present wiring; empty while a stage is replaced."""
        return self._wiring

    def send(self, rows: Rows, payload: bytes | memoryview) -> None:
        """Send a micro-batch of token ids to the first stage; results, or a loss, come to the listener."""
        assert self._first is not None, "only a ready pipeline takes micro-batches"
        if self._owed == 0:
            self._heard = time.monotonic()
        self._owed += 1
        frames.write(self._first, rows, payload)

    def halt(self, batch: int) -> None:
        """Ask that a micro-batch does not go round again."""
        assert self._first is not None, "only a ready pipeline has micro-batches under way"
        frames.write(self._first, Halt(self._wiring, batch))

    async def close(self) -> None:
        """End all workers and remove the sockets; closing twice is harmless."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(stage.worker.end() for stage in self.stages if stage.worker is not None))
        writers = [*self._links, *([self._first] if self._first is not None else [])]
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        if self._workers is not None:
            self._workers.close()

    def on_ended(self, worker: WorkerProcess) -> None:
        """Workers' owner: a process is gone."""
        self._changed.set()
        for stage in self.stages:
            if stage.worker is worker:
                line = f"{stage.layers}: process {worker.pid} ended with status {worker.status}"
                self._call(self._report, line)

    def on_broken(self, worker: WorkerProcess, wiring: str) -> None:
        """Workers' owner: a link is gone; if it is of the present wiring, the workers are wired again."""
        if wiring == self._wiring:
            self._broken = True
            self._changed.set()

    def _keep(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the pipeline failed", exc_info=task.exception())

    def _call(self, callback: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> None:
        """Call a callback of the owner, whose failure must not stop the pipeline."""
        try:
            callback(*arguments, **options)
        except Exception:
            log.exception("a callback of the pipeline's owner failed")

    async def _accept_tokens(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        join = await opening(reader)
        try:
            while isinstance(join, Join) and join.wiring == self._wiring:
                message, _ = await frames.read(reader)
                if isinstance(message, Tokens) and message.wiring == self._wiring:
                    self._owed -= message.last
                    self._heard = time.monotonic()
                    self._call(self._listener.on_tokens, message)
        except LinkClosed:
            pass  # the last worker ended, or was wired again
        finally:
            self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._links.discard(writer)
        writer.transport.abort()

    async def _raise_workers(self) -> None:
        """Start and load a worker for every stage that has none alive."""
        missing = [stage for stage in self.stages if not stage.alive]
        results = await asyncio.gather(
            *(self._raise_worker(stage) for stage in missing), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _raise_worker(self, stage: PipelineStage) -> None:
        assert self._workers is not None
        old = stage.worker
        if old is not None:
            await old.end()
        environment = BATCH_INVARIANT_ENVIRONMENT if self._config.batch_invariant else {}
        stage.worker = worker = await self._workers.spawn(environment, self, self._keep)
        try:
            await worker.load(self._load(stage))
        except CordeeError:
            await worker.end()
            raise
        stage.restarts += old is not None
        self._call(self._report, f"{stage.layers} loaded (process {worker.pid})")

    def _load(self, stage: PipelineStage) -> LoadStage:
        cut_first = len(self.stages) > 1 and stage is self.stages[0]
        return LoadStage(
            path=str(stage.slice.path),
            config=self._config,
            is_last=stage is self.stages[-1],
            engine=self._source.engine,
            embedding=str(self._source.path) if cut_first else None,
            ends=self._source.ends,
        )

    async def _wire(self) -> None:
        """Connect the workers in a new wiring, without any sequence."""
        workers = [stage.worker for stage in self.stages if stage.worker is not None]
        slices = [stage.slice for stage in self.stages]
        self._wiring = _wiring_id(slices, workers)
        self._broken = False
        self._owed = 0
        if self._first is not None:
            self._first.transport.abort()
        first, downstream = workers[0].inbox, [worker.inbox for worker in workers[1:]]
        wires = [Wire(self._wiring, target) for target in downstream]
        wires.append(Wire(self._wiring, self._tokens, first if downstream else None))
        # All of them answer, or end: their answers must be read before they are wired again.
        answers = await asyncio.gather(
            *(worker.wire(wire) for worker, wire in zip(workers, wires, strict=True)), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        _, self._first = await asyncio.open_unix_connection(first)
        frames.write(self._first, Join(self._wiring))

    async def _supervise(self) -> None:
        """Replace workers that ended, and wire again where a link broke, while the pipeline lives."""
        while True:
            while not self._broken and all(stage.alive for stage in self.stages):
                self._changed.clear()
                await self._changed.wait()
            self.state = "replacing"
            self._wiring = ""  # what still comes of the old one is ignored
            self._owed = 0
            self._call(self._listener.on_lost)
            await self._replace()
            self.state = "ready"
            self._call(self._listener.on_ready)

    async def _replace(self) -> None:
        failures, pause = 0, RETRY_SECONDS_MIN
        while True:
            try:
                await self._raise_workers()
                await self._wire()
                return
            except Exception as error:
                if not isinstance(error, CordeeError | OSError):
                    log.exception("replacing a stage failed unexpectedly")
                failures += 1
                line = f"a stage could not be replaced ({error}); trying again in {pause:.2g} s"
                self._call(self._report, line)
                if failures == FAILURES_MAX:
                    self.state = "failed"
                    reason = error if isinstance(error, CordeeError) else StageFailed(str(error))
                    self._call(self._listener.on_failed, reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _watch(self) -> None:
        """Kill workers that hang while work waits for them."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.state == "ready" and self._owed == 0:
                continue
            stalled = self._owed > 0 and time.monotonic() - self._heard > STALL_SECONDS
            for stage in self.stages:
                worker = stage.worker
                if worker is not None and worker.alive and (stalled or worker.stopped):
                    self._call(self._report, f"process {worker.pid} hangs: it is replaced")
                    worker.kill()


def _wiring_id(slices: Sequence[SliceFile], workers: Sequence[WorkerProcess]) -> str:
    """The hash of (slice digest, worker id) of the stages, in order."""
    pairs = [(each.digest, worker.id) for each, worker in zip(slices, workers, strict=True)]
    return hashlib.sha256(msgspec.msgpack.encode(pairs)).hexdigest()[:16]
