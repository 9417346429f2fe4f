"""A model on the hub that no disk holds: three nodes fetch about one copy of it, and trust no source."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.cluster.facts import SliceHeld
from cordee.distribution import chunks as chunks_module
from cordee.distribution import hub_ranges as hub_ranges_module
from cordee.distribution import manifest as manifests
from cordee.distribution import slice_store as slice_store_module
from cordee.distribution.chunks import FALLBACK_TRIES, ChunkClient, ChunkServer, chunk_key
from cordee.distribution.hub_ranges import HubModel
from cordee.distribution.hub_source import Hub
from cordee.distribution.pull import hub_files
from cordee.distribution.slice_store import SliceStore
from cordee.errors import HubUnreachable, StorageFailed
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.models.store import Store
from fake_hub import FakeHub
from tiny import make_tiny
from wire import Wire

CHUNK_BYTES = 1 << 12
SOURCE = "o/m/a.gguf"
THIRDS = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.gguf", seed=3, tokenizer="bytes")


class Cluster:
    """Nodes with empty disks, one of which has read the model on the hub for its manifest."""

    def __init__(self, folder: Path, model: Path, hub: FakeHub) -> None:
        self.folder, self.model, self.hub, self.wire = folder, model, hub, Wire()
        self.reports: list[str] = []
        self.stores = {name: SliceStore(Store(folder / name)) for name in THIRDS}
        for name, slice_store in self.stores.items():
            self.wire.handlers[chunk_key(name)] = ChunkServer(slice_store, lambda *_: None).answer
        headers = folder / "headers"
        headers.mkdir()
        self.digest = HubModel(hub_files(SOURCE), headers).manifest(self.stores["a"]).digest

    def open(self, node: str) -> HubModel:
        return Hub(self.stores[node]).open(SOURCE)

    def holders(self, without: str) -> dict[str, list[SliceHeld]]:
        found = {}
        for name, slice_store in self.stores.items():
            if name != without and self.digest in slice_store.known():
                found[name] = slice_store.held(self.digest)
        return found

    async def fetch(self, node: str, first: int, last: int, fallback=True) -> Path:
        """What a node of the cluster does to get a slice."""
        client = ChunkClient(self.wire, self.stores[node], self.reports.append)
        await client.manifest(self.digest, list(THIRDS))
        opened = (lambda: self.open(node)) if fallback is True else fallback
        holders = lambda: self.holders(node)  # noqa: E731
        return (await client.slice(self.digest, first, last, holders, None, opened or None)).path

    def is_a_cut(self, path: Path, first: int, last: int) -> bool:
        wanted = cut(read_header(self.model), first, last, self.folder / "cut.gguf").path
        return path.read_bytes() == wanted.read_bytes()

    def bytes_of(self, *thirds: str) -> int:
        """The bytes of the layers of some thirds."""
        layers = {layer for name in thirds for layer in range(*THIRDS[name])}
        names = tuple(f"blk.{layer}." for layer in layers)
        return sum(t.nbytes for t in read_header(self.model).tensors if t.name.startswith(names))


@pytest.fixture
def cluster(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (manifests, slice_store_module, hub_ranges_module, chunks_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(hub_ranges_module, "FIRST_BYTES", 1 << 11)
    monkeypatch.setattr(hub_ranges_module, "GAP_BYTES", 1 << 10)
    monkeypatch.setattr(chunks_module, "SILENCE_SECONDS", 0.3)
    hub = FakeHub({"o/m": {"a.gguf": model.read_bytes()}})
    hub.use(monkeypatch, tmp_path)
    yield Cluster(tmp_path, model, hub)
    hub.close()


def test_three_nodes_fetch_one_model_from_the_hub_and_copies_from_each_other(cluster: Cluster) -> None:
    cluster.hub.sent = 0

    async def story() -> None:
        paths = await asyncio.gather(*(cluster.fetch(node, *layers) for node, layers in THIRDS.items()))
        assert all(
            cluster.is_a_cut(*each) for each in zip(paths, *zip(*THIRDS.values(), strict=True), strict=True)
        )
        fetched, size = cluster.hub.sent, cluster.model.stat().st_size
        headers = len(THIRDS) * 2 * read_header(cluster.model).nbytes
        assert cluster.bytes_of(*THIRDS) <= fetched < size + headers
        for node, other in ("ab", "bc", "ca"):
            assert cluster.is_a_cut(await cluster.fetch(node, *THIRDS[other]), *THIRDS[other])
        assert cluster.hub.sent == fetched

    asyncio.run(story())
    assert cluster.reports == []


def test_what_one_neighbour_has_comes_from_it_and_only_the_rest_from_the_hub(cluster: Cluster) -> None:
    asyncio.run(cluster.fetch("a", 0, 3))
    cluster.hub.ranges.clear()
    cluster.wire.asked.clear()
    assert cluster.is_a_cut(asyncio.run(cluster.fetch("b", 2, 4)), 2, 4)
    tensors = read_header(cluster.model).tensors
    asked = {tensors[tensor].name.split(".")[1] for tensor, _ in cluster.wire.chunks("a")} - {"weight"}
    assert asked == {"2"}
    ends = [asked.removeprefix("bytes=").split("-") for asked in cluster.hub.ranges]
    spans = [range(int(start), int(end) + 1) for start, end in ends]
    third = [tensor for tensor in tensors if tensor.name.startswith("blk.3.")]
    second = [tensor for tensor in tensors if tensor.name.startswith("blk.2.")]
    assert all(any(tensor.offset in span for span in spans) for tensor in third)
    assert not any(tensor.offset in span for span in spans for tensor in second)


def test_a_wrong_chunk_of_the_hub_is_named_and_fetched_again(cluster: Cluster) -> None:
    source = cluster.open("b")
    cluster.hub.corrupt = 1
    assert cluster.is_a_cut(asyncio.run(cluster.fetch("b", 2, 4, lambda: source)), 2, 4)
    [report] = cluster.reports
    assert report.startswith("The hub (o/m) gave wrong bytes for chunk ")
    assert " of output_norm.weight of " in report  # what comes first


def test_a_hub_that_always_lies_is_given_up_and_what_was_right_stays(cluster: Cluster) -> None:
    source = cluster.open("b")
    cluster.hub.corrupt = 1000
    with pytest.raises(StorageFailed, match=r"hub: The hub \(o/m\) gave wrong bytes for chunk"):
        asyncio.run(cluster.fetch("b", 2, 4, lambda: source))
    assert len(cluster.reports) == FALLBACK_TRIES
    cluster.hub.corrupt, cluster.hub.sent = 0, 0
    assert cluster.is_a_cut(asyncio.run(cluster.fetch("b", 2, 4, lambda: source)), 2, 4)
    assert 0 < cluster.hub.sent < cluster.bytes_of("b") // 10


def test_the_hub_may_go_once_a_neighbour_has_the_layers(cluster: Cluster) -> None:
    asyncio.run(cluster.fetch("a", 0, 4))
    cluster.hub.status = 503
    assert cluster.is_a_cut(asyncio.run(cluster.fetch("b", 0, 2)), 0, 2)
    with pytest.raises(StorageFailed, match=r"(?s)layers 2 to 6 of .*hub: .*cannot be fetched from"):
        asyncio.run(cluster.fetch("c", 2, 6))
    cluster.hub.status = None
    cluster.wire.asked.clear()
    assert cluster.is_a_cut(asyncio.run(cluster.fetch("c", 2, 6)), 2, 6)
    assert cluster.wire.asked == []  # what the neighbours had was kept


def test_without_a_source_nobody_asks_the_hub(cluster: Cluster) -> None:
    cluster.hub.ranges.clear()
    with pytest.raises(StorageFailed, match="nobody has them"):
        asyncio.run(cluster.fetch("b", 2, 4, None))
    assert cluster.hub.ranges == []


def test_a_pass_that_nobody_wants_any_more_ends_and_a_failure_is_reported_once(cluster: Cluster) -> None:
    async def story() -> None:
        hub, made = Hub(cluster.stores["b"]), []
        reading = hub.read("m", SOURCE, 5, made.append)
        assert (reading.name, reading.source, reading.done_bytes) == ("m", SOURCE, 0)
        assert hub.read("m", SOURCE, 5, made.append) is reading
        assert hub.stop("m")
        await hub.close()
        assert (made, hub.reading, hub.fault("m")) == ([], [], None)
        cluster.hub.status = 503
        hub.read("m", "o/m/a.gguf", 5, made.append)
        while hub.reading:
            await asyncio.sleep(0)
        assert isinstance(hub.fault("m"), HubUnreachable)
        assert hub.fault("m") is None
        cluster.hub.status = None
        hub.read("m", SOURCE, 5, made.append)
        while hub.reading:
            await asyncio.sleep(0)
        assert [manifest.digest for manifest in made] == [cluster.digest]

    asyncio.run(story())


def test_a_killed_fetcher_goes_on_where_it_stopped(starter_path: Path, tmp_path: Path) -> None:
    """In processes of their own, with real chunks: a slow connection, SIGKILL, another try."""
    content = starter_path.read_bytes()
    hub = FakeHub({"o/m": {"a.gguf": content}})
    try:
        whole = Store(tmp_path / "whole")
        manifest = SliceStore(whole).manifest_of(whole.add_file(starter_path, "mine", take="link"))
        slice_store = SliceStore(Store(tmp_path / "taker"))
        slice_store.add_manifest(manifest.digest, manifest.path.read_bytes())
        fetch = ("hub", tmp_path / "taker", SOURCE, manifest.digest, 2, 20)
        kill_at = 10_000_000

        def start() -> subprocess.Popen[str]:
            command = [
                sys.executable,
                Path(__file__).resolve().parents[1] / "helpers" / "chunk_peer.py",
                *map(str, fetch),
            ]
            environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

        hub.slow = True
        with start() as process:
            while int(process.stdout.readline()) < kill_at:
                pass
            process.send_signal(signal.SIGKILL)
        hub.slow, hub.sent = False, 0
        with start() as process:
            found = int(process.stdout.readline())
            process.stdout.read()
        assert process.returncode == 0
        assert found > 0
        fetched = slice_store.slice(manifest.digest, 2, 20)
        wanted = cut(read_header(starter_path), 2, 20, tmp_path / "cut.gguf")
        assert fetched.path.read_bytes() == wanted.path.read_bytes()
        assert hub.sent < wanted.nbytes - kill_at + 2 * hub_ranges_module.FIRST_BYTES
    finally:
        hub.close()
