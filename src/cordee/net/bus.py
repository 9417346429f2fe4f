"""What the agents of a cluster need of each other: the protocol `Bus`. `zenoh_bus.ZenohBus` implements it.

Keys are `a/b/c`; in patterns `*` stands for any one level, `**` for any number of them. The level after the
first is the node that says something (in `removed/...`, see REMOVED, the one after that), and the bus brings
nothing that comes from another: a node says, announces and answers only under keys that are its own.
Everything on the bus is soft state: messages may be lost, and their senders repeat them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from cordee.net import address
from cordee.net.identity import SLOT_DIGITS

PORT = 7330  # where a node listens unless told otherwise or taken: `--peer HOST` means this port
# The key that is announced for a node that was removed, and the only one that such a node may see: its id,
# that of the node that announces it, and the revocation in hexadecimal.
REMOVED = "removed/{}/{}/{}"


# Called with the payload of a query; gives the answer, or None for no answer.
Answer = Callable[[bytes], Awaitable[bytes | None]]


def speaker(key: str) -> str:
    """Whose key that is: the digits of its slot, which the bus has compared with the certificate."""
    chunks = key.split("/")
    return chunks[min(2 if chunks[0] == "removed" else 1, len(chunks) - 1)][:SLOT_DIGITS]


@dataclass(frozen=True)
class BusOptions:
    """Where to listen, and which nodes to look for.

    `listen`: HOST, HOST:PORT, :PORT, or empty for all interfaces; port 0 is any free one. `peers`: addresses
    given by hand. `scouting`: the interface for multicast, "auto" for all that can, empty for none.
    """

    listen: str = ""
    peers: tuple[str, ...] = ()
    scouting: str = "auto"

    def listening(self) -> address.Listening:
        """Where to listen, checked and in numbers.

        Raises:
            BadRequest: that is no address, or none of this machine.
        """
        return address.listening(self.listen, PORT)

    def check(self) -> None:
        """Refuse what can never work; whether a peer is there is another question.

        Raises:
            BadRequest: an address is none, or cannot be used; there is no such interface.
        """
        self.listening()
        for each in self.peers:
            address.peer(each, PORT)
        if self.scouting not in ("", "auto"):
            address.check_interface(self.scouting)


class Bus(Protocol):
    """A node's place on the bus of its cluster.

    Handlers are called in the event loop, in the order in which one node sent. Nothing here waits for another
    node except `query`. What is published while no link is up is lost.
    """

    @property
    def addresses(self) -> list[str]:
        """Where other nodes reach this one: `host:port`."""
        ...

    @property
    def remembered(self) -> set[str]:
        """The ids of nodes that were seen at some time, without those that were removed."""
        ...

    def forget(self, node: str) -> None:
        """Stop looking for a node that left for good."""

    async def refresh(self) -> None:
        """Take up a renewed certificate and new removals; other nodes may miss this one for a moment.

        Raises:
            SetupNeeded: the bus cannot be opened again.
        """

    def publish(self, key: str, payload: bytes) -> None:
        """Send to all nodes that subscribed to the key."""

    def subscribe(self, pattern: str, handler: Callable[[str, bytes], None]) -> None:
        """Call `handler(key, payload)` for all that is published under the pattern, by this node too."""

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        """Ask all nodes that serve a key of the pattern; gives the answers that came within `seconds`."""
        ...

    def serve(self, key: str, handler: Answer) -> None:
        """Answer queries for the key; those above a bounded number at once get no answer."""

    def announce(self, key: str) -> None:
        """Be seen as alive under the key, until `close` or until the link is lost."""

    def watch(self, pattern: str, handler: Callable[[str, bool], None]) -> None:
        """Call `handler(key, alive)` for keys of the pattern that come or go, first for those there now."""

    async def close(self) -> None:
        """Leave the bus; the other nodes see it at once."""
