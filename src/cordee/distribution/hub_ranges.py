"""A model that nobody holds whole, taken from the hub by byte ranges: its header, its manifest, parts of it.

The manifest takes one pass over the whole model, of which nothing is kept but the digests; so no disk needs
to hold it. While it passes, each file is checked against the SHA-256 that the hub promises. Parts are then
made of the ranges where their chunks lie, and checked against the manifest like those from any neighbour. A
set of shards gets the manifest of the one file that the store would make of it.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

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

# Most headers have 2 to 16 MB; each further try takes as much again as came before.
FIRST_BYTES = 4 << 20
# One request fetches so much at most (the hub refuses to give 50 GB at once) and passes over gaps so long.
SPAN_BYTES = 1 << 30
GAP_BYTES = 1 << 20
# A pass of hours is not given up for a connection that is gone for some minutes (a router that restarts); a
# part is, as neighbours may have it and whoever wants it asks again. The hub client tries for seconds itself.
PASS_TRIES = 60
FILL_TRIES = 2
AGAIN_SECONDS = 10.0

Region = tuple[int, int, Chunk]  # where in a file a chunk begins, its length, and which it is


class HubModel:
    """A model on the hub: `header` as its one file has it (or would), in a folder of the caller's."""

    def __init__(self, files: Sequence[HubFile], folder: Path) -> None:
        """Fetch the header, of each shard, into `folder`.

        Raises:
            BadModelFile: what the hub has is no model.
            StorageFailed, ModelNotFound: as `fetch_range` does.
        """
        self._files = list(files)
        paths = [_fetch_header(file, folder) for file in self._files]
        self.header = _joined(read_header(paths[0], weights=False), folder)
        by_path = dict(zip(paths, self._files, strict=True))
        tensors = read_header(paths[0], weights=False).tensors
        self._places = {tensor.name: (by_path[tensor.path], tensor.offset) for tensor in tensors}

    def manifest(self, parts: SliceStore, progress: Progress | None = None) -> Manifest:
        """Pass over the whole model and keep its manifest. `progress(done_bytes, total_bytes)`.

        A connection that breaks is taken up where it broke, for PASS_TRIES; `progress` is called meanwhile,
        too, so that it may end the pass by raising.

        Raises:
            HubUnreachable: it cannot be reached.
            StorageFailed: the hub gave something else than it promised.
            BadModelFile: the model is too large for a manifest.
        """
        maker = ManifestMaker(self.header)
        chunks = [
            Chunk(number, index)
            for number, tensor in enumerate(self.header.tensors)
            for index in range(chunk_count(tensor))
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
        return parts.keep_made(maker)

    def fill(self, assembly: Assembly, chunks: Sequence[Chunk]) -> None:
        """Fetch these chunks of a part, all or some of what it misses.

        Raises:
            HubUnreachable: it cannot be reached; what came is kept.
            StorageFailed: the hub does not give ranges, or there is no room on disk.
            BadModelFile: the hub's model is not the one of the manifest; names the first wrong chunk if the
                headers agree. All chunks that are right are kept.
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
            except BadModelFile as error:  # what comes after it may be right
                wrong.append(error)

        for file in self._files:
            for span in _spans(self._regions(file, chunks)):
                end = span[-1][0] + span[-1][1]
                _stream(file, _Carver(span[0][0], span, take), end, FILL_TRIES, lambda: None)
        if wrong:
            raise wrong[0]

    def _regions(self, file: HubFile, chunks: Sequence[Chunk]) -> list[Region]:
        """Where in a file those of the chunks lie that are in it, in order."""
        regions = []
        for chunk in chunks:
            tensor = self.header.tensors[chunk.tensor]
            holder, offset = self._places[tensor.name]
            if holder == file:
                start = chunk.index * CHUNK_BYTES
                regions.append((offset + start, min(CHUNK_BYTES, tensor.nbytes - start), chunk))
        return sorted(regions)


class _Carver(io.RawIOBase):
    """Takes a stretch of a file as it comes and gives the chunks that lie in it; `digest` is of all bytes."""

    def __init__(self, start: int, regions: Sequence[Region], take: Callable[[Chunk, bytes], None]) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self._regions, self._take = iter(regions), take
        self._next = next(self._regions, None)
        self._at, self._end = start, start  # where in the file `_kept` begins; where the stretch ends
        self._kept = bytearray()

    @property
    def reached(self) -> int:
        """Where in the file the bytes that are still to come begin."""
        return self._at + len(self._kept)

    def up_to(self, end: int) -> "_Carver":
        """Take the stretch up to `end` from now on."""
        self._end = end
        return self

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        """Raises StorageFailed if more comes than was asked for, as from a server without ranges."""
        if self.reached + len(data) > self._end:
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
        return len(data)


def _stream(file: HubFile, carver: _Carver, end: int, tries: int, tell: Callable[[], None]) -> None:
    """Have the carver take a file up to `end`, `tries` times without a byte if the connection breaks."""
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
    """Regions in groups that one request fetches."""
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
    """The beginning of a file that holds its header, under its own name."""
    path = folder / PurePosixPath(file.path).name
    with disk_faults(folder), path.open("wb") as out:
        while out.tell() < min(file.nbytes, MANIFEST_BYTES_LIMIT):
            start = out.tell()
            nbytes = min(max(start, FIRST_BYTES), file.nbytes - start)
            fetch_range(file, start, nbytes, out)
            out.flush()
            if has_header(path):
                break
            with path.open("rb") as begun:
                if begun.read(len(MAGIC)) != MAGIC:
                    break
    return path


def _joined(header: Header, folder: Path) -> Header:
    """The header of the one file that a set of shards would be."""
    if header.get("split.count", 1) == 1:
        return header
    path = folder / "joined.gguf"
    with atomic_file(path) as file:
        write_all(file, plan_slice(header, 0, header.layers).header)
    return read_header(path, weights=False)
