"""Files at a place, holes, renaming where a reader is in the way."""

import os
from pathlib import Path

import pytest

from cordee.system import disk


def test_reads_and_writes_at_a_place(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | disk.BINARY)
    try:
        assert disk.pwrite(descriptor, b"a\r\nb\x1ac", 3) == 6
        assert disk.pread(descriptor, 100, 0) == b"\0\0\0a\r\nb\x1ac"
        assert disk.pread(descriptor, 2, 6) == b"b\x1a"
        assert disk.pread(descriptor, 2, 100) == b""
    finally:
        os.close(descriptor)


def test_files_and_folders_are_synced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    disk.sync(tmp_path / "file")
    disk.sync(tmp_path)


def test_data_is_found_and_a_hole_may_be(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    with (tmp_path / "file").open("rb") as file:
        assert disk.has_data(file.fileno(), 1 << 19, 4)
        assert disk.has_data(file.fileno(), (1 << 20) - 4096, 4096) is disk.OPEN_FILES_STAY


def test_a_file_that_is_open_is_replaced_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Windows does while a reader has it open."""
    calls: list[int] = []

    def act() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise PermissionError(13, "the file is used by another process")

    disk.patiently(act)
    assert len(calls) == 3


def test_a_file_that_stays_open_is_an_error_in_the_end() -> None:
    def act() -> None:
        raise PermissionError(13, "the file is used by another process")

    with pytest.raises(PermissionError):
        disk.patiently(act, seconds=0.1)


def test_replacing(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).write_text(name, encoding="ascii")
    disk.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text(encoding="ascii") == "new"
    assert not (tmp_path / "new").exists()
