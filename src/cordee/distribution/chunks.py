"""Parts of models between nodes: who has chunks answers for them, who needs a part asks several at once.

Chunks that no neighbour has may come from outside (the hub), where a fetch is told of one; it is believed no
more than a neighbour.

An ask names (manifest, tensor, chunk); the manifest itself is asked for in pieces, as the chunks of tensor
SHEET. An answer is the bytes, or that they are not here, or that too many ask. Nothing that comes is
believed: a chunk is checked against the manifest, the manifest against its digest. A neighbour that gives
wrong bytes, or gives none in time, is dropped for the rest of the fetch and the reason is reported; its
chunks are asked of others. What came stays on disk, so a fetch that failed or was cancelled goes on where it
stopped.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from cordee.cluster.facts import SliceHeld
from cordee.distribution.assemble import Assembly
from cordee.distribution.manifest import CHUNK_BYTES, MANIFEST_BYTES_LIMIT, Chunk, Manifest
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, CordeeError, StorageFailed
from cordee.models.slices import Progress, SliceFile

# The tensor number under which a manifest's own bytes are asked for.
MANIFEST = -1
# Chunks in memory and on the way: four keep a link of 1 Gbit/s busy, sixteen fill several.
IN_FLIGHT_EACH = 4
IN_FLIGHT = 16
# So much comes from outside before the neighbours are looked at again: some seconds of a fast connection.
OUTSIDE_BYTES = 128 << 20
# How often a fetch asks outside for chunks that came wrong: a fault on the way is gone the next time.
OUTSIDE_TRIES = 3
# Threads that check and write what came; one does 1 GB/s.
WRITERS = 2
# Four chunks in this time are 3 Mbit/s: who is slower is not worth waiting for, unless nobody else has them.
PATIENCE_SECONDS = 10.0
LAST_PATIENCE_SECONDS = 60.0
# How long a fetch waits before it looks for new neighbours, and before it asks one again.
LOOK_AGAIN_SECONDS = 1.0
AGAIN_SECONDS = 0.2
# The bus drops what is too much and blinks when it reopens; who serves nothing for so long is gone.
SILENCE_SECONDS = 2.0
# Parts that a neighbour may say it has of one model; real ones have a few.
HELD_LIMIT = 64
# Asks that are answered at once (each holds a chunk in memory) and that wait; more are told to come again.
READERS = 4
WAITING_LIMIT = 64
# A link of 2.5 Gbit/s less a fifth for streams; reading and hashing so much takes a fifth of a core.
SERVED_BYTES_PER_SECOND = 250e6

Report = Callable[[str], None]
Holders = Callable[[], Mapping[str, Sequence[SliceHeld]]]


class Queries(Protocol):
    """What is needed of the bus (`cordee.net.bus.Bus`)."""

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        """The answers of whoever serves the key that came within `seconds`."""


class Outside(Protocol):
    """Where chunks come from that no neighbour has (`cordee.distribution.hub_ranges.HubModel`)."""

    def fill(self, assembly: Assembly, chunks: Sequence[Chunk]) -> None:
        """Bring chunks that are missing, in a thread. Raises CordeeError; what came is kept."""


class ChunkRequest(msgspec.Struct, frozen=True, array_like=True):
    """Which chunk is wanted."""

    manifest: str
    tensor: int
    chunk: int


class ChunkReply(msgspec.Struct, frozen=True, array_like=True):
    """The bytes, if they are here."""

    state: Literal["here", "absent", "busy"]
    data: bytes = b""


def chunk_key(node: str) -> str:
    """The key under which a node answers for its chunks."""
    return f"chunk/{node}"


class ChunkServer:
    """Answers for the chunks that lie here.

    `on_damage(model, message)` is called when one is damaged on this disk: verify the parts of that model.
    """

    def __init__(
        self,
        parts: SliceStore,
        on_damage: Callable[[str, str], None],
        bytes_per_second: float = SERVED_BYTES_PER_SECOND,
    ) -> None:
        self._parts, self._on_damage, self._bytes_per_second = parts, on_damage, bytes_per_second
        self._readers = asyncio.Semaphore(READERS)
        self._waiting = 0
        self._free_at = 0.0

    async def answer(self, payload: bytes) -> bytes:
        """The handler to serve under `chunk_key`; whatever is asked, it answers."""
        try:
            ask = msgspec.msgpack.decode(payload, type=ChunkRequest)
        except msgspec.MsgspecError:
            return msgspec.msgpack.encode(ChunkReply("absent"))
        if self._waiting >= WAITING_LIMIT:
            return msgspec.msgpack.encode(ChunkReply("busy"))
        self._waiting += 1
        try:
            async with self._readers:
                answer = await self._answer(ask)
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + len(answer.data) / self._bytes_per_second
                await asyncio.sleep(self._free_at - now)
        finally:
            self._waiting -= 1
        return msgspec.msgpack.encode(answer)

    async def _answer(self, ask: ChunkRequest) -> ChunkReply:
        try:
            return ChunkReply("here", await asyncio.to_thread(self._read, ask))
        except BadModelFile as error:
            self._on_damage(ask.manifest, error.message)
        except (CordeeError, OSError):
            pass  # whoever asks is told no more than that it is not here
        return ChunkReply("absent")

    def _read(self, ask: ChunkRequest) -> bytes:
        if ask.tensor == MANIFEST:
            return self._parts.read_manifest_piece(ask.manifest, ask.chunk)
        return self._parts.read(ask.manifest, Chunk(ask.tensor, ask.chunk))


class ChunkClient:
    """Fetches manifests and parts. `bytes_per_second` is what each node gave in the last fetch from it;
    `report` is told whatever went wrong on the way."""

    def __init__(self, bus: Queries, parts: SliceStore, report: Report) -> None:
        self.bytes_per_second: dict[str, float] = {}
        self.report = report
        self._bus, self._parts = bus, parts

    async def manifest(self, digest: str, nodes: Iterable[str]) -> Manifest:
        """The manifest of a model, from this disk or the first of `nodes` that gives it.

        Raises:
            StorageFailed: none of them gives it, or there is no room on disk.
        """
        try:
            return await asyncio.to_thread(self._parts.manifest, digest)
        except CordeeError:  # not here, or damaged
            pass
        faults = []
        for node in nodes:
            try:
                return await asyncio.to_thread(
                    self._parts.add_manifest, digest, await self._pieces(digest, node)
                )
            except (BadModelFile, _Lost) as error:
                faults.append(f"node {node}: {error}")
                self.report(f"The manifest of {digest} did not come from node {node}: {error}")
        reasons = "; ".join(faults) or "nobody has it"
        raise StorageFailed(f"The model {digest} is not to be had from the cluster ({reasons}).")

    async def slice(
        self,
        digest: str,
        first: int,
        last: int,
        holders: Holders,
        progress: Progress | None = None,
        outside: Callable[[], Outside] | None = None,
    ) -> SliceFile:
        """Layers `first` to `last` of a model whose manifest is here (0 to 0: its embedding) as a file.

        `holders` says, whenever it is called, which nodes have what; what none of them has comes from
        `outside` (opened in a thread, once it is needed). `progress(done_bytes, total_bytes)` counts what was
        here too. To cancel the task is to cancel the fetch.

        Raises:
            StorageFailed: nobody gives some of the chunks, with all reasons; no room on disk; or another
                process assembles this part.
            ModelNotFound, BadRequest, UnsupportedModel, BadModelFile: as `SliceStore.layout` does.
        """
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def tell(done: int, total: int) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if progress:
                loop.call_soon_threadsafe(progress, done, total)

        stack, pool = ExitStack(), ThreadPoolExecutor(WRITERS + 1, "chunks")  # one waits for outside
        try:
            if found := await loop.run_in_executor(pool, self._parts.slice, digest, first, last):
                return found
            opened = self._parts.assembling(digest, first, last, tell)
            assembly = await loop.run_in_executor(pool, stack.enter_context, opened)
            await _Fetch(self, assembly, holders, pool, outside).run()
            return await loop.run_in_executor(pool, assembly.finish)
        finally:
            cancelled.set()
            try:
                await _certainly(asyncio.to_thread(pool.shutdown))  # no thread writes once the file is closed
            finally:
                stack.close()

    async def ask(self, node: str, ask: ChunkRequest, patience_seconds: float) -> ChunkReply:
        """What a node answers, asked again while it is busy; raises _Lost with the reason if it does not."""
        payload, begun = msgspec.msgpack.encode(ask), time.monotonic()
        end, heard = begun + patience_seconds, begun
        while (left := end - time.monotonic()) > 0 and time.monotonic() - heard < SILENCE_SECONDS:
            if answers := await self._bus.query(chunk_key(node), payload, seconds=left):
                try:
                    answer = msgspec.msgpack.decode(answers[0], type=ChunkReply)
                except msgspec.MsgspecError as error:
                    raise _Lost(f"it answers nonsense ({error})") from error
                if answer.state != "busy":
                    return answer
                heard = time.monotonic()
            await asyncio.sleep(AGAIN_SECONDS)
        raise _Lost(f"it gave no chunk in {time.monotonic() - begun:.1f} seconds")

    async def _pieces(self, digest: str, node: str) -> bytes:
        """A manifest as a node gives it, still to be checked."""
        content = bytearray()
        for index in range(MANIFEST_BYTES_LIMIT // CHUNK_BYTES + 1):
            answer = await self.ask(node, ChunkRequest(digest, MANIFEST, index), PATIENCE_SECONDS)
            if answer.state != "here":
                raise _Lost("it has none")
            content += answer.data
            if len(answer.data) != CHUNK_BYTES:
                return bytes(content)
        raise _Lost("it gives more than any manifest has")

    def tensors(self, digest: str, held: Sequence[SliceHeld]) -> set[int]:
        """The tensors that somebody who says so has of a model; what cannot be is nothing."""
        found: set[int] = set()
        for part in held[:HELD_LIMIT]:
            if part.model == digest:
                try:
                    found |= self._parts.layout(digest, part.first, part.last).offsets.keys()
                except CordeeError:
                    continue
        return found


class _Lost(Exception):
    """A node gives no answer, or none that is one; the text says why."""


@dataclass
class _Neighbour:
    """What is known of a node in one fetch."""

    fault: str = ""  # why it is asked no more
    absent: set[int] = field(default_factory=set)  # tensors it turned out not to have
    in_flight: int = 0
    nbytes: int = 0
    busy_seconds: float = 0.0
    busy_since: float = 0.0

    def depart(self) -> None:
        """An ask leaves."""
        if not self.in_flight:
            self.busy_since = time.monotonic()
        self.in_flight += 1

    def land(self, nbytes: int) -> None:
        """An ask is over and gave so many sound bytes."""
        self.in_flight -= 1
        self.nbytes += nbytes
        if not self.in_flight:
            self.busy_seconds += time.monotonic() - self.busy_since


class _Fetch:
    """What one part still needs, and who is being asked for what."""

    def __init__(
        self,
        client: ChunkClient,
        assembly: Assembly,
        holders: Holders,
        pool: ThreadPoolExecutor,
        outside: Callable[[], Outside] | None,
    ) -> None:
        self._client, self._assembly, self._holders, self._pool = client, assembly, holders, pool
        self._manifest = assembly.layout.manifest
        self._waiting: dict[int, deque[Chunk]] = {}  # by tensor, so that nobody looks through all chunks
        for chunk in assembly.missing:
            self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        self._neighbours: dict[str, _Neighbour] = {}
        self._tensors: dict[tuple[SliceHeld, ...], set[int]] = {}
        self._flights: dict[asyncio.Task[str], tuple[str, Chunk]] = {}
        self._open, self._outside = outside, None
        self._outside_fault = "" if outside else "not asked"  # why nothing more comes from outside
        self._outside_tries = OUTSIDE_TRIES
        self._outing: asyncio.Task[None] | None = None
        self._outing_chunks: list[Chunk] = []

    async def run(self) -> None:
        """Until nothing is missing; see `ChunkClient.part`."""
        try:
            while self._assembly.missing or self._under_way:
                self._launch()
                if not self._under_way:
                    raise self._nobody()
                done, _ = await asyncio.wait(
                    self._under_way, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if task is self._outing:
                        self._land_outing(task)
                    else:
                        self._land(task)
        finally:
            for task in self._under_way:
                task.cancel()
            await _certainly(asyncio.gather(*self._under_way, return_exceptions=True))
            for node, neighbour in self._neighbours.items():
                if neighbour.busy_seconds and neighbour.nbytes:
                    self._client.bytes_per_second[node] = neighbour.nbytes / neighbour.busy_seconds

    @property
    def _under_way(self) -> list[asyncio.Task]:
        return [*self._flights, *([self._outing] if self._outing else [])]

    def _launch(self) -> None:
        """Ask whoever can be asked for more; those with the fewest asks first. Outside, what nobody has."""
        has = {node: self._has(node, held) for node, held in self._holders().items()}
        if self._outing is None and not self._outside_fault:
            self._go_outside(set().union(*has.values()))
        while len(self._flights) < IN_FLIGHT:
            order = sorted(has, key=lambda node: (self._neighbours[node].in_flight, node))
            for node in order:
                tensor = next((number for number in self._waiting if number in has[node]), None)
                if tensor is not None and self._neighbours[node].in_flight < IN_FLIGHT_EACH:
                    others = any(tensor in tensors for other, tensors in has.items() if other != node)
                    self._depart(node, tensor, PATIENCE_SECONDS if others else LAST_PATIENCE_SECONDS)
                    break
            else:
                return

    def _has(self, node: str, held: Sequence[SliceHeld]) -> set[int]:
        """The tensors that a node may be asked for."""
        neighbour = self._neighbours.setdefault(node, _Neighbour())
        key = tuple(held)
        if key not in self._tensors:
            self._tensors[key] = self._client.tensors(self._manifest.digest, held)
        return set() if neighbour.fault else self._tensors[key] - neighbour.absent

    def _depart(self, node: str, tensor: int, patience_seconds: float) -> None:
        chunk = self._waiting[tensor].popleft()
        if not self._waiting[tensor]:
            del self._waiting[tensor]
        self._neighbours[node].depart()
        self._flights[asyncio.create_task(self._flight(node, chunk, patience_seconds))] = (node, chunk)

    async def _flight(self, node: str, chunk: Chunk, patience_seconds: float) -> str:
        """Ask for a chunk and write it; gives the answer's state."""
        ask = ChunkRequest(self._manifest.digest, *chunk)
        answer = await self._client.ask(node, ask, patience_seconds)
        if answer.state == "here":
            put = self._assembly.put
            await asyncio.get_running_loop().run_in_executor(
                self._pool, put, chunk, answer.data, f"Node {node}"
            )
        return answer.state

    def _land(self, task: asyncio.Task[str]) -> None:
        node, chunk = self._flights.pop(task)
        neighbour = self._neighbours[node]
        came = chunk not in self._assembly.missing
        neighbour.land(self._manifest.nbytes(chunk) if came else 0)
        if not came:
            self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        try:
            if task.result() == "absent":
                neighbour.absent.add(chunk.tensor)
        except (BadModelFile, _Lost) as error:
            if not neighbour.fault:
                neighbour.fault = str(error)
                self._client.report(f"Node {node} is asked no more: {neighbour.fault}")

    def _go_outside(self, held: set[int]) -> None:
        """Take some of what no neighbour has out of the line, and have it fetched."""
        chunks, nbytes = self._outing_chunks, 0
        for tensor in [number for number in self._waiting if number not in held]:
            while self._waiting[tensor] and nbytes < OUTSIDE_BYTES:
                chunks.append(self._waiting[tensor].popleft())
                nbytes += self._manifest.nbytes(chunks[-1])
            if not self._waiting[tensor]:
                del self._waiting[tensor]
            if nbytes >= OUTSIDE_BYTES:
                break
        if chunks:
            loop = asyncio.get_running_loop()
            self._outing = asyncio.ensure_future(loop.run_in_executor(self._pool, self._fill, tuple(chunks)))

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        if self._outside is None:
            assert self._open is not None, "nobody goes outside without a way"
            self._outside = self._open()
        self._outside.fill(self._assembly, chunks)

    def _land_outing(self, outing: asyncio.Task[None]) -> None:
        for chunk in self._outing_chunks:
            if chunk in self._assembly.missing:
                self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        self._outing, self._outing_chunks = None, []
        try:
            outing.result()
        except BadModelFile as error:
            self._client.report(error.message)
            self._outside_tries -= 1
            self._outside_fault = "" if self._outside_tries else error.message
        except CordeeError as error:
            self._outside_fault = error.message
            self._client.report(f"Nothing more from outside: {error.message}")

    def _nobody(self) -> StorageFailed:
        missing = self._assembly.missing
        faults = [f"node {node}: {n.fault}" for node, n in self._neighbours.items() if n.fault]
        if self._open:
            faults.append(f"outside: {self._outside_fault}")
        return StorageFailed(
            f"Nobody gives {len(missing)} chunks of {self._assembly.layout.name}, as "
            f"{self._manifest.chunk_name(next(iter(missing)))} ({'; '.join(faults) or 'nobody has them'}): "
            "what came is kept."
        )


async def _certainly(work: Awaitable[object]) -> None:
    """Wait for something that must be over before we go on, even if we are cancelled meanwhile: then
    afterwards. (Who was cancelled and goes on is a process that nobody knows of any more.)"""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
