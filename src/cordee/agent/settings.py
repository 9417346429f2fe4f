"""What `cordee up` remembers in `cluster/settings`: the node's name, and where it listens."""

from pathlib import Path

import msgspec

from cordee.files import atomic_file, write_all


class Settings(msgspec.Struct, frozen=True):
    """Each is empty for its default."""

    name: str = ""
    listen: str = ""


def load(folder: Path) -> Settings:
    """The settings that lie beside the identity in `folder`; the defaults where none make sense."""
    try:
        return msgspec.json.decode((folder / "settings").read_bytes(), type=Settings)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return Settings()


def save(folder: Path, settings: Settings) -> None:
    """Keep them, if they are new.

    Raises:
        StorageFailed: the folder cannot be written.
    """
    if settings != load(folder):
        with atomic_file(folder / "settings") as file:
            write_all(file, msgspec.json.encode(settings))
