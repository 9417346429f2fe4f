"""Whether this node reaches the others, for rows: the bus may work where the links between stages do not.

    Probe, Probe with PROBE_BYTES ------> the other node's inbox
      <------------ Probe with PROBE_BYTES

Each node tries every other one's inbox, whose port is in the range of the stages' ports, when it first hears
of it and every PROBE_SECONDS: a connection as stages would make it, with certificates on both sides, and more
bytes than a packet holds. So a closed firewall, a clock that is off and a network that loses large packets
are known before a model depends on them. TRIES failures in a row make a node unreachable, until one succeeds.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from cordee.cluster.facts import Facts
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Probe

PROBE_SECONDS = 20.0  # between probes of a node that is reached
AGAIN_SECONDS = 3.0  # of one that is not, or was not at the first try
LOOK_SECONDS = 0.5  # how often it is looked whom to probe
# For the bytes to come back, once connected: a machine that swaps takes long, too.
ANSWER_SECONDS = 12.0
TRIES = 2  # a node may just be starting, or have another address
PROBES_MAX = 4  # at the same time: each costs some milliseconds of a core
PROBE_BYTES = 16 << 10  # more than a jumbo frame of 9,000 bytes
PAYLOAD = bytes(PROBE_BYTES)


class Probes:
    """See the module's docstring. All methods on one event loop.

    `alive` gives the facts of the other nodes that are alive, by id; `changed` is called when `unreachable`
    has changed.
    """

    def __init__(
        self, identity: Identity, alive: Callable[[], Mapping[str, Facts]], changed: Callable[[], None]
    ) -> None:
        self._identity = identity
        self._alive = alive
        self._changed = changed
        self._due: dict[str, float] = {}  # when to probe a node; time.monotonic
        self._failures: dict[str, int] = {}  # in a row
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._unreachable: dict[str, str] = {}

    @property
    def unreachable(self) -> Mapping[str, str]:
        """The nodes that are alive and cannot be reached, each with the reason."""
        return self._unreachable

    def hasten(self, node: str) -> None:
        """Probe a node now: something is wrong with it."""
        self._due[node] = time.monotonic()

    async def watch(self) -> None:
        """Probe whoever is due, for ever."""
        try:
            while True:
                self._begin(time.monotonic())
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._under_way.values():
                task.cancel()

    def _begin(self, now: float) -> None:
        nodes = self._alive()
        for node in [node for node in self._due if node not in nodes]:
            self._forget(node)
        due = [node for node in nodes if nodes[node].inbox and self._due.get(node, now) <= now]
        for node in sorted(due, key=lambda node: self._due.get(node, 0.0)):
            if len(self._under_way) >= PROBES_MAX:
                return
            if node not in self._under_way:
                task = asyncio.get_running_loop().create_task(self._probe(node, nodes[node].inbox))
                self._under_way[node] = task

    async def _probe(self, node: str, endpoint: str) -> None:
        try:
            failure = await self._failure(node, endpoint)
        finally:
            self._under_way.pop(node, None)
        if node not in self._alive():
            return
        failures = self._failures[node] = self._failures.get(node, 0) + 1 if failure else 0
        self._due[node] = time.monotonic() + (AGAIN_SECONDS if failures else PROBE_SECONDS)
        was_reached = node not in self._unreachable
        if failures >= TRIES:
            self._unreachable[node] = failure
        elif not failures:
            self._unreachable.pop(node, None)
        if was_reached != (node not in self._unreachable):
            self._changed()

    async def _failure(self, node: str, endpoint: str) -> str:
        """Why a node cannot be reached; "" if it can."""
        try:
            reader, writer = await tls_link.open_stream(self._identity.folder, endpoint, node)
        except LinkClosed as error:
            return str(error)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                frames.write(writer, Probe())
                frames.write(writer, Probe(), PAYLOAD)
                message, payload = await frames.read(reader, PROBE_BYTES)
            if not isinstance(message, Probe) or len(payload) != PROBE_BYTES:
                return "it answers a probe with something else"
        except TimeoutError:
            return (
                f"{PROBE_BYTES >> 10} kB do not come back in {ANSWER_SECONDS:.0f} s (large packets are lost?)"
            )
        except LinkClosed as error:
            return str(error)
        finally:
            writer.transport.abort()
        return ""

    def _forget(self, node: str) -> None:
        del self._due[node]
        self._failures.pop(node, None)
        if self._unreachable.pop(node, None) is not None:
            self._changed()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer another node, whose first Probe came.

    Raises:
        LinkClosed: it went, or sends something else.
    """
    message, _ = await frames.read(reader, PROBE_BYTES)
    if isinstance(message, Probe):
        frames.write(writer, Probe(), PAYLOAD)
        await reader.read(1)  # until the other side has it, and closes
