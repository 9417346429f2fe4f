"""Keys of the API: how one is made, stored and recognised.

    cordee-ID-SECRET    ID: 16 hexadecimal digits, under which the key is found; SECRET: 256 random bits

Only what is in `ApiKey` is kept: the secret is shown once, and stored as its scrypt. The secret is random, so
that nobody finds it by trying whatever the hash is; scrypt is what auditors look for where keys lie on a
disk, and makes even a weak source of randomness expensive to try. Its cost, some milliseconds, is paid once
for each key and process: what was recognised is remembered by its SHA-256. What is remembered is still
compared with the stored digest at each request, so that nothing of it outlives the key.

An ID that is not known costs nothing: it is no secret, and has 64 random bits. The comparison of digests
takes the same time wherever they differ.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import msgspec
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cordee.access import limits
from cordee.access.api_keys import KEYS_MAX, NAME_CHARS_MAX, ApiKey
from cordee.errors import BadRequest, nearest

ID_BYTES = 8
SECRET_BYTES = 32
SHOWN = re.compile(r"cordee-([0-9a-f]{16})-([\w-]{43})", re.ASCII)
SCRYPT = {"length": 32, "n": 1 << 13, "r": 8, "p": 1}  # 8 MiB and about 20 ms, one at a time
REMEMBERED_MAX = 2 * KEYS_MAX
NAME = re.compile(rf"[\w.@+-]{{1,{NAME_CHARS_MAX}}}")


def digest_of(key_id: str, secret: str) -> bytes:
    """What is stored of a secret. The id is random and used once, and so serves as the salt."""
    return Scrypt(salt=bytes.fromhex(key_id), **SCRYPT).derive(secret.encode())


def new_key(name: str, known: Iterable[ApiKey], **bounds: float | bool) -> tuple[ApiKey, str]:
    """A key, and how it is shown to whoever gets it; `bounds` are the other fields of ApiKey.

    Raises:
        BadRequest: the name cannot be used, or is; or there are too many keys.
    """
    entries = {key.name: key for key in known}
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"A key's name is who or what it is for: letters, digits and . _ @ + - without blanks, at most "
            f"{NAME_CHARS_MAX}.",
            "name",
        )
    if name in entries and entries[name].id:
        raise BadRequest(
            f"There is a key {name} already: `cordee key rm {name}` revokes it, or choose another name.",
            "name",
        )
    if name not in entries and len(entries) >= KEYS_MAX:
        raise BadRequest(
            f"There are {KEYS_MAX} names of keys, those of revoked keys included: use one of these again.",
            "name",
        )
    key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
    key = ApiKey(name, key_id, digest_of(key_id, secret), created=round(time.time()))
    return msgspec.structs.replace(key, **bounds), f"cordee-{key_id}-{secret}"


def revoked(name: str, known: Iterable[ApiKey]) -> ApiKey:
    """What takes the place of a key that is no more.

    Raises:
        BadRequest: there is none of that name.
    """
    return ApiKey(_named(name, known).name)


def _named(name: str, known: Iterable[ApiKey]) -> ApiKey:
    found = {key.name: key for key in known if key.id}
    if name not in found:
        raise BadRequest(
            f"There is no key {name!r}{nearest(name, found)}: `cordee key ls` lists them.", "name"
        )
    return found[name]


def limited(name: str, known: Iterable[ApiKey], requests: int, tokens: int) -> ApiKey:
    """What takes the place of a key whose bounds change; whoever has it goes on using it.

    Raises:
        BadRequest: there is none of that name.
    """
    found = _named(name, known)
    return msgspec.structs.replace(found, requests=requests, tokens=tokens)


def described(key: ApiKey, now: float) -> dict[str, Any]:
    """What people may see of a key, as values for JSON."""
    return {
        "name": key.name,
        "id": key.id,
        "state": "valid" if key.is_valid(now) else "expired",
        "admin": key.admin,
        "limit": limits.written(key.requests, key.tokens) or None,
        "created": key.created,
        "expires": key.expires or None,
    }


class Keyring:
    """Recognises keys. `read` gives all that there are now, and is called often; `clock` as `time.time`."""

    def __init__(
        self, read: Callable[[], Collection[ApiKey]], clock: Callable[[], float] = time.time
    ) -> None:
        self._read = read
        self._clock = clock
        self._remembered: OrderedDict[bytes, bytes] = OrderedDict()  # SHA-256 of what was shown: digest
        self._computing = asyncio.Lock()  # one scrypt at a time, whoever sends keys

    @property
    def is_empty(self) -> bool:
        """Whether nobody could show a key."""
        now = self._clock()
        return not any(key.is_valid(now) for key in self._read())

    def standing(self, key: ApiKey) -> ApiKey | None:
        """A key that was recognised, as it is now; None: it is revoked, replaced or expired."""
        now = self._clock()
        return next((each for each in self._read() if each.id == key.id and each.is_valid(now)), None)

    def recall(self, shown: str) -> ApiKey | None:
        """The key, if it was recognised before; this costs nearly nothing."""
        key = self._find(shown)
        mark = hashlib.sha256(shown.encode(errors="surrogatepass")).digest()
        digest = self._remembered.get(mark)
        if key is None or digest is None or not secrets.compare_digest(digest, key.digest):
            return None
        self._remembered.move_to_end(mark)
        return key

    async def recognise(self, shown: str) -> ApiKey | None:
        """The key that somebody shows; None if there is none such."""
        found = self.recall(shown)
        key = self._find(shown)
        if found is not None or key is None:
            return found
        async with self._computing:
            digest = await asyncio.to_thread(digest_of, key.id, shown.rpartition(f"{key.id}-")[2])
        if not secrets.compare_digest(digest, key.digest):
            return None
        self._remembered[hashlib.sha256(shown.encode()).digest()] = digest
        while len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return self.standing(key)

    def _find(self, shown: str) -> ApiKey | None:
        match = SHOWN.fullmatch(shown)
        now = self._clock()
        if match is None:
            return None
        return next((key for key in self._read() if key.id == match[1] and key.is_valid(now)), None)
