"""Another version in place of this one: checked, installed beside it, tried, and given up if it fails.

The version before stays until the next update. A node that runs as a service hands its layers to others first
(`cordee drain`), so that no answer is lost; with several machines, update one after the other.
"""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from cordee.errors import BadRequest, DoesNotFit, SetupNeeded, StorageFailed
from cordee.files import disk_faults
from cordee.install import layout, service
from cordee.install.bundle import MAKER, SIGNATURE, SMALL_BYTES_MAX, SUMS, VERSION, InstallBundle

UP_SECONDS = 120.0  # for a node to be there again; a model that is loaded meanwhile takes no part in this
POLL_SECONDS = 1.0
DRAIN_SECONDS = 900.0  # answers that are being written end by themselves, or move
INSTALL_SECONDS = 900.0  # 20 s on a PC; a slow disk beside other work takes longer
FETCH_SECONDS = 30.0  # without a byte
FILE_BYTES_MAX = 1 << 30  # of one file of a folder that is fetched; the starter model has a tenth
READ_BYTES = 1 << 20

Report = Callable[[str], None]


def fetched(address: str, folder: Path, maker: bytes, report: Report) -> InstallBundle:
    """The folder that some HTTP server of the house offers at this address, copied into `folder`.

    What is not signed by `maker` is not even fetched, and the address cannot change a byte of the rest.

    Raises:
        BadRequest: it is not there, or not ours.
    """
    base = address.rstrip("/") + "/"
    for name in (VERSION, SUMS, SIGNATURE, MAKER):
        _fetch(base + name, folder / name, SMALL_BYTES_MAX)
    bundle = InstallBundle(folder)
    bundle.check_signature(maker)
    for name in bundle.sums():
        report(f"fetching {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _fetch(base + name, folder / name, FILE_BYTES_MAX)
    return bundle


def _fetch(address: str, target: Path, bytes_max: int) -> None:
    try:
        opened = urllib.request.urlopen(address, timeout=FETCH_SECONDS)
        with opened as answer, disk_faults(target), target.open("wb") as file:
            left = bytes_max
            while left and (piece := answer.read(min(READ_BYTES, left))):
                file.write(piece)
                left -= len(piece)
    except (urllib.error.URLError, ValueError) as error:
        raise BadRequest(
            f"{address} cannot be fetched ({error}): does that machine offer it still?"
        ) from error
    except OSError as error:
        raise BadRequest(f"{address} broke off ({error}): try again.") from error


def check(new: InstallBundle, top: Path) -> None:
    """May this bundle take the place of what is installed at `top`?

    Raises:
        BadRequest: it is not signed by the same maker, is damaged, or is not newer.
    """
    installed = InstallBundle(top / "bundle")
    new.check_signature(installed.small(MAKER))
    if new.version == installed.version:
        raise BadRequest(f"Cordée {new.version} is installed already.")
    if _ordered(new.version) < _ordered(installed.version):
        raise BadRequest(
            f"{new.version} is older than {installed.version}, which is installed. To go back all the same: "
            f"sh {new.folder / 'install.sh'} --prefix {top}"
        )
    new.check_files()


def _ordered(version: str) -> list[int]:
    """A version for comparing: `0.2.0-1f0c2ab9` is [0, 2, 0]."""
    return [int(part) for part in version.partition("-")[0].split(".") if part.isdigit()]


def apply(new: InstallBundle, top: Path, report: Report) -> None:
    """Install a bundle that was checked, and have the service run it; as before if it does not come up.

    Raises:
        StorageFailed: it cannot be installed; nothing has changed.
        SetupNeeded: the node did not come up with it; it runs with the version before again.
    """
    report(f"installing {new.version} beside the version that runs")
    command = ["sh", str(new.folder / "install.sh"), "--prefix", str(top), "--no-switch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode:
        raise StorageFailed(
            f"{new.version} could not be installed: {done.stderr.strip() or done.stdout.strip()}"
        )
    before = (top / "current").readlink()
    running = service.own()
    is_service = running.place.is_file() and running.is_active
    if is_service:
        _drain(running, report)
    switch(top, new.version)
    if is_service:
        report("starting the new version")
        with contextlib.suppress(SetupNeeded):  # `_comes_up` says so
            running.systemctl("restart", service.UNIT)
        if not _comes_up(running, new.version.partition("-")[0]):
            switch(top, str(before))
            running.systemctl("restart", service.UNIT)
            raise SetupNeeded(
                f"The node did not come up with {new.version}; it runs with {before} again. "
                "`cordee service logs` shows what it said."
            )
    keep_bundle(new, top)
    for old in top.iterdir():
        is_version = (old / "whole").is_file() and not old.is_symlink()
        if is_version and old.name not in (new.version, str(before)):
            shutil.rmtree(old)


def switch(top: Path, version: str) -> None:
    """Make this installed version the one in use."""
    link = top / "current.new"
    link.unlink(missing_ok=True)
    link.symlink_to(version)
    link.replace(top / "current")


def keep_bundle(new: InstallBundle, top: Path) -> None:
    """Keep the folder that was installed, for the next machine."""
    partial = top / "bundle.partial"
    with disk_faults(partial):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(new.folder, partial)
        shutil.rmtree(top / "bundle")
        partial.rename(top / "bundle")


def _drain(running: service.Service, report: Report) -> None:
    report("moving what runs here to other machines")
    done = _verb(running, "drain", seconds=DRAIN_SECONDS)
    if done is None or done.returncode not in (0, DoesNotFit.exit_code):
        raise SetupNeeded("This node could not be drained: nothing has changed. `cordee drain` says why.")
    if done.returncode:
        report("no other machine has room for all of it: what it serves pauses for the restart")


def _comes_up(running: service.Service, version: str) -> bool:
    """Whether the node is there again, as this version."""
    ends = time.monotonic() + UP_SECONDS
    while time.monotonic() < ends:
        time.sleep(POLL_SECONDS)
        done = _verb(running, "nodes", "--json", seconds=UP_SECONDS)
        if done is None or done.returncode:
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):
            nodes = json.loads(done.stdout)["nodes"]
            if any(node["self"] and node["version"] == version for node in nodes):
                return True
    return False


def _verb(running: service.Service, *words: str, seconds: float) -> subprocess.CompletedProcess[str] | None:
    """What a verb says to the service's node, as the account that it runs as; None: not in time."""
    command: Sequence[str] = (str(layout.program()), *words)
    account = service.ACCOUNT if running.for_machine else None
    home = {"HOME": str(service.STATE), "PATH": "/usr/bin:/bin"} if running.for_machine else None
    try:
        return subprocess.run(
            command,
            user=account,
            env=home,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
