"""The state folder is private; a file is either complete or not there at all."""

import errno
import os
import pwd
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.errors import StorageFailed
from cordee.files import atomic_file, atomic_folder, home, partial_name


def test_home_is_where_the_variable_says_and_private(monkeypatch, tmp_path):
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path / "deep" / "state"))
    folder = home()
    assert folder == tmp_path / "deep" / "state"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_home_without_the_variable_is_the_users_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("CORDEE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home().is_relative_to(tmp_path)
    assert home().name == "cordee"


def test_home_that_cannot_be_made_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path / "file" / "state"))
    with pytest.raises(StorageFailed, match="CORDEE_HOME"):
        home()


def test_without_any_home_folder_the_remedy_is_named(monkeypatch, tmp_path):
    """As in a container whose user has no entry: nothing may be made in a folder called `~`."""
    for name in ("CORDEE_HOME", "HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    for chosen in ("", "~/state", "~nobody-of-this-name/state"):
        monkeypatch.setenv("CORDEE_HOME", chosen)
        with pytest.raises(StorageFailed, match=r"no home folder .*set CORDEE_HOME"):
            home()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "\u6a21" * 85, os.fsdecode(b"\xe9" * 255)])
def test_a_name_may_be_as_long_as_names_may_be(tmp_path, name):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    left = tmp_path / partial_name(f".{name}", f".{int(gone.stdout)}.abc.partial")
    left.write_bytes(b"half")
    with atomic_file(tmp_path / name) as file:
        file.write(b"whole")
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "and what was left is swept"
    with atomic_folder(tmp_path / f"y{name[1:]}") as folder:
        (folder / "a").write_bytes(b"b")
    with pytest.raises(StorageFailed, match="the name is too long: choose a shorter one"):
        atomic_file(tmp_path / (name + "x")).__enter__()


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "answer"
    with atomic_file(path) as file:
        file.write(b"forty-")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"forty-two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["answer"]


def test_a_failure_leaves_what_was_there_before(tmp_path):
    path = tmp_path / "answer"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["answer"]


def test_what_a_killed_writer_left_is_swept_and_a_living_ones_is_not(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    dead = tmp_path / f".answer.{int(gone.stdout)}.abc.partial"
    living = tmp_path / f".answer.{os.getpid()}.abc.partial"
    other = tmp_path / f".another.{int(gone.stdout)}.abc.partial"
    for path in (dead, living, other):
        path.write_bytes(b"half")
    with atomic_file(tmp_path / "answer") as file:
        file.write(b"whole")
    assert not dead.exists()
    assert living.exists()
    assert other.exists()


def test_a_folder_that_is_not_there_is_an_expected_error(tmp_path):
    with pytest.raises(StorageFailed, match="missing"), atomic_file(tmp_path / "missing" / "answer"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_an_expected_error(tmp_path, code):
    path = tmp_path / "answer"
    with pytest.raises(StorageFailed, match="free some space"), atomic_file(path):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_other_faults_of_the_block_are_not_hidden(tmp_path):
    with pytest.raises(ConnectionResetError), atomic_file(tmp_path / "answer"):
        raise ConnectionResetError
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from cordee.errors import StorageFailed
from cordee.files import atomic_file
try:
    with atomic_file(Path(sys.argv[1])) as file:
        for _ in range(64):
            rest = memoryview(bytes(65536))
            while rest:
                rest = rest[file.write(rest):]
except StorageFailed as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_the_systems_own_limit_is_met_for_real(tmp_path):
    limit = 1 << 20  # the writer wants four times as much
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "answer")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == StorageFailed.exit_code, done.stderr
    assert str(tmp_path / "answer") in done.stdout
    assert list(tmp_path.iterdir()) == []
