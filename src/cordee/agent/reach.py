"""Whether nodes can connect to each other: a firewall may let links out and not in.

    asker                                     another node
    query reach/NODE: the asker's id -------> tries where the asker says that it listens
      <------- Tried: what it reached, and what not

A link of the bus works for both sides, whoever opened it, so a closed firewall shows nowhere but at the links
between stages, which stay in "wiring". So the agent's own ports are tried: the bus, and the inbox, which is
in the range of the stages' ports.

Nobody can have a port of somebody else tried: the request has no address. The other node takes those that the
asker announces for itself, and says "reached" only of those behind which TLS shows the asker's certificate;
of all others it says the same, after the same time.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping

import msgspec

from cordee.cluster.facts import Facts
from cordee.errors import BadRequest
from cordee.net import address
from cordee.net.bus import Bus
from cordee.net.identity import Identity
from cordee.net.peers import Peers
from cordee.worker import tls_link
from cordee.worker.frames import LinkClosed

TRY_SECONDS = 5.0  # for one address: TCP repeats itself after one and after three; machines may be busy
ANSWER_SECONDS = TRY_SECONDS + 3.0
NODES_MAX = 8  # that are asked, and tried: a firewall treats them alike
TRIES_MAX = 4  # of other nodes at once; the rest get no answer

KnownNodes = Callable[[], Mapping[str, Facts]]


class Tried(msgspec.Struct, frozen=True):
    """The ports of a node at which another could reach it, at any of its addresses, and the others."""

    reached: tuple[int, ...] = ()
    closed: tuple[int, ...] = ()


class Reach:
    """See the module's docstring. `alive` gives the facts of the other nodes that are alive, by id."""

    def __init__(self, bus: Bus, identity: Identity, alive: KnownNodes) -> None:
        self._bus = bus
        self._identity = identity
        self._alive = alive
        self._tries = 0
        bus.serve(f"reach/{identity.node}", self._answer)

    async def seen_by_others(self) -> dict[str, Tried]:
        """What other nodes reach of this one, by their ids; those that gave no answer are left out."""
        nodes = list(self._alive())[:NODES_MAX]
        answers = await asyncio.gather(*map(self._ask, nodes))
        return {node: tried for node, tried in zip(nodes, answers, strict=True) if tried is not None}

    async def seen_from_here(self) -> dict[str, Tried]:
        """What this node reaches of others, by their ids."""
        nodes = list(self._alive())[:NODES_MAX]
        found = await asyncio.gather(*map(self._try, nodes))
        return dict(zip(nodes, found, strict=True))

    async def answers(self, host: str, port: int) -> bool:
        """Whether a node of this cluster listens there."""
        return bool(await _node_behind(self._identity, host, port))

    async def _ask(self, node: str) -> Tried | None:
        own = self._identity.node.encode()
        for answer in await self._bus.query(f"reach/{node}", own, seconds=ANSWER_SECONDS):
            try:
                return msgspec.msgpack.decode(answer, type=Tried)
            except (msgspec.MsgspecError, ValueError):
                continue
        return None

    async def _answer(self, question: bytes) -> bytes | None:
        node = question.decode("ascii", errors="replace")
        if node not in self._alive() or self._tries >= TRIES_MAX:
            return None
        self._tries += 1
        at_least = asyncio.create_task(asyncio.sleep(TRY_SECONDS))
        try:
            tried = await self._try(node)
            if tried.closed:
                await at_least
            return msgspec.msgpack.encode(tried)
        finally:
            at_least.cancel()
            self._tries -= 1

    async def _try(self, node: str) -> Tried:
        """Try where a node says that it listens."""
        facts = self._alive().get(node)
        seen = Peers(self._identity).known.get(node, "")
        announced = (seen, "" if facts is None else facts.inbox)
        wanted = list(dict.fromkeys(where for each in announced for where in _some(each, seen)))
        answers = await asyncio.gather(*(_node_behind(self._identity, *where) for where in wanted))
        reached = {port for (_, port), answer in zip(wanted, answers, strict=True) if answer == node}
        closed = {port for _, port in wanted} - reached
        return Tried(tuple(sorted(reached)), tuple(sorted(closed)))


async def is_there(identity: Identity, node: str) -> bool:
    """Whether a node shows its certificate at an address where it was seen last."""
    seen = Peers(identity).known.get(node, "")
    wanted = _some(seen, seen)
    return node in await asyncio.gather(*(_node_behind(identity, *where) for where in wanted))


async def _node_behind(identity: Identity, host: str, port: int) -> str:
    """The id of the node that listens there; empty if none answers in TRY_SECONDS."""
    try:
        async with asyncio.timeout(TRY_SECONDS):
            return await tls_link.node_behind(identity.folder, host, port)
    except (OSError, LinkClosed):  # TimeoutError is an OSError
        return ""


def _some(endpoint: str, seen: str) -> Iterable[tuple[str, int]]:
    """The addresses of an endpoint that another node announced, as far as they may be dialled.

    `seen` are the addresses at which it was seen on the bus.
    """
    seen_hosts = address.hosts(seen)
    for each in endpoint.split(",")[: address.ADDRESSES_MAX]:
        try:
            host, port = address.parse(each, 0)
        except BadRequest:
            continue
        if port and (address.is_near(host) or host in seen_hosts):
            yield host, port
