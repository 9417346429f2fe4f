"""The store of a node for models of the cluster: their manifests, and the slices assembled by them.

    manifests/<hex>/manifest               the manifest with that digest
    manifests/<hex>/whole.json             which whole model of the store it was made from, if any
    manifests/<hex>/vocabulary.gguf        the metadata alone
    manifests/<hex>/<first>-<last>.gguf    a complete slice (assemble.py); with .partial appended, growing

Everything can be read by chunk, from whichever file has it: for neighbours, and to assemble other slices. A
chunk is hashed whenever it is read, so damage on this disk is found before it is passed on.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cordee.cluster.disk import StoredSlice
from cordee.cluster.facts import SliceHeld
from cordee.distribution.assemble import (
    PARTIAL,
    Assembly,
    SliceLayout,
    assembling,
    bad_chunks,
    damages,
    partial_path,
    read_chunk,
)
from cordee.distribution.manifest import (
    CHUNK_BYTES,
    Chunk,
    Manifest,
    ManifestMaker,
    make_manifest,
    read_manifest,
)
from cordee.errors import BadModelFile, CordeeError, ModelNotFound, UnsupportedModel
from cordee.files import atomic_file, disk_faults, write_all
from cordee.models.gguf import read_header
from cordee.models.slices import Progress, SliceFile, plan_outside
from cordee.models.store import Store, StoredModel, digest_hex

# A node runs a handful of models in a few slices each; the layout of a last slice holds the vocabulary.
LAYOUTS_KEPT = 32
# A manifest takes a tenth of a megabyte, and the digests of a large model two more.
MANIFESTS_KEPT = 256
# The unit of `st_blocks`, whatever the file system.
STAT_BLOCK_BYTES = 512

Key = TypeVar("Key")
Value = TypeVar("Value")

_SLICE_NAME = re.compile(r"(\d+)-(\d+)\.gguf")


class SliceStore:
    """Slices of models in a store, for any number of threads. Models are named by their manifest's digest."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = store.root / "manifests"
        self._manifests: dict[str, Manifest] = {}
        self._layouts: dict[tuple[str, int, int], SliceLayout] = {}

    def manifest_of(self, model: StoredModel, progress: Progress | None = None) -> Manifest:
        """The manifest of a whole model in the store, made once. `progress(done_bytes, total_bytes)`.

        Raises:
            BadModelFile: the model's file is damaged.
            StorageFailed: no room on disk.
        """
        if found := self.made().get(model.digest):
            with suppress(BadModelFile, UnsupportedModel):
                return self.manifest(found)
        with disk_faults(self._root):
            manifest = make_manifest(read_header(model.path, name=model.name), self._root, progress)
            self._store.set_manifest_source(manifest.digest, model.digest)
        return manifest

    def add_manifest(self, digest: str, content: bytes) -> Manifest:
        """Keep a manifest that came from elsewhere.

        Raises:
            BadModelFile: this is not a manifest, or not the one of that digest; nothing was kept.
            StorageFailed: no room on disk.
        """
        if (found := f"sha256:{hashlib.sha256(content).hexdigest()}") != digest:
            raise BadModelFile(f"Another manifest came ({found}) instead of {digest}.")
        folder = self._folder(digest)
        with disk_faults(self._root):
            folder.mkdir(mode=0o700, exist_ok=True)
            with atomic_file(folder / "manifest") as file:
                write_all(file, content)
            self._manifests.pop(digest, None)
            try:
                return self.manifest(digest)
            except (BadModelFile, UnsupportedModel):  # the digest is of something else
                (folder / "manifest").unlink()
                with suppress(OSError):  # it has slices
                    folder.rmdir()
                raise

    def keep_made(self, maker: ManifestMaker) -> Manifest:
        """Keep a manifest that was made from a model that is not in the store.

        Raises:
            StorageFailed: no room on disk.
        """
        with disk_faults(self._root):
            return self.manifest(maker.write(self._root).digest)

    def known(self) -> list[str]:
        """The digests of the manifests that are here."""
        return sorted(f"sha256:{path.parent.name}" for path in self._root.glob("*/manifest"))

    def made(self) -> dict[str, str]:
        """The digests of manifests made from models in the store, by the whole model's digest."""
        sources = {digest: self._store.manifest_source(digest) for digest in self.known()}
        return {source: digest for digest, source in sources.items() if source}

    def manifest(self, digest: str) -> Manifest:
        """The manifest of that digest.

        Raises:
            ModelNotFound: it is not here.
            BadModelFile: it is damaged on disk; add it again.
        """
        path = self._folder(digest) / "manifest"
        if not path.exists():  # or no longer: `cordee rm` is another process
            raise ModelNotFound(f"Nothing is known here of the model {digest}.")
        if manifest := self._manifests.get(digest):
            return manifest
        manifest = read_manifest(path)
        if manifest.digest != digest:
            raise BadModelFile(f"{path} is damaged: fetch it again.")
        _remember(self._manifests, digest, manifest, MANIFESTS_KEPT)
        return manifest

    def layout(self, digest: str, first: int, last: int) -> SliceLayout:
        """The layout of a slice. Raises as `manifest` and `SliceLayout` do."""
        key = (digest, first, last)
        if key not in self._layouts:
            _remember(self._layouts, key, SliceLayout(self.manifest(digest), first, last), LAYOUTS_KEPT)
        return self._layouts[key]

    def held(self, digest: str) -> list[SliceHeld]:
        """The complete slices of a model here: 0 to 0 is the embedding alone. Raises as `manifest` does."""
        layers = self.manifest(digest).header.layers
        whole = [(0, layers)] if self._store.whole(digest) else []
        complete = [(layout.first, layout.last) for layout, _ in self._complete(digest)]
        ranges = dict.fromkeys([*whole, *complete])
        return [SliceHeld(digest, first, last, (first, last) == (0, layers)) for first, last in ranges]

    def on_disk(self, digest: str) -> tuple[list[StoredSlice], list[StoredSlice]]:
        """The slices of a model assembled here, complete and growing; `used` is in seconds since 1970.

        A growing slice takes the bytes that have come; a file of the wrong length counts as growing. Raises
        as `manifest` does.
        """
        complete: list[StoredSlice] = []
        growing: list[StoredSlice] = []
        for layout, path in self._found(digest):
            with suppress(OSError):  # finished or removed meanwhile
                stat = path.stat()
                stored = StoredSlice(
                    SliceHeld(digest, layout.first, layout.last),
                    stat.st_blocks * STAT_BLOCK_BYTES,
                    stat.st_mtime,
                )
                is_complete = path.suffix != PARTIAL and stat.st_size == layout.nbytes
                (complete if is_complete else growing).append(stored)
        return complete, growing

    def slice(self, digest: str, first: int, last: int) -> SliceFile | None:
        """A slice as a file; None if it is not complete here. All layers, or none, may be the whole model.

        Asking for it counts as using it: see `on_disk`. Raises as `layout` does.
        """
        layout = self.layout(digest, first, last)
        if self.is_whole(digest, first, last) and (path := self._store.whole(digest)):
            return SliceFile(path, first, last, layout.file(path).digest, path.stat().st_size)
        path = self._path(digest, first, last)
        if not _is_complete(layout, path):
            return None
        with suppress(OSError):
            os.utime(path)
        return layout.file(path)

    def vocabulary(self, digest: str) -> Path:
        """A file for `Vocabulary`: a model without weights, made from the manifest.

        Raises as `manifest` does.
        """
        header = plan_outside(self.manifest(digest).header, ()).header
        path = self._folder(digest) / "vocabulary.gguf"
        if not path.exists() or path.read_bytes() != header:
            with atomic_file(path) as file:
                write_all(file, header)
        return path

    @contextmanager
    def assembling(
        self, digest: str, first: int, last: int, progress: Progress | None = None
    ) -> Generator[Assembly]:
        """Begin or continue a slice; what any file here has of it is in it already.

        `progress(done_bytes, total_bytes)` counts that too. Raises as `layout` does, and

            StorageFailed: no room on disk, or another process assembles this slice.
        """
        layout, path = self.layout(digest, first, last), self._path(digest, first, last)
        with assembling(layout, path, progress) as assembly:
            for other, offsets in list(self._files(digest, growing=True)):
                if assembly.missing and other != partial_path(path):
                    _copy(assembly, other, offsets)
            yield assembly

    def read(self, digest: str, chunk: Chunk) -> bytes:
        """A chunk of a model from any file that has it here.

        Raises:
            ModelNotFound: no file here has it.
            BadModelFile: it is damaged here; names file and chunk.
            BadRequest: the model has no such chunk.
        """
        manifest, damaged = self.manifest(digest), None
        manifest.nbytes(chunk)
        for path, offsets in self._files(digest):
            if chunk.tensor in offsets:
                with suppress(OSError), path.open("rb", buffering=0) as file:
                    data = read_chunk(manifest, chunk, file.fileno(), offsets[chunk.tensor])
                    if data is not None:
                        return data
                damaged = path
        if damaged:
            raise BadModelFile(f"{manifest.chunk_name(chunk)} is damaged in {damaged}.")
        raise ModelNotFound(f"{manifest.chunk_name(chunk)} is not here.")

    def read_manifest_piece(self, digest: str, index: int) -> bytes:
        """Piece `index` of a manifest's own bytes; all but the last have CHUNK_BYTES.

        Raises as `manifest` does.
        """
        with self.manifest(digest).path.open("rb") as file:
            file.seek(max(0, index) * CHUNK_BYTES)
            return file.read(CHUNK_BYTES)

    def verify(self, digest: str, first: int, last: int, progress: Progress | None = None) -> list[str]:
        """Read a complete slice back; the names of everything in it that is damaged.

        A damaged slice is no longer held: assembling it again fetches what was damaged and nothing else. (A
        damaged whole model stays: only `cordee pull` replaces it.) Raises as `layout` does.
        """
        layout, path = self.layout(digest, first, last), self._path(digest, first, last)
        whole = self._store.whole(digest)
        if whole and self.is_whole(digest, first, last):
            every = _whole_offsets(layout.manifest)
            offsets = every if last else {number: every[number] for number in layout.offsets}
            return bad_chunks(layout.manifest, offsets, whole, progress)
        found = damages(layout, path, progress)
        if found:
            with disk_faults(self._root):
                path.replace(partial_path(path))
        return found

    def is_whole(self, digest: str, first: int, last: int) -> bool:
        """Whether a slice is read from the whole model's file. Raises as `manifest` does."""
        ranges = ((0, self.manifest(digest).header.layers), (0, 0))
        return (first, last) in ranges and self._store.whole(digest) is not None

    def drop(self, digest: str, first: int, last: int) -> None:
        """Remove a slice, complete or growing."""
        path = self._path(digest, first, last)
        with disk_faults(self._root):
            path.unlink(missing_ok=True)
            partial_path(path).unlink(missing_ok=True)

    def forget(self, digest: str) -> None:
        """Remove a manifest and all slices that were assembled by it; a whole model stays in the store."""
        self._manifests.pop(digest, None)
        with disk_faults(self._root), suppress(FileNotFoundError):
            shutil.rmtree(self._folder(digest))

    def _folder(self, digest: str) -> Path:
        try:
            return self._root / digest_hex(digest)
        except ValueError as error:
            raise ModelNotFound(f"{digest!r} names no model.") from error

    def _path(self, digest: str, first: int, last: int) -> Path:
        return self._folder(digest) / f"{first}-{last}.gguf"

    def _complete(self, digest: str) -> Iterator[tuple[SliceLayout, Path]]:
        for layout, path in self._found(digest):
            if path.suffix != PARTIAL and _is_complete(layout, path):
                yield layout, path

    def _found(self, digest: str) -> Iterator[tuple[SliceLayout, Path]]:
        """All files named like slices, growing ones too; those of impossible ranges are skipped."""
        for path in sorted(self._folder(digest).iterdir()):
            if match := _SLICE_NAME.fullmatch(path.name.removesuffix(PARTIAL)):
                with suppress(CordeeError):
                    yield self.layout(digest, int(match[1]), int(match[2])), path

    def _files(self, digest: str, growing: bool = False) -> Iterator[tuple[Path, dict[int, int]]]:
        """(file, offset in it of each tensor) for every file that may hold chunks of a model."""
        if whole := self._store.whole(digest):
            yield whole, _whole_offsets(self.manifest(digest))
        for layout, path in self._found(digest) if growing else self._complete(digest):
            yield path, layout.offsets


def _whole_offsets(manifest: Manifest) -> dict[int, int]:
    return {number: tensor.offset for number, tensor in enumerate(manifest.header.tensors)}


def _is_complete(layout: SliceLayout, path: Path) -> bool:
    """Whether a file has the size of the slice; only `verify` reads it."""
    try:
        return path.stat().st_size == layout.nbytes
    except OSError:
        return False


def _copy(assembly: Assembly, source: Path, offsets: dict[int, int]) -> None:
    """Take what another file on this disk has of a slice; a file that cannot be read has nothing."""
    manifest = assembly.layout.manifest
    with suppress(OSError), source.open("rb", buffering=0) as file:
        for chunk in [chunk for chunk in assembly.missing if chunk.tensor in offsets]:
            data = read_chunk(manifest, chunk, file.fileno(), offsets[chunk.tensor])
            if data is not None:
                assembly.put(chunk, data, str(source))


def _remember(memory: dict[Key, Value], key: Key, value: Value, limit: int) -> None:
    """Keep a value; the oldest goes when there are too many."""
    memory[key] = value
    while len(memory) > limit:
        memory.pop(next(iter(memory)), None)  # another thread may have been faster
