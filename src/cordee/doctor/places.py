"""The places that this machine must have free: room on its disk, and the ports that it listens on."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cordee.agent import settings
from cordee.errors import BadRequest, StorageFailed
from cordee.files import home
from cordee.findings import Finding
from cordee.net import address
from cordee.net.bus import BusOptions
from cordee.serving import registry
from cordee.system.disk import free_file_count

FREE_DISK_BYTES = 1_000_000_000  # a small model and its slices
FULL_BYTES = 10_000_000  # less than what a running node writes
FREE_FILES = 1000  # a model that is cut takes some dozens
API = ("127.0.0.1", 8321)  # where `cordee up` and `serve` answer unless told otherwise


def places_facts() -> dict[str, Any]:
    """Where state is kept, and how much room there is."""
    try:
        folder = home()
    except StorageFailed as error:
        return {"disk": {"folder": None, "free_bytes": 0, "free_files": 0, "fault": error.message}}
    free_files = free_file_count(folder)
    free_bytes = shutil.disk_usage(folder).free
    return {"disk": {"folder": str(folder), "free_bytes": free_bytes, "free_files": free_files, "fault": ""}}


def disk(facts: dict[str, Any]) -> Sequence[Finding]:
    """Is there room, and may it be used?"""
    known = facts["disk"]
    if known["fault"]:
        return [Finding(known["fault"], "export CORDEE_HOME=FOLDER", True)]
    folder, found = known["folder"], list[Finding]()
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(Finding(f"{folder} cannot be written.", f"sudo chown -R $USER {folder}", True))
    remedy = "Free some space (`cordee ls`, `cordee rm`), or set CORDEE_HOME to a folder on another disk."
    if known["free_bytes"] < FREE_DISK_BYTES:
        what = (
            f"The disk is {'full' if known['free_bytes'] < FULL_BYTES else 'almost full'}: "
            f"{known['free_bytes'] / 1e6:.0f} MB are free in {folder}, where models are kept."
        )
        found.append(Finding(what, remedy, True))
    elif known["free_files"] is not None and known["free_files"] < FREE_FILES:
        what = f"The disk is full: it has room for {known['free_files']} more files ({folder})."
        found.append(Finding(what, remedy, True))
    return found


def ports(facts: dict[str, Any]) -> Sequence[Finding]:
    """Are the ports free that `cordee up` will listen on? Where a node runs, it knows."""
    if facts["node"] is not None or facts["disk"]["fault"]:
        return []
    found: list[Finding] = []
    kept = settings.load(Path(facts["disk"]["folder"]) / "cluster")
    try:
        wanted = BusOptions(kept.listen).listening()
    except BadRequest as error:
        remedy = "cordee up --listen 0.0.0.0    (all interfaces; it is remembered)"
        found.append(Finding(f"--listen {kept.listen} is remembered. {error.message}", remedy, True))
    else:
        if fault := _fault(wanted.host, wanted.port):
            what = f"Port {wanted.port}, for other nodes, cannot be used: {fault}."
            others = f"`cordee up` takes a port of {address.PORTS[0]} to {address.PORTS[-1]}"
            if wanted.is_chosen:
                others = "choose another port: cordee up --listen HOST:PORT"
            found.append(Finding(what, f"End that program; or else {others}.", wanted.is_chosen))
    if not _is_ours(API[1]) and (fault := _fault(*API)):
        what = f"Port {API[1]}, for the API, cannot be used: {fault}."
        found.append(Finding(what, "End that program; or else choose another: cordee up --port 8322", True))
    return found


def _fault(host: str, port: int) -> str:
    """Why this cannot be listened on; empty if it can."""
    try:
        address.listener(host, port).close()
    except OSError as error:
        return address.refusal(error, port)
    return ""


def _is_ours(port: int) -> bool:
    """Whether `cordee serve` of this user holds the port."""
    with suppress(psutil.Error, OSError):
        return any(service.get("port") == port for service in registry.running())
    return False
