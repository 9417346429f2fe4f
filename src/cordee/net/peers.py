"""Where the other nodes were seen last, so that a restarted node finds them without multicast.

A cache: `cluster/peers` holds a line `NODE ADDRESS,ADDRESS` for each node. Lines that make no sense
are skipped, and a lost file costs nothing where another node remembers.

What was only said of a node (claims.py) has a third word, `?`. There are UNPROVEN_MAX such nodes at most, and
they push out nobody else: a member that announces thousands of nodes fills these places and no more.
"""

import contextlib
import re
from pathlib import Path

from cordee import files
from cordee.errors import BadRequest, StorageFailed
from cordee.net import address
from cordee.net.identity import ID_DIGITS, SLOTS, Identity

FILE_BYTES_MAX = 256 << 10  # SLOTS nodes of ADDRESSES_MAX addresses take half of it
UNPROVEN_MAX = 16  # nodes behind a firewall that lets nothing in
UNPROVEN = "?"
NODE = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")


class Peers:
    """The remembered nodes of an identity's cluster."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._known, self._unproven = _load(identity.folder / "peers")

    @property
    def known(self) -> dict[str, str]:
        """All of them by id, their addresses joined by commas."""
        return {node: ",".join(addresses) for node, addresses in self._known.items()}

    @property
    def unproven(self) -> frozenset[str]:
        """Those of which it was only said where they are."""
        return frozenset(self._unproven)

    def addresses(self) -> list[str]:
        """Where to look for nodes that were not removed."""
        revoked = self._identity.revoked
        return [each for node, known in self._known.items() if node not in revoked for each in known]

    def remember(self, node: str, addresses: str, *, proven: bool = True) -> None:
        """A node was seen at these addresses, joined by commas; they replace those of before.

        If it is only said to be there, not `proven`, nothing that is proven is replaced.
        """
        sound, was_proven = _sound(addresses), node in self._known and node not in self._unproven
        is_news = self._known.get(node) != sound or was_proven != proven
        if not NODE.fullmatch(node) or not sound or not is_news or (was_proven and not proven):
            return
        self._drop(node)
        if not proven:
            while len(self._unproven) >= UNPROVEN_MAX:
                self._drop(next(iter(self._unproven)))
            self._unproven[node] = None
        while len(self._known) >= SLOTS:
            self._drop(next(iter(self._unproven or self._known)))
        self._known[node] = sound
        self._write()

    def is_proven(self, node: str, addresses: str) -> bool:
        """Whether a node was seen at these addresses, joined by commas, and at no others."""
        return node not in self._unproven and self.known.get(node) == addresses

    def forget(self, node: str) -> None:
        """A node left for good."""
        if node in self._known:
            self._drop(node)
            self._write()

    def _drop(self, node: str) -> None:
        self._known.pop(node, None)
        self._unproven.pop(node, None)

    def _write(self) -> None:
        marks = dict.fromkeys(self._unproven, f" {UNPROVEN}")
        lines = "".join(f"{node} {where}{marks.get(node, '')}\n" for node, where in self.known.items())
        with (
            contextlib.suppress(StorageFailed),  # remembered until the node stops
            files.atomic_file(self._identity.folder / "peers") as file,
        ):
            file.write(lines.encode())


def _load(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, None]]:
    """The nodes with their addresses, and which of them are not proven."""
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX).decode("ascii", errors="replace")
    except OSError:
        return {}, {}
    known: dict[str, tuple[str, ...]] = {}
    unproven: dict[str, None] = {}
    for line in text.splitlines()[:SLOTS]:
        node, addresses, mark = (*line.split(" "), "", "", "")[:3]
        if NODE.fullmatch(node) and (sound := _sound(addresses)):
            known[node] = sound
            if mark == UNPROVEN:
                unproven[node] = None
    return known, unproven


def _sound(addresses: str) -> tuple[str, ...]:
    """The well-formed addresses, with a port, of a list joined by commas."""
    sound: list[str] = []
    for each in addresses.split(",")[: address.ADDRESSES_MAX]:
        with contextlib.suppress(BadRequest):
            host, port = address.parse(each, 0)
            if port and re.fullmatch(r"[\w.:-]+", host):
                sound.append(address.text(host, port))
    return tuple(sound)
