"""The model store: whole models and the slices cut from them, each content once and complete.

    blobs/sha256-<hex>                        whole models, named by their content
    names/<quoted name>.json                  which model each name stands for
    slices/<hex>/<first>-<last>.gguf, .json   slices of the model with that digest
    notes/<hex>.json                          what was found out about a model, such as its batch invariance
    manifests/<hex>/                          manifests, and the slices assembled by them (slice_store.py)
    incoming/<random>/                        work in progress

Long work is done in a folder under `incoming`, which its process holds locked; the result is renamed to its
place under the store's own lock, which is held for moments. So other processes never see half a file, and
what a killed process left is in a folder that nobody holds: the next process that adds something removes it.
Content that no name stands for is removed at the same time.
"""

import hashlib
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, TypeVar
from urllib.parse import quote

import msgspec

from cordee.errors import BadModelFile, BadRequest, ModelNotFound, StorageFailed, nearest
from cordee.files import atomic_file, disk_faults, home, printable, publish, storage_failed, write_all
from cordee.models.cards import cards
from cordee.models.gguf import Header, read_header
from cordee.models.slices import Progress, SliceFile, cut, plan_slice
from cordee.system import disk, locks

# Reading this much at a time keeps the disk at full speed and is small beside any model.
COPY_BYTES = 4 << 20
# File names have at most 255 bytes; `.json` and the affixes of a partial file need the rest.
QUOTED_NAME_BYTES = 200
# The lock is held for a few renames and removals; a store on a slow disk may take a second or two.
LOCK_SECONDS = 30.0
LOCK_POLL_SECONDS = 0.02
# From linux/fs.h: make a file share the blocks of another until one of them is written to.

T = TypeVar("T")

_NAME = re.compile(r"\w[\w.:/@+-]*")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the store. `path` is its whole GGUF file of `nbytes` bytes; `added` is ISO 8601 in UTC."""

    name: str
    digest: str  # 'sha256:' and 64 hex digits, of the whole file
    path: Path
    nbytes: int
    source: str
    added: str
    architecture: str
    layers: int


class _NameEntry(msgspec.Struct, frozen=True):
    """What the file of a name says."""

    name: str
    digest: str
    nbytes: int
    source: str
    added: str
    architecture: str
    layers: int


class _SliceNote(msgspec.Struct, frozen=True):
    """What is noted beside a slice."""

    digest: str
    nbytes: int


class Store:
    """The models of one user. Any number of processes may use the same folder at once."""

    def __init__(self, root: Path | None = None) -> None:
        """Open the store in `root`, else in the state folder; created if it is not there.

        Raises:
            StorageFailed: the folder cannot be created.
        """
        self.root = Path(root) if root else home() / "models"
        try:
            for name in ("blobs", "names", "slices", "notes", "manifests", "incoming"):
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_failed(self.root, error, "cannot be created") from error

    def list(self, report: Callable[[str], None] | None = None) -> list[StoredModel]:
        """All models by name. With `report`, damaged entries are reported and skipped.

        Raises:
            StorageFailed: an entry is damaged, and there is no `report`.
        """
        models: list[StoredModel] = []
        for path in (self.root / "names").glob("*.json"):
            try:
                entry = self._name_entry(path)
            except StorageFailed as error:
                if report is None:
                    raise
                report(error.message)
                continue
            if entry is not None:
                models.append(self._model(entry))
        return sorted(models, key=lambda model: model.name)

    def get(self, name: str) -> StoredModel:
        """The model of that name; its file is there and has the right size.

        Raises:
            ModelNotFound: no such model; suggests the closest names and the remedy.
            BadModelFile: its file is gone or has another size.
        """
        entry = self._name_entry(self._name_path(name))
        if entry is None:
            raise self._not_found(name)
        model = self._model(entry)
        fault = None
        try:
            if (size := model.path.stat().st_size) != model.nbytes:
                fault = f"has {size} bytes instead of {model.nbytes}"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            raise BadModelFile(
                f"The file of model {name!r} {fault}: put it back with "
                f"`cordee pull {shlex.quote(model.source)} --name {name}`."
            )
        return model

    def add_file(
        self,
        path: Path,
        name: str,
        progress: Progress | None = None,
        *,
        source: str | None = None,
        digest: str | None = None,
        take: Literal["copy", "link", "move"] = "copy",
    ) -> StoredModel:
        """Put a GGUF file into the store under `name`; a set of shards (its first file given) becomes one.

        `take` says how: `copy` copies the file (as a clone that takes no room, on file systems that can);
        `link` makes a hard link, which is only for files that nobody writes to; `move` removes the original.
        A name that was there before stands for the new model afterwards. `digest` is the file's, where the
        caller has just computed it; otherwise the file is read for it. `progress(done_bytes, total_bytes)`.

        Raises:
            BadRequest: `name` cannot name a model.
            BadModelFile: the file is not a model, or changed meanwhile; nothing was stored.
            StorageFailed: no room on the disk, or no permission; nothing was stored.
        """
        self._name_path(name)
        header = read_header(path)
        with disk_faults(self.root), self.working_folder() as folder:
            ready = folder / "model.gguf"
            if header.count("split.count", 1) > 1:
                merged = cut(header, 0, header.layers, ready, progress=progress)
                digest, nbytes = merged.digest, merged.nbytes
            else:
                nbytes = header.path.stat().st_size
                digest = _take_in(header.path, ready, nbytes, digest, take, progress)
            entry = _NameEntry(
                name=name,
                digest=digest,
                nbytes=nbytes,
                source=printable(source or str(header.path.resolve())),
                added=datetime.now(UTC).isoformat(timespec="seconds"),
                architecture=header.architecture,
                layers=header.layers,
            )
            with self._lock():
                publish(ready, self._blob(digest))
                _write_json(self._name_path(name), entry)
                self._collect()
        return self._model(entry)

    def remove(self, name: str) -> None:
        """Remove a name; the model and its slices go with the last name that stands for it.

        Raises:
            ModelNotFound: no such model.
        """
        path = self._name_path(name)
        with disk_faults(self.root), self._lock():
            if not path.exists():
                raise self._not_found(name)
            path.unlink()
            self._collect()

    def slice_for(
        self,
        model: StoredModel,
        first: int,
        last: int,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> SliceFile:
        """Layers `first` to `last` (exclusive) of a model, cut once and kept; all are the model's own file.

        A kept slice is used if it has the size and the header that cutting it now would give. A new one is
        read back and compared with what was written.

        Raises:
            UnsupportedModel, BadRequest: as `cut` does.
            BadModelFile: the model's file is gone or damaged.
            StorageFailed: no room on the disk, or it does not keep what is written.
        """
        header = read_header(model.path, name=model.name)
        plan = plan_slice(header, first, last, force=force)
        if (first, last) == (0, header.layers):
            return SliceFile(model.path, first, last, model.digest, model.nbytes)
        path = self.root / "slices" / digest_hex(model.digest) / f"{first}-{last}.gguf"
        note = _read_json(path.with_suffix(".json"), _SliceNote)
        if note and note.nbytes == plan.nbytes and _is_slice(path, plan.header, plan.nbytes):
            return SliceFile(path, first, last, note.digest, note.nbytes)
        return self._cut(header, model, path, first, last, force, progress)

    def _cut(
        self,
        header: Header,
        model: StoredModel,
        path: Path,
        first: int,
        last: int,
        force: bool,
        progress: Progress | None,
    ) -> SliceFile:
        with disk_faults(self.root), self.working_folder() as folder:
            fresh = cut(header, first, last, folder / "slice.gguf", progress=progress, force=force)
            if _digest(fresh.path) != fresh.digest:
                raise StorageFailed(
                    f"{self.root} does not give back what was written to it: check the disk first of all."
                )
            with self._lock():
                if not model.path.exists():  # removed while it was cut
                    raise self._not_found(model.name)
                path.parent.mkdir(mode=0o700, exist_ok=True)
                publish(fresh.path, path)
                _write_json(path.with_suffix(".json"), _SliceNote(fresh.digest, fresh.nbytes))
        return SliceFile(path, first, last, fresh.digest, fresh.nbytes)

    def note(self, digest: str, key: str) -> Any:
        """What was noted about a model under `key` (such as a build of the engine); None if nothing was."""
        return self.notes(digest).get(key)

    def notes(self, digest: str) -> dict[str, Any]:
        """Everything that was noted about a model, by key."""
        return _read_json(self._notes_path(digest), dict[str, Any]) or {}

    def set_note(self, digest: str, key: str, value: Any) -> None:
        """Note something JSON-able about a model; it is removed with the model."""
        with disk_faults(self.root), self._lock():
            path = self._notes_path(digest)
            _write_json(path, (_read_json(path, dict[str, Any]) or {}) | {key: value})

    def whole(self, manifest_digest: str) -> Path | None:
        """The whole file of the model with that manifest; None if it is not here."""
        source = self.manifest_source(manifest_digest)
        path = self._blob(source) if source and _DIGEST.fullmatch(source) else None
        return path if path and path.exists() else None

    def manifest_source(self, manifest_digest: str) -> str | None:
        """The digest of the whole file that a manifest was made from; None if it was made elsewhere."""
        return _read_json(self._manifest_source(manifest_digest), str)

    def set_manifest_source(self, manifest_digest: str, digest: str) -> None:
        """Note which whole file a manifest was made from.

        When that model is removed, its manifest goes with it unless slices were assembled by it.
        """
        with disk_faults(self.root), self._lock():
            _write_json(self._manifest_source(manifest_digest), digest)

    def _manifest_source(self, manifest_digest: str) -> Path:
        return self.root / "manifests" / digest_hex(manifest_digest) / "whole.json"

    def _model(self, entry: _NameEntry) -> StoredModel:
        return StoredModel(path=self._blob(entry.digest), **msgspec.structs.asdict(entry))

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / f"sha256-{digest_hex(digest)}"

    def _notes_path(self, digest: str) -> Path:
        return self.root / "notes" / f"{digest_hex(digest)}.json"

    def _name_path(self, name: str) -> Path:
        return self.root / "names" / f"{check_name(name)}.json"

    def _name_entry(self, path: Path) -> _NameEntry | None:
        """What the file of a name says; None if there is none."""
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=_NameEntry)
            digest_hex(entry.digest)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise StorageFailed(
                f"{path} is damaged ({error}): remove this file, then pull the model again."
            ) from error
        return entry

    def _not_found(self, name: str) -> ModelNotFound:
        if name in cards():
            return ModelNotFound(f"The model {name!r} is not here yet: `cordee pull {name}` fetches it.")
        names = [*cards(), *(model.name for model in self.list(lambda _: None))]
        return ModelNotFound(
            f"There is no model {name!r}{nearest(name, names)}: `cordee ls` lists the models here, "
            "`cordee pull` fetches others."
        )

    def _collect(self) -> None:
        """Remove all content that no name stands for. The caller holds the lock."""
        try:
            used = {digest_hex(model.digest) for model in self.list()}
        except StorageFailed:  # which model a damaged entry stands for is unknown: keep everything
            return
        for kind in ("blobs", "slices", "notes"):
            for entry in (self.root / kind).iterdir():
                if re.sub(r"^sha256-|\.json$", "", entry.name) in used:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        for source in (self.root / "manifests").glob("*/whole.json"):
            if (_read_json(source, str) or "").removeprefix("sha256:") in used:
                continue
            source.unlink()
            if not any(source.parent.glob("*-*.gguf*")):
                shutil.rmtree(source.parent)

    @contextmanager
    def working_folder(self) -> Generator[Path]:
        """A folder for work in progress, locked and removed at the end of the block."""
        incoming = self.root / "incoming"
        folder = incoming / secrets.token_hex(8)
        with ExitStack() as stack:
            with self._lock():
                for other in incoming.iterdir():
                    if _is_abandoned(other):
                        shutil.rmtree(other, ignore_errors=True)
                folder.mkdir(mode=0o700)
                stack.enter_context(locks.held_folder(folder))
                stack.callback(shutil.rmtree, folder)
            yield folder

    @contextmanager
    def _lock(self) -> Generator[None]:
        """Lock the store: no other process changes what is visible meanwhile."""
        with (self.root / ".lock").open("a") as file:
            _wait_for(file, self.root)
            yield


def check_name(name: str) -> str:
    """The name of a model, quoted so that it is safe as a file name.

    Raises:
        BadRequest: it cannot name a model.
    """
    quoted = quote(name, safe="", errors="replace")
    if not _NAME.fullmatch(name) or len(quoted) > QUOTED_NAME_BYTES:
        raise BadRequest(
            f"{name!r} cannot name a model: use letters and digits, and . : / @ + - _ after the first.",
            "name",
        )
    return quoted


def _wait_for(file: TextIO, root: Path) -> None:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            locks.take(file)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise StorageFailed(f"Another process has locked {root}: end it, then try again.") from None
        time.sleep(LOCK_POLL_SECONDS)


def _is_abandoned(folder: Path) -> bool:
    """Whether no living process holds this folder."""
    try:
        with locks.held_folder(folder):
            return True
    except (FileNotFoundError, BlockingIOError):  # its process has just finished, or works
        return False


def digest_hex(digest: str) -> str:
    """The hex digits of a digest, safe as a file name; ValueError if it is not a digest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"{digest!r} is not a digest")
    return match[1]


def _take_in(
    source: Path,
    target: Path,
    nbytes: int,
    digest: str | None,
    take: Literal["copy", "link", "move"],
    progress: Progress | None,
) -> str:
    """Bring a file of `nbytes` bytes to `target`, on the store's file system; gives its digest."""
    linked = False
    if take != "copy":
        with suppress(OSError):  # another file system, or one without links: copy instead
            os.link(source, target)
            linked = True
    if not linked:
        with atomic_file(target) as out:
            if not _clone(source, out):
                digest = _copy(source, out, nbytes, progress)
    digest = digest or _digest(target, progress)
    if target.stat().st_size != nbytes:
        raise BadModelFile(f"{source} changed while it was stored: try again when it is complete.")
    if take == "move":
        source.unlink()
    return digest


def _clone(source: Path, out: BinaryIO) -> bool:
    """Let `out` share the blocks of `source`; False if the file system cannot."""
    with source.open("rb") as file:
        return disk.clone(file.fileno(), out.fileno())


def _copy(source: Path, out: BinaryIO, nbytes: int, progress: Progress | None) -> str:
    """Copy a file and give the digest of what was written."""
    digest, done = hashlib.sha256(), 0
    for chunk in _chunks(source):
        write_all(out, chunk)
        digest.update(chunk)
        done += len(chunk)
        if progress:
            progress(done, nbytes)
    return f"sha256:{digest.hexdigest()}"


def _digest(path: Path, progress: Progress | None = None) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    for chunk in _chunks(path):
        digest.update(chunk)
        done += len(chunk)
        if progress:
            progress(done, total)
    return f"sha256:{digest.hexdigest()}"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(COPY_BYTES):
            yield chunk


def _is_slice(path: Path, header: bytes, nbytes: int) -> bool:
    """Whether a file has this size and starts with this header."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == nbytes and file.read(len(header)) == header
    except OSError:
        return False


def _read_json(path: Path, kind: type[T]) -> T | None:
    """A small file that the store can do without; None if it is missing or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(value))
