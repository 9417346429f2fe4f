"""A back-up of an identity: only with its pass phrase, all of it or nothing."""

import stat
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.errors import BadRequest, IdentityDamaged
from cordee.net import backup, identity
from cordee.net.members import KnownMember, Members
from members import founder

PHRASE = "quatre cordées sur une paroi"


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_restored_machine_is_the_same_admin(tmp_path: Path) -> None:
    admin = founder(tmp_path / "a")
    admin.revoke("0123456789abcdef")
    Members(admin).remember(KnownMember("00000000000000aa", "pc-2"))
    (admin.folder / "settings").write_text('{"name": "pc-1"}')
    (admin.folder / "agent.lock").write_text("123")
    file = tmp_path / "cluster.backup"
    backup.write(admin, file, PHRASE)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = contents(admin.folder)
    assert not any(data in file.read_bytes() for name, data in kept.items() if len(data) > 4)
    identity.forget()
    restored = backup.restore(file, PHRASE)
    assert (restored.node, restored.is_admin, restored.revoked) == (admin.node, True, admin.revoked)
    del kept["agent.lock"]
    assert contents(restored.folder) == kept
    assert {stat.S_IMODE(path.stat().st_mode) for path in restored.folder.iterdir()} == {0o600}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cluster"]


def test_another_identity_is_replaced_whole(tmp_path: Path) -> None:
    admin = founder(tmp_path / "a")
    backup.write(admin, tmp_path / "file", PHRASE)
    other = founder(tmp_path / "b")
    (other.folder / "peers").write_text("of the other cluster")
    restored = backup.restore(tmp_path / "file", PHRASE)
    assert restored.node == admin.node
    assert not (restored.folder / "peers").exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["cluster"]


def test_accents_typed_either_way_are_the_same_phrase(tmp_path: Path) -> None:
    backup.write(founder(tmp_path / "a"), tmp_path / "file", "cordée")
    assert backup.restore(tmp_path / "file", "corde\u0301e")


@pytest.mark.parametrize("phrase", ["", "quatre cordees sur une paroi", PHRASE + " "])
def test_without_the_phrase_nothing_changes(tmp_path: Path, phrase: str) -> None:
    backup.write(founder(tmp_path / "a"), tmp_path / "file", PHRASE)
    other = founder(tmp_path / "b")
    with pytest.raises(BadRequest, match=r"The pass phrase is wrong, or .*file is damaged"):
        backup.restore(tmp_path / "file", phrase)
    assert identity.load().node == other.node


@given(place=st.integers(0, 4000), byte=st.integers(1, 255))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_of_it_can_be_changed(tmp_path: Path, place: int, byte: int) -> None:
    file = tmp_path / "file"
    if not file.exists():
        backup.write(founder(tmp_path / "a"), file, PHRASE)
        identity.forget()
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= byte
    (tmp_path / "changed").write_bytes(data)
    with pytest.raises(BadRequest, match="changed is"):
        backup.restore(tmp_path / "changed", PHRASE)
    assert not identity.exists()


@pytest.mark.parametrize("data", [b"", b"cordee identity 1", b"\x1f\x8b a tar of an older guide"])
def test_what_is_no_backup_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(BadRequest, match="file is no file that `cordee identity backup` made"):
        backup.restore(tmp_path / "file", PHRASE)
    with pytest.raises(BadRequest, match="missing cannot be read"):
        backup.restore(tmp_path / "missing", PHRASE)


def test_half_an_identity_is_not_restored(tmp_path: Path) -> None:
    admin = founder(tmp_path / "a", time.time())
    (admin.folder / "node.key").unlink()
    backup.write(admin, tmp_path / "file", PHRASE)
    other = founder(tmp_path / "b")
    with pytest.raises(IdentityDamaged, match="file holds no whole identity"):
        backup.restore(tmp_path / "file", PHRASE)
    assert identity.load().node == other.node
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["cluster"]
