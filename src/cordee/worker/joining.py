"""How the links between workers come about: who called, who called too early, and calling the neighbours."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cordee.system import links
from cordee.worker import frames
from cordee.worker.frames import DoorClosed, LinkClosed
from cordee.worker.messages import Join, Wire, WireFailed

JOINS_MAX = 4  # of one node that are not wired yet, so that none can keep out those of another

J = TypeVar("J", Join, str)


@dataclass(eq=False)
class Peer:
    """A link that was opened from elsewhere, and the node it comes from; "" is this machine."""

    link: socket.socket
    node: str

    def fileno(self) -> int:
        """For a selector."""
        return self.link.fileno()

    def close(self) -> None:
        """End the link."""
        self.link.close()


def keep_early(waiting: dict[tuple[J, str], socket.socket], key: tuple[J, str], link: socket.socket) -> None:
    """Keep a link that joined too early, by what it joined and its node: JOINS_MAX of a node."""
    same = [each for each in waiting if each[1] == key[1]]
    if key in waiting:
        waiting.pop(key).close()
    elif len(same) == JOINS_MAX:
        waiting.pop(same[0]).close()
    waiting[key] = link


def joined(identity: Path | None, wire: Wire) -> tuple[list[socket.socket], WireFailed | None]:
    """Links to the neighbours that a Wire names, downstream and then the first; and why one is missing."""
    targets = [(wire.downstream, wire.downstream_node, Join(wire.wiring))]
    if wire.first is not None:
        targets.append((wire.first, wire.first_node, Join(wire.wiring, again=True)))
    links: list[socket.socket] = []
    for target, node, join in targets:
        try:
            links.append(_joined(identity, target, node, join))
        except (OSError, LinkClosed) as error:  # that stage has just ended, mostly: another Wire follows
            unreachable = node if isinstance(error, DoorClosed) else ""
            return links, WireFailed(wire.wiring, str(error) or "it closed the link", unreachable)
    return links, None


def _joined(identity: Path | None, target: str, node: str, join: Join) -> socket.socket:
    """A link to the worker, or the parent, at `target` on a node; the Join is sent.

    Raises:
        OSError, LinkClosed: it cannot be reached.
    """
    if links.is_path(target):
        peer = links.connect(Path(target), frames.SOCKET_SECONDS)
    else:
        from cordee.worker import tls_link

        assert identity is not None, "a worker with neighbours on other machines has an identity"
        peer = tls_link.connect(identity, target, node)
    frames.send(peer, join)
    return peer
