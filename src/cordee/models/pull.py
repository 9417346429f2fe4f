"""Putting models into the store: from a file."""

from pathlib import Path

from cordee.models.slices import Progress
from cordee.models.store import Store, StoredModel


def pull(
    source: str, name: str | None = None, store: Store | None = None, progress: Progress | None = None
) -> StoredModel:
    """Put the model file `source` into the store under `name`, else under the file's name."""
    path = Path(source).expanduser()
    return (store or Store()).add_file(path, name or path.stem, progress)
