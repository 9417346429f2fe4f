"""The pipeline: stage workers of one model on this machine, supervised; micro-batches in, tokens out.

    loading -> ready <-> replacing -> failed
       |         |           |          |
       '---------'-----------'----------'--> closed

- One worker process per stage. The pipeline hands rows to the first and hears tokens from the last; between
  them rows go from worker to worker.
- A worker that ends, for whatever reason, is replaced; the others keep their loaded stages. All are then
  wired to a new placement, whose id is the hash of the slices and of who runs them, and start without any
  sequence: the listener's `on_lost` has told the scheduler to replay its token logs.
- A worker that hangs (stopped, or silent for STALL_SECONDS with work under way) is killed, which makes it
  one that ended.
- Replacing is tried again after a pause that doubles up to RETRY_SECONDS_MAX, for as long as the pipeline
  lives; after FAILURES_MAX in a row its state is `failed` until one succeeds.
"""

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
    placement_id,
)
from cordee.node.worker import rebuilt_error

State = Literal["loading", "ready", "replacing", "failed", "closed"]

START_SECONDS = 60.0  # a worker's interpreter and imports, on a slow and busy machine
LOAD_SECONDS = 3600.0  # 60 GB from a slow disk take half an hour
WIRE_SECONDS = 60.0  # forgetting sequences clears the KV cache's memory
STALL_SECONDS = 600.0  # 512 rows of prefill take this long on a machine that does one row a second
WATCH_SECONDS = 1.0  # how often workers that owe an answer are looked at
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 30.0
FAILURES_MAX = 3  # replacements that failed one after the other before the state says so
CLOSE_SECONDS = 5.0  # a worker inside a long native call does not see its control link end

# libgomp's default is to spin for about a millisecond at each barrier: fastest on an idle machine, but when
# anything else wants a core the spinners hold what the sleeper needs, and decoding falls from 120 to 5
# tokens/s (measured on 2 cores). 1,000 spins are as fast alone and immune. Its "passive" is 2.5 times slower.
WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
EXACT_ENVIRONMENT = {"GGML_CPU_TILED_MM": "0"}  # see engine/llama.py


class Listener(Protocol):
    """Who is told what the pipeline does; called on the event loop, and must not raise."""

    def on_tokens(self, tokens: Tokens) -> None:
        """A micro-batch's result came."""

    def on_lost(self) -> None:
        """Nothing that was sent will be answered, and all sequences are forgotten."""

    def on_ready(self) -> None:
        """Micro-batches may be sent."""

    def on_failed(self, error: CordeeError) -> None:
        """No replacement for now; the pipeline goes on trying."""


@dataclass
class WorkerHandle:
    """A worker as the pipeline sees it."""

    id: str
    process: asyncio.subprocess.Process
    inbox: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    description: StageDescription | None = None

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


@dataclass
class Stage:
    """A place in the pipeline: its slice, and the worker that runs it now. `first` to `last` (exclusive)
    are its layers."""

    slice: SliceFile
    worker: WorkerHandle | None = None
    restarts: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

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
        listener: Listener,
        report: Callable[[str], None],
    ) -> None:
        self.state: State = "loading"
        self.stages = [Stage(piece) for piece in slices]
        self._config = config
        self._listener = listener
        self._report = report
        self._placement = ""
        self._folder = Path(tempfile.mkdtemp(prefix="cordee-"))  # mode 0700
        self._expected: dict[str, asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._servers: list[asyncio.Server] = []
        self._first: asyncio.StreamWriter | None = None
        self._answers: asyncio.StreamWriter | None = None
        self._owed = 0
        self._heard = time.monotonic()
        self._tasks: set[asyncio.Task] = set()

    @classmethod
    async def start(
        cls,
        slices: Sequence[SliceFile],
        config: StageConfig,
        listener: Listener,
        report: Callable[[str], None],
    ) -> "Pipeline":
        """Start the workers, load their slices, wire them.

        Raises:
            CordeeError: what the first worker that could not load says.
        """
        pipeline = cls(slices, config, listener, report)
        try:
            await pipeline._listen()
            await pipeline._raise_workers()
            await pipeline._wire()
        except BaseException:
            await pipeline.close()
            raise
        pipeline.state = "ready"
        pipeline._keep(pipeline._supervise())
        pipeline._keep(pipeline._watch())
        return pipeline

    @property
    def placement(self) -> str:
        """The id of the placement that is wired."""
        return self._placement

    def send(self, rows: Rows, payload: bytes | memoryview) -> None:
        """Send a micro-batch to the first stage; its result, or a loss, comes to the listener."""
        assert self._first is not None, "only a ready pipeline takes micro-batches"
        if self._owed == 0:
            self._heard = time.monotonic()
        self._owed += 1
        link.write(self._first, rows, payload)

    async def close(self) -> None:
        """End all workers and remove the sockets; closing twice is harmless."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in (self._first, self._answers):
            if writer is not None:
                writer.close()
        for server in self._servers:
            server.close()
        workers = [stage.worker for stage in self.stages if stage.worker is not None]
        await asyncio.gather(*(_end(worker) for worker in workers))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        for name, accepted in (("control", self._accept_control), ("tokens", self._accept_tokens)):
            self._servers.append(await asyncio.start_unix_server(accepted, self._folder / name))

    async def _accept_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            message, _ = await link.read(reader)
        except LinkClosed:
            writer.close()
            return
        expected = self._expected.pop(message.worker, None) if isinstance(message, Hello) else None
        if expected is None or expected.done():
            writer.close()
        else:
            expected.set_result((reader, writer))

    async def _accept_tokens(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            join, _ = await link.read(reader)
            if not isinstance(join, Join) or join.placement != self._placement:
                return
            if self._answers is not None:
                self._answers.close()
            self._answers = writer
            while True:
                message, _ = await link.read(reader)
                if isinstance(message, Tokens) and message.placement == self._placement:
                    self._owed -= 1
                    self._heard = time.monotonic()
                    self._listener.on_tokens(message)
        except LinkClosed:
            pass  # the last worker ended; its exit is noticed by the supervisor
        finally:
            writer.close()

    async def _raise_workers(self) -> None:
        """Start and load a worker for every stage that has none alive."""
        missing = [stage for stage in self.stages if stage.worker is None or not stage.worker.alive]
        results = await asyncio.gather(
            *(self._raise_worker(stage) for stage in missing), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _raise_worker(self, stage: Stage) -> None:
        if stage.worker is not None:
            stage.worker.writer.close()
        stage.worker = worker = await self._spawn()
        stage.ended.clear()
        self._keep(self._wait_for_end(stage, worker))
        is_last = stage is self.stages[-1]
        link.write(worker.writer, Load(str(stage.slice.path), self._config, is_last))
        answer = await _answer(worker, LOAD_SECONDS)
        if isinstance(answer, LoadFailed):
            worker.process.kill()
            await worker.process.wait()
            raise rebuilt_error(answer)
        if not isinstance(answer, Loaded):
            raise StageFailed(
                f"layers {stage.slice.first} to {stage.slice.last - 1}: the worker did not load"
            )
        worker.description = answer.description
        self._report(
            f"layers {stage.slice.first} to {stage.slice.last - 1} loaded (process {worker.process.pid})"
        )

    async def _spawn(self) -> WorkerHandle:
        worker_id = secrets.token_hex(8)
        inbox = str(self._folder / worker_id)
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        if self._config.exact:
            environment |= EXACT_ENVIRONMENT
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cordee.node.worker",
            worker_id,
            str(self._folder / "control"),
            inbox,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is the service's to handle
        )
        self._expected[worker_id] = connected = asyncio.get_running_loop().create_future()
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((connected, ended), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not connected.done():
                raise StageFailed(f"a stage worker did not start (status {process.returncode})")
        except BaseException:
            if process.returncode is None:
                process.kill()
            raise
        finally:
            ended.cancel()
            self._expected.pop(worker_id, None)
        return WorkerHandle(worker_id, process, inbox, *connected.result())

    async def _wait_for_end(self, stage: Stage, worker: WorkerHandle) -> None:
        status = await worker.process.wait()
        if stage.worker is worker and self.state != "closed":
            self._report(
                f"layers {stage.slice.first} to {stage.slice.last - 1}: process {worker.process.pid} ended "
                f"with status {status}"
            )
            stage.ended.set()

    async def _wire(self) -> None:
        """Join the workers to a new placement, without any sequence."""
        workers = [stage.worker for stage in self.stages if stage.worker is not None]
        self._placement = placement_id(
            [(stage.slice.digest, worker.id) for stage, worker in zip(self.stages, workers, strict=True)]
        )
        self._owed = 0
        if self._first is not None:
            self._first.close()
        downstream = [worker.inbox for worker in workers[1:]] + [str(self._folder / "tokens")]
        for worker, target in zip(workers, downstream, strict=True):
            link.write(worker.writer, Wire(self._placement, target))
        answers = await asyncio.gather(*(_answer(worker, WIRE_SECONDS) for worker in workers))
        if any(not isinstance(answer, Wired) for answer in answers):
            raise StageFailed("a stage was lost while the pipeline was wired")
        _, self._first = await asyncio.open_unix_connection(workers[0].inbox)
        link.write(self._first, Join(self._placement))

    async def _supervise(self) -> None:
        """Replace workers that ended, for as long as the pipeline lives."""
        while True:
            waits = [asyncio.ensure_future(stage.ended.wait()) for stage in self.stages]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self.state = "replacing"
            self._owed = 0
            self._listener.on_lost()
            await self._replace()
            self.state = "ready"
            self._listener.on_ready()

    async def _replace(self) -> None:
        failures, pause = 0, RETRY_SECONDS_MIN
        while True:
            try:
                for stage in self.stages:
                    if stage.ended.is_set():
                        stage.restarts += 1
                await self._raise_workers()
                await self._wire()
                return
            except (CordeeError, LinkClosed, OSError, TimeoutError) as error:
                failures += 1
                self._report(f"a stage could not be replaced ({error}); trying again in {pause:.2g} s")
                if failures == FAILURES_MAX:
                    self.state = "failed"
                    reason = error if isinstance(error, CordeeError) else StageFailed(str(error))
                    self._listener.on_failed(reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _watch(self) -> None:
        """Kill workers that hang while an answer is owed."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._owed == 0:
                continue
            silent = time.monotonic() - self._heard
            for stage in self.stages:
                worker = stage.worker
                if worker is not None and worker.alive and (silent > STALL_SECONDS or _stopped(worker)):
                    self._report(f"process {worker.process.pid} hangs: it is replaced")
                    worker.process.kill()


async def _answer(worker: WorkerHandle, seconds: float) -> Message:
    """The worker's next control message; LinkClosed if it ends first, or takes too long."""
    try:
        async with asyncio.timeout(seconds):
            message, _ = await link.read(worker.reader)
    except TimeoutError as error:
        worker.process.kill()
        raise LinkClosed(f"process {worker.process.pid} did not answer within {seconds:.0f} s") from error
    return message


async def _end(worker: WorkerHandle) -> None:
    worker.writer.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await worker.process.wait()
    except TimeoutError:
        worker.process.kill()
        await worker.process.wait()


def _stopped(worker: WorkerHandle) -> bool:
    try:
        return psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
