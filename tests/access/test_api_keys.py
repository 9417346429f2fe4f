"""The map of keys: it converges, only the authority writes it, and what was revoked never comes back."""

import hmac
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.access.api_keys import HELD_MAX, NAME_CHARS_MAX, STAMP_MAX, ApiKey, ApiKeys, signed


@dataclass
class Seal:
    """An authority; `secret` is its key, which nodes that are no admins use to check alone."""

    secret: bytes = b"ours"
    is_admin: bool = True

    def sign_as_authority(self, statement: bytes) -> bytes:
        assert self.is_admin
        return hmac.digest(self.secret, statement, "sha256")

    def is_of_authority(self, statement: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(self.secret, statement, "sha256"), signature)


ADMIN, MEMBER = Seal(), Seal(is_admin=False)


def key(name: str, number: int = 1) -> ApiKey:
    return ApiKey(name, f"{number:016x}", b"digest")


@given(st.integers(0, 2**32))
def test_whatever_is_lost_doubled_or_late_all_hold_the_same_in_the_end(seed: int) -> None:
    rng = Random(seed)
    nodes = [ApiKeys(ADMIN) for _ in range(2)] + [ApiKeys(MEMBER) for _ in range(2)]
    said: list[tuple[ApiKey, ...]] = []
    clock = 0.0
    for _ in range(30):
        clock += rng.choice((0.0, 0.5, -3.0))  # clocks differ, and go back
        admin = rng.choice(nodes[:2])
        name = rng.choice("abc")
        admin.write(rng.choice((ApiKey(name), key(name, rng.randrange(100)))), max(0.0, clock))
        said.append(admin.all)
        for node in nodes:
            if rng.random() < 0.3:
                assert node.merge(rng.choice(said)) == ""
    for node in nodes:
        for each in rng.sample(nodes, len(nodes)):
            node.merge(each.all)
    for node in nodes:
        node.merge(nodes[0].all)
        nodes[0].merge(node.all)
    for node in nodes:
        node.merge(nodes[0].all)
    assert len({node.all for node in nodes}) == 1


def test_a_revoked_key_does_not_come_back_from_a_node_that_slept() -> None:
    admin = ApiKeys(ADMIN)
    admin.write(key("marie"), 100.0)
    asleep = ApiKeys(MEMBER, admin.all)
    admin.write(ApiKey("marie"), 50.0)  # by a clock that is slow
    assert admin.merge(asleep.all) == "" and not admin.all[0].id
    asleep.merge(admin.all)
    assert asleep.all == admin.all
    for number in range(HELD_MAX + 50):  # not even where the map is full
        admin.merge([signed(key(f"n{number}"), ADMIN, None, 200.0)])
    assert len(admin.all) == HELD_MAX and not next(each for each in admin.all if each.name == "marie").id


@pytest.mark.parametrize(
    "change",
    [
        {"admin": True},
        {"tokens": 10**9},
        {"expires": 0.0},
        {"id": "f" * 16},
        {"digest": b"mine"},
        {"stamp": 5000.0},
        {"name": "paul"},
        {"signature": b""},
    ],
)
def test_no_member_makes_a_key_or_changes_one(change: dict) -> None:
    admin = ApiKeys(ADMIN)
    admin.write(msgspec.structs.replace(key("marie"), expires=9.0), 100.0)
    node = ApiKeys(MEMBER, admin.all)
    before = node.all
    forged = msgspec.structs.replace(before[0], **change)
    newer = msgspec.structs.replace(forged, stamp=forged.stamp + 1)
    assert "no admin signed" in node.merge([newer])
    assert ApiKeys(MEMBER).merge([forged]) != "" or forged == before[0]
    assert node.all == before
    theirs = signed(key("paul"), Seal(b"another cluster's"), None, 1.0)
    assert "no admin signed" in node.merge([theirs])


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a" * (NAME_CHARS_MAX + 1)},
        {"name": "a\x1b[2J"},
        {"stamp": float("nan")},
        {"stamp": 2 * STAMP_MAX},
        {"tokens": -1},
        {"expires": float("inf")},
        {"digest": b""},
        {"digest": b"a" * 5000},
    ],
)
def test_what_no_admin_could_have_written_is_dropped(change: dict) -> None:
    node = ApiKeys(MEMBER)
    made = msgspec.structs.replace(key("marie"), **{"stamp": 1.0, **change})
    statement = b"cordee api key " + msgspec.msgpack.encode(made)
    assert node.merge([msgspec.structs.replace(made, signature=ADMIN.sign_as_authority(statement))])
    assert node.all == ()


def test_a_signature_holds_for_what_came_over_the_wire() -> None:
    admin = ApiKeys(ADMIN)
    admin.write(msgspec.structs.replace(key("marie"), created=5, expires=10**10), 7)  # integers
    node = ApiKeys(MEMBER)
    assert node.hear(admin.packed) == "" and node.all == admin.all
    assert node.hear([b"\xc1"]) != "" and node.hear([msgspec.msgpack.encode({"name": 5})]) != ""
    assert node.packed == admin.packed


def test_who_founds_a_cluster_takes_its_keys_along() -> None:
    admin = ApiKeys(ADMIN)
    admin.write(ApiKey("paul"), 1.0)
    admin.adopt([key("marie"), key("paul"), ApiKey("")], 2.0)
    assert {each.name: bool(each.id) for each in admin.all} == {"marie": True, "paul": False}
    assert ApiKeys(MEMBER).merge(admin.all) == ""
