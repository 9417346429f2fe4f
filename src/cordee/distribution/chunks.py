"""Slices of models between nodes: who has chunks serves them, who needs a slice asks several nodes at once.

Chunks that no neighbour has may come from the hub, where a fetch is given that fallback; it is trusted no
more than a neighbour.

A request names (manifest, tensor, chunk); the manifest itself is requested in pieces, as the chunks of tensor
MANIFEST. The reply is the bytes, or that they are not here, or that too many ask. Nothing that comes is
trusted: a chunk is checked against the manifest, the manifest against its digest. A neighbour that gives
wrong bytes, or gives none in time, is dropped for the rest of the fetch and the reason is reported; its
chunks are requested from others. What came stays on disk, so a fetch that failed or was cancelled goes on
where it stopped.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from cordee.cluster.facts import SliceHeld
from cordee.distribution.assemble import Assembly
from cordee.distribution.manifest import CHUNK_BYTES, MANIFEST_BYTES_LIMIT, Chunk, Manifest
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, CordeeError, StorageFailed, UnsupportedModel
from cordee.models.slices import Progress, SliceFile

# The tensor number under which a manifest's own bytes are requested.
MANIFEST = -1
# Chunks in memory and on the way: four keep a link of 1 Gbit/s busy, sixteen fill several.
IN_FLIGHT_EACH = 4
IN_FLIGHT = 16
# This much comes from the fallback before the neighbours are looked at again: seconds of a fast connection.
FALLBACK_BYTES = 128 << 20
# How often a fetch asks the fallback for chunks that came wrong: a fault on the way is gone the next time.
FALLBACK_TRIES = 3
# Threads that check and write what came; one does 1 GB/s.
WRITERS = 2
# Four chunks in this time are 3 Mbit/s: a slower node is not worth waiting for, unless no other has them.
PATIENCE_SECONDS = 10.0
LAST_PATIENCE_SECONDS = 60.0
# How long a fetch waits before it looks for new neighbours, and before it asks one again.
LOOK_AGAIN_SECONDS = 1.0
AGAIN_SECONDS = 0.2
# The bus drops messages under load, and all of them while it reopens; a node that is silent longer is gone.
SILENCE_SECONDS = 2.0
# Slices of one model that a neighbour may claim to have; real ones have a few.
HELD_LIMIT = 64
# Requests that are answered at once (each holds a chunk in memory) and that wait; more are told to ask again.
READERS = 4
WAITING_LIMIT = 64
# A link of 2.5 Gbit/s less a fifth for streams; reading and hashing that much takes a fifth of a core.
SERVED_BYTES_PER_SECOND = 250e6

Report = Callable[[str], None]
Holders = Callable[[], Mapping[str, Sequence[SliceHeld]]]


class Queries(Protocol):
    """What is needed of the bus (`cordee.net.bus.Bus`)."""

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        """The replies that came within `seconds` from the nodes that serve the key."""
        ...


class Fallback(Protocol):
    """Where chunks come from that no neighbour has (`cordee.distribution.hub_ranges.HubModel`)."""

    def fill(self, assembly: Assembly, chunks: Sequence[Chunk]) -> None:
        """Fetch missing chunks, in a thread. Raises CordeeError; what came is kept."""


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
    """The key under which a node serves its chunks."""
    return f"chunk/{node}"


class ChunkServer:
    """Serves the chunks that are here.

    `on_damage(model, message)` is called when one is damaged on this disk: verify the slices of that model.
    """

    def __init__(
        self,
        slice_store: SliceStore,
        on_damage: Callable[[str, str], None],
        bytes_per_second: float = SERVED_BYTES_PER_SECOND,
    ) -> None:
        self._slice_store, self._on_damage, self._bytes_per_second = slice_store, on_damage, bytes_per_second
        self._readers = asyncio.Semaphore(READERS)
        self._waiting = 0
        self._free_at = 0.0

    async def answer(self, payload: bytes) -> bytes:
        """The handler to serve under `chunk_key`; it replies to any payload."""
        try:
            request = msgspec.msgpack.decode(payload, type=ChunkRequest)
        except msgspec.MsgspecError:
            return msgspec.msgpack.encode(ChunkReply("absent"))
        if self._waiting >= WAITING_LIMIT:
            return msgspec.msgpack.encode(ChunkReply("busy"))
        self._waiting += 1
        try:
            async with self._readers:
                reply = await self._reply(request)
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + len(reply.data) / self._bytes_per_second
                await asyncio.sleep(self._free_at - now)
        finally:
            self._waiting -= 1
        return msgspec.msgpack.encode(reply)

    async def _reply(self, request: ChunkRequest) -> ChunkReply:
        try:
            return ChunkReply("here", await asyncio.to_thread(self._read, request))
        except BadModelFile as error:
            self._on_damage(request.manifest, error.message)
        except (CordeeError, OSError):
            pass  # the other node is told no more than that it is not here
        return ChunkReply("absent")

    def _read(self, request: ChunkRequest) -> bytes:
        if request.tensor == MANIFEST:
            return self._slice_store.read_manifest_piece(request.manifest, request.chunk)
        return self._slice_store.read(request.manifest, Chunk(request.tensor, request.chunk))


class ChunkClient:
    """Fetches manifests and slices.

    `bytes_per_second` is the rate of each node in the last fetch from it; `report` is called with each fault
    on the way.
    """

    def __init__(self, bus: Queries, slice_store: SliceStore, report: Report) -> None:
        self.bytes_per_second: dict[str, float] = {}
        self.report = report
        self._bus, self._slice_store = bus, slice_store

    async def manifest(self, digest: str, nodes: Iterable[str]) -> Manifest:
        """The manifest of a model, from this disk or the first of `nodes` that gives it.

        Raises:
            StorageFailed: none of them gives it, or there is no room on disk.
        """
        try:
            return await asyncio.to_thread(self._slice_store.manifest, digest)
        except CordeeError:  # not here, or damaged
            pass
        faults: list[str] = []
        for node in nodes:
            try:
                content = await self._manifest_pieces(digest, node)
                return await asyncio.to_thread(self._slice_store.add_manifest, digest, content)
            except (BadModelFile, UnsupportedModel, _NoReply) as error:
                faults.append(f"node {node}: {error}")
                self.report(f"The manifest of {digest} did not come from node {node}: {error}")
        reasons = "; ".join(faults) or "no node has it"
        raise StorageFailed(f"The model {digest} cannot be fetched from the cluster ({reasons}).")

    async def slice(
        self,
        digest: str,
        first: int,
        last: int,
        holders: Holders,
        progress: Progress | None = None,
        fallback: Callable[[], Fallback] | None = None,
    ) -> SliceFile:
        """Layers `first` to `last` of a model whose manifest is here (0 to 0: its embedding) as a file.

        `holders` says, each time it is called, which nodes have what; what none of them has comes from
        `fallback` (called in a thread, once it is needed). `progress(done_bytes, total_bytes)` also counts
        what was here. Cancelling the task cancels the fetch.

        Raises:
            StorageFailed: nobody gives some of the chunks, with all reasons; no room on disk; or another
                process assembles this slice.
            ModelNotFound, BadRequest, UnsupportedModel, BadModelFile: as `SliceStore.layout` does.
        """
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def tell(done: int, total: int) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if progress:
                loop.call_soon_threadsafe(progress, done, total)

        stack, pool = ExitStack(), ThreadPoolExecutor(WRITERS + 1, "chunks")  # one is for the fallback
        try:
            if found := await loop.run_in_executor(pool, self._slice_store.slice, digest, first, last):
                return found
            opened = self._slice_store.assembling(digest, first, last, tell)
            assembly = await loop.run_in_executor(pool, stack.enter_context, opened)
            await _Fetch(self, assembly, holders, pool, fallback).run()
            return await loop.run_in_executor(pool, assembly.finish)
        finally:
            cancelled.set()
            try:
                await _uncancelled(asyncio.to_thread(pool.shutdown))  # no thread writes to a closed file
            finally:
                stack.close()

    async def request(self, node: str, request: ChunkRequest, patience_seconds: float) -> ChunkReply:
        """A node's reply, requested again while it is busy; raises _NoReply, saying why, if none comes."""
        payload, begun = msgspec.msgpack.encode(request), time.monotonic()
        end, heard = begun + patience_seconds, begun
        while (left := end - time.monotonic()) > 0 and time.monotonic() - heard < SILENCE_SECONDS:
            if replies := await self._bus.query(chunk_key(node), payload, seconds=left):
                try:
                    reply = msgspec.msgpack.decode(replies[0], type=ChunkReply)
                except msgspec.MsgspecError as error:
                    raise _NoReply(f"it answers nonsense ({error})") from error
                if reply.state != "busy":
                    return reply
                heard = time.monotonic()
            await asyncio.sleep(AGAIN_SECONDS)
        raise _NoReply(f"it gave no chunk in {time.monotonic() - begun:.1f} seconds")

    async def _manifest_pieces(self, digest: str, node: str) -> bytes:
        """A manifest as a node gives it, not checked yet."""
        content = bytearray()
        for index in range(MANIFEST_BYTES_LIMIT // CHUNK_BYTES + 1):
            reply = await self.request(node, ChunkRequest(digest, MANIFEST, index), PATIENCE_SECONDS)
            if reply.state != "here":
                raise _NoReply("it has none")
            content += reply.data
            if len(reply.data) != CHUNK_BYTES:
                return bytes(content)
        raise _NoReply("it gives more than any manifest has")

    def tensors(self, digest: str, held: Sequence[SliceHeld]) -> set[int]:
        """The numbers of a model's tensors in the slices that a node claims; impossible slices have none."""
        found: set[int] = set()
        for claim in held[:HELD_LIMIT]:
            if claim.model == digest:
                try:
                    found |= self._slice_store.layout(digest, claim.first, claim.last).offsets.keys()
                except CordeeError:
                    continue
        return found


class _NoReply(Exception):
    """A node gives no reply, or no valid one; the text says why."""


@dataclass
class _Neighbour:
    """What is known about a node in one fetch."""

    fault: str = ""  # why it is no longer asked
    absent: set[int] = field(default_factory=set[int])  # tensors it turned out not to have
    in_flight: int = 0
    nbytes: int = 0
    busy_seconds: float = 0.0
    busy_since: float = 0.0

    def begin(self) -> None:
        """A request is sent."""
        if not self.in_flight:
            self.busy_since = time.monotonic()
        self.in_flight += 1

    def end(self, nbytes: int) -> None:
        """A request ended and gave this many correct bytes."""
        self.in_flight -= 1
        self.nbytes += nbytes
        if not self.in_flight:
            self.busy_seconds += time.monotonic() - self.busy_since


class _Fetch:
    """What one slice still needs, and which node is asked for what."""

    def __init__(
        self,
        client: ChunkClient,
        assembly: Assembly,
        holders: Holders,
        pool: ThreadPoolExecutor,
        fallback: Callable[[], Fallback] | None,
    ) -> None:
        self._client, self._assembly, self._holders, self._pool = client, assembly, holders, pool
        self._manifest = assembly.layout.manifest
        self._waiting: dict[int, deque[Chunk]] = {}  # by tensor, so that no search goes through all chunks
        for chunk in assembly.missing:
            self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        self._neighbours: dict[str, _Neighbour] = {}
        self._tensors: dict[tuple[SliceHeld, ...], set[int]] = {}
        self._requests: dict[asyncio.Task[str], tuple[str, Chunk]] = {}
        self._open_fallback = fallback
        self._fallback: Fallback | None = None
        self._fallback_fault = "" if fallback else "not asked"  # why nothing more comes from there
        self._fallback_tries = FALLBACK_TRIES
        self._fallback_fill: asyncio.Future[None] | None = None
        self._fallback_chunks: list[Chunk] = []

    async def run(self) -> None:
        """Until nothing is missing; see `ChunkClient.slice`."""
        try:
            while self._assembly.missing or self._under_way:
                self._launch()
                if not self._under_way:
                    raise self._failure()
                await asyncio.wait(
                    self._under_way, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in [task for task in self._requests if task.done()]:
                    self._request_ended(task)
                if self._fallback_fill is not None and self._fallback_fill.done():
                    self._fallback_ended(self._fallback_fill)
        finally:
            for task in self._under_way:
                task.cancel()
            await _uncancelled(asyncio.gather(*self._under_way, return_exceptions=True))
            for node, neighbour in self._neighbours.items():
                if neighbour.busy_seconds and neighbour.nbytes:
                    self._client.bytes_per_second[node] = neighbour.nbytes / neighbour.busy_seconds

    @property
    def _under_way(self) -> list[asyncio.Future[Any]]:
        return [*self._requests, *([self._fallback_fill] if self._fallback_fill else [])]

    def _launch(self) -> None:
        """Send requests to the neighbours, least busy first; ask the fallback for what none of them has."""
        has = {node: self._has(node, held) for node, held in self._holders().items()}
        if self._fallback_fill is None and not self._fallback_fault:
            self._ask_fallback(set[int]().union(*has.values()))
        while len(self._requests) < IN_FLIGHT:
            order = sorted(has, key=lambda node: (self._neighbours[node].in_flight, node))
            for node in order:
                tensor = next((number for number in self._waiting if number in has[node]), None)
                if tensor is not None and self._neighbours[node].in_flight < IN_FLIGHT_EACH:
                    others = any(tensor in tensors for other, tensors in has.items() if other != node)
                    self._send(node, tensor, PATIENCE_SECONDS if others else LAST_PATIENCE_SECONDS)
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

    def _send(self, node: str, tensor: int, patience_seconds: float) -> None:
        chunk = self._waiting[tensor].popleft()
        if not self._waiting[tensor]:
            del self._waiting[tensor]
        self._neighbours[node].begin()
        self._requests[asyncio.create_task(self._request(node, chunk, patience_seconds))] = (node, chunk)

    async def _request(self, node: str, chunk: Chunk, patience_seconds: float) -> str:
        """Request a chunk and write it; gives the reply's state."""
        request = ChunkRequest(self._manifest.digest, *chunk)
        reply = await self._client.request(node, request, patience_seconds)
        if reply.state == "here":
            put = self._assembly.put
            await asyncio.get_running_loop().run_in_executor(
                self._pool, put, chunk, reply.data, f"Node {node}"
            )
        return reply.state

    def _request_ended(self, task: asyncio.Task[str]) -> None:
        node, chunk = self._requests.pop(task)
        neighbour = self._neighbours[node]
        came = chunk not in self._assembly.missing
        neighbour.end(self._manifest.nbytes(chunk) if came else 0)
        if not came:
            self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        try:
            if task.result() == "absent":
                neighbour.absent.add(chunk.tensor)
        except (BadModelFile, _NoReply) as error:
            if not neighbour.fault:
                neighbour.fault = str(error)
                self._client.report(f"Node {node} is no longer asked: {neighbour.fault}")

    def _ask_fallback(self, held: set[int]) -> None:
        """Take some of what no neighbour has off the waiting list, and have it fetched."""
        chunks, nbytes = self._fallback_chunks, 0
        for tensor in [number for number in self._waiting if number not in held]:
            while self._waiting[tensor] and nbytes < FALLBACK_BYTES:
                chunks.append(self._waiting[tensor].popleft())
                nbytes += self._manifest.nbytes(chunks[-1])
            if not self._waiting[tensor]:
                del self._waiting[tensor]
            if nbytes >= FALLBACK_BYTES:
                break
        if chunks:
            loop = asyncio.get_running_loop()
            self._fallback_fill = loop.run_in_executor(self._pool, self._fill, tuple(chunks))

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        if self._fallback is None:
            assert self._open_fallback is not None, "without a fallback its fault is set from the start"
            self._fallback = self._open_fallback()
        self._fallback.fill(self._assembly, chunks)

    def _fallback_ended(self, fill: asyncio.Future[None]) -> None:
        for chunk in self._fallback_chunks:
            if chunk in self._assembly.missing:
                self._waiting.setdefault(chunk.tensor, deque()).append(chunk)
        self._fallback_fill, self._fallback_chunks = None, []
        try:
            fill.result()
        except BadModelFile as error:
            self._client.report(error.message)
            self._fallback_tries -= 1
            self._fallback_fault = "" if self._fallback_tries else error.message
        except CordeeError as error:
            self._fallback_fault = error.message
            self._client.report(f"Nothing more comes from the hub: {error.message}")

    def _failure(self) -> StorageFailed:
        missing = self._assembly.missing
        faults = [f"node {node}: {n.fault}" for node, n in self._neighbours.items() if n.fault]
        if self._open_fallback:
            faults.append(f"hub: {self._fallback_fault}")
        return StorageFailed(
            f"No node provides {len(missing)} chunks of {self._assembly.layout.name}, such as "
            f"{self._manifest.chunk_name(next(iter(missing)))} ({'; '.join(faults) or 'nobody has them'}): "
            "what came is kept."
        )


async def _uncancelled(work: Awaitable[object]) -> None:
    """Wait for work that must be over before we go on, even if we are cancelled meanwhile.

    The cancellation is raised again afterwards: a task that swallowed it would go on without an owner.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
