"""What is remembered of other members: names outlive restarts, nonsense does no harm."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.net import members as members_module
from cordee.net.identity import SLOTS, Identity
from cordee.net.members import HEARD_SECONDS, KnownMember, Members, advice
from members import cluster


@pytest.fixture
def admin(tmp_path: Path, home: Path) -> Identity:
    return cluster(tmp_path, 2)[0]


def member(number: int, **more: object) -> KnownMember:
    return KnownMember(f"{number:016x}", f"pc-{number}", **more)


def test_names_and_times_outlive_a_restart(admin: Identity) -> None:
    members = Members(admin)
    members.remember(member(1, admin=True, heard=5.0))
    members.remember(member(2, version="0.2.0", renewals="10.0.0.1:7", heard=7.0))
    assert Members(admin).known == members.known == {m.node: m for m in (members.known.values())}
    assert [each.name for each in Members(admin).known.values()] == ["pc-1", "pc-2"]
    members.forget(member(1).node)
    assert [each.name for each in Members(admin).known.values()] == ["pc-2"]


def test_each_heartbeat_counts_but_does_not_write_the_disk(admin: Identity, monkeypatch) -> None:
    members = Members(admin)
    members.remember(member(1, heard=1000.0))
    members.remember(member(1, heard=1001.0))
    assert members.known[member(1).node].heard == 1001.0
    assert Members(admin).known[member(1).node].heard == 1000.0
    members.remember(member(1, heard=1000.0 + HEARD_SECONDS))
    assert Members(admin).known[member(1).node].heard == 1000.0 + HEARD_SECONDS
    members.remember(member(1, heard=2000.0, admin=True))
    assert Members(admin).known[member(1).node].admin
    members.remember(member(1, heard=2001.0, admin=True))
    members.save()
    assert Members(admin).known[member(1).node].heard == 2001.0


def test_removed_nodes_and_this_one_are_not_among_them(admin: Identity) -> None:
    members = Members(admin)
    members.remember(KnownMember(admin.node, "me"))
    members.remember(member(1))
    admin.revoke(member(1).node)
    assert members.known == Members(admin).known == {}


def test_admins_come_with_the_one_heard_last_first(admin: Identity) -> None:
    members = Members(admin)
    for number, heard in ((1, 5.0), (2, 9.0), (3, 7.0)):
        members.remember(member(number, admin=number != 3, heard=heard))
    assert [each.name for each in members.admins] == ["pc-2", "pc-1"]


def test_only_so_many_are_remembered(admin: Identity) -> None:
    members = Members(admin)
    members._written = {member(n).node: member(n, heard=float(n)) for n in range(SLOTS + 9)}  # saves no disk
    for number in range(SLOTS + 9):
        members.remember(member(number, heard=float(number)))
    assert len(members.known) == SLOTS
    assert member(8).node not in members.known


@given(data=st.binary(max_size=200) | st.sampled_from([b"[1]", b'[{"node": 1}]', b"[" * 10_000]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_as_good_as_none(admin: Identity, data: bytes) -> None:
    (admin.folder / "members").write_bytes(data)
    members = Members(admin)
    members.remember(member(1, heard=1.0))
    assert member(1).node in Members(admin).known


def test_what_a_node_says_at_length_is_not_remembered(admin: Identity) -> None:
    members = Members(admin)
    members.remember(KnownMember("a" * 16, "x" * (members_module.TEXT_CHARS_MAX + 1)))
    assert members.known == {}


@pytest.mark.parametrize(
    ("admins", "count", "said"),
    [(["a"], 2, False), (["a"], 3, True), (["a"], 4, True), (["a", "b"], 4, False), ([], 4, False)],
)
def test_a_second_admin_is_advised_from_the_third_machine_on(
    admins: list[str], count: int, said: bool
) -> None:
    told = advice(admins, count)
    assert bool(told) == said
    assert not said or (told.startswith(f"a is the only admin of {count} machines") and "admin add" in told)
