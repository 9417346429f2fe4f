"""A model that no node holds whole, fetched from the hub by byte ranges: header, manifest, slices.

The manifest takes one pass over the whole model, of which nothing is kept but the digests; so no disk needs
to hold it. In this pass each file is checked against the SHA-256 that the hub promises. Slices are then
assembled from the ranges of their chunks, which are checked against the manifest like those from any
neighbour. A set of shards gets the manifest of the one file that the store would make of it.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cordee.distribution.assemble import Assembly
from cordee.distribution.hub import HubFile, fetch_range
from cordee.distribution.manifest import (
    CHUNK_BYTES,
    MANIFEST_BYTES_LIMIT,
    Chunk,
    Manifest,
    ManifestMaker,
    chunk_count,
)
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, HubUnreachable, StorageFailed
from cordee.files import atomic_file, disk_faults, write_all
from cordee.models.gguf import MAGIC, Header, has_header, read_header
from cordee.models.slices import Progress, plan_slice

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Most headers have 2 to 16 MB; each further request doubles what came before.
FIRST_BYTES = 4 << 20
# The most that one request fetches (the hub refuses to give 50 GB at once), and the longest gap it includes.
SPAN_BYTES = 1 << 30
GAP_BYTES = 1 << 20
# A pass of hours is not given up for a connection that is gone for some minutes (a router that restarts).
# Chunks of a slice are: neighbours may have them, and the fetch asks again. The hub client itself retries for
# seconds.
PASS_TRIES = 60
FILL_TRIES = 2
AGAIN_SECONDS = 10.0

Region = tuple[int, int, Chunk]  # the offset of a chunk in a file, its length, and which chunk it is


class HubModel:
    """A model on the hub: `header` is that of its one file, or of the file that its shards would make."""

    def __init__(self, files: Sequence[HubFile], folder: Path) -> None:
        """Fetch the header, for shards that of each, into `folder`.

        Raises:
            BadModelFile: what the hub has is not a model.
            StorageFailed, ModelNotFound: as `fetch_range` does.
        """
        self._files = list(files)
        paths = [_fetch_header(file, folder) for file in self._files]
        first = read_header(paths[0], weights=False, name=self._files[0].path)
        self.header = _joined(first, folder)
        by_path = dict(zip(paths, self._files, strict=True))
        self._places = {tensor.name: (by_path[tensor.path], tensor.offset) for tensor in first.tensors}

    def manifest(self, slice_store: SliceStore, progress: Progress | None = None) -> Manifest:
        """Read the whole model once and keep its manifest. `progress(done_bytes, total_bytes)`.

        A broken connection is resumed where it broke, up to PASS_TRIES times; `progress` is called meanwhile,
        too, so that it can end the pass by raising.

        Raises:
            HubUnreachable: it cannot be reached.
            StorageFailed: the hub gave other content than it promised.
            BadModelFile: the model is too large for a manifest.
        """
        maker = ManifestMaker(self.header)
        chunks = [
            Chunk(position, number)
            for position, tensor in enumerate(self.header.tensors)
            for number in range(chunk_count(tensor))
        ]
        done = 0

        def tell() -> None:
            if progress:
                progress(done, self.header.size_bytes)

        def take(chunk: Chunk, data: bytes) -> None:
            nonlocal done
            maker.add(chunk, data)
            done += len(data)
            tell()

        for file in self._files:
            carver = _Carver(0, self._regions(file, chunks), take)
            for start in range(0, file.nbytes, SPAN_BYTES):
                _stream(file, carver, min(start + SPAN_BYTES, file.nbytes), PASS_TRIES, tell)
            if carver.digest.hexdigest() != file.sha256:
                raise StorageFailed(f"{file.path} came with other content than the hub promised: try again.")
        return slice_store.keep_made(maker)

    def fill(self, assembly: Assembly, chunks: Sequence[Chunk]) -> None:
        """Fetch these chunks of a slice, all or some of those it misses.

        Raises:
            HubUnreachable: it cannot be reached; what came is kept.
            StorageFailed: the hub does not support ranges, or there is no room on disk.
            BadModelFile: the hub's model is not the one of the manifest; names the first wrong chunk if the
                headers agree. All correct chunks are kept.
        """
        shapes = [
            [(t.name, t.nbytes) for t in h.tensors] for h in (self.header, assembly.layout.manifest.header)
        ]
        if shapes[0] != shapes[1]:
            raise BadModelFile(f"{self._files[0].repository} does not hold {assembly.layout.name}.")

        wrong: list[BadModelFile] = []

        def take(chunk: Chunk, data: bytes) -> None:
            try:
                assembly.put(chunk, data, f"The hub ({self._files[0].repository})")
            except BadModelFile as error:  # those after it may be correct
                wrong.append(error)

        for file in self._files:
            for span in _spans(self._regions(file, chunks)):
                end = span[-1][0] + span[-1][1]
                _stream(file, _Carver(span[0][0], span, take), end, FILL_TRIES, lambda: None)
        if wrong:
            raise wrong[0]

    def _regions(self, file: HubFile, chunks: Sequence[Chunk]) -> list[Region]:
        """The regions of the chunks that are in a file, in order."""
        regions: list[Region] = []
        for chunk in chunks:
            tensor = self.header.tensors[chunk.tensor]
            holder, offset = self._places[tensor.name]
            if holder == file:
                start = chunk.number * CHUNK_BYTES
                regions.append((offset + start, min(CHUNK_BYTES, tensor.nbytes - start), chunk))
        return sorted(regions)


class _Carver(io.RawIOBase):
    """Takes a span of a file as it comes and gives the chunks in it; `digest` is of all bytes."""

    def __init__(self, start: int, regions: Sequence[Region], take: Callable[[Chunk, bytes], None]) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self._regions, self._take = iter(regions), take
        self._next = next(self._regions, None)
        self._at, self._end = start, start  # where in the file `_kept` begins; where the span ends
        self._kept = bytearray()

    @property
    def reached(self) -> int:
        """The offset in the file of the next byte to come."""
        return self._at + len(self._kept)

    def up_to(self, end: int) -> "_Carver":
        """Extend the span to `end`."""
        self._end = end
        return self

    def writable(self) -> bool:
        return True

    def write(self, buffer: "ReadableBuffer", /) -> int:
        """Raises StorageFailed if more comes than was asked for, as from a server without ranges."""
        data = memoryview(buffer)
        if self.reached + data.nbytes > self._end:
            raise StorageFailed("The hub gives more than the range it was asked for: pull the whole model.")
        self.digest.update(data)
        self._kept += data
        while self._next and self._next[0] + self._next[1] <= self.reached:
            start, nbytes, chunk = self._next
            self._take(chunk, bytes(self._kept[start - self._at : start - self._at + nbytes]))
            self._next = next(self._regions, None)
        keep_from = self._next[0] if self._next else self._end
        gone = min(max(0, keep_from - self._at), len(self._kept))
        del self._kept[:gone]
        self._at += gone
        return data.nbytes


def _stream(file: HubFile, carver: _Carver, end: int, tries: int, tell: Callable[[], None]) -> None:
    """Have the carver take a file up to `end`; gives up after `tries` broken connections without a byte."""
    failed = 0
    while carver.reached < end:
        before = carver.reached
        try:
            fetch_range(file, before, end - before, carver.up_to(end))
        except HubUnreachable:
            failed = 1 if carver.reached > before else failed + 1
            if failed >= tries:
                raise
            tell()
            time.sleep(AGAIN_SECONDS)


def _spans(regions: Sequence[Region]) -> Iterator[list[Region]]:
    """Regions in groups, each of which one request fetches."""
    span: list[Region] = []
    for region in regions:
        if span:
            end = span[-1][0] + span[-1][1]
            if region[0] - end > GAP_BYTES or region[0] + region[1] - span[0][0] > SPAN_BYTES:
                yield span
                span = []
        span.append(region)
    if span:
        yield span


def _fetch_header(file: HubFile, folder: Path) -> Path:
    """The beginning of a file, long enough for its header, under the file's own name."""
    path = folder / PurePosixPath(file.path).name
    with disk_faults(folder), path.open("wb") as out:
        while out.tell() < min(file.nbytes, MANIFEST_BYTES_LIMIT):
            start = out.tell()
            nbytes = min(max(start, FIRST_BYTES), file.nbytes - start)
            fetch_range(file, start, nbytes, out)
            out.flush()
            if has_header(path, file.path):
                break
            with path.open("rb") as begun:
                if begun.read(len(MAGIC)) != MAGIC:
                    break
    return path


def _joined(header: Header, folder: Path) -> Header:
    """The header of the one file that a set of shards would make."""
    if header.count("split.count", 1) == 1:
        return header
    path = folder / "joined.gguf"
    with atomic_file(path) as file:
        write_all(file, plan_slice(header, 0, header.layers).header)
    return read_header(path, weights=False, name=header.name)
