"""A bus within one process, whose nodes may give wrong answers."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec

from cordee.distribution.chunks import MANIFEST, ChunkRequest

Handler = Callable[[bytes], Awaitable[bytes | None]]


class Wire:
    """A bus within this process; `asked` lists (node, request), `bend` may replace a node's replies."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.bend: dict[str, Callable[[ChunkRequest, Handler, bytes], Awaitable[bytes | None]]] = {}
        self.asked: list[tuple[str, ChunkRequest]] = []
        self.at_once = Counter()

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        node, request = pattern.removeprefix("chunk/"), msgspec.msgpack.decode(payload, type=ChunkRequest)
        handler, bend = self.handlers.get(pattern), self.bend.get(node)
        if not handler:
            return []
        self.asked.append((node, request))
        self.at_once[node] += 1
        self.at_once["most"] = max(self.at_once["most"], self.at_once[node])
        try:
            async with asyncio.timeout(seconds):
                answer = await (bend(request, handler, payload) if bend else handler(payload))
        except TimeoutError:
            return []
        finally:
            self.at_once[node] -= 1
        return [] if answer is None else [answer]

    def chunks(self, node: str | None = None) -> list[tuple[int, int]]:
        """The chunks that were asked of a node, or of all."""
        asked = [
            request for name, request in self.asked if node in (None, name) and request.tensor != MANIFEST
        ]
        return [(request.tensor, request.chunk) for request in asked]
