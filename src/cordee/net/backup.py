"""A node's identity in one file, encrypted with a pass phrase: `cordee identity backup` and `restore`.

    MAGIC | salt | nonce | AES-256-GCM of a msgpack map, name -> bytes, of the files of the identity's folder

The key is scrypt (RFC 7914) of the pass phrase, with parameters that OWASP's Password Storage Cheat Sheet
recommends: 64 MB and half a second for each guess. They belong to the format: MAGIC changes with them, so a
file cannot ask for more memory. The head is authenticated, too.
"""

import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cordee import files
from cordee.errors import BadRequest, IdentityDamaged
from cordee.net import identity
from cordee.net.identity import Identity

MAGIC = b"cordee identity 1\n"
SALT_BYTES = 16
NONCE_BYTES = 12
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 16, 8, 2
FILE_BYTES_MAX = 16 << 20  # the longest of FILES are the deployments, 4 MB at most
# What is worth keeping; the others are made anew. Those that are not there are left out.
FILES = (
    *("ca.pem", "ca.key", "node.key", "node.pem", "revoked"),
    *("peers", "members", "settings", "deployments", "renewal-port"),
)


def write(member: Identity, path: Path, phrase: str) -> None:
    """Write an identity to a file that only this user can read.

    Raises:
        StorageFailed: the file cannot be written.
    """
    kept = {name: (member.folder / name).read_bytes() for name in FILES if (member.folder / name).is_file()}
    salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
    head = MAGIC + salt + nonce
    sealed = AESGCM(_key(phrase, salt)).encrypt(nonce, msgspec.msgpack.encode(kept), head)
    with files.atomic_file(path) as file:
        files.write_all(file, head + sealed)


def restore(path: Path, phrase: str) -> Identity:
    """Make the identity of a file this machine's, in place of any other; all of it or nothing.

    Raises:
        BadRequest: the file cannot be read or is no backup, or the pass phrase is wrong.
        IdentityDamaged: what is in it is no whole identity.
        StorageFailed: the folder cannot be written.
    """
    kept = _opened(path, phrase)
    place = identity.place()
    with files.disk_faults(place):
        partial = Path(tempfile.mkdtemp(prefix=identity.PARTIAL, dir=place.parent))
        try:
            for name, data in kept.items():
                with files.atomic_file(partial / name) as file:
                    files.write_all(file, data)
            try:
                identity.load(partial)
            except IdentityDamaged as error:
                raise IdentityDamaged(f"{path} holds no whole identity: restore another backup.") from error
            _exchange(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return identity.load()


def _exchange(new: Path, place: Path) -> None:
    """Put a folder in the place of another, which is deleted."""
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f"{new.name}.replaced")
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _opened(path: Path, phrase: str) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadRequest(
            f"{path} cannot be read ({error.strerror}): name the backup file.", "file"
        ) from error
    start = len(MAGIC) + SALT_BYTES
    head, sealed = data[: start + NONCE_BYTES], data[start + NONCE_BYTES :]
    if not head.startswith(MAGIC) or len(data) > FILE_BYTES_MAX:
        raise BadRequest(f"{path} is no file that `cordee identity backup` made.", "file")
    try:
        opened = AESGCM(_key(phrase, head[len(MAGIC) : start])).decrypt(head[start:], sealed, head)
        kept = msgspec.msgpack.decode(opened, type=dict[str, bytes])
    except (InvalidTag, ValueError, msgspec.MsgspecError) as error:
        raise BadRequest(f"The pass phrase is wrong, or {path} is damaged.", "file") from error
    return {name: data for name, data in kept.items() if name in FILES}


def _key(phrase: str, salt: bytes) -> bytes:
    """The key of a pass phrase: the same whether an accent is typed as one character or as two."""
    word = unicodedata.normalize("NFC", phrase).encode()
    return Scrypt(salt, 32, SCRYPT_N, SCRYPT_R, SCRYPT_P).derive(word)
