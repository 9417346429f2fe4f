"""The API's keys: who in the house may ask. One map for all nodes; the last writer wins. Pure.

Theory of operation. Every node holds the whole map and sends it with every heartbeat, and at once where it
changed. A node that hears one keeps, for each name, the entry with the greatest (stamp, content), which is
associative, commutative and idempotent: loss, repetition and order of messages do not matter.

Only admins write: the cluster's authority signs each entry, so that no other member can make a key, change
its bounds, or bring back one that was revoked. An entry of a revoked key stays in the map, without a secret:
a node that slept for a year, and still has the key on its disk, hears that it is no more. That is also why
nothing is ever pushed out of the map. A name can be used again; a map that is full takes no new name.

A stamp is the time of the admin that wrote it, or a little more than that of the entry it replaces. What an
admin wrote with a clock that was wrong is so replaced all the same.
"""

import itertools
from collections.abc import Iterable
from typing import Protocol

import msgspec

from cordee.cluster.soundness import fault

KEYS_MAX = 256  # names, those of revoked keys included; a heartbeat carries 200 bytes of each
# Two admins that do not hear each other may both fill it; no node holds more than this.
HELD_MAX = 2 * KEYS_MAX
NAME_CHARS_MAX = 64
STAMP_MAX = 1e11  # seconds since 1970: the year 5138
TICK_SECONDS = 0.001


class ApiKey(msgspec.Struct, frozen=True):
    """What is known of a key: all but its secret. With an empty `id` there is no key of that name any more.

    `digest` is what access/keyring.py makes of the secret. `requests` at once and `tokens` a minute are its
    bounds, 0 for none of its own; `admin`: it may see and do what concerns all. Times are in seconds since
    1970; `expires` 0: never. The `signature` is the authority's, under all else; empty outside a cluster.
    """

    name: str
    id: str = ""
    digest: bytes = b""
    admin: bool = False
    requests: int = 0
    tokens: int = 0
    created: float = 0.0
    expires: float = 0.0
    stamp: float = 0.0
    signature: bytes = b""

    def is_valid(self, now: float) -> bool:
        """Whether whoever knows its secret may ask now."""
        return bool(self.id) and (not self.expires or now < self.expires)


class Authority(Protocol):
    """The cluster's authority, as a node knows it: admins hold its key."""

    @property
    def is_admin(self) -> bool:
        """Whether this node holds the authority's key."""
        ...

    def sign_as_authority(self, statement: bytes) -> bytes:
        """The authority's signature, by an admin."""
        ...

    def is_of_authority(self, statement: bytes, signature: bytes) -> bool:
        """Whether the authority signed that."""
        ...


_decoder = msgspec.msgpack.Decoder(ApiKey)


class ApiKeys:
    """See the module's theory of operation. `keys` are those of the last run, from disk."""

    def __init__(self, authority: Authority, keys: Iterable[ApiKey] = ()) -> None:
        self._authority = authority
        self._keys: dict[str, ApiKey] = {}
        self.all: tuple[ApiKey, ...] = ()
        self.packed: tuple[bytes, ...] = ()  # the same, as it travels
        self.merge(keys)

    def hear(self, packed: Iterable[bytes]) -> str:
        """`merge` what another node sent, as `packed` has it."""
        try:
            return self.merge([_decoder.decode(each) for each in itertools.islice(packed, HELD_MAX)])
        except (msgspec.MsgspecError, ValueError):
            return "an API key that is none"

    def merge(self, keys: Iterable[ApiKey]) -> str:
        """Take in the map of another node, up to the first entry that is wrong; says what is, if any.

        What is held costs no signature, so a member that sends it again and again takes no time.
        """
        for key in itertools.islice(keys, HELD_MAX):
            held = self._keys.get(key.name)
            if key == held or (held is not None and not _newer(key, held)):
                continue
            if found := self._fault(key):
                return found
            if held is not None or len(self._keys) < HELD_MAX:
                self._put(key)
        return ""

    def write(self, key: ApiKey, now: float) -> None:
        """Replace the entry of its name, here and soon everywhere; this node is an admin."""
        self._put(signed(key, self._authority, self._keys.get(key.name), now))

    def adopt(self, keys: Iterable[ApiKey], now: float) -> None:
        """Take over keys that had no cluster, as the admin that founds one; names that are known stay."""
        for key in keys:
            if key.name not in self._keys and is_sound(key):
                self.write(key, now)

    def _put(self, key: ApiKey) -> None:
        self._keys[key.name] = key
        self.all = tuple(self._keys[name] for name in sorted(self._keys))
        self.packed = tuple(map(msgspec.msgpack.encode, self.all))

    def _fault(self, key: ApiKey) -> str:
        if not is_sound(key):
            return "an API key that is none"
        if not self._authority.is_of_authority(statement(key), key.signature):
            return "an API key that no admin signed"
        return ""


def signed(key: ApiKey, authority: Authority, old: ApiKey | None, now: float) -> ApiKey:
    """An entry as an admin writes it in the place of the `old` one."""
    stamp = now if old is None else max(now, old.stamp + TICK_SECONDS)
    stamped = msgspec.structs.replace(key, stamp=stamp, signature=b"")
    # As the others read it, and encode it to check the signature: an integer becomes a number with a point.
    stamped = msgspec.convert(msgspec.to_builtins(stamped), ApiKey)
    return msgspec.structs.replace(stamped, signature=authority.sign_as_authority(statement(stamped)))


def is_sound(key: ApiKey) -> bool:
    """Whether an entry is what an admin could have written."""
    return (
        0 < len(key.name) <= NAME_CHARS_MAX
        and not fault(key)
        and 0 <= key.stamp <= STAMP_MAX
        and bool(key.id) == bool(key.digest)
    )


def statement(key: ApiKey) -> bytes:
    """What the authority signs."""
    return b"cordee api key " + msgspec.msgpack.encode(msgspec.structs.replace(key, signature=b""))


def _newer(key: ApiKey, held: ApiKey) -> bool:
    return (key.stamp, statement(key)) > (held.stamp, statement(held))
