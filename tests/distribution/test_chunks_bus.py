"""The starter model's slices over real links with TLS, between processes that are killed in the middle."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from cordee.cluster.facts import SliceHeld
from cordee.distribution.chunks import (
    IN_FLIGHT_EACH,
    MANIFEST,
    ChunkClient,
    ChunkRequest,
    ChunkServer,
    chunk_key,
)
from cordee.distribution.slice_store import SliceStore
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.models.store import Store
from cordee.net.bus import BusOptions
from cordee.net.identity import Identity
from cordee.net.zenoh_bus import ZenohBus
from members import cluster

PEER = Path(__file__).resolve().parents[1] / "helpers" / "chunk_peer.py"
FIRST, LAST = 2, 10


@pytest.fixture
def members(home: Path, tmp_path: Path) -> list[Identity]:
    return cluster(tmp_path / "members", 3)


class Giver:
    """A node in this process with the whole starter model; `asked` are the chunks that others wanted."""

    def __init__(self, member: Identity, root: Path, starter: Path, bytes_per_second: float) -> None:
        store = Store(root)
        self.slice_store, self.node, self.asked = SliceStore(store), member.node, []
        self.manifest = self.slice_store.manifest_of(store.add_file(starter, "starter", take="link"))
        self.held = self.slice_store.held(self.manifest.digest)
        self._server = ChunkServer(
            self.slice_store, lambda *damage: pytest.fail(str(damage)), bytes_per_second
        )

    async def answer(self, payload: bytes) -> bytes:
        request = msgspec.msgpack.decode(payload, type=ChunkRequest)
        if request.tensor != MANIFEST:
            self.asked.append((request.tensor, request.chunk))
        return await self._server.answer(payload)


@asynccontextmanager
async def on_the_bus(member: Identity, *peers: str) -> AsyncIterator[ZenohBus]:
    bus = await ZenohBus.open(member, BusOptions("127.0.0.1:0", peers, ""))
    try:
        yield bus
    finally:
        await bus.close()


def start(member: Identity, *arguments: object) -> subprocess.Popen:
    """A node in a process of its own."""
    command = [sys.executable, PEER, *map(str, arguments)]
    environment = os.environ | {"CORDEE_HOME": str(member.folder.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def is_a_cut(path: Path, starter: Path, scratch: Path) -> bool:
    return path.read_bytes() == cut(read_header(starter), FIRST, LAST, scratch).path.read_bytes()


def test_a_killed_fetcher_goes_on_without_asking_for_what_it_has(members, starter_path, tmp_path):
    giver = Giver(members[0], tmp_path / "giver", starter_path, 10e6)
    digest, root = giver.manifest.digest, tmp_path / "taker"

    async def story() -> tuple[int, int]:
        async with on_the_bus(members[0]) as bus:
            bus.serve(chunk_key(giver.node), giver.answer)
            fetch = ("fetch", root, bus.addresses[0], giver.node, digest, FIRST, LAST)
            with start(members[1], *fetch) as process:
                while int(await asyncio.to_thread(process.stdout.readline)) < 10_000_000:
                    pass
                process.send_signal(signal.SIGKILL)
            before = len(giver.asked)
            with start(members[1], *fetch) as process:
                found = int(await asyncio.to_thread(process.stdout.readline))
                await asyncio.to_thread(process.stdout.read)
            assert process.returncode == 0
            return before, found

    before, found = asyncio.run(story())
    slice_store = SliceStore(Store(root))
    assert found > 0
    assert is_a_cut(slice_store.slice(digest, FIRST, LAST).path, starter_path, tmp_path / "cut.gguf")
    total = set(slice_store.layout(digest, FIRST, LAST).chunks())
    assert len(total) - IN_FLIGHT_EACH > before > IN_FLIGHT_EACH
    assert set(giver.asked) == total
    assert len(giver.asked) - len(total) <= IN_FLIGHT_EACH  # those that were on their way


def test_a_killed_source_is_left_for_one_that_lives(members, starter_path, tmp_path):
    giver = Giver(members[0], tmp_path / "giver", starter_path, 10e6)
    digest, doomed = giver.manifest.digest, members[1].node
    other = Store(tmp_path / "doomed")
    SliceStore(other).manifest_of(other.add_file(starter_path, "starter", take="link"))
    reports: list[str] = []
    slice_store = SliceStore(Store(tmp_path / "taker"))

    async def story() -> Path:
        with start(members[1], "serve", other.root) as process:
            address = (await asyncio.to_thread(process.stdout.readline)).split()[0]
            async with (
                on_the_bus(members[0], address) as bus,
                on_the_bus(members[2], address, *bus.addresses) as mine,
            ):
                bus.serve(chunk_key(giver.node), giver.answer)
                client = ChunkClient(mine, slice_store, reports.append)
                await client.manifest(digest, [giver.node, doomed] * 10)
                whole = [SliceHeld(digest, 0, giver.manifest.header.layers, True)]
                holders = {doomed: whole, giver.node: giver.held}

                def kill(done: int, total: int) -> None:
                    if done > total // 3 and process.poll() is None:
                        process.kill()

                fetched = await client.slice(digest, FIRST, LAST, lambda: holders, kill)
        return fetched.path

    assert is_a_cut(asyncio.run(story()), starter_path, tmp_path / "cut.gguf")
    dropped = [report for report in reports if "is no longer asked" in report]
    assert len(dropped) == 1
    assert f"Node {doomed} is no longer asked: it gave no chunk in " in dropped[0]
    total = len(list(slice_store.layout(digest, FIRST, LAST).chunks()))
    assert 0 < len(giver.asked) < total
