"""Slices come from neighbours: several at once, checked, without those that lie, stall or die."""

import asyncio
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from cordee.cluster.facts import SliceHeld
from cordee.distribution import chunks as chunks_module
from cordee.distribution import manifest as manifests
from cordee.distribution import slice_store as slice_store_module
from cordee.distribution.chunks import MANIFEST, ChunkClient, ChunkReply, ChunkRequest, ChunkServer, chunk_key
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadRequest, ModelNotFound, StorageFailed
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.models.store import Store
from tiny import make_tiny
from wire import Handler, Wire

CHUNK_BYTES = 1 << 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of tiny models have several chunks then."""
    for module in (manifests, slice_store_module, chunks_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(chunks_module, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(chunks_module, "SILENCE_SECONDS", 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("model") / "tiny.gguf", tokenizer="bytes")


class World:
    """Nodes `a`, `b`, … with the whole model, and one that has nothing."""

    def __init__(self, model: Path, folder: Path, nodes: str) -> None:
        self.folder, self.model, self.wire = folder, model, Wire()
        self.reports: list[str] = []
        self.damage: list[tuple[str, str]] = []
        self.stores: dict[str, SliceStore] = {}
        for name in nodes:
            store = Store(folder / name)
            self.stores[name] = SliceStore(store)
            self.digest = self.stores[name].manifest_of(store.add_file(model, "mine", take="link")).digest
            self.serve(name)
        self.mine = SliceStore(Store(folder / "mine"))
        self.client = ChunkClient(self.wire, self.mine, self.reports.append)

    def serve(self, name: str, **options) -> None:
        server = ChunkServer(self.stores[name], lambda *damage: self.damage.append(damage), **options)
        self.wire.handlers[chunk_key(name)] = server.answer

    def holders(self) -> dict[str, list[SliceHeld]]:
        """What each node really has."""
        return {name: store.held(self.digest) for name, store in self.stores.items()}

    async def fetch(self, first: int, last: int, holders=None, progress=None) -> bytes:
        """A slice, fetched from nothing; its bytes."""
        await self.client.manifest(self.digest, list(self.stores))
        fetched = await self.client.slice(self.digest, first, last, holders or self.holders, progress)
        return fetched.path.read_bytes()

    def cut(self, first: int, last: int) -> bytes:
        """What a slice must be."""
        return cut(read_header(self.model), first, last, self.folder / "cut.gguf").path.read_bytes()

    def chunk_count(self, first: int, last: int) -> int:
        return len(list(self.stores["a"].layout(self.digest, first, last).chunks()))


@pytest.fixture
def world(model, tmp_path):
    """A function that makes a world."""
    return lambda nodes: World(model, tmp_path, nodes)


async def wrong(request: ChunkRequest, handler: Handler, payload: bytes) -> bytes:
    """Bytes of the right number that are not the chunk's."""
    answer = msgspec.msgpack.decode(await handler(payload), type=ChunkReply)
    return msgspec.msgpack.encode(ChunkReply("here", bytes(byte ^ 1 for byte in answer.data)))


async def never(request: ChunkRequest, handler: Handler, payload: bytes) -> bytes:
    await asyncio.Event().wait()


@pytest.mark.parametrize("nodes", ["a", "abc"])
def test_a_slice_from_neighbours_is_the_bytes_of_a_cut(world, nodes):
    world = world(nodes)
    calls = []
    assert asyncio.run(world.fetch(1, 4, progress=lambda *call: calls.append(call))) == world.cut(1, 4)
    asked = world.wire.chunks()
    assert len(asked) == len(set(asked)) == world.chunk_count(1, 4)
    assert all(world.wire.chunks(name) for name in nodes)
    assert 1 < world.wire.at_once["most"] <= chunks_module.IN_FLIGHT_EACH
    assert set(world.client.bytes_per_second) == set(nodes)
    assert all(rate > 0 for rate in world.client.bytes_per_second.values())
    assert sorted(calls)[-1][0] == sorted(calls)[-1][1]
    assert world.reports == []


def test_a_slice_that_is_here_is_asked_of_nobody(world):
    world = world("a")
    asyncio.run(world.fetch(0, 2))
    before = len(world.wire.asked)
    assert asyncio.run(world.fetch(0, 2)) == world.cut(0, 2)
    assert len(world.wire.asked) == before


def test_slices_with_other_cuts_serve_each_other_without_the_whole(world):
    world = world("ab")
    first, second = (SliceStore(Store(world.folder / name)) for name in ("first", "second"))
    for store, ranges in ((first, [(0, 2), (0, 0)]), (second, [(2, 6)])):
        client = ChunkClient(world.wire, store, world.reports.append)

        async def fetch(client=client, ranges=ranges) -> None:
            await client.manifest(world.digest, "a")
            for layers in ranges:
                await client.slice(world.digest, *layers, world.holders)

        asyncio.run(fetch())
    world.wire.handlers.clear()
    world.wire.asked.clear()
    world.stores = {"c": first, "d": second}
    world.serve("c")
    world.serve("d")
    assert asyncio.run(world.fetch(1, 4)) == world.cut(1, 4)
    assert asyncio.run(world.fetch(0, 6)) == world.cut(0, 6)
    assert set(world.wire.chunks("c")).isdisjoint(world.wire.chunks("d"))


def test_a_neighbour_that_lies_is_named_dropped_and_costs_nothing_but_time(world):
    world = world("abc")
    world.wire.bend["b"] = wrong
    assert asyncio.run(world.fetch(0, 3)) == world.cut(0, 3)
    assert len(world.reports) == 1
    assert "Node b is no longer asked: Node b gave wrong bytes for chunk " in world.reports[0]
    assert len(world.wire.chunks("b")) <= chunks_module.IN_FLIGHT_EACH
    assert len(world.wire.chunks()) == world.chunk_count(0, 3) + len(world.wire.chunks("b"))
    assert "b" not in world.client.bytes_per_second


@pytest.mark.parametrize("nonsense", [b"", b"\xc1", msgspec.msgpack.encode(["here", b"x" * 9000]), b"x" * 99])
def test_nonsense_is_no_answer(world, nonsense):
    world = world("ab")

    async def babble(*_: object) -> bytes:
        return nonsense

    world.wire.bend["a"] = babble
    assert asyncio.run(world.fetch(0, 2)) == world.cut(0, 2)
    assert any("Node a is no longer asked" in report for report in world.reports)


def test_a_neighbour_that_stalls_is_dropped_when_others_have_the_same(world, monkeypatch):
    monkeypatch.setattr(chunks_module, "PATIENCE_SECONDS", 2.0)
    world = world("ab")
    world.wire.bend["a"] = lambda request, handler, payload: (
        handler(payload) if request.tensor == MANIFEST else never(request, handler, payload)
    )
    assert asyncio.run(world.fetch(0, 2)) == world.cut(0, 2)
    assert "Node a is no longer asked: it gave no chunk in" in world.reports[0]


def test_the_only_node_that_has_it_is_given_more_time(world, monkeypatch):
    world = world("a")
    asyncio.run(world.client.manifest(world.digest, "a"))
    monkeypatch.setattr(chunks_module, "PATIENCE_SECONDS", 0.05)

    async def slow(request: ChunkRequest, handler: Handler, payload: bytes) -> bytes:
        await asyncio.sleep(0.1)
        return await handler(payload)

    world.wire.bend["a"] = slow
    assert asyncio.run(world.fetch(0, 0)) == world.mine.slice(world.digest, 0, 0).path.read_bytes()
    assert world.reports == []


def test_a_source_that_dies_in_the_middle_is_replaced_by_one_that_comes(world):
    world = world("ab")
    come: list[str] = ["a"]

    async def dying(request: ChunkRequest, handler: Handler, payload: bytes) -> bytes | None:
        if len(world.wire.chunks("a")) > 5:
            come.append("b")
            return None
        return await handler(payload)

    world.wire.bend["a"] = dying
    holders = lambda: {name: held for name, held in world.holders().items() if name in come}  # noqa: E731
    assert asyncio.run(world.fetch(0, 3, holders)) == world.cut(0, 3)
    assert "Node a is no longer asked: it gave no chunk in" in world.reports[0]
    given = world.chunk_count(0, 3) - len(world.wire.chunks("b"))
    assert 2 <= given <= 5


def test_when_nobody_gives_the_rest_the_error_says_why_and_what_came_is_kept(world):
    world, given = world("a"), []

    async def dying(request: ChunkRequest, handler: Handler, payload: bytes) -> bytes | None:
        if len(given) == 9:
            return None
        given.extend([request] if request.tensor != MANIFEST else [])
        return await handler(payload)

    world.wire.bend["a"] = dying
    with pytest.raises(
        StorageFailed, match=r"No node provides \d+ chunks of layers 0 to 3 .*node a: it gave no"
    ):
        asyncio.run(world.fetch(0, 3))
    world.wire.bend.clear()
    world.wire.asked.clear()
    assert asyncio.run(world.fetch(0, 3)) == world.cut(0, 3)
    assert len(world.wire.chunks()) == world.chunk_count(0, 3) - 9


def test_a_cancelled_fetch_goes_on_where_it_stopped(world):
    world = world("ab")

    async def cancelled() -> None:
        await world.client.manifest(world.digest, "a")
        fetch = world.client.slice(world.digest, 0, 4, world.holders, lambda done, total: enough(done, total))
        task = asyncio.create_task(fetch)

        def enough(done: int, total: int) -> None:
            if done > total // 2:
                task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert world.mine.held(world.digest) == []
    before = set(world.wire.chunks())
    assert len(before) < world.chunk_count(0, 4)
    world.wire.asked.clear()
    assert asyncio.run(world.fetch(0, 4)) == world.cut(0, 4)
    again = set(world.wire.chunks()) & before  # those on their way when it was cancelled
    assert len(again) <= 2 * chunks_module.IN_FLIGHT_EACH
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chunks")]


def test_a_fetch_cancelled_while_it_cleans_up_is_cancelled(world, monkeypatch):
    """Once a stage that was stopped at that moment lived on: its worker kept memory promised to another."""
    world, pools = world("a"), []
    loop = task = None

    class Pool(chunks_module.ThreadPoolExecutor):
        def shutdown(self, *arguments, **options) -> None:
            if self._thread_name_prefix == "chunks":
                pools.append(self)
                loop.call_soon_threadsafe(task.cancel)
                cancelled.wait(30)
            super().shutdown(*arguments, **options)

    monkeypatch.setattr(chunks_module, "ThreadPoolExecutor", Pool)
    cancelled = threading.Event()

    async def stopped() -> None:
        nonlocal loop, task
        loop = asyncio.get_running_loop()
        await world.client.manifest(world.digest, "a")
        task = asyncio.create_task(world.client.slice(world.digest, 0, 2, world.holders))
        while not pools:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stopped())


def test_a_node_that_claims_what_it_does_not_have_is_not_asked_for_it_twice(world):
    world = world("ab")
    world.stores["b"].forget(world.digest)
    world.stores["b"].add_manifest(world.digest, world.stores["a"].manifest(world.digest).path.read_bytes())
    claims = {"a": world.stores["a"].held(world.digest), "b": [SliceHeld(world.digest, 0, 6, True)]}
    claims["b"] += [SliceHeld(world.digest, 5, 2), SliceHeld(world.digest, -1, 99), SliceHeld("?", 0, 2)]
    assert asyncio.run(world.fetch(0, 2, lambda: claims)) == world.cut(0, 2)
    assert len(world.wire.chunks()) == world.chunk_count(0, 2) + len(world.wire.chunks("b"))
    tensors = Counter(tensor for tensor, _ in world.wire.chunks("b"))
    assert all(count <= chunks_module.IN_FLIGHT_EACH for count in tensors.values())


def test_damage_on_a_neighbours_disk_is_found_there_and_fetched_elsewhere(world):
    world = world("a")
    asyncio.run(world.fetch(0, 2))
    world.stores["b"] = world.mine
    world.serve("b")
    path = world.mine.slice(world.digest, 0, 2).path
    data = bytearray(path.read_bytes())
    data[read_header(path).tensor("blk.1.ffn_up.weight").offset] ^= 1
    path.write_bytes(data)
    world.mine = SliceStore(Store(world.folder / "third"))
    world.client = ChunkClient(world.wire, world.mine, world.reports.append)
    world.wire.asked.clear()

    def holders() -> dict[str, list[SliceHeld]]:
        return {name: [SliceHeld(world.digest, 0, 2)] for name in ("ab" if world.damage else "b")}

    assert asyncio.run(world.fetch(0, 2, holders)) == world.cut(0, 2)
    ((model, text),) = world.damage
    assert model == world.digest
    assert "chunk 0 of blk.1.ffn_up.weight" in text
    assert world.wire.chunks("a")
    assert world.reports == []
    assert len(world.stores["b"].verify(world.digest, 0, 2)) == 1


def test_a_manifest_comes_from_the_next_one_if_the_first_lies(world):
    world = world("abc")
    world.wire.bend["a"] = wrong
    del world.wire.handlers["chunk/b"]
    manifest = asyncio.run(world.client.manifest(world.digest, "abc"))
    assert manifest.digest == world.digest
    assert "did not come from node a" in world.reports[0]
    assert "did not come from node b: it gave no" in world.reports[1]
    with pytest.raises(StorageFailed, match=r"cannot be fetched from the cluster .*node c: it has none"):
        asyncio.run(world.client.manifest("sha256:" + "0" * 64, "c"))


def test_an_endless_manifest_is_not_taken(world, monkeypatch):
    world = world("a")
    monkeypatch.setattr(chunks_module, "MANIFEST_BYTES_LIMIT", 10 * CHUNK_BYTES)

    async def endless(*_: object) -> bytes:
        return msgspec.msgpack.encode(ChunkReply("here", bytes(CHUNK_BYTES)))

    world.wire.bend["a"] = endless
    with pytest.raises(StorageFailed, match="more than any manifest has"):
        asyncio.run(world.client.manifest(world.digest, "a"))
    assert len(world.wire.asked) == 11


def test_without_manifest_or_layers_there_is_nothing_to_fetch(world):
    world = world("a")
    with pytest.raises(ModelNotFound):
        asyncio.run(world.client.slice(world.digest, 0, 2, world.holders))
    with pytest.raises(BadRequest):
        asyncio.run(world.fetch(2, 9))


# --- the server's side ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1garbage", msgspec.msgpack.encode(["../../etc", 0, 0]), msgspec.msgpack.encode([1])]
)
def test_a_strange_request_is_answered_with_nothing(world, payload):
    world = world("a")
    answer = asyncio.run(world.wire.handlers["chunk/a"](payload))
    assert msgspec.msgpack.decode(answer, type=ChunkReply) == ChunkReply("absent")
    assert world.reports == []


@pytest.mark.parametrize(
    ("tensor", "chunk"), [(0, 1 << 40), (0, -1), (-2, 0), (1 << 40, 0), (MANIFEST, 1 << 40)]
)
def test_chunks_that_do_not_exist_are_not_here(world, tensor, chunk):
    world = world("a")
    payload = msgspec.msgpack.encode(ChunkRequest(world.digest, tensor, chunk))
    answer = msgspec.msgpack.decode(asyncio.run(world.wire.handlers["chunk/a"](payload)), type=ChunkReply)
    assert answer.data == b""


def test_more_requests_than_can_wait_are_told_to_ask_again_and_do(world, monkeypatch):
    monkeypatch.setattr(chunks_module, "WAITING_LIMIT", 1)
    world = world("a")
    payload = msgspec.msgpack.encode(ChunkRequest(world.digest, 0, 0))

    async def crowd() -> list[str]:
        answers = await asyncio.gather(*(world.wire.handlers["chunk/a"](payload) for _ in range(5)))
        return sorted(msgspec.msgpack.decode(answer, type=ChunkReply).state for answer in answers)

    assert asyncio.run(crowd()) == ["busy"] * 4 + ["here"]
    assert asyncio.run(world.fetch(0, 2)) == world.cut(0, 2)
    assert world.reports == []


def test_no_more_is_served_in_a_second_than_allowed(world):
    world = world("a")
    world.serve("a", bytes_per_second=CHUNK_BYTES / 100)
    slept: list[float] = []
    payload = msgspec.msgpack.encode(ChunkRequest(world.digest, 0, 0))

    async def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
        real = asyncio.sleep

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            await real(0)

        monkeypatch.setattr(asyncio, "sleep", sleep)
        await asyncio.gather(*(world.wire.handlers["chunk/a"](payload) for _ in range(10)))

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(crowd(monkeypatch))
    # Each waits for those before it: ten chunks at one in a hundred seconds, less what the test took.
    assert all(later - sooner > 90 for sooner, later in pairwise(slept))
    assert len(slept) == 10
    assert slept[-1] > 900
