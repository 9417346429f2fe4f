"""A node of a cluster as a process of its own, which serves a model's chunks or fetches a slice of one.

    chunk_peer.py serve STORE PEER…                        prints its addresses, then serves until killed
    chunk_peer.py fetch STORE PEER NODE DIGEST FIRST LAST  prints how many bytes have come, line by line
    chunk_peer.py hub STORE SOURCE DIGEST FIRST LAST       the same from the hub alone, without a cluster

Its identity is that in CORDEE_HOME.
"""

import asyncio
import sys
from pathlib import Path

from cordee.cluster.facts import SliceHeld
from cordee.distribution.chunks import ChunkClient, ChunkServer, chunk_key
from cordee.distribution.hub_source import Hub
from cordee.distribution.slice_store import SliceStore
from cordee.models.store import Store
from cordee.net import identity
from cordee.net.bus import BusOptions
from cordee.net.zenoh_bus import ZenohBus

# Slow enough to be killed in the middle of a fetch, whatever else the machine does.
BYTES_PER_SECOND = 10e6


async def serve(root: str, *peers: str) -> None:
    member = identity.load()
    bus = await ZenohBus.open(member, BusOptions("127.0.0.1:0", peers, ""))
    server = ChunkServer(SliceStore(Store(Path(root))), print, BYTES_PER_SECOND)
    bus.serve(chunk_key(member.node), server.answer)
    print(*bus.addresses, flush=True)
    await asyncio.Event().wait()


async def fetch(root: str, peer: str, node: str, digest: str, first: str, last: str) -> None:
    bus = await ZenohBus.open(identity.load(), BusOptions("127.0.0.1:0", (peer,), ""))
    client = ChunkClient(bus, SliceStore(Store(Path(root))), lambda text: print(text, file=sys.stderr))
    manifest = await client.manifest(digest, [node] * 10)
    whole = [SliceHeld(digest, 0, manifest.header.layers, True)]
    await client.slice(
        digest, int(first), int(last), lambda: {node: whole}, lambda done, _: print(done, flush=True)
    )
    await bus.close()


async def hub(root: str, source: str, digest: str, first: str, last: str) -> None:
    slice_store = SliceStore(Store(Path(root)))
    client = ChunkClient(Nobody(), slice_store, lambda text: print(text, file=sys.stderr))
    await client.slice(
        digest,
        int(first),
        int(last),
        dict,
        lambda done, _: print(done, flush=True),
        lambda: Hub(slice_store).open(source),
    )


class Nobody:
    """A bus without neighbours."""

    async def query(self, pattern: str, payload: bytes, *, seconds: float) -> list[bytes]:
        raise AssertionError("there is no neighbour")


if __name__ == "__main__":
    asyncio.run({"serve": serve, "fetch": fetch, "hub": hub}[sys.argv[1]](*sys.argv[2:]))
