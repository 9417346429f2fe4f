"""A slice that rots on disk is not loaded: that is said, its workers end, and what is damaged comes again."""

import asyncio
import time
from pathlib import Path

import pytest

from cordee.cluster.facts import SliceHeld
from cordee.cluster.goals import SliceGoal, StageSpec
from cordee.distribution import attestation, local_models
from cordee.distribution.attestation import Attestation
from cordee.distribution.local_models import LocalModels
from cordee.errors import BadModelFile, StageFailed
from cordee.models.store import Store
from tiny import make_tiny

SECONDS = 60.0


class Alone:
    """A bus without neighbours, and the owner of local models: it wants all that is there."""

    def __init__(self) -> None:
        self.bad: list[SliceGoal] = []
        self.goals: set[SliceGoal] = set()

    def serve(self, *_: object) -> None:
        pass

    async def query(self, *_: object, **__: object) -> list[bytes]:
        return []

    def holders(self) -> dict[str, list[SliceHeld]]:
        return {}

    def sources(self) -> dict[str, str]:
        return {}

    def wanted(self) -> set[SliceGoal]:
        return self.goals

    def changed(self) -> None:
        pass

    def fetch_failed(self, goal: SliceGoal, detail: str) -> None:
        pass

    def damaged(self, goal: SliceGoal) -> None:
        self.bad.append(goal)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "tiny.gguf", tokenizer="bytes")


def rot(path: Path) -> None:
    """Change one bit in the middle, as a disk does: neither length nor times change."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


async def opened(store: Path, model: Path, alone: Alone) -> tuple[LocalModels, StageSpec]:
    """A node with the model, and a stage of it that was loaded once."""
    made = Store(store)
    made.add_file(model, "tiny")
    local = LocalModels(made, "a", alone, alone)
    await local.look()
    spec = StageSpec(local.offers[0].shape.digest, "CPU", 1, 4, 64, 1)
    (await local.vocabulary(spec.model, "tiny")).close()  # as for clients: that is what people call it
    await local.prepare(spec)
    await local.look()
    return local, spec


def test_a_slice_that_rotted_is_not_loaded_and_comes_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        local, spec = await opened(tmp_path, model, Alone())
        path = (await local.prepare(spec)).slice
        whole = path.read_bytes()
        rot(path)
        assert (await local.prepare(spec)).slice == path  # it was hashed a moment ago
        monkeypatch.setattr(attestation, "FRESH_SECONDS", 0.0)
        with pytest.raises(BadModelFile, match=r"layers 1 to 3 of tiny .* damaged on this disk \(1 piece\)"):
            await local.prepare(spec)
        monkeypatch.undo()
        assert (await local.prepare(spec)).slice.read_bytes() == whole
        await local.close()

    asyncio.run(story())


def test_a_whole_model_that_rotted_says_how_it_is_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        local, spec = await opened(tmp_path, model, Alone())
        everything = spec._replace(first=0, last=6)
        path = (await local.prepare(everything)).slice
        rot(path)
        monkeypatch.setattr(attestation, "FRESH_SECONDS", 0.0)
        with pytest.raises(BadModelFile, match="cordee rm tiny"):
            await local.prepare(everything)
        await local.close()

    asyncio.run(story())


def test_what_rots_under_a_running_worker_is_found_while_nothing_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        alone = Alone()
        local, spec = await opened(tmp_path, model, alone)
        path = (await local.prepare(spec)).slice
        alone.goals = {spec.slice}
        monkeypatch.setattr(attestation, "FRESH_SECONDS", 0.0)
        monkeypatch.setattr(local_models, "ATTEST_SECONDS", 0.01)
        watching = asyncio.create_task(local.attest())
        await asyncio.sleep(0.2)
        assert not alone.bad
        rot(path)
        ends = time.monotonic() + SECONDS
        while not alone.bad and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        assert alone.bad[0] == spec.slice
        watching.cancel()
        assert spec.slice not in {SliceGoal(each.model, each.first, each.last) for each in local.slices}
        await local.close()

    asyncio.run(story())


def test_hashing_ends_when_the_node_does(model: Path, tmp_path: Path) -> None:
    async def story() -> None:
        local, spec = await opened(tmp_path, model, Alone())
        attested = Attestation(local._slice_store)
        attested.close()
        with pytest.raises(StageFailed, match="stops"):
            attested.check(spec.slice, "a slice", "tiny")
        await local.close()

    asyncio.run(story())
