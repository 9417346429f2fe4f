"""Where the other nodes were seen last, so that a restarted node finds them without multicast.

A cache: `cluster/peers` holds a line `NODE ADDRESS,ADDRESS` for each node. Lines that make no sense
are skipped, and a lost file costs nothing where another node remembers.
"""

import contextlib
import re
from pathlib import Path

from cordee import files
from cordee.errors import BadRequest, StorageFailed
from cordee.net import address
from cordee.net.identity import ID_DIGITS, SLOTS, Identity

FILE_BYTES_MAX = 256 << 10  # SLOTS nodes of ADDRESSES_MAX addresses take half of it
NODE = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")


class Peers:
    """The remembered nodes of an identity's cluster."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._known = _load(identity.folder / "peers")

    @property
    def known(self) -> dict[str, str]:
        """All of them by id, their addresses joined by commas."""
        return {node: ",".join(addresses) for node, addresses in self._known.items()}

    def addresses(self) -> list[str]:
        """Where to look for nodes that were not removed."""
        revoked = self._identity.revoked
        return [each for node, known in self._known.items() if node not in revoked for each in known]

    def remember(self, node: str, addresses: str) -> None:
        """A node was seen at these addresses, joined by commas; they replace those of before."""
        sound = _sound(addresses)
        if not NODE.fullmatch(node) or not sound or self._known.get(node) == sound:
            return
        self._known.pop(node, None)
        while len(self._known) >= SLOTS:
            self._known.pop(next(iter(self._known)))
        self._known[node] = sound
        self._write()

    def forget(self, node: str) -> None:
        """A node left for good."""
        if self._known.pop(node, None) is not None:
            self._write()

    def _write(self) -> None:
        lines = "".join(f"{node} {addresses}\n" for node, addresses in self.known.items())
        with (
            contextlib.suppress(StorageFailed),  # remembered until the node stops
            files.atomic_file(self._identity.folder / "peers") as file,
        ):
            file.write(lines.encode())


def _load(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX).decode("ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(" ") for line in text.splitlines()[:SLOTS])
    known = {node: _sound(addresses) for node, _, addresses in pairs if NODE.fullmatch(node)}
    return {node: addresses for node, addresses in known.items() if addresses}


def _sound(addresses: str) -> tuple[str, ...]:
    """The well-formed addresses, with a port, of a list joined by commas."""
    sound: list[str] = []
    for each in addresses.split(",")[: address.ADDRESSES_MAX]:
        with contextlib.suppress(BadRequest):
            host, port = address.parse(each, 0)
            if port and re.fullmatch(r"[\w.:-]+", host):
                sound.append(address.text(host, port))
    return tuple(sound)
