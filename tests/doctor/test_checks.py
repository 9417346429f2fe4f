"""`cordee doctor` on machines that were prepared to have something wrong with them."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cordee.agent import settings
from cordee.agent.settings import Settings
from cordee.doctor import computing, examine
from cordee.machine import hardware
from default_port import default_port_taken
from members import DAY_SECONDS, founder, newcomer
from terminal import PROGRAM, SECONDS

MEGABYTE = 1_000_000


def told(home: Path) -> list[dict[str, Any]]:
    """What `cordee doctor` finds for a state folder; its exit code says whether any of it is a problem."""
    done = subprocess.run(
        [*PROGRAM, "doctor", "--json"],
        capture_output=True,
        env=os.environ | {"CORDEE_HOME": str(home)},
        timeout=SECONDS,
    )
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == int(any(finding["problem"] for finding in found)), done.stderr
    return found


def one(found: list[dict[str, Any]], word: str) -> dict[str, Any]:
    """The one finding that has a word in it."""
    matching = [finding for finding in found if word in finding["what"]]
    assert len(matching) == 1, found
    assert matching[0]["remedy"]
    return matching[0]


# Ports and addresses


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_port_that_is_taken_and_who_has_it(tmp_path: Path, taken: int, host: str) -> None:
    settings.save(founder(tmp_path).folder, Settings("pc", f"{host}:{taken}"))
    finding = one(told(tmp_path), f"Port {taken}, for other nodes")
    assert f"(process {os.getpid()})" in finding["what"]
    assert finding["problem"] and "--listen HOST:PORT" in finding["remedy"]


def test_the_default_port_is_only_advice(tmp_path: Path) -> None:
    with default_port_taken():
        finding = one(told(tmp_path), "Port 7330, for other nodes")
    assert not finding["problem"] and "7331 to 7360" in finding["remedy"]


def test_an_address_that_was_kept_and_is_no_longer_this_machines(tmp_path: Path) -> None:
    settings.save(founder(tmp_path).folder, Settings("pc", "203.0.113.9"))
    finding = one(told(tmp_path), "203.0.113.9")
    assert finding["problem"] and "is not an address of this machine" in finding["what"]
    assert "--listen 0.0.0.0" in finding["remedy"]


def test_settings_that_make_no_sense_are_the_defaults(tmp_path: Path) -> None:
    (founder(tmp_path).folder / "settings").write_bytes(b"\xff{]")
    assert settings.load(tmp_path / "cluster") == Settings()


# The disk


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of its own, made with the mount options that the test names."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "cordee-test", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs root, for a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", ["size=16m"], indirect=True)
def test_a_disk_that_is_full(small_disk: Path) -> None:
    assert "almost full: 1" in one(told(small_disk), "disk")["what"]
    with (small_disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(MEGABYTE)):
                pass
        except OSError:
            pass
    finding = one(told(small_disk), "disk")
    assert finding["problem"] and f"full: 0 MB are free in {small_disk}" in finding["what"]
    assert "almost" not in finding["what"]


@pytest.mark.parametrize("small_disk", ["size=2g,nr_inodes=40"], indirect=True)
def test_a_disk_that_has_room_but_not_for_another_file(small_disk: Path) -> None:
    for number in range(100):
        try:
            (small_disk / str(number)).touch()
        except OSError:
            break
    finding = one(told(small_disk), "disk")
    assert finding["problem"] and "room for 0 more files" in finding["what"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = one(told(tmp_path / "file" / "home"), "cannot be created")
    assert finding["problem"] and "CORDEE_HOME" in finding["remedy"]


# Certificate and clock


def test_a_certificate_that_ran_out(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")
    newcomer(tmp_path / "member", admin, time.time() - 40 * DAY_SECONDS)
    finding = one(told(tmp_path / "member"), "ran out on")
    assert finding["problem"]
    founder(tmp_path / "old", time.time() - 40 * DAY_SECONDS)  # an admin renews its own when it starts
    assert not [each for each in told(tmp_path / "old") if "runs out" in each["what"]]


def test_a_certificate_that_runs_out_soon(tmp_path: Path) -> None:
    admin = founder(tmp_path / "admin")
    newcomer(tmp_path / "member", admin, time.time() - 25 * DAY_SECONDS)
    finding = one(told(tmp_path / "member"), "runs out in 5 days")
    assert not finding["problem"] and "admin" in finding["remedy"]
    newcomer(tmp_path / "fresh", admin, time.time() - 15 * DAY_SECONDS)
    assert not [each for each in told(tmp_path / "fresh") if "runs out" in each["what"]]


def test_a_clock_that_is_behind_the_certificate(tmp_path: Path) -> None:
    founder(tmp_path, time.time() + 10 * DAY_SECONDS)
    finding = one(told(tmp_path), "clock")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert finding["problem"] and f"This machine's clock says {today}" in finding["what"]
    assert "timedatectl" in finding["remedy"]


def test_an_identity_that_is_damaged(tmp_path: Path) -> None:
    (founder(tmp_path).folder / "node.key").write_bytes(b"-----BEGIN")
    finding = one(told(tmp_path), "node.key is damaged")
    assert finding["problem"]


def test_a_machine_without_an_identity_lacks_nothing(tmp_path: Path) -> None:
    assert not [each for each in told(tmp_path) if "runs out" in each["what"]]


# GPUs


def fake_device(root: Path, slot: str, kind: str, vendor: str, driver: str | None) -> None:
    device = root / "bus/pci/devices" / slot
    device.mkdir(parents=True)
    for name, value in (("class", kind), ("vendor", vendor), ("device", "0x2484")):
        (device / name).write_text(value + "\n")
    if driver:
        (root / "drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(root / "drivers" / driver)


def test_gpus_are_found_among_the_pci_devices(tmp_path: Path) -> None:
    fake_device(tmp_path, "0000:01:00.0", "0x030000", "0x10de", "nvidia")
    fake_device(tmp_path, "0000:02:00.0", "0x030200", "0x1002", None)
    fake_device(tmp_path, "0000:03:00.0", "0x030000", "0x1234", "bochs-drm")  # a virtual display
    fake_device(tmp_path, "0000:04:00.0", "0x020000", "0x8086", "e1000e")  # a network card
    found = hardware.gpus(tmp_path)
    assert [(gpu.vendor, gpu.driver) for gpu in found] == [("NVIDIA", "nvidia"), ("AMD", None)]


def test_a_gpu_without_a_driver_is_named(tmp_path: Path) -> None:
    fake_device(tmp_path, "0000:01:00.0", "0x030000", "0x10de", None)
    fake_device(tmp_path, "0000:02:00.0", "0x030000", "0x10de", "nouveau")
    facts = {"gpus": [asdict(gpu) for gpu in hardware.gpus(tmp_path)], "system": "Debian GNU/Linux 12"}
    found = computing.gpus(facts | {"libllama": {"devices": [{"backend": "CPU"}]}})
    assert [finding.what.partition(" has no driver")[1] for finding in found] == [" has no driver"] * 2
    assert {finding.remedy for finding in found} == {"sudo apt-get install -y nvidia-driver"}


# The list


def test_what_two_checks_find_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"memory": {"available_bytes": 1_000_000, "total_bytes": 1_000_000}}
    monkeypatch.setattr(examine, "CHECKS", (computing.memory, computing.memory))
    [finding] = examine.findings(facts)
    assert finding.problem and "1 MB of memory is free" in finding.what
