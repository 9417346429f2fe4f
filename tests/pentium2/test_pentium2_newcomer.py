"""A newcomer with an old machine: a bare i386 Debian on the emulated Pentium II, and the exported README."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from make_model import SHAPES, make_model
from pentium2_machine import boot, make_disk, need_debootstrap, need_machine, old_program
from terminal import PROGRAM

# The last release whose i386 packages run without SSE.
RELEASE = "bookworm"
PLACE = "/home/cordee"


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """The files of a Debian for i386, unpacked but not configured, which is enough to run its programs."""
    need_machine()
    need_debootstrap()
    folder = tmp_path / "debian"
    command = ["debootstrap", "--arch=i386", "--foreign", "--variant=minbase", RELEASE, folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The folder that `make tiny` and `cordee export` make."""
    for system in ("pentium2", "windows"):
        old_program(system)
    make_model(tmp_path / "model.gguf", replace(SHAPES["15m"], layout="pentium2"))
    command = [*PROGRAM, "export", "--for", "pentium2", tmp_path / "model.gguf", tmp_path / "cd"]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "cd"


def typed(readme: Path) -> list[str]:
    """The lines that the README says to type on Linux, in order."""
    text = readme.read_text(encoding="cp1252").partition("On Linux")[2].partition("On Windows")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


@pytest.mark.long
def test_a_newcomer_who_follows_the_readme_gets_a_text(debian: Path, exported: Path, tmp_path: Path) -> None:
    lines = typed(exported / "README.TXT")
    assert len(lines) == 4
    shutil.copytree(exported, debian / "media" / "cordee")
    (debian / "root" / "typed").write_text("\n".join(["set -e", f"cd {PLACE}", *lines]))
    found = boot(
        tmp_path,
        {},
        {
            "release": "busybox chroot /disk /bin/cat /etc/debian_version",
            "copy": f"busybox chroot /disk /bin/cp -r /media/cordee {PLACE}",
            "typed": "busybox chroot /disk /bin/bash /root/typed",
        },
        disk=make_disk(debian, tmp_path / "disk"),
    )
    assert found["release"].text.startswith("12.")
    assert (found["copy"].status, found["typed"].status) == (0, 0), found
    assert "Once upon a time" in found["typed"].text
    assert "tokens/s" in found["typed"].text
    assert found["typed"].text.count(": OK\n") == len(list(exported.iterdir())) - 1
    assert "floating point: right" in found["typed"].text
