"""What is on a disk: large or damaged models hold up no others, and the disk does not run full."""

import asyncio
import os
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from cordee.cluster.facts import SliceHeld
from cordee.cluster.goals import DISK_RESERVE_BYTES, SliceGoal, StageSpec
from cordee.distribution import inventory as inventory_module
from cordee.distribution import local_models as local_models_module
from cordee.distribution.inventory import DISK_STEP_BYTES, GROWING_KEEP_SECONDS, Inventory
from cordee.distribution.local_models import FETCHES_MAX, LocalModels
from cordee.distribution.slice_store import SliceStore
from cordee.errors import StorageFailed
from cordee.models.store import Store
from tiny import make_tiny

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.gguf", seed=3, tokenizer="bytes")


class Node:
    """An inventory with a store of its own; `told` counts changes to publish."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.slice_store = SliceStore(self.store)
        self.told = 0
        self.inventory = Inventory(self.store, self.slice_store, self._changed)

    def _changed(self) -> None:
        self.told += 1

    def add(self, model: Path, name: str) -> None:
        self.store.add_file(model, name)

    @property
    def offered(self) -> list[str]:
        return [offer.name for offer in self.inventory.offers]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "store")


async def until(true) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def test_small_models_are_offered_from_the_start(node: Node, model: Path, tmp_path: Path) -> None:
    node.add(model, "a")
    node.add(make_tiny("qwen3", tmp_path / "b.gguf"), "b")
    asyncio.run(node.inventory.look())
    assert node.offered == ["a", "b"]
    assert [(held.first, held.whole) for held in node.inventory.slices] == [(0, True), (0, True)]
    before = node.told
    asyncio.run(node.inventory.scan())
    assert node.told == before


def test_a_large_model_holds_up_nothing_while_it_is_read(
    node: Node, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory_module, "READING_SECONDS", 0.05)
    node.add(model, "large")
    going_on, real = threading.Event(), node.slice_store.manifest_of

    def slow(stored, progress):
        progress(1, 2)
        going_on.wait(30)
        return real(stored, progress)

    monkeypatch.setattr(node.slice_store, "manifest_of", slow)

    async def story() -> None:
        await node.inventory.look()
        assert node.offered == []
        [reading] = node.inventory.reading.values()
        assert (reading.name, reading.source, reading.done_bytes, reading.total_bytes) == ("large", "", 1, 2)
        await node.inventory.scan()  # does not begin a second time
        going_on.set()
        await until(lambda: node.offered == ["large"])
        assert node.inventory.reading == {}
        await node.inventory.close()

    asyncio.run(story())


def test_a_node_that_ends_does_not_read_to_the_end(node: Node, model: Path, monkeypatch) -> None:
    node.add(model, "large")

    def endless(_stored, progress):
        while True:
            progress(1, 2)

    monkeypatch.setattr(node.slice_store, "manifest_of", endless)
    monkeypatch.setattr(inventory_module, "READING_SECONDS", 0.05)

    async def story() -> None:
        await node.inventory.look()
        await node.inventory.close()

    asyncio.run(story())
    assert node.offered == []


def test_one_damaged_model_hides_no_other_and_is_logged_once(
    node: Node, model: Path, tmp_path, caplog
) -> None:
    node.add(model, "good")
    node.add(make_tiny("qwen3", tmp_path / "b.gguf"), "gone")
    node.store.get("gone").path.unlink()
    (node.store.root / "names" / "garbage.json").write_bytes(b"\xff\x00")
    (node.store.root / "manifests" / ("0" * 64)).mkdir()
    (node.store.root / "manifests" / ("0" * 64) / "manifest").write_bytes(b"garbage")

    async def story() -> None:
        await node.inventory.look()
        await node.inventory.scan()

    asyncio.run(story())
    assert node.offered == ["good"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    for fault in ("garbage.json is damaged", "gone is not offered", "the slices of model sha256:0000"):
        assert any(fault in each for each in told)


def test_a_damaged_manifest_is_made_again(node: Node, model: Path) -> None:
    node.add(model, "a")
    asyncio.run(node.inventory.look())
    [offer] = node.inventory.offers
    again = Node(node.store.root)
    again.slice_store.manifest(offer.shape.digest).path.write_bytes(b"garbage")
    again = Node(node.store.root)
    asyncio.run(again.inventory.look())
    assert again.inventory.offers == (offer,)


def test_a_whole_model_that_stays_damaged_is_not_verified_for_every_request(
    node: Node, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node.add(model, "a")

    async def story() -> None:
        await node.inventory.look()
        [held] = node.inventory.slices
        path = node.store.whole(held.model)
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"damage")
        for _ in range(5):
            node.inventory.damaged(held.model, "a chunk is wrong")
            await until(lambda: not node.inventory._verifying)

    asyncio.run(story())
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "a chunk is wrong"
    assert len(told) == 2
    assert told[1].startswith("damaged on this disk: chunk ")


class Disk:
    """A disk that is as full as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 40
        monkeypatch.setattr(inventory_module.shutil, "disk_usage", lambda _: Usage(0, 0, self.free))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def with_slices(node: Node, model: Path, *ranges: tuple[int, int]) -> str:
    """Slices on a disk that does not have the whole model; the model's digest."""
    other = Store(node.store.root.parent / "other")
    whole = SliceStore(other)
    manifest = whole.manifest_of(other.add_file(model, "mine"))
    node.slice_store.add_manifest(manifest.digest, manifest.path.read_bytes())
    for first, last in ranges:
        with node.slice_store.assembling(manifest.digest, first, last) as assembly:
            for chunk in list(assembly.missing):
                assembly.put(chunk, whole.read(manifest.digest, chunk), "other")
            assembly.finish()
    return manifest.digest


def test_a_short_disk_loses_what_nobody_wants_and_keeps_what_the_cluster_needs(
    node: Node, model: Path, disk: Disk
) -> None:
    digest = with_slices(node, model, (0, 2), (2, 4), (4, 6))
    wanted = [SliceGoal(digest, 0, 2)]
    whole = [SliceHeld(digest, 0, 6, whole=True)]
    two, one = {"b": whole, "c": whole}, {"b": whole}

    def held() -> list[tuple[int, int]]:
        return [(each.first, each.last) for each in node.slice_store.held(digest)]

    asyncio.run(node.inventory.tidy("a", wanted, two))
    assert len(held()) == 3  # there is room
    disk.free = DISK_RESERVE_BYTES - (1 << 30)
    asyncio.run(node.inventory.tidy("a", wanted, one))
    assert len(held()) == 3  # the second copy
    asyncio.run(node.inventory.tidy("a", wanted, two))
    assert held() == [(0, 2)]
    assert [(each.first, each.last) for each in node.inventory.slices] == [(0, 2)]


def test_what_was_given_up_half_fetched_goes_first_once_it_is_old(
    node: Node, model: Path, disk: Disk
) -> None:
    digest = with_slices(node, model)
    other = SliceStore(Store(node.store.root.parent / "other"))
    with node.slice_store.assembling(digest, 0, 2) as assembly:
        chunk = next(iter(assembly.missing))
        assembly.put(chunk, other.read(digest, chunk), "other")
    [growing] = node.slice_store.on_disk(digest)[1]
    assert growing.nbytes > 0
    disk.free = 0
    asyncio.run(node.inventory.tidy("a", [], {}))
    assert node.slice_store.on_disk(digest)[1] == [growing]
    partial = next(node.store.root.glob("manifests/*/0-2.gguf.partial"))
    os.utime(partial, (0, partial.stat().st_mtime - 2 * GROWING_KEEP_SECONDS))
    asyncio.run(node.inventory.tidy("a", [SliceGoal(digest, 0, 2)], {}))
    assert partial.exists()
    asyncio.run(node.inventory.tidy("a", [], {}))
    assert not partial.exists()


def test_what_is_half_fetched_counts_as_free(node: Node, model: Path, disk: Disk) -> None:
    digest = with_slices(node, model)
    disk.free = 2 * DISK_STEP_BYTES - 1
    asyncio.run(node.inventory.scan())
    assert node.inventory.disk_free_bytes == DISK_STEP_BYTES
    with node.slice_store.assembling(digest, 0, 2) as assembly:
        chunk = next(iter(assembly.missing))
        assembly.put(chunk, SliceStore(Store(node.store.root.parent / "other")).read(digest, chunk), "other")
    asyncio.run(node.inventory.scan())
    assert node.inventory.disk_free_bytes == 2 * DISK_STEP_BYTES


class Alone:
    """A bus without neighbours, and the owner of local models."""

    def __init__(self) -> None:
        self.failed: list[tuple[SliceGoal, str]] = []

    def serve(self, *_: object) -> None:
        pass

    async def query(self, *_: object, **__: object) -> list[bytes]:
        return []

    def holders(self) -> dict[str, list[SliceHeld]]:
        return {}

    def sources(self) -> dict[str, str]:
        return {}

    def wanted(self) -> set[SliceGoal]:
        return set()

    def changed(self) -> None:
        pass

    def fetch_failed(self, goal: SliceGoal, detail: str) -> None:
        self.failed.append((goal, detail))


def test_urgent_slices_are_fetched_first_and_failures_not_at_once_again(tmp_path: Path, monkeypatch) -> None:
    alone = Alone()
    first, second, urgent = (SliceGoal("m", number, number + 1) for number in range(3))

    async def story() -> None:
        local_models = LocalModels(Store(tmp_path / "store"), "a", alone, alone)
        begun: list[SliceGoal] = []

        async def fetch(goal: SliceGoal) -> Path:
            begun.append(goal)
            if goal == second:
                raise StorageFailed("nobody gives it")
            await asyncio.Event().wait()

        monkeypatch.setattr(local_models, "_slice", fetch)
        local_models.pursue([first, second, urgent])
        await until(lambda: alone.failed)
        assert begun == [first, second]
        assert len(begun) == FETCHES_MAX
        await until(lambda: not local_models._fetches.keys() - {first})
        for _ in range(3):
            local_models.pursue([second, urgent])
            await asyncio.sleep(0.01)
        assert alone.failed == [(second, "nobody gives it")]
        assert begun == [first, second, urgent]
        assert set(local_models._fetches) == {urgent}
        await local_models.close()

    asyncio.run(story())


def test_two_that_want_the_same_slice_at_once_both_get_it(model: Path, tmp_path: Path) -> None:
    """The embedding is asked for by each first stage, and by a goal of its own."""

    async def story() -> None:
        store = Store(tmp_path / "store")
        store.add_file(model, "a")
        local_models = LocalModels(store, "a", Alone(), Alone())
        await local_models.look()
        digest = local_models.offers[0].shape.digest
        loads = [StageSpec(digest, "CPU", 0, 2, 64, sequences) for sequences in (1, 2, 3)]
        files = await asyncio.gather(*map(local_models.prepare, loads))
        assert len({(each.slice, each.embedding) for each in files}) == 1
        assert not any(each.is_last for each in files)
        await local_models.close()

    asyncio.run(story())


def test_a_node_that_has_just_started_waits_until_it_hears_which_nodes_have_the_layers(
    tmp_path: Path, monkeypatch
) -> None:
    """Otherwise a node that restarts would fail to load a stage for a minute, only because it was first."""
    heard: dict[str, list[SliceHeld]] = {"b": [SliceHeld("m", 0, 2)]}
    alone = Alone()
    monkeypatch.setattr(alone, "holders", lambda: heard)

    async def story() -> None:
        local_models = LocalModels(Store(tmp_path / "store"), "a", alone, alone)
        asked: list[str] = []

        async def manifest(digest: str) -> None:
            asked.append(digest)
            raise StorageFailed("asked for")

        monkeypatch.setattr(local_models, "_manifest", manifest)
        local_models.pursue([SliceGoal("m", 1, 3)])
        await asyncio.sleep(3 * local_models_module.LOOK_SECONDS)
        assert not asked
        heard["c"] = [SliceHeld("m", 2, 4)]
        await until(lambda: alone.failed)
        assert asked == ["m"]
        await local_models.close()

    asyncio.run(story())
