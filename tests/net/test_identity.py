"""Identity on disk: the same node after a restart, an error for any damage, never a new one in its place."""

import stat
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.errors import IdentityDamaged
from cordee.net import identity
from members import DAY_SECONDS, at_home, cluster, founder, newcomer

FILES = ("ca.pem", "ca.key", "node.key", "node.pem", "revoked")
NOBODY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


def test_a_restart_is_the_same_node(home: Path) -> None:
    founded = identity.found(time.time())
    loaded = identity.load()
    assert (loaded.node, loaded.cluster, loaded.is_admin) == (founded.node, founded.cluster, True)


def test_ids_are_fingerprints_of_what_nobody_else_can_show(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    assert first.cluster == second.cluster
    assert len({first.node, second.node, first.cluster}) == 3
    assert identity.node_id(identity.requested_key(second.request())) == second.node
    assert not second.is_admin


def test_only_the_user_can_read_it(home: Path) -> None:
    identity.found(time.time())
    folder = home / "cluster"
    folder.chmod(0o755)
    identity.load()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "data", [b"", b"garbage", bytes(range(256)), b"\xff" * (identity.FILE_BYTES_MAX + 1)]
)
def test_garbage_is_named_and_nothing_is_made_in_its_place(home: Path, name: str, data: bytes) -> None:
    identity.found(time.time())
    path = home / "cluster" / name
    path.write_bytes(data)
    if name == "revoked" and not data:
        identity.load()  # nobody was removed
        return
    with pytest.raises(IdentityDamaged, match=f"{name} is damaged .*cordee invite"):
        identity.load()
    assert path.read_bytes() == data
    with pytest.raises(IdentityDamaged, match="belongs to a cluster already"):
        identity.found(time.time())


@given(st.binary(max_size=400), st.integers(0, 10**6), st.sampled_from(FILES))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_a_plain_error(home: Path, junk: bytes, place: int, name: str) -> None:
    """Bytes overwritten anywhere in a file: the same identity or an error that names a file, nothing else."""
    if not identity.exists():
        identity.found(time.time()).revoke(NOBODY)
    node = identity.load().node
    path = home / "cluster" / name
    sound = path.read_bytes()
    place %= len(sound)
    path.write_bytes(sound[:place] + junk + sound[place + len(junk) :])
    try:
        assert identity.load().node == node
    except IdentityDamaged as error:
        assert any(str(home / "cluster" / each) in error.message for each in FILES)
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("name", [name for name in FILES if name != "ca.key"])
def test_a_missing_file_is_named(home: Path, name: str) -> None:
    identity.found(time.time())
    (home / "cluster" / name).unlink()
    with pytest.raises(IdentityDamaged, match=f"{name} is damaged"):
        identity.load()


def test_files_of_different_identities_do_not_mix(tmp_path: Path) -> None:
    ours, theirs = founder(tmp_path / "ours"), founder(tmp_path / "theirs")
    for name in ("ca.pem", "ca.key", "node.key", "node.pem"):
        path = ours.folder / name
        sound = path.read_bytes()
        path.write_bytes((theirs.folder / name).read_bytes())
        at_home(tmp_path / "ours")
        with pytest.raises(IdentityDamaged):
            identity.load()
        path.write_bytes(sound)


def test_certificates_work_where_the_clock_is_a_day_off(home: Path) -> None:
    now = time.time()
    start, end = identity.found(now).validity()
    assert start < now - DAY_SECONDS and now + 25 * DAY_SECONDS < end


def test_renewal_is_due_after_a_third_and_keeps_the_node(tmp_path: Path) -> None:
    now = time.time()
    admin = founder(tmp_path / "admin", now)
    member = newcomer(tmp_path / "member", admin, now)
    assert not member.renewal_due(now + 9 * DAY_SECONDS)
    later = now + 10 * DAY_SECONDS + 60
    assert member.renewal_due(later)
    member.renew(admin.sign_again(member.request(), identity.pem(member.certificate), later))
    assert not member.renewal_due(later)
    assert identity.load().validity() == member.validity()
    assert identity.load().node == member.node


def test_admins_renew_members_only(tmp_path: Path) -> None:
    now = time.time()
    admin, member, removed = cluster(tmp_path, 3)
    stranger = founder(tmp_path / "stranger")
    admin.revoke(removed.node)
    for node in (removed, stranger):
        with pytest.raises(ValueError):
            admin.sign_again(node.request(), identity.pem(node.certificate), now)
    with pytest.raises(ValueError):  # the certificate of another node
        admin.sign_again(stranger.request(), identity.pem(member.certificate), now)
    with pytest.raises(ValueError):
        member.renew(identity.pem(removed.certificate))


def test_removals_are_believed_when_the_authority_signed_them(tmp_path: Path) -> None:
    admin, member = cluster(tmp_path, 2)
    stranger = founder(tmp_path / "stranger")
    stranger.revoke(NOBODY)
    assert member.admit(stranger.revocations) == frozenset()
    assert member.admit([b"", b"x" * 80, bytes.fromhex(admin.node)]) == frozenset()
    admin.revoke(NOBODY)
    assert member.admit(admin.revocations) == {NOBODY}
    assert member.admit(admin.revocations) == frozenset()
    at_home(tmp_path / "1")
    assert identity.load().revoked == {NOBODY}


@given(st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=6))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_order_members_end_with_the_same_removals(
    tmp_path: Path, rounds: list[set[int]]
) -> None:
    at_home(tmp_path / "a")
    admin = identity.load() if identity.exists() else identity.found(time.time())
    at_home(tmp_path / "b")
    member = newcomer(tmp_path / "b", admin) if not identity.exists() else identity.load()
    for numbers in rounds:
        for number in numbers:
            admin.revoke(f"{number:016x}")
        before = member.revoked
        member.admit(reversed(admin.revocations))
        assert before <= member.revoked == admin.revoked


def test_a_second_admin_signs_for_the_same_cluster(tmp_path: Path) -> None:
    admin, second, third = cluster(tmp_path, 3)
    second.become_admin(admin.authority_key_pem())
    at_home(tmp_path / "1")
    reloaded = identity.load()
    assert reloaded.is_admin
    third.renew(reloaded.sign(third.request(), time.time()))
    with pytest.raises(ValueError):
        third.become_admin(founder(tmp_path / "stranger").authority_key_pem())


def test_common_names_are_slots_that_no_public_authority_signs() -> None:
    names = identity.slots()
    assert len(set(names)) == identity.SLOTS
    assert identity.slot_of(NOBODY) in names
    assert not any("." in name for name in names)


def test_what_a_killed_process_left_is_removed(home: Path) -> None:
    (home / ".cluster.half").mkdir(parents=True)
    (home / ".cluster.half" / "node.key").write_text("half a key")
    identity.found(time.time())
    assert [path.name for path in home.iterdir()] == ["cluster"]


def test_leaving_deletes_the_identity(home: Path) -> None:
    identity.found(time.time())
    identity.forget()
    assert not identity.exists()
    assert not list(home.iterdir())
