"""The Windows program under Wine, in a Debian for i386 of its own: it prints what the Linux program prints.

Wine is not Windows 98 (`tests/pentium2/test_pentium2.py` compares the imports to its libraries), but it runs
every line.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from cordee.models.cards import cards
from pentium2_machine import need_debootstrap, old_program

RELEASE = "bookworm"
MODEL = cards()["story-small"].path
GREEDY = ("--greedy", "-n", "120")
INSTALL = "apt-get update -q && apt-get install -y -q --no-install-recommends wine wine32"
INSTALL_SECONDS, RUN_SECONDS = 1200, 120


class Wine:
    """A Debian for i386 with Wine. What runs there sees only its own processes, and ends with the call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = ["debootstrap", "--arch=i386", "--variant=minbase", RELEASE, str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
        for name in ("etc/apt/apt.conf.d", "etc/resolv.conf"):  # how this machine reaches its packages
            if (source := Path("/", name)).is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            elif source.exists():
                shutil.copyfile(source, folder / name)
        self._inside(["sh", "-c", INSTALL], INSTALL_SECONDS).check_returncode()
        (folder / "cordee").mkdir()
        shutil.copy(old_program("windows"), folder / "cordee")
        shutil.copy(MODEL, folder / "cordee" / "m.gguf")

    def run(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess:
        """cordee-tiny.exe in its folder, where the model is m.gguf."""
        command = 'cd /cordee && exec wine cordee-tiny.exe "$@"'
        return self._inside(["sh", "-c", command, "sh", *arguments], RUN_SECONDS, typed)

    def _inside(self, command: list[str], seconds: float, typed: str = "") -> subprocess.CompletedProcess:
        private = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            f"--mount-proc={self._folder}/proc",
        ]
        settings = ["env", "HOME=/root", "WINEDEBUG=-all", "DEBIAN_FRONTEND=noninteractive"]
        return subprocess.run(
            [*private, "chroot", str(self._folder), *settings, *command],
            input=typed,
            capture_output=True,
            text=True,
            timeout=seconds,
        )


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Wine:
    need_debootstrap()
    return Wine(tmp_path_factory.mktemp("wine") / "debian")


def linux(*arguments: str, typed: str = "") -> str:
    command = [str(old_program("pentium2")), *arguments]
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, check=True, timeout=RUN_SECONDS
    )
    return done.stdout


@pytest.mark.long
def test_windows_tells_the_same_story(wine: Wine) -> None:
    told = wine.run("m.gguf", "Once upon a time", *GREEDY)
    assert told.returncode == 0, told.stderr
    assert told.stdout == linux(str(MODEL), "Once upon a time", *GREEDY)
    assert wine.run("m.gguf", "Tom", "--seed", "7").stdout == linux(str(MODEL), "Tom", "--seed", "7")


@pytest.mark.long
def test_windows_chats_computes_right_and_names_what_is_missing(wine: Wine) -> None:
    typed = "Once upon a time\nMia had a dog\n\n"
    assert wine.run("m.gguf", *GREEDY, typed=typed).stdout == linux(str(MODEL), *GREEDY, typed=typed)
    tested = wine.run("--selftest")
    assert tested.returncode == 0
    assert tested.stdout.count("right") == 2
    missing = wine.run("none.gguf", "Tom")
    assert missing.returncode == 1
    assert "none.gguf cannot be opened: there is no such file" in missing.stderr
