"""Worker processes as their parent sees them: started, loaded, wired, watched, ended.

`Workers` has the folder with their sockets; each `WorkerProcess` is one process. What a worker reports
unasked, that it ended or that one of its links broke, goes to the owner it was started for.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

import msgspec
import psutil

from cordee import children, errors
from cordee.engine.stage import StageDescription
from cordee.errors import CordeeError, StageFailed, StorageFailed
from cordee.files import disk_faults
from cordee.system import disk, links, locks, processes
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import (
    AdmitReaders,
    Broken,
    Hello,
    KvReaders,
    Loaded,
    LoadFailed,
    LoadStage,
    Message,
    Recompute,
    Recomputed,
    Record,
    RecordQuery,
    Wire,
    Wired,
    WireFailed,
)

COMMAND = tuple(children.command("cordee.worker.worker"))
START_SECONDS = 60.0  # a worker's interpreter and imports, on a slow and busy machine
LOAD_SECONDS = 3600.0  # 60 GB from a slow disk take half an hour
HELLO_SECONDS = 10.0  # for the first message of a link, which is sent as soon as it is there
WIRE_SECONDS = 600.0  # a worker first finishes what it computes: 512 rows, at one row a second
RECORD_SECONDS = 600.0  # for a record: a worker first ends what it computes
RECOMPUTE_SECONDS = 600.0  # for rows computed again with the lowest priority
CLOSE_SECONDS = 5.0  # a worker ends at once with its control link, unless it is stopped or swapped out

# How long threads spin at a barrier before they sleep (libgomp; single trials on 2 cores, starter model).
# Beside one busy process, spinners hold the core that the sleeper needs: with the default, 300,000, a token
# takes over 200 ms; 40 ms with 1,000 spins, 91 with 4,000, 167 with 8,000. The next stage needs it, too,
# while threads of the stage before still spin: three stages make 58 tokens/s with 100,000 spins, 98 with
# 16,000, 105 with 4,000, 109 with 1,000, 82 with 100. One stage alone makes 124 with 4,000, 127 with 1,000,
# 128 with 500. "passive" is half as fast.
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
BATCH_INVARIANT_ENVIRONMENT = {"GGML_CPU_TILED_MM": "0"}  # see engine/llama/stage.py

FOLDER_PREFIX = "cordee-run-"  # begins the name of a folder of sockets
LOCK = "lock"
# A socket's name has at most 107 bytes (unix(7)); those of the folder and of a socket in it are the rest.
TOP_BYTES_MAX = 107 - len(f"/.{FOLDER_PREFIX}12345678/0123456789abcdef")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Answer = TypeVar("Answer", bound=Message)


class WorkerOwner(Protocol):
    """Who is told what workers report unasked; called on the event loop, and must not raise."""

    def on_ended(self, worker: "WorkerProcess") -> None:
        """Its process is gone."""

    def on_broken(self, worker: "WorkerProcess", wiring: str) -> None:
        """One of its links in this wiring is gone."""

    def on_late(self, node: str, reason: str) -> None:
        """Another node is too slow, or cannot be reached."""


class WorkerProcess:
    """A worker process. Made by `Workers.spawn`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, inbox: str, streams: Streams) -> None:
        self.id = name
        self.inbox = inbox  # the local link at which it takes rows
        self.endpoint = ""  # where other machines reach it, if it listens for them
        self.description: StageDescription | None = None
        self.ended = False
        self.kv_readers = 0  # workers of the next placement that may take sequences over from it
        self._process = process
        self._reader, self._writer = streams
        self._answers: asyncio.Queue[Message | None] = asyncio.Queue()  # to what it was sent; None: it ended
        self._spot_answers: dict[int, asyncio.Future[tuple[Record | Recomputed, bytes]]] = {}  # by number
        self._queries = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs, loaded or loading."""
        return not self.ended and self._process.returncode is None

    @property
    def status(self) -> int | None:
        """The exit status of its process; negative: it was ended by that signal."""
        return self._process.returncode

    @property
    def stopped(self) -> bool:
        """Whether its process was stopped by a signal."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    async def load(self, load: LoadStage) -> None:
        """Have it load a slice.

        Raises:
            CordeeError: the slice cannot be loaded, or the process ended.
        """
        frames.write(self._writer, load)
        answer = await self._answer((Loaded, LoadFailed), LOAD_SECONDS)
        if isinstance(answer, LoadFailed):
            raise rebuilt_error(answer)
        self.description, self.endpoint = answer.description, answer.endpoint

    async def wire(self, wire: Wire) -> None:
        """Connect it to its neighbours in a new wiring; it forgets all sequences.

        Raises:
            StageFailed: the next stage cannot be reached, or the process ended.
        """
        frames.write(self._writer, wire)
        kinds = (Wired, WireFailed)
        answer = await self._answer(kinds, WIRE_SECONDS, lambda answer: answer.wiring == wire.wiring)
        if isinstance(answer, WireFailed):
            raise StageFailed(f"a stage cannot reach the next one ({answer.message})")

    def admit_readers(self, wiring: str, nodes: frozenset[str]) -> None:
        """Let workers on these nodes take over its sequences of a wiring."""
        frames.write(self._writer, AdmitReaders(wiring, tuple(sorted(nodes))))

    async def record(self, query: RecordQuery) -> tuple[Record, bytes]:
        """What its stage received and sent; see RecordQuery.

        Raises:
            StageFailed: it did not answer in time, or ended.
        """
        self._queries += 1
        query = msgspec.structs.replace(query, number=self._queries)
        answer, payload = await self._spot_answer(self._queries, query, b"", RECORD_SECONDS)
        assert isinstance(answer, Record)
        return answer, payload

    async def recompute(self, message: Recompute, payload: bytes) -> tuple[Recomputed, bytes]:
        """Rows computed by a worker that does nothing else.

        Raises:
            StageFailed: it did not answer in time, or ended.
        """
        answer, rows = await self._spot_answer(0, message, payload, RECOMPUTE_SECONDS)
        assert isinstance(answer, Recomputed)
        return answer, rows

    def kill(self) -> None:
        """End it by force; `end` waits for that."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        """End it by closing its control link, else by force; ending twice is harmless."""
        self._writer.transport.abort()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def follow(self, owner: WorkerOwner) -> None:
        """Read its messages until its control link ends; then its process ends too."""
        try:
            while True:
                message, payload = await frames.read(self._reader)
                if isinstance(message, Broken | WireFailed) and message.node:
                    owner.on_late(message.node, message.message)
                if isinstance(message, Broken):
                    owner.on_broken(self, message.wiring)
                elif isinstance(message, KvReaders):
                    self.kv_readers = message.count
                elif isinstance(message, Record | Recomputed):
                    number = message.number if isinstance(message, Record) else 0
                    future = self._spot_answers.get(number)
                    if future is not None and not future.done():
                        future.set_result((message, payload))
                else:
                    self._answers.put_nowait(message)
        except LinkClosed:
            self.ended = True
        self._answers.put_nowait(None)
        for future in self._spot_answers.values():
            if not future.done():
                future.set_exception(StageFailed(f"process {self.pid} ended before it answered"))
        await self.end()
        owner.on_ended(self)

    async def _spot_answer(
        self, number: int, message: RecordQuery | Recompute, payload: bytes, seconds: float
    ) -> tuple[Record | Recomputed, bytes]:
        if self.ended:
            raise StageFailed(f"process {self.pid} has ended")
        self._spot_answers[number] = future = asyncio.get_running_loop().create_future()
        try:
            frames.write(self._writer, message, payload)
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            raise StageFailed(f"process {self.pid} did not answer within {seconds:.0f} s") from error
        finally:
            del self._spot_answers[number]

    async def _answer(
        self,
        kinds: tuple[type[Answer], ...],
        seconds: float,
        fits: Callable[[Answer], bool] = lambda _: True,
    ) -> Answer:
        """Its next control message of these kinds that fits.

        Raises:
            StageFailed: it ended first, or took too long and was killed.
        """
        try:
            async with asyncio.timeout(seconds):
                while (message := await self._answers.get()) is not None:
                    if isinstance(message, kinds) and fits(message):
                        return message
        except TimeoutError as error:
            self.kill()
            raise StageFailed(f"process {self.pid} did not answer within {seconds:.0f} s") from error
        self._answers.put_nowait(None)  # for the next call
        raise StageFailed(f"process {self.pid} ended before it answered")


class Workers:
    """Starts workers. Made by `Workers.open`; all methods on one event loop."""

    def __init__(self) -> None:
        self.folder, self._lock = _own_folder()
        self._expected: dict[str, asyncio.Future[Streams]] = {}
        self._servers: list[asyncio.Server] = []

    @classmethod
    async def open(cls) -> "Workers":
        """A folder of sockets, and their control socket."""
        workers = cls()
        try:
            await workers.listen("control", workers._identify)
        except BaseException:  # among them that it is cancelled
            workers.close()
            raise
        return workers

    async def listen(
        self, name: str, accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> str:
        """A local link in the folder; its path."""
        path = self.folder / name
        self._servers.append(await links.serve(path, accept))
        return str(path)

    async def spawn(
        self,
        environment: Mapping[str, str],
        owner: WorkerOwner,
        keep: Callable[[Coroutine[None, None, None]], object],
    ) -> WorkerProcess:
        """Start a process; `keep` runs the coroutine that follows it.

        Raises:
            StageFailed: it does not come up.
        """
        name = secrets.token_hex(8)
        inbox = str(self.folder / name)
        self._expected[name] = connected = asyncio.get_running_loop().create_future()
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            name,
            str(self.folder / "control"),
            inbox,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, **environment},
            **processes.APART,
        )
        processes.ends_with_this(process.pid)
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
            self._expected.pop(name, None)
        worker = WorkerProcess(name, process, inbox, connected.result())
        keep(worker.follow(owner))
        return worker

    def close(self) -> None:
        """Remove the sockets; the workers must have been ended."""
        for server in self._servers:
            server.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        if disk.OPEN_FILES_STAY:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _identify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await opening(reader)
        expected = self._expected.pop(hello.worker, None) if isinstance(hello, Hello) else None
        if expected is None or expected.done():
            writer.transport.abort()
        else:
            expected.set_result((reader, writer))


def _own_folder() -> tuple[Path, TextIO]:
    """A new folder for sockets (mode 0700), and a lock that the system takes from a process that ends: a
    folder without one is what a killed process left, and is removed here.

    Raises:
        StorageFailed: there is no place for it.
    """
    top = _sockets_top()
    with disk_faults(top):
        for left in top.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(OSError):
                with (left / LOCK).open("r+") as lock:
                    locks.take(lock)
                    shutil.rmtree(left, ignore_errors=disk.OPEN_FILES_STAY)
                if disk.OPEN_FILES_STAY:
                    shutil.rmtree(left)
        # Hidden until it is locked; where open files stay, a folder that has one is safe without that.
        hidden = "" if disk.OPEN_FILES_STAY else "."
        made = Path(tempfile.mkdtemp(prefix=f"{hidden}{FOLDER_PREFIX}", dir=top))
        lock = (made / LOCK).open("w")
        locks.wait_for(lock)
        if disk.OPEN_FILES_STAY:
            return made, lock
        return made.rename(top / made.name.removeprefix(".")), lock  # others see it once it is locked


def _sockets_top() -> Path:
    """The folder for temporary files, or if its name is too long for sockets one for the same purpose.

    Raises:
        StorageFailed: there is none that can be written to.
    """
    if not links.NAMES_ARE_SHORT:
        return Path(tempfile.gettempdir())
    places = [os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    with contextlib.suppress(FileNotFoundError):
        places.insert(0, tempfile.gettempdir())
    for place in places:
        is_short = place.startswith("/") and len(os.fsencode(place)) <= TOP_BYTES_MAX
        if is_short and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise StorageFailed(
        "There is no folder for temporary files with a short name that can be written to: set TMPDIR to one."
    )


async def opening(reader: asyncio.StreamReader) -> Message | None:
    """The first message of a link; None if there is none in time."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            message, _ = await frames.read(reader, 0, frames.OPENING_BYTES_MAX)
    except (LinkClosed, TimeoutError):
        return None
    return message


def rebuilt_error(failed: LoadFailed) -> CordeeError:
    """The error that a worker met, as an exception of this process."""
    kind = getattr(errors, failed.error, CordeeError)
    return kind(failed.message)
