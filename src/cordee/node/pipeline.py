"""The pipeline: stage workers of one model on this machine, supervised; micro-batches in, tokens out.

    loading -> ready <-> replacing -> failed
       |         |           |          |
       '---------'-----------'----------'--> closed

- One worker process per stage. The pipeline hands micro-batches to the first and hears tokens from the last;
  between them rows go from worker to worker, and what goes round goes from the last to the first.
- A worker that ends, for whatever reason, is replaced; the others keep their loaded stages. All are then
  wired to a new placement, whose id is the hash of the slices and of who runs them, and start without any
  sequence: the listener's `on_lost` has told the scheduler to replay its token logs.
- A worker that hangs (stopped while something is wanted of it, or silent for STALL_SECONDS with work under
  way) is killed, which makes it one that ended. So is one that closes its control link or garbles it.
- Replacing is tried again after a pause that doubles up to RETRY_SECONDS_MAX, for as long as the pipeline
  lives; after FAILURES_MAX in a row its state is `failed` until one succeeds.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import psutil

from cordee.engine.stage import StageConfig, StageDescription
from cordee.errors import CordeeError, StageFailed
from cordee.models.slices import SliceFile
from cordee.node import link
from cordee.node.link import LinkClosed
from cordee.node.messages import (
    Halt,
    Hello,
    Join,
    Load,
    Loaded,
    LoadFailed,
    Message,
    Rows,
    Tokens,
    Wire,
    Wired,
    WireFailed,
    placement_id,
)
from cordee.node.worker import rebuilt_error

State = Literal["loading", "ready", "replacing", "failed", "closed"]

COMMAND = (sys.executable, "-m", "cordee.node.worker")
START_SECONDS = 60.0  # a worker's interpreter and imports, on a slow and busy machine
LOAD_SECONDS = 3600.0  # 60 GB from a slow disk take half an hour
JOIN_SECONDS = 10.0  # for the first message of a link, which is sent as soon as it is there
STALL_SECONDS = 600.0  # 512 rows of prefill take this long on a machine that does one row a second
WIRE_SECONDS = STALL_SECONDS  # a survivor first finishes what it computes for the old placement
WATCH_SECONDS = 1.0  # how often workers that owe an answer are looked at
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 30.0
FAILURES_MAX = 3  # replacements that failed one after the other before the state says so
CLOSE_SECONDS = 5.0  # a worker ends at once with its control link, unless it is stopped or swapped out

# How long threads spin at a barrier before they sleep (libgomp; single trials on 2 cores, starter model).
# The default, 300,000, is fast on an idle machine; but beside one busy process, spinners hold the core that
# the sleeper needs, and a token takes over 200 ms. There it takes 40 ms with 1,000 spins, 91 with 4,000, 167
# with 8,000. Alone, 4,000 are about as fast as the default, 1,000 slower; "passive" is half as fast.
WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "4000"}
EXACT_ENVIRONMENT = {"GGML_CPU_TILED_MM": "0"}  # see engine/llama.py

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The model behind the slices: its file, which has the embedding, and the tokens that end an answer."""

    path: Path
    ends: tuple[int, ...]


class Listener(Protocol):
    """Who is told what the pipeline does; called on the event loop, and must not raise."""

    def on_tokens(self, tokens: Tokens) -> None:
        """A result of a micro-batch came."""

    def on_lost(self) -> None:
        """Nothing that was sent will be answered, and all sequences are forgotten."""

    def on_ready(self) -> None:
        """Micro-batches may be sent."""

    def on_failed(self, error: CordeeError) -> None:
        """No replacement for now; the pipeline goes on trying."""


@dataclass
class WorkerHandle:
    """A worker as the pipeline sees it. `said` are its control messages, one for each that it was sent, and
    None once it ended."""

    id: str
    process: asyncio.subprocess.Process
    inbox: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    said: asyncio.Queue[Message | None] = field(default_factory=asyncio.Queue)
    ended: bool = False
    description: StageDescription | None = None

    @property
    def alive(self) -> bool:
        return not self.ended and self.process.returncode is None


@dataclass
class Stage:
    """A place in the pipeline: its slice, and the worker that runs it now."""

    slice: SliceFile
    worker: WorkerHandle | None = None
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
        return worker.process.pid if worker is not None and worker.alive else None

    @property
    def description(self) -> StageDescription | None:
        """What the loaded stage says of itself."""
        return None if self.worker is None else self.worker.description


class Pipeline:
    """See the module's theory of operation. Made by `Pipeline.start`; all methods on one event loop."""

    def __init__(
        self,
        slices: Sequence[SliceFile],
        config: StageConfig,
        source: Source,
        listener: Listener,
        report: Callable[[str], None],
    ) -> None:
        self.state: State = "loading"
        self.stages = [Stage(piece) for piece in slices]
        self._config = config
        self._source = source
        self._listener = listener
        self._report = report
        self._placement = ""
        self._folder = Path(tempfile.mkdtemp(prefix="cordee-"))  # mode 0700
        self._expected: dict[str, asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._servers: list[asyncio.Server] = []
        self._first: asyncio.StreamWriter | None = None
        self._links: set[asyncio.StreamWriter] = set()  # all that were accepted
        self._change = asyncio.Event()  # a worker ended
        self._owed = 0
        self._heard = time.monotonic()
        self._tasks: set[asyncio.Task] = set()

    @classmethod
    async def start(
        cls,
        slices: Sequence[SliceFile],
        config: StageConfig,
        source: Source,
        listener: Listener,
        report: Callable[[str], None],
    ) -> "Pipeline":
        """Start the workers, load the slices of the model `source`, wire them.

        Raises:
            CordeeError: what the first worker that could not load says, or why there is none.
        """
        pipeline = cls(slices, config, source, listener, report)
        pipeline._keep(pipeline._watch())
        try:
            await pipeline._listen()
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
    def placement(self) -> str:
        """The id of the placement that is wired; empty while a stage is replaced."""
        return self._placement

    def send(self, rows: Rows, payload: bytes | memoryview) -> None:
        """Send a micro-batch of token ids to the first stage; results, or a loss, come to the listener."""
        assert self._first is not None, "only a ready pipeline takes micro-batches"
        if self._owed == 0:
            self._heard = time.monotonic()
        self._owed += 1
        link.write(self._first, rows, payload)

    def halt(self, batch: int) -> None:
        """Ask that a micro-batch does not go round again."""
        last = self.stages[-1].worker
        if last is not None and last.alive:
            link.write(last.writer, Halt(batch))

    async def close(self) -> None:
        """End all workers and remove the sockets; closing twice is harmless."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            server.close()
        await asyncio.gather(*(_end(stage.worker) for stage in self.stages if stage.worker is not None))
        writers = self._links | ({self._first} if self._first is not None else set())
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, coroutine: Coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the pipeline failed", exc_info=task.exception())

    def _tell(self, listener: Callable, *arguments: object) -> None:
        """Call someone outside, whose failure must not stop the pipeline."""
        try:
            listener(*arguments)
        except Exception:
            log.exception("a listener of the pipeline failed")

    async def _listen(self) -> None:
        for name, accepted in (("control", self._accept_control), ("tokens", self._accept_tokens)):
            self._servers.append(await asyncio.start_unix_server(accepted, self._folder / name))

    async def _accept_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        hello = await _opening(reader)
        expected = self._expected.pop(hello.worker, None) if isinstance(hello, Hello) else None
        if expected is None or expected.done():
            self._drop(writer)
        else:
            expected.set_result((reader, writer))

    async def _accept_tokens(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        join = await _opening(reader)
        try:
            while isinstance(join, Join) and join.placement == self._placement:
                message, _ = await link.read(reader)
                if isinstance(message, Tokens) and message.placement == self._placement:
                    self._owed -= message.last
                    self._heard = time.monotonic()
                    self._tell(self._listener.on_tokens, message)
        except LinkClosed:
            pass  # the last worker ended, or was wired anew
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

    async def _raise_worker(self, stage: Stage) -> None:
        old = stage.worker
        if old is not None:
            await _end(old)
            self._drop(old.writer)
        stage.worker = worker = await self._spawn()
        self._keep(self._follow(stage, worker))
        link.write(worker.writer, self._load(stage))
        answer = await _answer(worker, (Loaded, LoadFailed), LOAD_SECONDS)
        if isinstance(answer, LoadFailed):
            await _end(worker)
            raise rebuilt_error(answer)
        assert isinstance(answer, Loaded)
        worker.description = answer.description
        stage.restarts += old is not None
        self._tell(self._report, f"{stage.layers} loaded (process {worker.process.pid})")

    def _load(self, stage: Stage) -> Load:
        cut_first = len(self.stages) > 1 and stage is self.stages[0]
        return Load(
            path=str(stage.slice.path),
            config=self._config,
            is_last=stage is self.stages[-1],
            embedding=str(self._source.path) if cut_first else None,
            ends=self._source.ends,
        )

    async def _spawn(self) -> WorkerHandle:
        worker_id = secrets.token_hex(8)
        inbox = str(self._folder / worker_id)
        self._expected[worker_id] = connected = asyncio.get_running_loop().create_future()
        process = await self._start_process(worker_id, inbox)
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((connected, ended), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not connected.done():
                raise StageFailed(f"a stage worker did not start (status {process.returncode})")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        finally:
            ended.cancel()
            self._expected.pop(worker_id, None)
        return WorkerHandle(worker_id, process, inbox, *connected.result())

    async def _start_process(self, worker_id: str, inbox: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *COMMAND,
            worker_id,
            str(self._folder / "control"),
            inbox,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, **WORKER_ENVIRONMENT, **(EXACT_ENVIRONMENT if self._config.exact else {})},
            start_new_session=True,  # the terminal's Ctrl-C is the service's to handle
        )

    async def _follow(self, stage: Stage, worker: WorkerHandle) -> None:
        """Hear a worker out: once its control link ends, so does its process."""
        try:
            while True:
                message, _ = await link.read(worker.reader)
                worker.said.put_nowait(message)
        except LinkClosed:
            worker.ended = True
        worker.said.put_nowait(None)
        self._change.set()
        await _end(worker)
        if stage.worker is worker:
            process = worker.process
            line = f"{stage.layers}: process {process.pid} ended with status {process.returncode}"
            self._tell(self._report, line)

    async def _wire(self) -> None:
        """Join the workers to a new placement, without any sequence."""
        workers = [stage.worker for stage in self.stages if stage.worker is not None]
        self._placement = placement_id(
            [(stage.slice.digest, worker.id) for stage, worker in zip(self.stages, workers, strict=True)]
        )
        self._owed = 0
        if self._first is not None:
            self._first.transport.abort()
        downstream = [worker.inbox for worker in workers[1:]] + [str(self._folder / "tokens")]
        for worker, target in zip(workers, downstream, strict=True):
            goes_round = worker is workers[-1] and len(workers) > 1
            link.write(worker.writer, Wire(self._placement, target, workers[0].inbox if goes_round else None))
        # All of them answer, or end; whoever waited for less would leave readers of the others behind.
        answers = await asyncio.gather(
            *(_answer(worker, (Wired, WireFailed), WIRE_SECONDS, self._placement) for worker in workers),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, WireFailed):
                raise StageFailed(f"a stage was lost while the pipeline was wired ({answer.message})")
        _, self._first = await asyncio.open_unix_connection(workers[0].inbox)
        link.write(self._first, Join(self._placement))

    async def _supervise(self) -> None:
        """Replace workers that ended, for as long as the pipeline lives."""
        while True:
            while all(stage.alive for stage in self.stages):
                self._change.clear()
                await self._change.wait()
            self.state = "replacing"
            self._placement = ""  # what still comes of the old one is nobody's
            self._owed = 0
            self._tell(self._listener.on_lost)
            await self._replace()
            self.state = "ready"
            self._tell(self._listener.on_ready)

    async def _replace(self) -> None:
        failures, pause = 0, RETRY_SECONDS_MIN
        while True:
            try:
                await self._raise_workers()
                await self._wire()
                return
            except Exception as error:
                if not isinstance(error, CordeeError | OSError):
                    log.exception("replacing a stage met what it does not know")
                failures += 1
                line = f"a stage could not be replaced ({error}); trying again in {pause:.2g} s"
                self._tell(self._report, line)
                if failures == FAILURES_MAX:
                    self.state = "failed"
                    reason = error if isinstance(error, CordeeError) else StageFailed(str(error))
                    self._tell(self._listener.on_failed, reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _watch(self) -> None:
        """Kill workers that hang while something is wanted of them."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.state == "ready" and self._owed == 0:
                continue
            stalled = self._owed > 0 and time.monotonic() - self._heard > STALL_SECONDS
            for stage in self.stages:
                worker = stage.worker
                if worker is not None and worker.alive and (stalled or _stopped(worker)):
                    self._tell(self._report, f"process {worker.process.pid} hangs: it is replaced")
                    _kill(worker)


async def _opening(reader: asyncio.StreamReader) -> Message | None:
    """The first message of a link; None if there is none in time."""
    try:
        async with asyncio.timeout(JOIN_SECONDS):
            message, _ = await link.read(reader)
    except (LinkClosed, TimeoutError):
        return None
    return message


async def _answer(
    worker: WorkerHandle, kinds: tuple[type[Message], ...], seconds: float, placement: str | None = None
) -> Message:
    """The worker's next control message of these kinds, about this placement.

    Raises:
        StageFailed: it ended first, or took too long and was killed.
    """
    try:
        async with asyncio.timeout(seconds):
            while (message := await worker.said.get()) is not None:
                if isinstance(message, kinds) and placement in (None, getattr(message, "placement", None)):
                    return message
    except TimeoutError as error:
        _kill(worker)
        raise StageFailed(f"process {worker.process.pid} did not answer within {seconds:.0f} s") from error
    worker.said.put_nowait(None)  # for whoever asks next
    raise StageFailed(f"process {worker.process.pid} ended before it answered")


async def _end(worker: WorkerHandle) -> None:
    """End a worker: by its control link, else by force."""
    worker.writer.transport.abort()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await worker.process.wait()
    except TimeoutError:
        _kill(worker)
        await worker.process.wait()


def _kill(worker: WorkerHandle) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.process.kill()


def _stopped(worker: WorkerHandle) -> bool:
    try:
        return psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
