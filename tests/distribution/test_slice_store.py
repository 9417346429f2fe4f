"""Slices assembled from chunks are the bytes of a cut, whatever happens in between; damage is named."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cordee.cluster.facts import SliceHeld
from cordee.distribution import manifest as manifests
from cordee.distribution import slice_store as slice_store_module
from cordee.distribution.manifest import Chunk
from cordee.distribution.slice_store import SliceStore
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, BadRequest, ModelNotFound, StorageFailed, UnsupportedModel
from cordee.models.embedding import Embedding
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.models.store import Store
from tiny import make_tiny

CHUNK_BYTES = 1 << 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of tiny models have several chunks then."""
    monkeypatch.setattr(manifests, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(slice_store_module, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("model") / "tiny.gguf", tokenizer="bytes")


class Holder:
    """A node with a whole model, and the manifest it gives to others."""

    def __init__(self, path: Path, root: Path) -> None:
        self.store = Store(root)
        self.slice_store = SliceStore(self.store)
        self.model = self.store.add_file(path, "mine")
        self.manifest = self.slice_store.manifest_of(self.model)
        self.digest = self.manifest.digest
        self.read: list[Chunk] = []

    def node(self, root: Path) -> SliceStore:
        """A node that knows no more than the manifest."""
        slice_store = SliceStore(Store(root))
        slice_store.add_manifest(self.digest, self.manifest.path.read_bytes())
        return slice_store

    def give(self, slice_store: SliceStore, first: int, last: int) -> Path:
        """Assemble a slice on another node, noting what it had to be given."""
        with slice_store.assembling(self.digest, first, last) as assembly:
            for chunk in list(assembly.missing):
                self.read.append(chunk)
                assembly.put(chunk, self.slice_store.read(self.digest, chunk), "the holder")
            return assembly.finish().path

    def cut(self, first: int, last: int, path: Path) -> bytes:
        """What a slice must be."""
        return cut(read_header(self.model.path), first, last, path).path.read_bytes()


@pytest.fixture
def holder(model, tmp_path) -> Holder:
    return Holder(model, tmp_path / "holder")


@pytest.fixture
def node(holder, tmp_path) -> SliceStore:
    return holder.node(tmp_path / "node")


# --- slices are cuts --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt-oss", "gemma3", "exaone4", "bailingmoe2"])
def test_slices_from_chunks_are_the_bytes_of_cuts(architecture, tmp_path):
    holder = Holder(make_tiny(architecture, tmp_path / "x.gguf", layers=6), tmp_path / "holder")
    node = holder.node(tmp_path / "node")
    for first, last in pairwise([0, 2, 4, 6]):
        path = holder.give(node, first, last)
        assert path.read_bytes() == holder.cut(first, last, tmp_path / "cut.gguf")
    assert holder.give(node, 0, 6).read_bytes() == holder.cut(0, 6, tmp_path / "cut.gguf")
    expected = [SliceHeld(holder.digest, *cut) for cut in [(0, 2), (0, 6, True), (2, 4), (4, 6)]]
    assert node.held(holder.digest) == expected


def test_the_host_has_vocabulary_and_embedding_without_layers(holder, node):
    whole = Vocabulary(holder.model.path)
    vocabulary = Vocabulary(node.vocabulary(holder.digest))
    text = "<|im_start|>user\nSing, muse.<|im_end|>"
    tokens = whole.tokenize(text, add_bos=True)
    assert vocabulary.tokenize(text, add_bos=True) == tokens
    assert (vocabulary.chat_template, vocabulary.eos) == (whole.chat_template, whole.eos)
    assert node.held(holder.digest) == []
    path = holder.give(node, 0, 0)
    rows = Embedding(read_header(path)).rows(tokens)
    assert np.array_equal(rows, Embedding(read_header(holder.model.path)).rows(tokens))
    assert node.held(holder.digest) == [SliceHeld(holder.digest, 0, 0)]
    assert path.stat().st_size < holder.model.nbytes / 4


def test_libllama_computes_with_assembled_slices_what_it_does_with_the_whole(holder, node):
    config = StageConfig(context=64, sequences=1, batch_rows=32, threads=2)
    tokens = np.arange(5, 25)
    whole = LlamaStage(holder.model.path, config)
    expected = whole.decode(batch_of_one(tokens.astype(np.int32), 0, 0))
    rows = Embedding(read_header(holder.give(node, 0, 0))).rows(tokens)
    stages = [
        LlamaStage(holder.give(node, *layers), config, is_last=layers[1] == 6)
        for layers in pairwise([0, 3, 6])
    ]
    for stage in stages:
        rows = stage.decode(batch_of_one(rows, 0, 0))
    assert rows.tobytes() == expected.tobytes()
    for stage in [whole, *stages]:
        stage.close()


def test_the_starter_model_is_passed_on_in_real_chunks(starter_path, tmp_path, monkeypatch):
    monkeypatch.undo()
    holder = Holder(starter_path, tmp_path / "holder")
    node = holder.node(tmp_path / "node")
    layers = holder.manifest.header.layers
    path = holder.give(node, layers - 2, layers)
    assert path.read_bytes() == holder.cut(layers - 2, layers, tmp_path / "cut.gguf")
    assert holder.slice_store.slice(holder.digest, 0, layers).path == holder.model.path


# --- what is here is not asked for ------------------------------------------------------------------


def test_what_another_slice_has_is_not_fetched(holder, node, tmp_path):
    holder.give(node, 0, 4)
    before = len(holder.read)
    assert holder.give(node, 2, 6).read_bytes() == holder.cut(2, 6, tmp_path / "cut.gguf")
    names = {holder.manifest.header.tensors[chunk.tensor].name for chunk in holder.read[before:]}
    assert names
    assert not any(name.startswith(("blk.2.", "blk.3.", "output_norm")) for name in names)
    fetched = len(holder.read)
    holder.give(node, 0, 2)
    assert len(holder.read) == fetched


def test_slices_of_a_model_that_is_here_need_no_other_node(holder, tmp_path):
    assert holder.give(holder.slice_store, 1, 3).read_bytes() == holder.cut(1, 3, tmp_path / "cut.gguf")
    assert holder.read == []


def test_what_a_slice_that_is_not_finished_has_is_used_too(holder, node):
    with node.assembling(holder.digest, 0, 4) as assembly:
        begun = [chunk for chunk in assembly.missing if chunk.number == 0]
        for chunk in begun:
            assembly.put(chunk, holder.slice_store.read(holder.digest, chunk), "the holder")
    holder.give(node, 2, 6)
    assert begun
    assert not set(begun) & set(holder.read)


CHILD = """
    import sys
    from cordee.distribution import manifest
    manifest.CHUNK_BYTES = int(sys.argv[4])
    from cordee.distribution.slice_store import SliceStore
    from cordee.models.store import Store
    node, holder = (SliceStore(Store(root)) for root in sys.argv[1:3])
    digest = sys.argv[3]
    with node.assembling(digest, 1, 4) as assembly:
        chunks = list(assembly.missing)
        for chunk in chunks[: len(chunks) // 2]:
            assembly.put(chunk, holder.read(digest, chunk), "the holder")
        print(len(chunks) // 2, flush=True)
        sys.stdin.read()
"""


def test_a_killed_process_loses_nothing_that_had_come(holder, node, tmp_path):
    roots = [str(tmp_path / "node"), str(holder.store.root)]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *roots, holder.digest, str(CHUNK_BYTES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        come = int(process.stdout.readline())
        with pytest.raises(StorageFailed, match="Another process fetches layers 1 to 4"):
            holder.give(node, 1, 4)
        assert node.slice(holder.digest, 1, 4) is None
        process.send_signal(signal.SIGKILL)
    assert holder.give(node, 1, 4).read_bytes() == holder.cut(1, 4, tmp_path / "cut.gguf")
    total = len(list(node.layout(holder.digest, 1, 4).chunks()))
    assert come > 3
    assert len(holder.read) == total - come


@pytest.mark.parametrize("garbage", [b"", b"x" * 1_000_000, bytes(100)])
def test_garbage_in_the_place_of_a_growing_slice_is_not_trusted(holder, node, tmp_path, garbage):
    (tmp_path / "node/manifests" / holder.digest[7:] / "1-3.gguf.partial").write_bytes(garbage)
    assert holder.give(node, 1, 3).read_bytes() == holder.cut(1, 3, tmp_path / "cut.gguf")


# --- damage -----------------------------------------------------------------------------------------


def test_wrong_bytes_are_refused_and_named(holder, node):
    with node.assembling(holder.digest, 0, 2) as assembly:
        chunk = next(iter(assembly.missing))
        data = holder.slice_store.read(holder.digest, chunk)
        for wrong in (data[:-1], data + b"x", bytes(len(data)), b""):
            with pytest.raises(BadModelFile, match=r"node b gave wrong bytes for chunk 0 of .* of"):
                assembly.put(chunk, wrong, "node b")
        assert chunk in assembly.missing
        with pytest.raises(ValueError, match="missing"):
            assembly.finish()


@pytest.mark.parametrize("place", ["header", "weights", "stand-in", "cut short", "longer"])
def test_a_flipped_bit_is_found_named_and_repaired_alone(holder, node, tmp_path, place):
    path = holder.give(node, 0, 2)
    good = path.read_bytes()
    assert node.verify(holder.digest, 0, 2) == []
    tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
    broken = bytearray(good)
    match place:
        case "header":
            broken[40] ^= 4
        case "weights":
            broken[tensors["blk.1.ffn_up.weight"].offset + CHUNK_BYTES + 7] ^= 4
        case "stand-in":
            broken[tensors["token_embd.weight"].offset + 9] ^= 4
        case "cut short":
            del broken[-CHUNK_BYTES // 2 :]
        case "longer":
            broken += b"more"
    path.write_bytes(broken)
    holder.read.clear()
    found = node.verify(holder.digest, 0, 2)
    if place == "weights":
        assert len(found) == 1
        assert found[0].startswith("chunk 1 of blk.1.ffn_up.weight of ")
        with pytest.raises(ModelNotFound):
            node.read(holder.digest, Chunk(0, 0))
    assert found
    assert node.held(holder.digest) == []
    assert holder.give(node, 0, 2).read_bytes() == good
    assert len(holder.read) <= (place in ("weights", "cut short"))
    assert node.verify(holder.digest, 0, 2) == []


def test_a_damaged_whole_model_is_found_by_its_chunk(holder):
    assert holder.slice_store.verify(holder.digest, 0, 6) == []
    with holder.model.path.open("r+b") as file:
        file.seek(read_header(holder.model.path).tensor("blk.4.attn_q.weight").offset)
        file.write(b"\xff\xfe\xfd")
    (found,) = holder.slice_store.verify(holder.digest, 0, 6)
    assert found.startswith("chunk 0 of blk.4.attn_q.weight of ")


def test_damage_is_not_passed_on(holder, node):
    path = holder.give(node, 0, 2)
    layout = node.layout(holder.digest, 0, 2)
    chunk = next(layout.chunks())
    with path.open("r+b") as file:
        file.seek(layout.offsets[chunk.tensor])
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(BadModelFile, match=r"chunk 0 of .* is damaged in .*0-2\.gguf"):
        node.read(holder.digest, chunk)


def test_a_damaged_manifest_is_not_used_and_can_come_again(holder, node, tmp_path):
    path = node.manifest(holder.digest).path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = SliceStore(Store(tmp_path / "node"))
    with pytest.raises(BadModelFile, match="damaged"):
        again.manifest(holder.digest)
    with pytest.raises(BadModelFile, match="Another manifest came"):
        again.add_manifest(holder.digest, bytes(content))
    for junk in (b"no manifest at all, but some text", holder.model.path.read_bytes()[:-1]):
        with pytest.raises(BadModelFile):
            again.add_manifest(f"sha256:{hashlib.sha256(junk).hexdigest()}", junk)
    assert again.known() == [holder.digest]
    again.add_manifest(holder.digest, holder.manifest.path.read_bytes())
    assert again.manifest(holder.digest).digest == holder.digest


def test_the_manifest_travels_in_pieces(holder, tmp_path):
    pieces = [holder.slice_store.read_manifest_piece(holder.digest, 0)]
    while len(pieces[-1]) == CHUNK_BYTES:
        pieces.append(holder.slice_store.read_manifest_piece(holder.digest, len(pieces)))
    assert len(pieces) > 1
    other = SliceStore(Store(tmp_path / "other"))
    assert other.add_manifest(holder.digest, b"".join(pieces)).digest == holder.digest
    assert other.known() == [holder.digest]


# --- refusals, room, and what goes when -------------------------------------------------------------


def test_what_is_not_here_or_does_not_exist_is_refused(holder, node):
    with pytest.raises(ModelNotFound, match="is not here"):
        node.read(holder.digest, Chunk(0, 0))
    with pytest.raises(BadRequest, match="has no chunk"):
        holder.slice_store.read(holder.digest, Chunk(0, 1 << 30))
    for digest in ("sha256:" + "0" * 64, "../../etc", ""):
        with pytest.raises(ModelNotFound):
            node.read(digest, Chunk(0, 0))
    for first, last in ((3, 2), (-1, 2), (0, 99), (2, 2)):
        with pytest.raises(BadRequest), node.assembling(holder.digest, first, last):
            pass


def test_a_model_that_cannot_be_cut_is_not(tmp_path):
    path = make_tiny("llama", tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxxma"))
    holder = Holder(path, tmp_path / "holder")
    with pytest.raises(UnsupportedModel, match="nobody has checked"):
        holder.give(holder.slice_store, 0, 2)


def test_a_full_disk_keeps_what_came_and_goes_on_with_room(holder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    room = (
        holder.slice_store.layout(holder.digest, 0, 2).nbytes
        + holder.manifest.path.stat().st_size
        + (1 << 16)
    )
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system of its own needs the permission to mount one")
    try:
        node = holder.node(small / "node")
        with pytest.raises(StorageFailed, match=r"layers 0 to 6 .* needs .* free some space"):
            holder.give(node, 0, 6)
        with node.assembling(holder.digest, 0, 2) as assembly:
            (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * 4096 - 3 * CHUNK_BYTES))
            with pytest.raises(StorageFailed, match="free some space"):
                for chunk in list(assembly.missing):
                    assembly.put(chunk, holder.slice_store.read(holder.digest, chunk), "the holder")
            left = len(assembly.missing)
        assert 0 < left < len(list(node.layout(holder.digest, 0, 2).chunks()))
        (small / "ballast").unlink()
        assert holder.give(node, 0, 2).read_bytes() == holder.cut(0, 2, tmp_path / "cut.gguf")
        assert len(holder.read) == left
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_manifest_is_made_once_and_goes_with_its_model(holder, monkeypatch):
    assert SliceStore(holder.store).known() == [holder.digest]
    monkeypatch.setattr(slice_store_module, "make_manifest", lambda *_: pytest.fail("made again"))
    assert SliceStore(holder.store).manifest_of(holder.model).digest == holder.digest
    assert holder.slice_store.held(holder.digest) == [SliceHeld(holder.digest, 0, 6, True)]
    holder.store.remove("mine")
    assert holder.store.whole(holder.digest) is None
    assert list((holder.store.root / "manifests").iterdir()) == []


def test_a_manifest_that_another_process_removed_is_unknown_and_can_come_again(holder, node):
    """`cordee rm` beside a running node, and then the same model from the hub."""
    content = holder.manifest.path.read_bytes()
    holder.store.remove("mine")
    with pytest.raises(ModelNotFound):
        holder.slice_store.manifest(holder.digest)
    assert holder.slice_store.add_manifest(holder.digest, content).digest == holder.digest
    assert holder.slice_store.vocabulary(holder.digest).exists()


def test_slices_stay_when_the_whole_model_goes_until_they_are_forgotten(holder, node):
    holder.give(holder.slice_store, 0, 2)
    holder.store.remove("mine")
    assert holder.slice_store.held(holder.digest) == [SliceHeld(holder.digest, 0, 2)]
    holder.slice_store.drop(holder.digest, 0, 2)
    assert holder.slice_store.held(holder.digest) == []
    holder.slice_store.forget(holder.digest)
    assert holder.slice_store.known() == []
    with pytest.raises(ModelNotFound):
        holder.slice_store.held(holder.digest)
