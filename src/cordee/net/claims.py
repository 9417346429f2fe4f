"""Where nodes are said to be on the bus, looked at before it is remembered.

Any member can announce any node at any address, and what is remembered is dialled for ever after. So an
address counts as a node's once the node's own certificate was seen there. Until then, and where nothing
answers, as behind a firewall, the node is remembered among a few that peers.py keeps from pushing out others;
what shows another certificate is forgotten. Addresses outside of this machine's networks (`address.is_near`)
are not even tried, unless a person gave them with --peer.
"""

import asyncio
import ssl
from collections.abc import Collection

from cryptography import x509

from cordee.errors import BadRequest
from cordee.net import address, identity
from cordee.net.identity import Identity
from cordee.net.peers import UNPROVEN_MAX, Peers

CLAIMS_MAX = 64  # that wait to be looked at; the oldest are dropped, and heard again later
LOOKS_MAX = 4  # at once
LOOK_SECONDS = 5.0  # for an address: TCP repeats itself after one and after three
PAUSE_SECONDS = 0.5  # after one that did not hold: what is false costs a write to the disk at most so often


class Claims:
    """Looks at what is heard, and has `peers` remember what holds. `given` are hosts that a person named.

    All methods on one event loop. Close it.
    """

    def __init__(self, member: Identity, peers: Peers, given: Collection[str]) -> None:
        self._identity = member
        self._peers = peers
        self._given = frozenset(given)
        self._waiting: dict[tuple[str, str], None] = {}  # nodes with addresses, the oldest first
        self._looks: set[asyncio.Task[None]] = set()

    def hear(self, node: str, addresses: str) -> None:
        """A node is said to be at these addresses, joined by commas."""
        claimed = addresses.split(",")[: address.ADDRESSES_MAX]
        near = ",".join(each for each in claimed if self._may_dial(each))
        if not near or self._peers.is_proven(node, near) or node in self._identity.revoked:
            return
        if node not in self._peers.known and len(self._peers.unproven) < UNPROVEN_MAX:
            self._peers.remember(node, near, proven=False)
        self._waiting.pop((node, near), None)
        while len(self._waiting) >= CLAIMS_MAX:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[node, near] = None
        if len(self._looks) < LOOKS_MAX:
            look = asyncio.get_running_loop().create_task(self._look())
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

    async def close(self) -> None:
        """Look at nothing more."""
        for look in self._looks:
            look.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)

    def _may_dial(self, where: str) -> bool:
        try:
            host, port = address.parse(where, 0)
        except BadRequest:
            return False
        return bool(port) and (address.is_near(host) or host in self._given)

    async def _look(self) -> None:
        while self._waiting:
            node, addresses = next(iter(self._waiting))
            del self._waiting[node, addresses]
            claimed = addresses.split(",")
            found = await asyncio.gather(*map(self._node_at, claimed))
            proven = [where for where, its in zip(claimed, found, strict=True) if its == node]
            silent = [where for where, its in zip(claimed, found, strict=True) if its is None]
            self._peers.remember(node, ",".join(proven or silent), proven=bool(proven))
            if not proven and not silent and node in self._peers.unproven:
                self._peers.forget(node)
            if not proven:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _node_at(self, where: str) -> str | None:
        """The id of the member that listens there; empty if it is no member, None if nothing answers."""
        host, port = address.parse(where, 0)
        writer = None
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                _, writer = await asyncio.open_connection(host, port, ssl=self._context())
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return identity.certified_node(x509.load_der_x509_certificate(shown))
        except (ssl.SSLError, ValueError):
            return ""
        except OSError:  # TimeoutError is one
            return None
        finally:
            if writer is not None:
                writer.transport.abort()

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        folder = self._identity.folder
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
        return context
