"""The keys on this disk: `api-keys` of the state folder, or of the cluster that this machine belongs to.

The agent of a cluster keeps its file, and hears changes from other nodes; `cordee serve` reads the file of
either again and again, so that a key that `cordee key rm` revokes stops within a second.
"""

import time
from pathlib import Path

import msgspec

from cordee import files
from cordee.access.api_keys import HELD_MAX, ApiKey, is_sound
from cordee.errors import StorageFailed
from cordee.net import identity

NAME = "api-keys"
FILE_BYTES_MAX = 1 << 20  # HELD_MAX keys take 150 kB
LOOK_SECONDS = 0.2  # between two looks at the file


def folder() -> Path:
    """Where this machine's keys are: in its cluster's folder, else in the state folder itself."""
    return identity.place() if identity.exists() else files.home()


class NoCluster:
    """The authority of a machine that is in no cluster: whoever may write its folder makes its keys."""

    is_admin = True

    def sign_as_authority(self, statement: bytes) -> bytes:
        """Nothing: nobody else reads it."""
        return b""

    def is_of_authority(self, statement: bytes, signature: bytes) -> bool:
        """Whatever is in the folder counts."""
        return True


class KeysFile:
    """A file of keys, in the folder `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._looked = 0.0
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def read(self) -> tuple[ApiKey, ...]:
        """What is in it now, or was at most LOOK_SECONDS ago; nothing where there is no such file.

        Raises:
            StorageFailed: it cannot be read: to go on without it might bring a revoked key back.
        """
        now = time.monotonic()
        if self._seen is not None and now - self._looked < LOOK_SECONDS:
            return self._keys
        self._looked = now
        try:
            state = self._path.stat()
            seen = state.st_mtime_ns, state.st_ino, state.st_size
            if seen != self._seen:
                self._keys, self._seen = _decoded(self._path), seen
        except FileNotFoundError:
            self._keys, self._seen = (), (0, 0, 0)
        except OSError as error:
            raise files.storage_failed(self._path, error, "cannot be read") from error
        return self._keys

    def write(self, keys: tuple[ApiKey, ...]) -> None:
        """Replace what is in it.

        Raises:
            StorageFailed: the disk has no room.
        """
        with files.atomic_file(self._path) as file:  # of mode 0600
            files.write_all(file, msgspec.msgpack.encode(keys))
        self._seen = None

    def keep(self, keys: tuple[ApiKey, ...]) -> None:
        """Write them if they changed."""
        if keys != self.read():
            self.write(keys)


def _decoded(path: Path) -> tuple[ApiKey, ...]:
    data = path.read_bytes()
    try:
        keys = msgspec.msgpack.decode(data, type=tuple[ApiKey, ...])
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageFailed(f"{path} is damaged: delete it, and make the keys anew.") from error
    if len(data) > FILE_BYTES_MAX or len(keys) > HELD_MAX or not all(map(is_sound, keys)):
        raise StorageFailed(f"{path} is damaged: delete it, and make the keys anew.")
    return keys
