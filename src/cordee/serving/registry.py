"""Which services run on this machine: one small file for each in the state folder, for `cordee ps`."""

import os
import time
from pathlib import Path

import msgspec
import psutil

from cordee.files import atomic_file, home

CLOCK_SLACK_SECONDS = 2.0  # psutil computes start times from ticks; a reused pid differs by far more


class Entry(msgspec.Struct):
    """A running service: its process, when that process started, and `Service.status()`."""

    pid: int
    started: float
    status: dict


def publish(name: str, status: dict) -> Path:
    """Write this process's entry for a service; gives the file, which `withdraw` removes."""
    path = _folder() / f"{os.getpid()}-{name.replace('/', '%2F')}.json"
    entry = Entry(os.getpid(), psutil.Process().create_time(), status)
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(entry))
    return path


def withdraw(path: Path) -> None:
    """Remove an entry; it may be gone already."""
    path.unlink(missing_ok=True)


def running() -> list[dict]:
    """The status of every service that runs, with fresh memory figures; entries of dead ones are removed."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=Entry)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            path.unlink(missing_ok=True)
            continue
        if not _lives(entry):
            path.unlink(missing_ok=True)
            continue
        for stage in entry.status.get("stages", []):
            stage["rss_bytes"] = resident_bytes(stage.get("pid"))
        found.append({**entry.status, "pid": entry.pid, "uptime": time.time() - entry.started})
    return found


def resident_bytes(pid: int | None) -> int | None:
    """Memory that a process holds now; None if it is gone."""
    try:
        return None if pid is None else psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None


def _lives(entry: Entry) -> bool:
    try:
        return abs(psutil.Process(entry.pid).create_time() - entry.started) < CLOCK_SLACK_SECONDS
    except psutil.Error:
        return False


def _folder() -> Path:
    folder = home() / "run"
    folder.mkdir(exist_ok=True)
    return folder
