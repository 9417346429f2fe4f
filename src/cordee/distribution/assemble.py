"""A slice assembled from chunks, in any order and from anywhere; the bytes are those of a cut.

A slice is named by its layers, `first` to `last` (exclusive): what `cut` would write for them. The slice 0 to
0 has no layers: it is the metadata and the token embedding, in which the host of a pipeline looks rows up.

The file grows under its name with `.partial`, sparse. No journal records what has come: whoever continues
(after a crash, or because a complete slice turned out damaged) hashes everything that is not a hole, so
damaged bytes are never trusted. Chunks are checked before they are written; everything else (header,
placeholders, padding) follows from the manifest and is written again where it differs.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from cordee.distribution.manifest import Chunk, Manifest
from cordee.errors import BadModelFile, StorageFailed
from cordee.files import disk_faults, publish
from cordee.models.slices import Progress, SliceFile, SlicePlan, plan_embedding, plan_slice
from cordee.system import disk, locks

PARTIAL = ".partial"
# Zeros are compared and written in blocks of this many bytes.
BLOCK_BYTES = 1 << 20


class SliceLayout:
    """What bytes a slice has, and where.

    `offsets` maps the number in the manifest of each tensor in the slice to its offset in the slice's file.

    Raises:
        BadRequest, UnsupportedModel, BadModelFile: there is no such slice, as `plan_slice` says.
    """

    def __init__(self, manifest: Manifest, first: int, last: int) -> None:
        self.manifest, self.first, self.last = manifest, first, last
        self.plan = _plan(manifest, first, last)
        self.nbytes = self.plan.nbytes
        numbers = {tensor.name: number for number, tensor in enumerate(manifest.header.tensors)}
        self.offsets: dict[int, int] = {}
        self._zeros: list[tuple[int, int]] = []
        for piece, start, end in self.plan.places():
            if piece.source is None:
                self._zeros.append((start, end))
            else:
                self.offsets[numbers[piece.source.name]] = start
                self._zeros.append((start + piece.nbytes, end))

    @property
    def name(self) -> str:
        """What to call the slice in a message."""
        what = f"layers {self.first} to {self.last}" if self.last else "the embedding"
        return f"{what} of {self.manifest.name}"

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of the slice, in the order of its file."""
        return (chunk for tensor in self.offsets for chunk in self.manifest.chunks(tensor))

    def differences(self, file: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes that should be there) wherever a file of this layout differs outside its chunks."""
        header = self.plan.header
        if disk.pread(file, len(header), 0) != header:
            yield 0, header
        for start, end in self._zeros:
            for at in range(start, end, BLOCK_BYTES):
                wanted = bytes(min(BLOCK_BYTES, end - at))
                if disk.has_data(file, at, len(wanted)) and disk.pread(file, len(wanted), at) != wanted:
                    yield at, wanted

    def file(self, path: Path) -> SliceFile:
        """The complete slice in the file `path`; its digest is of the header and the chunks' digests."""
        digest = hashlib.sha256(self.plan.header)
        for chunk in self.chunks():
            digest.update(self.manifest.digest_of(chunk))
        return SliceFile(path, self.first, self.last, f"sha256:{digest.hexdigest()}", self.nbytes)


def read_chunk(manifest: Manifest, chunk: Chunk, file: int, tensor_at: int) -> bytes | None:
    """A chunk from a file in which its tensor begins at `tensor_at`; None if it is wrong or missing there.

    Raises:
        OSError: the file cannot be read there.
    """
    at, nbytes = tensor_at + manifest.offset(chunk), manifest.nbytes(chunk)
    if not disk.has_data(file, at, nbytes):  # saves reading and hashing the holes of a sparse file
        return bytes(nbytes) if manifest.digest_of(chunk) == _digest_of_zeros(nbytes) else None
    data = disk.pread(file, nbytes, at)
    return data if manifest.is_sound(chunk, data) else None


class Assembly:
    """A slice that is being assembled. `missing` has its chunks that have not come yet, in order.

    `put` may be called by several threads; everything else by one.
    """

    def __init__(self, layout: SliceLayout, path: Path, file: int, progress: Progress | None) -> None:
        self.layout = layout
        self.missing: dict[Chunk, None] = dict.fromkeys(layout.chunks())
        self._path, self._file, self._progress = path, file, progress
        self._total = sum(map(layout.manifest.nbytes, self.missing))
        self._done = 0
        self._lock = threading.Lock()

    def put(self, chunk: Chunk, data: bytes, origin: str) -> None:
        """Write a chunk that `origin` gave; one that is here already is dropped.

        Raises:
            BadModelFile: these are not the chunk's bytes; names origin, chunk and model.
            StorageFailed: no room on disk; what came before stays.
        """
        if chunk not in self.missing:
            return
        manifest = self.layout.manifest
        if len(data) != manifest.nbytes(chunk) or not manifest.is_sound(chunk, data):
            raise BadModelFile(f"{origin} gave wrong bytes for {manifest.chunk_name(chunk)}.")
        with disk_faults(self._path):
            _write_at(self._file, data, self.layout.offsets[chunk.tensor] + manifest.offset(chunk))
        self._note(chunk)

    def finish(self) -> SliceFile:
        """Move the complete slice to its final place, durably.

        Raises:
            StorageFailed: the disk does not take it.
        """
        if self.missing:
            raise ValueError(f"{len(self.missing)} chunks of {self.layout.name} are missing")
        with disk_faults(self._path):
            publish(partial_path(self._path), self._path)
        return self.layout.file(self._path)

    def prepare(self) -> None:
        """Give the file its length, header and padding, and find out which chunks it has."""
        with disk_faults(self._path):
            os.ftruncate(self._file, self.layout.nbytes)
            for at, wanted in list(self.layout.differences(self._file)):
                _write_at(self._file, wanted, at)
            for chunk in list(self.missing):
                at = self.layout.offsets[chunk.tensor]
                if read_chunk(self.layout.manifest, chunk, self._file, at) is not None:
                    self._note(chunk)

    def _note(self, chunk: Chunk) -> None:
        with self._lock:
            if chunk not in self.missing:  # another thread was faster
                return
            del self.missing[chunk]
            self._done += self.layout.manifest.nbytes(chunk)
            if self._progress:
                self._progress(self._done, self._total)


@contextmanager
def assembling(layout: SliceLayout, path: Path, progress: Progress | None = None) -> Generator[Assembly]:
    """Begin or continue the slice that will be the file `path`; what came stays when the block fails.

    `progress(done_bytes, total_bytes)` counts chunks, including those that were here.

    Raises:
        StorageFailed: no room on disk, or another process assembles this slice.
    """
    partial = partial_path(path)
    with disk_faults(path):
        file = os.open(partial, os.O_RDWR | os.O_CREAT | disk.BINARY, 0o600)
    try:
        if not _is_mine(file, partial):
            raise StorageFailed(f"Another process fetches {layout.name} here: wait until that is done.")
        _require_room(layout, path, file)
        assembly = Assembly(layout, path, file, progress)
        assembly.prepare()
        yield assembly
    finally:
        os.close(file)


def partial_path(path: Path) -> Path:
    """The growing file of the slice that will be the file `path`."""
    return path.with_name(path.name + PARTIAL)


def damages(layout: SliceLayout, path: Path, progress: Progress | None = None) -> list[str]:
    """Read a slice back from disk; the names of everything in it that is damaged.

    Raises:
        BadModelFile: the file cannot be read.
    """
    found = bad_chunks(layout.manifest, layout.offsets, path, progress)
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != layout.nbytes:
            found.append(f"the length of {layout.name}")
        if any(True for _ in layout.differences(file.fileno())):
            found.append(f"the header or padding of {layout.name}")
    return found


def bad_chunks(
    manifest: Manifest, offsets: Mapping[int, int], path: Path, progress: Progress | None = None
) -> list[str]:
    """The names of the chunks that are damaged in a file where tensors begin at `offsets`.

    Raises:
        BadModelFile: the file cannot be read.
    """
    found: list[str] = []
    chunks = [chunk for tensor in offsets for chunk in manifest.chunks(tensor)]
    done, total = 0, sum(map(manifest.nbytes, chunks))
    try:
        with path.open("rb", buffering=0) as file:
            for chunk in chunks:
                if read_chunk(manifest, chunk, file.fileno(), offsets[chunk.tensor]) is None:
                    found.append(manifest.chunk_name(chunk))
                done += manifest.nbytes(chunk)
                if progress:
                    progress(done, total)
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read ({error.strerror}).") from error
    return found


def _plan(manifest: Manifest, first: int, last: int) -> SlicePlan:
    if first == last == 0:
        return plan_embedding(manifest.header)
    return plan_slice(manifest.header, first, last)


def _is_mine(file: int, partial: Path) -> bool:
    """Lock an open file; False if another process holds it, or has just finished it and moved it away."""
    with suppress(BlockingIOError, FileNotFoundError):
        locks.take(file)
        return os.path.samestat(os.fstat(file), partial.stat())
    return False


@lru_cache(16)
def _digest_of_zeros(nbytes: int) -> bytes:
    return hashlib.sha256(bytes(nbytes)).digest()


def _write_at(file: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        count = disk.pwrite(file, rest, at)
        rest, at = rest[count:], at + count


def _require_room(layout: SliceLayout, path: Path, file: int) -> None:
    """Refuse what the disk cannot hold, rather than fail after hours."""
    needed = layout.nbytes - disk.allocated_bytes(os.fstat(file))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise StorageFailed(
            f"{layout.name} needs {needed / 1e9:.1f} GB more on the disk of {path.parent}, where "
            f"{free / 1e9:.1f} GB are free: free some space."
        )
