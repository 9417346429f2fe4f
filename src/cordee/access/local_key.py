"""The API's key: who may ask, beside having an account on this machine.

`--local-key` makes one, in a file of the state folder that only its owner may read. Programs send it as
`Authorization: Bearer KEY`, which OpenAI's clients do with what they call `api_key`.
"""

import secrets
from pathlib import Path

from cordee import files
from cordee.errors import KeyNeeded, StorageFailed

NAME = "local-key"  # of the file
KEY_BYTES = 32  # random ones, which nobody guesses
PREFIX = "cordee-"  # tells people, and programs that look for leaked keys, what it is
KEY_CHARS_MAX = 200  # of a file that somebody else may have written
SCHEME = "bearer"


class LocalKey:
    """The key of a state folder, where there is one. Made by `LocalKey.made` or `LocalKey.found`."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._key = key.encode()

    @classmethod
    def found(cls) -> "LocalKey | None":
        """The key that is there; None if there is none that could be one."""
        path = files.home() / NAME
        try:
            key = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        is_key = key.startswith(PREFIX) and len(key) <= KEY_CHARS_MAX and key.isprintable()
        return cls(path, key) if is_key else None

    @classmethod
    def made(cls) -> "LocalKey":
        """The key that is there, or a new one.

        Raises:
            StorageFailed: it cannot be written; or others may read the file, whose key is then no secret.
        """
        found = cls.found()
        if found is None:
            found = cls(files.home() / NAME, PREFIX + secrets.token_urlsafe(KEY_BYTES))
            with files.atomic_file(found.path) as file:  # of mode 0600
                files.write_all(file, found._key + b"\n")
        elif found.path.stat().st_mode & 0o077:
            raise StorageFailed(
                f"Other accounts may open {found.path}: delete it, and the next start makes another key."
            )
        return found

    @property
    def header(self) -> str:
        """What a request's Authorization header has to be."""
        return f"Bearer {self._key.decode()}"

    def check(self, authorization: str | None) -> None:
        """Refuse a request by its Authorization header.

        Raises:
            KeyNeeded: names the file with the key.
        """
        scheme, _, given = (authorization or "").partition(" ")
        is_ours = secrets.compare_digest(given.strip().encode("utf-8", "surrogatepass"), self._key)
        if not is_ours or scheme.lower() != SCHEME:
            wrong = "this key is not the API's" if given else "the API wants a key"
            raise KeyNeeded(
                f"{wrong}: send 'Authorization: Bearer KEY' with the one in {self.path}, which only the "
                "account that runs Cordée can read"
            )
