"""The services that run on this machine: a small file for each in the state folder, for `cordee ps`."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from cordee.files import atomic_file, home

CLOCK_SLACK_SECONDS = 2.0  # psutil computes start times from ticks; a reused pid differs by far more


class Entry(msgspec.Struct):
    """A running service: its process, when that process started (seconds since 1970), and its `status()`."""

    pid: int
    started: float
    status: dict[str, Any]


def publish(name: str, status: Mapping[str, Any]) -> Path:
    """Write this process's entry for a service; gives the file, which `withdraw` removes.

    Raises:
        StorageFailed, OSError: it cannot be written.
    """
    path = _folder() / f"{os.getpid()}-{name.replace('/', '%2F')}.json"
    entry = Entry(os.getpid(), psutil.Process().create_time(), dict(status))
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(entry))
    return path


def withdraw(path: Path) -> None:
    """Remove an entry; it may be gone already."""
    path.unlink(missing_ok=True)


def running() -> list[dict[str, Any]]:
    """The status of every running service, with fresh memory figures; entries of ended ones are removed."""
    found: list[dict[str, Any]] = []
    for path in sorted(_folder().glob("*.json")):
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=Entry)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            path.unlink(missing_ok=True)
            continue
        if not _runs(entry):
            path.unlink(missing_ok=True)
            continue
        for stage in entry.status.get("stages", []):
            stage["rss_bytes"] = resident_bytes(stage.get("pid"))
        found.append({**entry.status, "pid": entry.pid, "uptime": time.time() - entry.started})
    return found


def resident_bytes(pid: int | None) -> int | None:
    """The resident memory of a process now; None if it is gone."""
    try:
        return None if pid is None else psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None


def _runs(entry: Entry) -> bool:
    try:
        return abs(psutil.Process(entry.pid).create_time() - entry.started) < CLOCK_SLACK_SECONDS
    except psutil.Error:
        return False


def _folder() -> Path:
    folder = home() / "run"
    folder.mkdir(exist_ok=True)
    return folder
