"""What is remembered of the other members: their names, who is an admin, when they were heard last.

A cache, like `peers.py`: `cluster/members` holds a JSON object for each node. It names nodes that are off, or
that were not heard since this one started, and says where an admin renews a certificate that ran out.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cordee import files
from cordee.errors import StorageFailed
from cordee.net.identity import SLOTS, Identity

FILE_BYTES_MAX = 1 << 20  # SLOTS members take a tenth
TEXT_CHARS_MAX = 200  # of each text that a node says of itself; ADDRESSES_MAX addresses take less
HEARD_SECONDS = 600.0  # so much may `heard` on disk be too early: the disk is not written at each heartbeat
LONE_ADMIN_MEMBERS = 3  # from so many members on, one admin is too few


class KnownMember(msgspec.Struct, frozen=True):
    """`renewals`: where it renews certificates, addresses joined by commas; `heard` in seconds since 1970."""

    node: str
    name: str
    admin: bool = False
    version: str = ""
    renewals: str = ""
    heard: float = 0.0


class Members:
    """The remembered members of an identity's cluster, without this node and those that were removed."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._path = identity.folder / "members"
        self._known = {member.node: member for member in _load(self._path)}
        self._written = dict(self._known)

    @property
    def known(self) -> dict[str, KnownMember]:
        """All of them, by id."""
        apart = self._identity.revoked | {self._identity.node}
        return {node: member for node, member in self._known.items() if node not in apart}

    @property
    def admins(self) -> list[KnownMember]:
        """The admins among them, the one heard last first."""
        return sorted((each for each in self.known.values() if each.admin), key=lambda each: -each.heard)

    def remember(self, member: KnownMember) -> None:
        """A member said this of itself, or another one said it."""
        texts = (member.node, member.name, member.version, member.renewals)
        if max(map(len, texts)) > TEXT_CHARS_MAX or member.node == self._identity.node:
            return
        if member.node not in self._known:
            while len(self._known) >= SLOTS:
                del self._known[min(self._known, key=lambda node: (self._known[node].heard, node))]
        self._known[member.node] = member
        old = self._written.get(member.node)
        if old is None or _undated(old) != _undated(member) or abs(member.heard - old.heard) >= HEARD_SECONDS:
            self.save()

    def forget(self, node: str) -> None:
        """A member left for good."""
        if self._known.pop(node, None) is not None:
            self.save()

    def save(self) -> None:
        """Write all to the disk."""
        if self._known == self._written:
            return
        self._written = dict(self._known)
        with contextlib.suppress(StorageFailed), files.atomic_file(self._path) as file:
            files.write_all(file, msgspec.json.encode(list(self._known.values())))


def advice(admins: Sequence[str], members: int) -> str:
    """What to say where a cluster of so many `members` has one admin alone, by name; else nothing."""
    if len(admins) != 1 or members < LONE_ADMIN_MEMBERS:
        return ""
    return (
        f"{admins[0]} is the only admin of {members} machines: if it is lost, nobody can invite, renew or "
        f"remove any more. On it, `cordee admin add NODE` makes an admin of another machine."
    )


def _undated(member: KnownMember) -> KnownMember:
    return msgspec.structs.replace(member, heard=0.0)


def _load(path: Path) -> list[KnownMember]:
    """Nothing if the file cannot be read: the other nodes say again who they are."""
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=list[KnownMember]) if len(data) <= FILE_BYTES_MAX else []
    except (OSError, msgspec.MsgspecError):
        return []
