"""The exported folder for an old machine: complete, with checksums, and never half written."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cordee.convert import export
from cordee.errors import BadRequest, SetupNeeded, StorageFailed, UnsupportedModel
from cordee.models.gguf import read_header
from cordee.models.store import Store
from make_model import SHAPES, make_model
from terminal import PROGRAM, SECONDS
from tiny import make_tiny

FILES = {
    "cordee-tiny",
    "cordee-tiny.exe",
    "model.gguf",
    "README.TXT",
    "LISEZMOI.TXT",
    "SHA256SUMS",
    "FILES.TXT",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "story.gguf"
    make_model(path, replace(SHAPES["260k"], layout="pentium2"))
    return path


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A build folder; the content of the programs does not matter here."""
    for place in export.PROGRAMS.values():
        path = tmp_path / "build" / place
        path.parent.mkdir(parents=True)
        path.write_bytes(place.encode() * 1000)
    return tmp_path / "build"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"build"}


def test_the_folder_holds_all_that_the_machine_needs(model: Path, programs: Path, tmp_path: Path) -> None:
    nbytes = export.export(read_header(model), tmp_path / "cd", programs=programs)
    folder = tmp_path / "cd"
    assert left(folder) == FILES
    assert left(tmp_path) == {"cd"}
    assert (folder / "model.gguf").read_bytes() == model.read_bytes()
    assert {name for name in FILES if os.access(folder / name, os.X_OK)} == set(export.PROGRAMS)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= nbytes <= export.CD_BYTES
    assert nbytes % 2048 == 0


def test_the_folder_can_be_checked_with_its_checksums(model: Path, programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cd"
    export.export(read_header(model), folder, programs=programs)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(FILES) - 1
    listed = dict(reversed(line.split()) for line in (folder / "FILES.TXT").read_text().splitlines())
    assert listed == {
        name: str((folder / name).stat().st_size) for name in FILES - {"SHA256SUMS", "FILES.TXT"}
    }
    with (folder / "model.gguf").open("r+b") as file:
        file.seek(5000)
        file.write(b"scratched")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", ["README.TXT", "LISEZMOI.TXT"])
def test_the_instructions_are_readable_on_windows_98(
    model: Path, programs: Path, tmp_path: Path, name: str
) -> None:
    export.export(read_header(model), tmp_path / "cd", programs=programs)
    data = (tmp_path / "cd" / name).read_bytes()
    assert data.count(b"\r\n") == data.count(b"\n") > 30
    text = data.decode("cp1252")
    assert max(map(len, text.splitlines())) < 80
    assert "story, 0.1 M" in text
    assert './cordee-tiny model.gguf "Once upon a time"' in text
    assert FILES - {name} <= set(text.replace("(", " ").replace(")", " ").replace(".\r", "\r").split())


def test_an_empty_folder_is_filled_and_a_used_one_is_not(model: Path, programs: Path, tmp_path: Path) -> None:
    (tmp_path / "cd").mkdir()
    export.export(read_header(model), tmp_path / "cd", programs=programs)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cd").iterdir()}
    with pytest.raises(BadRequest, match="new folder"):
        export.export(read_header(model), tmp_path / "cd", programs=programs)
    with pytest.raises(BadRequest, match="create it"):
        export.export(read_header(model), tmp_path / "no" / "cd", programs=programs)
    with pytest.raises(StorageFailed, match="/proc/cd cannot be written"):
        export.export(read_header(model), Path("/proc/cd"), programs=programs)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cd").iterdir()} == before


def test_what_is_larger_than_a_cd_is_refused_unless_asked_for(
    model: Path, programs: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="--any-size"):
        export.export(read_header(model), tmp_path / "cd", programs=programs, limit_bytes=80_000)
    assert left(tmp_path) == set()
    export.export(read_header(model), tmp_path / "cd", programs=programs, limit_bytes=None)


def test_other_models_and_missing_programs_are_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "other.gguf")
    with pytest.raises(UnsupportedModel, match="cordee convert --target pentium2"):
        export.export(read_header(tmp_path / "other.gguf"), tmp_path / "cd")
    with pytest.raises(SetupNeeded, match="make tiny"):
        export.export(read_header(model), tmp_path / "cd", programs=tmp_path)
    assert left(tmp_path) == {"other.gguf"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_folder_that_failed(
    model: Path, programs: Path, tmp_path: Path, fault: BaseException
) -> None:
    def fail(done: int, total: int) -> None:
        if done == total:
            raise fault

    with pytest.raises(StorageFailed if isinstance(fault, OSError) else KeyboardInterrupt):
        export.export(read_header(model), tmp_path / "cd", programs=programs, progress=fail)
    assert left(tmp_path) == set()


def test_what_a_killed_export_left_is_removed(model: Path, programs: Path, tmp_path: Path) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    remains = tmp_path / f".cd.{gone}.x.partial"
    remains.mkdir()
    (remains / "model.gguf").write_bytes(b"half")
    export.export(read_header(model), tmp_path / "cd", programs=programs)
    assert left(tmp_path) == {"cd"}


def test_the_verb_takes_a_model_of_the_store_and_names_the_instructions(
    model: Path, programs: Path, tmp_path: Path, home: Path
) -> None:
    Store().add_file(model, "bedtime")
    options = ["export", "--for", "pentium2", "bedtime", str(tmp_path / "cd"), "--programs", str(programs)]
    first, second = (
        subprocess.run([*PROGRAM, *options], capture_output=True, text=True, timeout=SECONDS)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "README.TXT" in first.stdout
    assert left(tmp_path / "cd") == FILES
    assert b"the model: bedtime, 0.1 MB" in (tmp_path / "cd" / "README.TXT").read_bytes()
    assert (second.returncode, second.stdout) == (BadRequest.exit_code, "")
    assert second.stderr.startswith("cordee: ")
