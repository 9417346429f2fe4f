"""Set-up and the Makefile, as far as they can be tested without a full set-up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the script uses of what a bare Debian has (`coreutils` and other packages marked essential).
ESSENTIAL = (
    "awk",
    "cat",
    "cut",
    "date",
    "df",
    "dirname",
    "flock",
    "grep",
    "id",
    "mkdir",
    "nproc",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "tail",
)

QUESTIONS = [
    "Why do climbers rope together?",
    """it's "quoted" and `backticked`""",
    "costs $5, $HOME, $(HOME), ${HOME}, $$",
    "back\\slash # hash ; | & < > * ?",
    "-n starts with a dash",
    "two\nlines",
    "Où est la cordée ?",
]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("given", ["as a variable", "in the environment"])
def test_make_passes_the_question_on_as_it_was_typed(tmp_path: Path, question: str, given: str) -> None:
    program = tmp_path / "cordee"
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o755)
    command = ["make", "--old-file=setup", f"bin={tmp_path}", "run"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    if given == "as a variable":
        command.append(f"ASK={question}")
    else:
        environment["ASK"] = question
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == ["run", "starter", "--", question]
    assert done.stderr == b""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A clone on a machine that has only the essential programs, in the folder `bin` beside it."""
    (tmp_path / "clone" / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "clone" / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "clone")
    (tmp_path / "bin").mkdir()
    for name in ESSENTIAL:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path / "clone"


def set_up(clone: Path) -> subprocess.CompletedProcess[str]:
    script = str(clone / "scripts" / "setup.sh")
    environment = {"PATH": str(clone.parent / "bin")}
    return subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True)


def add_program(clone: Path, name: str, text: str = "exit 0") -> None:
    program = clone.parent / "bin" / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def install_line(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The packages of the install line on standard error, with which set-up fails."""
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    return line.removeprefix("sudo ").removeprefix("apt-get install -y ").split()


def test_set_up_names_what_the_machine_lacks_and_only_that(bare: Path) -> None:
    assert install_line(set_up(bare)) == ["python3", "python3-venv", "build-essential"]
    add_program(bare, "g++")
    add_program(bare, "make")
    assert install_line(set_up(bare)) == ["python3", "python3-venv"]
    add_program(bare, "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    assert install_line(set_up(bare)) == ["python3-venv"]
    assert not (bare / ".venv").exists()


def test_set_up_refuses_an_old_python(bare: Path) -> None:
    add_program(bare, "python3", 'case "$1" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    done = set_up(bare)
    assert done.returncode == 1
    assert "Python 3.9.2" in done.stderr


def test_set_up_shows_why_a_step_failed(bare: Path) -> None:
    add_program(bare, "g++")
    add_program(bare, "make")
    add_program(bare, "sleep")
    add_program(bare, "python3", 'case "$*" in *venv*.venv) echo no room; exit 28 ;; esac')
    done = set_up(bare)
    assert (done.returncode, done.stdout) == (28, "")
    assert "no room" in done.stderr
    assert "exit status 28" in done.stderr


def test_set_up_says_that_the_disk_is_too_small_before_it_begins(bare: Path) -> None:
    for name in ("g++", "make", "python3"):
        add_program(bare, name)
    (bare.parent / "bin" / "df").unlink()
    add_program(bare, "df", "echo Filesystem; echo /dev/sda 1000000 900000 100000 90% /")
    done = set_up(bare)
    assert (done.returncode, done.stdout) == (1, "")
    assert "100 MB are free" in done.stderr
    assert not (bare / ".venv").exists()


def test_set_up_says_what_helps_without_a_network(bare: Path) -> None:
    for name in ("g++", "make", "sleep"):
        add_program(bare, name)
    add_program(
        bare,
        "python3",
        'case "$*" in *venv*.venv) echo "Temporary failure in name resolution"; exit 1 ;; esac',
    )
    assert "HTTPS_PROXY=" in set_up(bare).stderr
