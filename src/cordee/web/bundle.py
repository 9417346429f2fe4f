"""The page's files (`static/`), as they are sent: under a name that changes with them, and compressed.

There is no build step: a browser loads the modules as they are written. All of them are under one prefix that
is the SHA-256 of the whole bundle, so a browser keeps them for good, and never mixes two releases.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent / "static"
HASH_CHARS = 16
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
COMPRESSED_LEVEL = 9  # each file is compressed once in the life of a process


@dataclass
class File:
    """A file of the bundle, read when the process began to serve the page."""

    path: PurePosixPath
    content: bytes

    @property
    def media_type(self) -> str:
        """Its Content-Type."""
        return MEDIA_TYPES[self.path.suffix]

    @cached_property
    def compressed(self) -> bytes:
        """Its content by gzip: the same bytes each time."""
        return gzip.compress(self.content, COMPRESSED_LEVEL, mtime=0)


class Bundle:
    """All files of a folder that a browser may ask for, by their path in it."""

    def __init__(self, folder: Path = ROOT) -> None:
        digest = hashlib.sha256()
        self._files: dict[str, File] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix in MEDIA_TYPES and path.is_file():
                name = path.relative_to(folder).as_posix()
                self._files[name] = File(PurePosixPath(name), path.read_bytes())
                digest.update(f"{name}\0".encode() + hashlib.sha256(self._files[name].content).digest())
        self.hash = digest.hexdigest()[:HASH_CHARS]
        self.document = (folder / "index.html").read_text(encoding="utf-8").replace("{{hash}}", self.hash)

    def find(self, path: str) -> File | None:
        """The file of a path below the prefix."""
        return self._files.get(path)
