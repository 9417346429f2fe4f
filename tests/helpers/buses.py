"""Members on the bus, for tests: real zenoh sessions over loopback."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from cordee.net.bus import BusOptions
from cordee.net.identity import Identity
from cordee.net.zenoh_bus import ZenohBus

LOOPBACK = "127.0.0.1:0"
PATIENCE_SECONDS = 20.0


class Node:
    """A bus and what it heard."""

    def __init__(self, bus: ZenohBus, node: str) -> None:
        self.bus = bus
        self.key = f"heartbeat/{node}"
        self.heard: list[tuple[str, bytes]] = []
        self.alive: set[str] = set()
        self.changes: list[tuple[str, bool]] = []
        bus.subscribe("heartbeat/*", lambda key, payload: self.heard.append((key, payload)))
        bus.watch("alive/*", self._note)

    def _note(self, key: str, alive: bool) -> None:
        self.changes.append((key, alive))
        (self.alive.add if alive else self.alive.discard)(key)


@contextlib.asynccontextmanager
async def node(
    member: Identity, peers: list[str], *, scouting: str = "", listen: str = LOOPBACK
) -> AsyncGenerator[Node]:
    """A member on the bus, alive under its id."""
    opened = await ZenohBus.open(member, BusOptions(listen, tuple(peers), scouting))
    try:
        made = Node(opened, member.node)
        opened.announce(f"alive/{member.node}")
        yield made
    finally:
        await opened.close()


async def until(condition: Callable[[], Any]) -> None:
    """Wait for it, at most PATIENCE_SECONDS."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def hears(listener: Node, speaker: Node, payload: bytes) -> None:
    """Wait until one node hears the other; the message is repeated, as everything on the bus is."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (speaker.key, payload) not in listener.heard:
            speaker.bus.publish(speaker.key, payload)
            await asyncio.sleep(0.05)


def tokens(*members: Identity) -> set[str]:
    return {f"alive/{member.node}" for member in members}


def run(story: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(story())
