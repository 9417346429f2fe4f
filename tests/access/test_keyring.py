"""Keys: made once, stored as a hash, recognised at little cost, gone at once."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from cordee.access import keyring as keyring_module
from cordee.access.api_keys import KEYS_MAX, ApiKey
from cordee.access.keyring import SHOWN, Keyring, digest_of, limited, new_key, revoked
from cordee.access.keys_file import KeysFile
from cordee.errors import BadRequest, StorageFailed


def recognised(keyring: Keyring, shown: str) -> ApiKey | None:
    return asyncio.run(keyring.recognise(shown))


def test_a_key_is_known_by_its_secret_and_nothing_of_that_is_stored() -> None:
    key, shown = new_key("marie", ())
    assert SHOWN.fullmatch(shown) and key.id in shown
    assert shown.split("-", 2)[2].encode() not in msgspec.msgpack.encode(key)
    assert recognised(Keyring(lambda: (key,)), shown) == key
    assert new_key("marie", ())[1] != shown


@pytest.mark.parametrize(
    "change", [lambda s: s[:-1] + ("a" if s[-1] != "a" else "b"), str.upper, lambda s: s + "a"]
)
def test_another_secret_is_no_key(change) -> None:
    key, shown = new_key("marie", ())
    keyring = Keyring(lambda: (key,))
    assert recognised(keyring, shown) == key
    assert recognised(keyring, change(shown)) is None


@pytest.mark.parametrize(
    "shown", ["", "none", "cordee-", "cordee-" + "0" * 16 + "-" + "a" * 43, "\udce9" * 60]
)
def test_what_is_no_key_is_no_key(shown: str) -> None:
    assert recognised(Keyring(lambda: (new_key("marie", ())[0],)), shown) is None
    assert Keyring(tuple).recall(shown) is None


def test_an_id_that_nobody_has_costs_no_hash_and_a_known_key_costs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, shown = new_key("marie", ())
    hashed: list[str] = []

    def counting(key_id: str, secret: str) -> bytes:
        hashed.append(key_id)
        return digest_of(key_id, secret)

    monkeypatch.setattr(keyring_module, "digest_of", counting)
    keyring = Keyring(lambda: (key,))
    assert keyring.recall(shown) is None
    for _ in range(3):
        assert recognised(keyring, shown) == key
    assert keyring.recall(shown) == key
    assert recognised(keyring, new_key("paul", ())[1]) is None
    assert len(hashed) == 2  # marie's once here, and paul's where it was made


def test_a_key_that_is_revoked_replaced_or_over_is_not_recalled() -> None:
    key, shown = new_key("marie", (), expires=1000.0)
    keys, now = [key], [999.0]
    keyring = Keyring(lambda: keys, lambda: now[0])
    assert recognised(keyring, shown) == key and keyring.standing(key) == key and not keyring.is_empty
    now[0] = 1000.0
    assert keyring.recall(shown) is None and keyring.standing(key) is None and keyring.is_empty
    now[0] = 999.0
    assert keyring.recall(shown) == key
    keys[0] = msgspec.structs.replace(key, digest=b"another")  # of that id, as nobody makes it
    assert keyring.recall(shown) is None
    keys[0] = revoked("marie", keys)
    assert keyring.recall(shown) is None and keyring.is_empty and recognised(keyring, shown) is None


def test_new_bounds_hold_for_who_has_the_key_already() -> None:
    key, shown = new_key("marie", (), requests=2, admin=True)
    keys = [key]
    keyring = Keyring(lambda: keys)
    assert recognised(keyring, shown) == key
    keys[0] = limited("marie", keys, 0, 900)
    assert keyring.standing(key) == keyring.recall(shown) == keys[0]
    assert (keys[0].requests, keys[0].tokens, keys[0].admin) == (0, 900, True)
    with pytest.raises(BadRequest, match="did you mean marie"):
        limited("mari", keys, 1, 1)


def test_names_that_are_none_or_taken_are_refused() -> None:
    keys = [new_key("marie", ())[0]]
    for name in ("", "a b", "a" * 65, "é\n", "../x", "marie"):
        with pytest.raises(BadRequest):
            new_key(name, keys)
    with pytest.raises(BadRequest, match="did you mean marie"):
        revoked("mari", keys)
    keys = [revoked("marie", keys)]
    assert new_key("marie", keys)[0].id  # again, under another id
    full = [ApiKey(str(number)) for number in range(KEYS_MAX)]
    with pytest.raises(BadRequest, match="use one of these again"):
        new_key("marie", full)
    assert new_key("7", full)[0].name == "7"


def test_the_file_is_its_owners_and_another_process_sees_a_change(tmp_path: Path) -> None:
    here, there = KeysFile(tmp_path), KeysFile(tmp_path)
    assert here.read() == there.read() == ()
    key = new_key("marie", ())[0]
    here.keep((key,))
    assert (tmp_path / "api-keys").stat().st_mode & 0o777 == 0o600
    for _ in range(100):
        if there.read() == (key,):
            break
        time.sleep(0.02)
    assert there.read() == here.read() == (key,)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgspec.msgpack.encode([{"name": ""}]), b"\xdd\xff\xff\xff\xff"]
)
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "api-keys").write_bytes(data)
    with pytest.raises(StorageFailed, match="damaged"):
        KeysFile(tmp_path).read()
