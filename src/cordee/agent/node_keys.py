"""The API's keys at a node: what the cluster knows of them, also on this disk; how an admin changes them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cordee.access import keyring
from cordee.access.api_keys import ApiKey, ApiKeys, Authority
from cordee.access.keys_file import KeysFile


class NodeKeys:
    """The keys of the cluster as this node knows them. `speak` tells the others at once.

    Raises:
        StorageFailed: the file of the last run cannot be read.
    """

    def __init__(self, authority: Authority, folder: Path, speak: Callable[[], None] = lambda: None) -> None:
        self._file = KeysFile(folder)
        self._speak = speak
        self.shared = ApiKeys(authority, self._file.read())

    def all(self) -> tuple[ApiKey, ...]:
        """Those that there are now, and the names of those that were revoked."""
        return self.shared.all

    def add(self, name: str, bounds: Mapping[str, float | bool]) -> str:
        """Make a key; how it is shown, once. This node is an admin.

        Raises:
            BadRequest: there is such a key, or the name is none.
        """
        key, shown = keyring.new_key(name, self.all(), **bounds)
        self._write(key)
        return shown

    def remove(self, name: str) -> None:
        """Revoke a key, on all nodes. This node is an admin.

        Raises:
            BadRequest: there is none such.
        """
        self._write(keyring.revoked(name, self.all()))

    def limit(self, name: str, requests: int, tokens: int) -> None:
        """Change the bounds of a key, on all nodes. This node is an admin.

        Raises:
            BadRequest: there is none such.
        """
        self._write(keyring.limited(name, self.all(), requests, tokens))

    def adopt(self, keys: tuple[ApiKey, ...]) -> None:
        """Take over the keys that this machine had before it founded the cluster."""
        self.shared.adopt(keys, time.time())
        self.keep()

    def keep(self) -> None:
        """Write them to the disk if they changed."""
        self._file.keep(self.all())

    def _write(self, key: ApiKey) -> None:
        self.shared.write(key, time.time())
        self.keep()
        self._speak()
