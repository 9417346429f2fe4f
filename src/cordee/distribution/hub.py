"""The model hub: what a repository holds, and downloads that resume where they stopped.

No other module connects to anything outside the local network. huggingface_hub makes the requests, so its
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` apply. Its `hf_hub_download` starts over in a new process, so
the files are fetched with the function underneath it, into partial files that are kept.
"""

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

import msgspec
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import (
    http_get,  # pyright: ignore[reportUnknownVariableType] - a class in its signature lacks type arguments
)
from huggingface_hub.utils import (
    build_hf_headers,  # pyright: ignore[reportUnknownVariableType] - a dict in its signature lacks them, too
    disable_progress_bars,
    hf_raise_for_status,
    http_backoff,  # pyright: ignore[reportUnknownVariableType] - its other arguments have no types
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from cordee.distribution.hub_faults import hub_faults
from cordee.errors import BadModelFile, StorageFailed
from cordee.files import home, partial_name
from cordee.models.slices import Progress
from cordee.system import locks

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# The library would send the hub data about this installation.
constants.HF_HUB_DISABLE_TELEMETRY = True
# What it has to say of its attempts would stand before our sentence for the same.
hub_logging.set_verbosity_error()

# A repository of a large model in all its quantizations has some hundred files; a data set has millions.
FILES_LIMIT = 10_000
# For each part of a list of files: a hub that has said nothing for so long does not answer.
LIST_SECONDS = 20.0
# A list is asked for again after these faults of the hub, which pass; not when there is no way to it:
# whoever asked learns that at once.
LIST_RETRIES = 2
PASSING_FAULTS = (500, 502, 503, 504)
# An interrupted download that was not resumed for this long is removed.
KEEP_SECONDS = 14 * 24 * 3600


@dataclass(frozen=True)
class HubFile:
    """A file of `nbytes` bytes in a repository, with the digest that the hub promises.

    That is a SHA-256 (64 hex digits), or for small files, which are in git itself, git's own SHA-1 (40).
    """

    repository: str
    path: str
    nbytes: int
    sha256: str
    git_sha1: str = ""


class _Stored(msgspec.Struct):
    """Where the hub keeps a large file."""

    oid: str
    size: int


class _Entry(msgspec.Struct):
    """A file or folder in the hub's list of a repository."""

    type: str
    path: str
    size: int = 0
    oid: str = ""
    lfs: _Stored | None = None


def repository_files(repository: str) -> list[HubFile]:
    """All files of a repository.

    Raises:
        ModelNotFound: no such repository, or a private one.
        StorageFailed: the hub cannot be reached, or wants an agreement first.
        SetupNeeded: the proxy, the certificates or the token of this machine cannot be used.
        BadRequest: this cannot be the name of a repository.
    """
    with hub_faults(repository):
        validate_repo_id(repository)
        entries = (entry for page in _pages(repository) for entry in page)
        files = [entry for entry, _ in zip(entries, range(FILES_LIMIT), strict=False)]
    return [
        HubFile(repository, file.path, file.lfs.size, file.lfs.oid)
        if file.lfs
        else HubFile(repository, file.path, file.size, "", file.oid)
        for file in files
        if file.type == "file"
    ]


def _pages(repository: str) -> Iterator[list[_Entry]]:
    """The parts of the list of a repository's files.

    The hub's API: GET /api/models/OWNER/NAME/tree/REVISION; a header `Link` leads to the next part. HfApi's
    own function for this tries for half a minute before it says that there is no network.
    """
    url = f"{constants.ENDPOINT}/api/models/{repository}/tree/{constants.DEFAULT_REVISION}?recursive=true"
    while url:
        response = http_backoff(
            "GET",
            url,
            headers=build_hf_headers(),
            timeout=LIST_SECONDS,
            max_retries=LIST_RETRIES,
            retry_on_exceptions=(),
            retry_on_status_codes=PASSING_FAULTS,
        )
        hf_raise_for_status(response)
        yield msgspec.json.decode(response.content, type=list[_Entry])
        url = response.links.get("next", {}).get("url", "")


@contextmanager
def downloaded(files: Sequence[HubFile], progress: Progress | None = None) -> Generator[list[Path]]:
    """The files, fetched and checked, in a folder that is removed when the block ends well.

    After an interruption what came stays, and the next call continues from there. `progress(done_bytes,
    total_bytes)` counts all files together.

    Raises:
        StorageFailed: the hub cannot be reached, sent other content than it promised (which is removed), or
            there is no room.
    """
    downloads = home() / "downloads"
    key = hashlib.sha256("\n".join(file.sha256 or file.git_sha1 for file in files).encode()).hexdigest()[:32]
    folder = downloads / key
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(folder, files[0]):
        _sweep(downloads)
        _require_room(folder, files)
        paths = list(_fetch_all(files, folder, progress))
        try:
            yield paths
        except BadModelFile:  # it came as promised, so it would come again like this
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def fetch_range(file: HubFile, start: int, nbytes: int, sink: BinaryIO | io.RawIOBase) -> None:
    """Write `nbytes` bytes of a file on the hub, from `start`, to `sink`; only its `write` is called.

    Raises:
        HubUnreachable: it cannot be reached, or the connection broke.
        StorageFailed: the hub does not give what was asked.
        ModelNotFound: the file is gone.
    """
    disable_progress_bars("huggingface_hub.http_get")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with hub_faults(file.repository):
        http_get(
            hf_hub_url(file.repository, file.path, endpoint=constants.ENDPOINT),
            cast(BinaryIO, sink),
            headers=headers | {"Range": f"bytes={start}-{start + nbytes - 1}"},
            expected_size=nbytes,
        )


def _fetch_all(files: Sequence[HubFile], folder: Path, progress: Progress | None) -> Iterator[Path]:
    before, total = 0, sum(file.nbytes for file in files)
    for file in files:
        path = folder / PurePosixPath(file.path).name
        if not path.exists():

            def report(done: int, before: int = before) -> None:
                if progress:
                    progress(before + done, total)

            _fetch(file, path, report)
        before += file.nbytes
        yield path


def _fetch(file: HubFile, path: Path, report: Callable[[int], None]) -> None:
    """Fetch one file; it gets its name once it is complete and has the right content."""
    if file.nbytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise StorageFailed(
            f"{file.path} is larger than the hub gives in one piece: choose a model that comes in shards."
        )
    partial = path.with_name(partial_name(path.name, ".partial"))
    with hub_faults(file.repository), partial.open("ab", buffering=0) as raw, _Counted(raw, report) as out:
        if out.tell() > file.nbytes:
            out.truncate(0)
            out.seek(0)
        report(out.tell())
        disable_progress_bars("huggingface_hub.http_get")
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        http_get(
            hf_hub_url(file.repository, file.path, endpoint=constants.ENDPOINT),
            out,
            resume_size=out.tell(),
            headers=headers,
            expected_size=file.nbytes,
        )
    found, promised = _found_digest(file, partial)
    if found != promised:
        partial.unlink()
        raise StorageFailed(
            f"{file.path} came with other content than the hub promised ({found}, not {promised}) and was "
            "removed: try again."
        )
    partial.replace(path)


def _found_digest(file: HubFile, path: Path) -> tuple[str, str]:
    """The digest of what came, and the promised one, each with its kind."""
    with path.open("rb") as came:
        if file.sha256:
            return f"sha256 {hashlib.file_digest(came, 'sha256').hexdigest()}", f"sha256 {file.sha256}"
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        hashlib.file_digest(came, lambda: blob)
    return f"git {blob.hexdigest()}", f"git {file.git_sha1}"


class _Counted(io.BufferedWriter):
    """A file that reports its length after each write."""

    def __init__(self, raw: BinaryIO, report: Callable[[int], None]) -> None:
        super().__init__(raw)
        self._report = report

    def write(self, buffer: "ReadableBuffer", /) -> int:
        written = super().write(buffer)
        self._report(self.tell())
        return written


@contextmanager
def _held(folder: Path, file: HubFile) -> Generator[None]:
    """Keep other processes off a download. Its last use is noted as the folder's modification time."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.held_folder(folder))
        except BlockingIOError:
            raise StorageFailed(
                f"Another process is fetching {file.repository}/{file.path}: wait until it has finished."
            ) from None
        os.utime(folder)
        yield


def _sweep(downloads: Path) -> None:
    """Remove abandoned downloads."""
    for folder in downloads.iterdir():
        if time.time() - folder.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _require_room(folder: Path, files: Sequence[HubFile]) -> None:
    """Refuse a download that the disk cannot hold, rather than fail after hours."""
    present = sum(path.stat().st_size for path in folder.iterdir())
    total = sum(file.nbytes for file in files)
    needed = total - present + (total if len(files) > 1 else 0)  # shards are merged into one more file
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageFailed(
            f"{files[0].repository} needs {needed / 1e9:.1f} GB on the disk of {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free: free some space, or set CORDEE_HOME to a folder on another "
            "disk."
        )
