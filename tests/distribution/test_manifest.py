"""A manifest names a model by all its bytes, is read as strictly as a file, and is the same everywhere."""

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.distribution import manifest as manifests
from cordee.distribution.manifest import Chunk, ManifestMaker, make_manifest, read_manifest
from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.models.gguf import read_header
from shards import write_shards
from tiny import make_tiny

CHUNK_BYTES = 1 << 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of tiny models have several chunks then."""
    monkeypatch.setattr(manifests, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny.gguf", tokenizer="bytes")


def all_chunks(manifest):
    return [chunk for number in range(len(manifest.header.tensors)) for chunk in manifest.chunks(number)]


def test_a_manifest_holds_the_header_and_the_digest_of_every_chunk(model, tmp_path):
    calls, data = [], model.read_bytes()
    manifest = make_manifest(read_header(model), tmp_path, lambda *call: calls.append(call))
    content = manifest.path.read_bytes()
    assert manifest.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert manifest.path == tmp_path / manifest.digest.removeprefix("sha256:") / "manifest"
    header = read_header(model)
    assert content.startswith(data[: header.nbytes])
    assert manifest.header.get("tokenizer.ggml.tokens") == header.get("tokenizer.ggml.tokens")
    chunks = all_chunks(manifest)
    assert max(chunk.number for chunk in chunks) > 3
    assert sum(map(manifest.nbytes, chunks)) == header.size_bytes
    for chunk in chunks:
        start = header.tensors[chunk.tensor].offset + manifest.offset(chunk)
        piece = data[start : start + manifest.nbytes(chunk)]
        assert manifest.is_sound(chunk, piece)
        assert not manifest.is_sound(chunk, piece[:-1])
    assert calls == sorted(calls)
    assert calls[-1] == (header.size_bytes, header.size_bytes)


def test_the_same_model_has_the_same_manifest_and_any_other_bit_another(model, tmp_path):
    manifest = make_manifest(read_header(model), tmp_path)
    copy = tmp_path / "copy.gguf"
    data = bytearray(model.read_bytes())
    copy.write_bytes(data)
    assert make_manifest(read_header(copy), tmp_path).digest == manifest.digest
    data[read_header(model).tensors[-1].offset + 5] ^= 1
    copy.write_bytes(data)
    assert make_manifest(read_header(copy), tmp_path).digest != manifest.digest


def test_chunks_given_in_any_order_make_the_same_manifest(model, tmp_path):
    header = read_header(model)
    manifest = make_manifest(header, tmp_path)
    maker = ManifestMaker(header)
    for chunk in reversed(all_chunks(manifest)):
        start = header.tensors[chunk.tensor].offset + manifest.offset(chunk)
        maker.add(chunk, model.read_bytes()[start : start + manifest.nbytes(chunk)])
    assert maker.write(tmp_path / "").digest == manifest.digest


@pytest.mark.parametrize("chunk", [Chunk(-1, 0), Chunk(10_000, 0), Chunk(0, -1), Chunk(0, 1 << 40)])
def test_a_chunk_that_does_not_exist_is_refused(model, tmp_path, chunk):
    manifest = make_manifest(read_header(model), tmp_path)
    with pytest.raises(BadRequest, match="has no chunk"):
        manifest.nbytes(chunk)


def test_a_set_of_shards_has_no_manifest_before_it_is_one_file(model, tmp_path):
    with pytest.raises(BadModelFile, match="into the store"):
        make_manifest(read_header(write_shards(read_header(model), tmp_path)), tmp_path)


def test_a_manifest_that_claims_to_be_a_shard_opens_no_other_file(model, tmp_path):
    first = write_shards(read_header(model), tmp_path)
    fake = tmp_path / "manifest"
    fake.write_bytes(first.read_bytes())
    with pytest.raises(BadModelFile, match="shards"):
        read_manifest(fake)


def test_manifests_of_another_chunk_size_are_refused(model, tmp_path, monkeypatch):
    manifest = make_manifest(read_header(model), tmp_path)
    content = manifest.path.read_bytes()
    seal = manifests.MARK + struct.pack("<Q", CHUNK_BYTES)
    assert content.count(seal) == 1
    for other in (manifests.MARK + struct.pack("<Q", CHUNK_BYTES + 1), b"cordee:9" + seal[8:]):
        manifest.path.write_bytes(content.replace(seal, other))
        with pytest.raises(BadModelFile, match="not a manifest of this version"):
            read_manifest(manifest.path)


def test_a_manifest_that_lies_about_sizes_costs_no_memory(model, tmp_path):
    manifest = make_manifest(read_header(model), tmp_path)
    content = bytearray(manifest.path.read_bytes())
    name = manifest.header.tensors[-1].name.encode()
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    dimensions = struct.unpack_from("<I", content, at)[0]
    struct.pack_into("<Q", content, at + 4 + 8 * (dimensions - 1), 1 << 40)
    manifest.path.write_bytes(content)
    with pytest.raises(BadModelFile, match="the tensors of its header need"):
        read_manifest(manifest.path)


def test_a_manifest_beyond_the_limit_is_neither_made_nor_read(model, tmp_path, monkeypatch):
    manifest = make_manifest(read_header(model), tmp_path)
    monkeypatch.setattr(manifests, "MANIFEST_BYTES_LIMIT", manifest.path.stat().st_size - 1)
    with pytest.raises(BadModelFile, match="too large"):
        make_manifest(read_header(model), tmp_path)
    with pytest.raises(BadModelFile, match="at most"):
        read_manifest(manifest.path)


@given(st.data())
def test_any_damage_is_refused_or_gives_another_manifest(model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    manifest = make_manifest(read_header(model), folder)
    content = bytearray(manifest.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "number", "cut", "longer"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "number":
                content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
            case "cut":
                del content[max(1, at) :]
            case "longer":
                content += data.draw(st.binary(min_size=1, max_size=40))
    broken = folder / "broken"
    broken.write_bytes(content)
    try:
        read = read_manifest(broken)
    except (BadModelFile, UnsupportedModel) as error:  # or its version became one of the future
        assert "broken" in error.message
    else:
        assert (read.digest == manifest.digest) == (bytes(content) == manifest.path.read_bytes())
        assert all(0 < read.nbytes(chunk) <= CHUNK_BYTES for chunk in all_chunks(read))
