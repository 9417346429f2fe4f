"""The manifest of a model: what a node must know to fetch any slice from anywhere and to check what came.

    GGUF header            as it is in the model's file, so a manifest is read like a file without weights
    MARK, CHUNK_BYTES      8 bytes, and a number of 8 bytes
    SHA-256 of each chunk  32 bytes each; tensors as the header lists them, the chunks of each in order

A chunk is CHUNK_BYTES of one tensor; its last chunk is what is left. Equal content has an equal manifest, so
the manifest's own SHA-256 names the model in the cluster. A manifest that came from elsewhere is untrusted
input: its header passes the same checks as a file's, and its length must be exactly what the header demands.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from cordee.errors import BadModelFile, BadRequest
from cordee.files import atomic_file, write_all
from cordee.models.gguf import Header, Tensor, read_header
from cordee.models.metadata import FETCH_AGAIN
from cordee.models.slices import Progress
from cordee.system.disk import pread

# A chunk takes 9 ms at 1 Gbit/s and 84 ms at 100 Mbit/s: rows of running streams may have to wait that long
# behind it. The digests of 120 GB take 3.7 MB, less than the vocabulary in front of them.
CHUNK_BYTES = 1 << 20
# The largest headers met have 40 MB (a tokenizer in JSON), the digests of 1 TB take 31 MB.
MANIFEST_BYTES_LIMIT = 128 << 20
MARK = b"cordee:1"
SEAL_BYTES = 16
DIGEST_BYTES = 32


class Chunk(NamedTuple):
    """Chunk `number` of the tensor that the header lists as number `tensor`; both count from 0."""

    tensor: int
    number: int


@dataclass(frozen=True)
class Manifest:
    """A manifest in the file `path`. The tensors of `header` say where they are in the model's whole file."""

    digest: str  # 'sha256:' and 64 hex digits, of the manifest
    path: Path
    header: Header
    _starts: list[int]  # for each tensor, the number of chunks before it; then the number of all chunks
    _table: bytes

    def chunks(self, tensor: int) -> Iterator[Chunk]:
        """The chunks of a tensor in order."""
        return (Chunk(tensor, number) for number in range(self._starts[tensor + 1] - self._starts[tensor]))

    def nbytes(self, chunk: Chunk) -> int:
        """The length of a chunk.

        Raises:
            BadRequest: the model has no such chunk.
        """
        tensors = self.header.tensors
        left = tensors[chunk.tensor].nbytes - self.offset(chunk) if 0 <= chunk.tensor < len(tensors) else 0
        if chunk.number < 0 or left <= 0:
            raise BadRequest(f"{self.name} has no chunk {chunk.number} of a tensor {chunk.tensor}.")
        return min(CHUNK_BYTES, left)

    def offset(self, chunk: Chunk) -> int:
        """Where in its tensor a chunk begins."""
        return chunk.number * CHUNK_BYTES

    def digest_of(self, chunk: Chunk) -> bytes:
        """The SHA-256 of a chunk that exists: 32 bytes."""
        at = (self._starts[chunk.tensor] + chunk.number) * DIGEST_BYTES
        return self._table[at : at + DIGEST_BYTES]

    def is_sound(self, chunk: Chunk, data: bytes) -> bool:
        """Whether `data` is that chunk."""
        return hashlib.sha256(data).digest() == self.digest_of(chunk)

    @property
    def name(self) -> str:
        """What to call the model in a message."""
        title = self.header.metadata.get("general.name")  # of whatever type: this is for messages
        return f"the model {title[:40]!r} ({self.digest[:19]}…)" if isinstance(title, str) else self.digest

    def chunk_name(self, chunk: Chunk) -> str:
        """What to call a chunk that exists in a message."""
        return f"chunk {chunk.number} of {self.header.tensors[chunk.tensor].name} of {self.name}"


class ManifestMaker:
    """Takes the chunks of a model in any order, then writes its manifest."""

    def __init__(self, header: Header) -> None:
        """Raises BadModelFile if the header is one of a set of shards, or larger than manifests may be."""
        self.header = header
        self._starts = _starts(header)
        if header.count("split.count", 1) != 1:
            raise BadModelFile(f"{header.name} is a shard: put the set into the store, which makes it one.")
        if _manifest_bytes(header, self._starts) > MANIFEST_BYTES_LIMIT:
            raise BadModelFile(
                f"{header.name} is too large: a manifest has at most {MANIFEST_BYTES_LIMIT:,} bytes."
            )
        self._table = bytearray(self._starts[-1] * DIGEST_BYTES)

    def add(self, chunk: Chunk, data: bytes) -> None:
        """Take a chunk; all must be given before the manifest is written."""
        at = (self._starts[chunk.tensor] + chunk.number) * DIGEST_BYTES
        self._table[at : at + DIGEST_BYTES] = hashlib.sha256(data).digest()

    def write(self, folder: Path) -> Manifest:
        """Write `folder`/<hex of the manifest's digest>/manifest; creates the inner folder if needed.

        Raises:
            BadModelFile: the file with the header changed or went away.
            StorageFailed: no room on disk.
        """
        content = _read(self.header.path, 0, self.header.nbytes) + _seal() + self._table
        digest = hashlib.sha256(content).hexdigest()
        path = folder / digest / "manifest"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_file(path) as file:
            write_all(file, content)
        return read_manifest(path)


def make_manifest(header: Header, folder: Path, progress: Progress | None = None) -> Manifest:
    """Read a whole model once and write its manifest below `folder`. `progress(done_bytes, total_bytes)`.

    Raises:
        BadModelFile: the model is a set of shards, or changed meanwhile.
        StorageFailed: no room on disk.
    """
    maker, done, total = ManifestMaker(header), 0, header.size_bytes
    for position, tensor in enumerate(header.tensors):
        for number in range(chunk_count(tensor)):
            start = number * CHUNK_BYTES
            data = _read(tensor.path, tensor.offset + start, min(CHUNK_BYTES, tensor.nbytes - start))
            maker.add(Chunk(position, number), data)
            done += len(data)
            if progress:
                progress(done, total)
    return maker.write(folder)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; memory stays in proportion to the file.

    Raises:
        BadModelFile: not a manifest, damaged, or its sizes are wrong; names file and fault.
    """
    header = read_header(path, weights=False)
    starts = _starts(header)
    size = path.stat().st_size
    if size > MANIFEST_BYTES_LIMIT or size != _manifest_bytes(header, starts):
        raise BadModelFile(
            f"{path} has {size:,} bytes, but the tensors of its header need "
            f"{_manifest_bytes(header, starts):,} (at most {MANIFEST_BYTES_LIMIT:,}): {FETCH_AGAIN}."
        )
    content = _read(path, 0, size)
    table_at = header.nbytes + SEAL_BYTES
    if content[header.nbytes : table_at] != _seal():
        raise BadModelFile(f"{path} is not a manifest of this version: {FETCH_AGAIN}.")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Manifest(digest, path, header, starts, content[table_at:])


def chunk_count(tensor: Tensor) -> int:
    """How many chunks a tensor has."""
    return -(-tensor.nbytes // CHUNK_BYTES)


def _seal() -> bytes:
    return MARK + struct.pack("<Q", CHUNK_BYTES)


def _starts(header: Header) -> list[int]:
    return [0, *accumulate(map(chunk_count, header.tensors))]


def _manifest_bytes(header: Header, starts: list[int]) -> int:
    return header.nbytes + SEAL_BYTES + starts[-1] * DIGEST_BYTES


def _read(path: Path, offset: int, nbytes: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            data = pread(file.fileno(), nbytes, offset)
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read ({error.strerror}).") from error
    if len(data) != nbytes:
        raise BadModelFile(f"{path} became shorter while it was read: {FETCH_AGAIN}.")
    return data
