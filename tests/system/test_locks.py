"""Locks: held against other processes, and gone with the process that held them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cordee import children
from cordee.system import locks

# Run by another process; says when it has the lock, and keeps it until it is killed.
HOLD_FILE = """
with open(sys.argv[1], 'a') as file:
    locks.take(file)
    print('held', flush=True)
    sys.stdin.read()
"""
HOLD_FOLDER = "with locks.held_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def holder(program: str, path: Path) -> "subprocess.Popen[bytes]":
    code = f"import sys; from pathlib import Path; from cordee.system import locks\n{program}"
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": str(children.PACKAGE)}
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"held"
    return process


def test_a_file_is_locked_until_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = holder(HOLD_FILE, path)
    with path.open("a") as file:
        with pytest.raises(BlockingIOError):
            locks.take(file)
        process.kill()
        process.wait()
        locks.wait_for(file)
    assert process.returncode in (-signal.SIGKILL, 1)


def test_a_folder_is_locked_until_its_holder_is_killed(tmp_path: Path) -> None:
    process = holder(HOLD_FOLDER, tmp_path)
    with pytest.raises(BlockingIOError), locks.held_folder(tmp_path):
        pass
    (tmp_path / "file").write_text("what is in it can be used", encoding="ascii")
    process.kill()
    process.wait()
    with locks.held_folder(tmp_path), pytest.raises(BlockingIOError), locks.held_folder(tmp_path):
        pass
    with locks.held_folder(tmp_path):
        pass


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locks.held_folder(tmp_path / "none"):
        pass
