"""A model on the hub that no disk here holds whole: its manifest in one pass, its slices by byte ranges."""

import hashlib
import time
from pathlib import Path

import pytest

from cordee.distribution import hub_ranges as hub_ranges_module
from cordee.distribution import manifest as manifests
from cordee.distribution import slice_store as slice_store_module
from cordee.distribution.hub_ranges import PASS_TRIES, HubModel
from cordee.distribution.pull import hub_files
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, BadRequest, HubUnreachable, ModelNotFound, StorageFailed
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.models.store import Store
from fake_hub import FakeHub
from shards import write_shards
from tiny import make_tiny

CHUNK_BYTES = 1 << 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.gguf", seed=3, tokenizer="bytes")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that serves a repository `o/m` for the rest of the test."""
    hubs = []
    for module in (manifests, slice_store_module, hub_ranges_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(hub_ranges_module, "FIRST_BYTES", 1 << 11)
    monkeypatch.setattr(hub_ranges_module, "GAP_BYTES", 1 << 10)

    def serve(files: dict[str, bytes]) -> FakeHub:
        hub = FakeHub({"o/m": files})
        hubs.append(hub)
        hub.use(monkeypatch, tmp_path)
        return hub

    yield serve
    for hub in hubs:
        hub.close()


@pytest.fixture
def slice_store(tmp_path) -> SliceStore:
    return SliceStore(Store(tmp_path / "store"))


def remote(tmp_path: Path, source: str = "o/m") -> HubModel:
    folder = tmp_path / "headers"
    folder.mkdir(exist_ok=True)
    return HubModel(hub_files(source), folder)


def local_manifest(path: Path, tmp_path: Path) -> str:
    """The digest of the manifest that a node with the whole model makes."""
    store = Store(tmp_path / "whole")
    return SliceStore(store).manifest_of(store.add_file(path, "mine")).digest


def test_the_manifest_is_that_of_the_whole_file_and_nothing_else_is_kept(
    served, model, slice_store, tmp_path
):
    hub = served({"a.gguf": model.read_bytes()})
    calls = []
    manifest = remote(tmp_path).manifest(slice_store, lambda *call: calls.append(call))
    assert manifest.digest == local_manifest(model, tmp_path)
    assert slice_store.known() == [manifest.digest]
    assert slice_store.held(manifest.digest) == []
    assert calls == sorted(calls)
    assert calls[-1] == (read_header(model).size_bytes,) * 2
    assert hub.ranges[-1] == f"bytes=0-{model.stat().st_size - 1}"
    assert hub.strange == []


def test_a_slice_is_fetched_by_its_ranges_alone(served, model, slice_store, tmp_path):
    hub = served({"a.gguf": model.read_bytes()})
    source = remote(tmp_path)
    digest = source.manifest(slice_store).digest
    hub.ranges.clear()
    with slice_store.assembling(digest, 2, 4) as assembly:
        source.fill(assembly, list(assembly.missing))
        path = assembly.finish().path
    assert path.read_bytes() == cut(read_header(model), 2, 4, tmp_path / "cut.gguf").path.read_bytes()
    spans = [[int(end) for end in asked.removeprefix("bytes=").split("-")] for asked in hub.ranges]
    assert len(spans) < 4
    fetched = sum(end - start + 1 for start, end in spans)
    wanted = sum(t.nbytes for t in read_header(model).tensors if t.name.startswith(("blk.2.", "blk.3.")))
    assert wanted <= fetched < wanted + 4 * CHUNK_BYTES


def test_a_long_model_is_passed_in_several_requests(served, model, slice_store, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_ranges_module, "SPAN_BYTES", 10_001)
    hub = served({"a.gguf": model.read_bytes()})
    assert remote(tmp_path).manifest(slice_store).digest == local_manifest(model, tmp_path)
    assert len(hub.ranges) > model.stat().st_size // 10_001


def test_shards_have_the_manifest_of_the_file_they_become(served, model, slice_store, tmp_path):
    first = write_shards(read_header(model), tmp_path)
    served({f"x/{path.name}": path.read_bytes() for path in tmp_path.glob("*.gguf")})
    source = remote(tmp_path)
    manifest = source.manifest(slice_store)
    assert manifest.digest == local_manifest(first, tmp_path)
    with slice_store.assembling(manifest.digest, 0, 3, None) as assembly:
        source.fill(assembly, list(assembly.missing))
        content = assembly.finish().path.read_bytes()
    assert content == cut(read_header(first), 0, 3, tmp_path / "cut.gguf").path.read_bytes()


def test_a_broken_connection_is_resumed_and_a_lost_one_keeps_what_came(served, model, slice_store, tmp_path):
    hub = served({"a.gguf": model.read_bytes()})
    source = remote(tmp_path)
    hub.stop_after = 50_000
    digest = source.manifest(slice_store).digest
    assert digest == local_manifest(model, tmp_path)
    hub.files["o/m"]["a.gguf"] = model.read_bytes()[:-1]
    with slice_store.assembling(digest, 0, 6) as assembly, pytest.raises(StorageFailed, match="try again"):
        total = len(assembly.missing)
        source.fill(assembly, list(assembly.missing))
    hub.files["o/m"]["a.gguf"] = model.read_bytes()
    with slice_store.assembling(digest, 0, 6) as assembly:
        assert len(assembly.missing) < total / 2
        source.fill(assembly, list(assembly.missing))
        assembly.finish()
    assert slice_store.verify(digest, 0, 6) == []


def test_a_pass_outlives_a_hub_that_is_gone_for_minutes(served, model, slice_store, tmp_path, monkeypatch):
    hub = served({"a.gguf": model.read_bytes()})
    source = remote(tmp_path)
    waits = []

    def wait(_seconds: float) -> None:
        waits.append(hub.status)
        hub.status = 503 if len(waits) < PASS_TRIES - 1 else None

    def fall(done_bytes: int, total_bytes: int) -> None:
        if not waits and done_bytes > total_bytes // 2:
            hub.status = 503

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(hub_ranges_module, "SPAN_BYTES", 50_000)
    hub.ranges.clear()
    assert source.manifest(slice_store, fall).digest == local_manifest(model, tmp_path)
    assert waits == [503] * (PASS_TRIES - 1)
    assert len(hub.ranges) == -(-model.stat().st_size // 50_000)  # nothing was read twice
    monkeypatch.setattr(hub_ranges_module, "PASS_TRIES", 3)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.status = 503
    with pytest.raises(HubUnreachable, match="cannot be fetched from"):
        source.manifest(slice_store)


def test_other_content_than_promised_makes_no_manifest(served, model, slice_store, tmp_path):
    hub = served({"a.gguf": model.read_bytes()})
    hub.promised["a.gguf"] = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(StorageFailed, match="other content than the hub promised"):
        remote(tmp_path).manifest(slice_store)
    assert slice_store.known() == []


def test_a_model_that_changed_on_the_hub_is_not_mixed_with_the_old_one(served, model, slice_store, tmp_path):
    data = bytearray(model.read_bytes())
    hub = served({"a.gguf": bytes(data)})
    source = remote(tmp_path)
    digest = source.manifest(slice_store).digest
    data[read_header(model).tensor("blk.3.ffn_up.weight").offset] ^= 1
    hub.files["o/m"]["a.gguf"] = bytes(data)
    wrong = r"The hub \(o/m\) gave wrong bytes for chunk 0 of blk\.3\.ffn_up\.weight of "
    with slice_store.assembling(digest, 2, 4) as assembly, pytest.raises(BadModelFile, match=wrong):
        source.fill(assembly, list(assembly.missing))


def test_another_model_on_the_hub_is_not_asked_for_chunks(served, model, slice_store, tmp_path):
    hub = served({"a.gguf": model.read_bytes()})
    digest = remote(tmp_path).manifest(slice_store).digest
    hub.files["o/m"]["a.gguf"] = make_tiny("llama", tmp_path / "b.gguf", layers=3).read_bytes()
    other = remote(tmp_path)
    hub.ranges.clear()
    with (
        slice_store.assembling(digest, 2, 4) as assembly,
        pytest.raises(BadModelFile, match="does not hold layers"),
    ):
        other.fill(assembly, list(assembly.missing))
    assert hub.ranges == []


def test_a_hub_without_ranges_is_not_read_to_its_end(served, model, slice_store, tmp_path):
    hub = served({"a.gguf": model.read_bytes()})
    source = remote(tmp_path)
    digest = source.manifest(slice_store).digest
    hub.ignore_ranges = True
    with (
        slice_store.assembling(digest, 2, 4) as assembly,
        pytest.raises(StorageFailed, match="more than the range"),
    ):
        source.fill(assembly, list(assembly.missing))


@pytest.mark.parametrize("content", [b"no model at all, only some text" * 999, b"GGUF" + b"\xff" * 50_000])
def test_what_is_not_a_model_is_refused(served, tmp_path, content):
    hub = served({"a.gguf": content})
    with pytest.raises(BadModelFile):
        remote(tmp_path)
    assert len(hub.ranges) == 1 or content.startswith(b"GGUF")


def test_invalid_sources_are_refused(served, model):
    served({"a.gguf": model.read_bytes(), "b.gguf": model.read_bytes()})
    with pytest.raises(BadRequest, match="not a model of a hub"):
        hub_files("/some/file")
    with pytest.raises(BadRequest, match="several models"):
        hub_files("o/m")
    with pytest.raises(ModelNotFound):
        hub_files("o/n")
    assert [file.path for file in hub_files("o/m/b.gguf")] == ["b.gguf"]
