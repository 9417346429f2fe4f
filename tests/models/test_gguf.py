"""The header reader: valid files read back exactly, others are refused with file, fault and remedy."""

import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.models import gguf as reading
from cordee.models.gguf import Array, read_header
from cordee.models.slices import even_cuts, plan_slice
from tiny import make_tiny

MEMORY_LIMIT = 8 << 20  # the window, a page of objects, and what the test itself holds


def write(path, metadata=(), tensors=(), architecture="llama", layers=1):
    """A small model file; `metadata` is (key, value, type, item type), `tensors` is (name, array)."""
    writer = GGUFWriter(path, architecture)
    if layers is not None:
        writer.add_uint32(f"{architecture}.block_count", layers)
    for key, value, kind, item_kind in metadata:
        writer.add_key_value(key, value, kind, sub_type=item_kind)
    for name, data in tensors:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- what is written is read back -------------------------------------------------------------------

INTEGERS = {
    GGUFValueType.UINT8: (0, 2**8 - 1),
    GGUFValueType.INT8: (-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: (0, 2**16 - 1),
    GGUFValueType.INT16: (-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.INT64: (-(2**63), 2**63 - 1),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = {kind: st.integers(*limits) for kind, limits in INTEGERS.items()} | {
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: TEXT,
}


@st.composite
def fields(draw):
    """A metadata value with its type and, for an array, its items' type."""
    kind = draw(st.sampled_from([*PLAIN, GGUFValueType.ARRAY]))
    if kind is not GGUFValueType.ARRAY:
        return draw(PLAIN[kind]), kind, None
    item_kind = draw(st.sampled_from(list(PLAIN)))
    return draw(st.lists(PLAIN[item_kind], min_size=1, max_size=9)), kind, item_kind


@given(
    metadata=st.dictionaries(TEXT.filter(bool).map(lambda text: f"x.{text}"), fields(), max_size=8),
    shapes=st.dictionaries(
        st.text("abc.0", min_size=1, max_size=20),
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
        max_size=6,
    ),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_gguf_package_writes_reads_back_equal(tmp_path, metadata, shapes):
    arrays = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()
    }
    path = write(
        tmp_path / "model.gguf",
        [(key, *entry) for key, entry in metadata.items()],
        arrays.items(),
    )
    header = read_header(path)
    for key, (value, kind, _) in metadata.items():
        assert header.types[key] is kind
        assert header.get(key) == value
    assert header.get(".block_count") == header.layers == 1
    assert [tensor.name for tensor in header.tensors] == list(arrays)
    for tensor in header.tensors:
        assert tensor.shape == arrays[tensor.name].shape[::-1]
        data = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == arrays[tensor.name].tobytes()


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0])
def test_quantized_tensors_have_their_size(tmp_path, kind):
    header = read_header(make_tiny("llama", tmp_path / "tiny.gguf", quantization=kind))
    theirs = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert {(t.name, t.nbytes, t.offset) for t in header.tensors} == {
        (t.name, int(t.n_bytes), int(t.data_offset)) for t in theirs.tensors
    }
    assert header.size_bytes == sum(int(t.n_bytes) for t in theirs.tensors)
    assert header.tied
    assert header.layers == 6


def test_defaults_and_prefix(tmp_path):
    header = read_header(make_tiny("qwen3", tmp_path / "tiny.gguf"))
    assert header.get(".attention.head_count") == header.get("qwen3.attention.head_count") == 4
    assert header.get(".rope.scaling.type") is None
    assert header.get(".rope.scaling.type", "none") == "none"
    assert not header.tied
    assert header.tensor("output.weight").shape == (128, 320)
    assert header.tensor("nothing") is None


def test_a_vocabulary_of_hundreds_of_thousands_stays_in_the_file(tmp_path):
    tokens = [f"token number {number}" for number in range(300_000)]
    path = write(
        tmp_path / "model.gguf",
        [("tokenizer.ggml.tokens", tokens, GGUFValueType.ARRAY, GGUFValueType.STRING)],
        [("token_embd.weight", np.zeros((8, 4), np.float32))],
    )
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT
    array = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(array, Array)
    assert len(array) == 300_000
    assert header.get("tokenizer.ggml.tokens") == tokens


def test_an_array_whose_file_changed_is_refused_when_asked_for(tmp_path):
    path = make_tiny("llama", tmp_path / "tiny.gguf", tokenizer="bytes")
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadModelFile, match="shorter"):
        header.get("tokenizer.ggml.tokens")
    path.unlink()
    with pytest.raises(BadModelFile, match="cannot be read"):
        header.get("tokenizer.ggml.tokens")


# --- shards -----------------------------------------------------------------------------------------


def write_shards(folder, most_tensors=4):
    """The shards of a small model, in order."""
    writer = GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=most_tensors)
    writer.add_uint32("llama.block_count", 3)
    for layer in range(3):
        for name in ("attn_q", "attn_k", "ffn_up"):
            data = np.full((4, 8), layer, np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("model-*.gguf"))


def test_a_sharded_set_reads_as_one_model(tmp_path):
    paths = write_shards(tmp_path)
    assert len(paths) == 3
    header = read_header(paths[0])
    assert len(header.tensors) == 9
    assert {tensor.path for tensor in header.tensors} == set(paths)
    for tensor in header.tensors:
        data = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == np.full((4, 8), int(tensor.name.split(".")[1]), np.float32).tobytes()


def test_a_missing_or_damaged_shard_is_named(tmp_path):
    paths = write_shards(tmp_path)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-1])
    with pytest.raises(BadModelFile, match="00003-of-00003"):
        read_header(paths[0])
    paths[2].unlink()
    with pytest.raises(BadModelFile, match="00003-of-00003"):
        read_header(paths[0])


def test_only_the_first_shard_stands_for_the_set(tmp_path):
    paths = write_shards(tmp_path)
    with pytest.raises(BadModelFile, match="00001"):
        read_header(paths[1])
    renamed = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(BadModelFile, match="restore its name"):
        read_header(renamed)


def test_two_shards_with_the_same_tensors_are_refused(tmp_path):
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(BadModelFile, match="same tensor"):
        read_header(paths[0])


# --- invalid files ----------------------------------------------------------------------------------


def refused(path: Path, fault: str) -> None:
    """The error names the file and the fault, and says what to do after the last colon."""
    with pytest.raises(BadModelFile, match=fault) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).rsplit(": ", 1)[1]) > 10


def test_not_a_model_at_all(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("Dear diary, today I downloaded a model.\n" * 10)
    refused(path, "not a GGUF")
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(b"GG")
    refused(path, "not a GGUF")
    refused(tmp_path / "absent.gguf", "cannot be read")
    refused(tmp_path, "cannot be read")


def test_every_truncation_is_refused(tmp_path):
    whole = write(
        tmp_path / "whole.gguf",
        [("x.list", ["a", "b"], GGUFValueType.ARRAY, GGUFValueType.STRING)],
        [("a", np.ones(7, np.float32)), ("b", np.ones((3, 5), np.float32))],
    ).read_bytes()
    path = tmp_path / "cut.gguf"
    end_of_data = len(whole.rstrip(b"\0"))
    for length in range(end_of_data):
        path.write_bytes(whole[:length])
        with pytest.raises(BadModelFile):
            read_header(path)


def header_bytes(keys=(), tensors=(), *, version=3, counts=None) -> bytes:
    """A header written by hand: `keys` are finished entries, `tensors` (name, shape, type, offset)."""
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text("llama.block_count") + struct.pack("<II", 4, 1), *keys]
    count = counts or (len(tensors), len(entries))
    out = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries)
    for name, shape, kind, offset in tensors:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += text(name) + dims + struct.pack("<IQ", kind, offset)
    return out.ljust(-(-len(out) // 32) * 32, b"\0")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text("x") + struct.pack("<IIQ", 9, kind, count) + data


TERA, MOST = 1 << 40, (1 << 64) - 1
F32, Q4_0 = 0, 2
LIES = {
    "a terabyte of tensors": ({"counts": (TERA, 2)}, "claims"),
    "minus one keys": ({"counts": (0, MOST)}, "claims"),
    "a key too many": ({"counts": (0, 3)}, "without a name"),
    "a terabyte of string": ({"keys": [text("x") + struct.pack("<IQ", 8, TERA)]}, "bytes, more than"),
    "a long key": ({"keys": [struct.pack("<Q", 70_000) + b"x" * 70_000]}, "key of 70,000"),
    "no UTF-8 in a key": ({"keys": [text(b"\xff\xfe") + struct.pack("<IB", 0, 0)]}, "not UTF-8"),
    "no UTF-8 in a text": ({"keys": [text("x") + struct.pack("<I", 8) + text(b"\xff")]}, "not UTF-8"),
    "an unknown value type": ({"keys": [text("x") + struct.pack("<I", 13)]}, "value type 13"),
    "a key twice": ({"keys": 2 * [text("x") + struct.pack("<IB", 0, 0)]}, "twice"),
    "a terabyte of array": ({"keys": [array(6, TERA)]}, "claims"),
    "minus one strings": ({"keys": [array(8, MOST)]}, "claims"),
    "strings beyond the end": ({"keys": [array(8, 1, struct.pack("<Q", MOST - 7))]}, "middle of"),
    "an array of arrays": ({"keys": [array(9, 1, struct.pack("<IQ", 0, 0))]}, "array of arrays"),
    "an odd alignment": ({"keys": [text("general.alignment") + struct.pack("<II", 4, 48)]}, "alignment"),
    "no alignment": ({"keys": [text("general.alignment") + struct.pack("<II", 4, 0)]}, "alignment"),
    "version 1": ({"version": 1}, "version 1"),
    "version 0": ({"version": 0}, "version 0"),
    "version 1000": ({"version": 1000}, "version 1000"),
    "big endian": ({"version": 3 << 24}, "big endian"),
    "a tensor of no dimensions": ({"tensors": [("t", (), F32, 0)]}, "0 dimensions"),
    "a tensor of five dimensions": ({"tensors": [("t", (1, 1, 1, 1, 1), F32, 0)]}, "5 dimensions"),
    "a tensor without a name": ({"tensors": [("", (8,), F32, 0)]}, "dimensions"),
    "a tensor with a long name": ({"tensors": [("t" * 64, (8,), F32, 0)]}, "tensor name of 64"),
    "a tensor of nothing": ({"tensors": [("t", (8, 0), F32, 0)]}, "impossible shape"),
    "a tensor of minus one rows": ({"tensors": [("t", (8, MOST), F32, 0)]}, "impossible shape"),
    "a shape that overflows": ({"tensors": [("t", (1 << 33, 1 << 33), F32, 0)]}, "impossible shape"),
    "a terabyte of tensor": ({"tensors": [("t", (TERA,), F32, 0)]}, "cut short"),
    "a tensor beyond the end": ({"tensors": [("t", (8,), F32, TERA)]}, "cut short"),
    "a tensor at minus 32": ({"tensors": [("t", (8,), F32, MOST - 31)]}, "cut short"),
    "a tensor between the lines": ({"tensors": [("t", (8,), F32, 4)]}, "not aligned"),
    "a tensor type that was given up": ({"tensors": [("t", (8,), 4, 0)]}, "type 4"),
    "a tensor type beyond all": ({"tensors": [("t", (8,), 1000, 0)]}, "type 1000"),
    "half a block": ({"tensors": [("t", (48,), Q4_0, 0)]}, "not a multiple of 32"),
    "two tensors on one place": ({"tensors": [("t", (16,), F32, 0), ("u", (8,), F32, 32)]}, "same bytes"),
    "two tensors of one name": ({"tensors": [("t", (8,), F32, 0), ("t", (8,), F32, 32)]}, "one name"),
    "a tensor of a layer too many": ({"tensors": [("blk.1.t", (8,), F32, 0)]}, "has 1 layers"),
}


@pytest.mark.parametrize(("contents", "fault"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(tmp_path, contents, fault):
    path = tmp_path / "liar.gguf"
    path.write_bytes(header_bytes(**contents) + bytes(4096))
    refused(path, fault)


@pytest.mark.parametrize(
    ("contents", "what"),
    [({"version": 4}, "GGUF version 4"), ({"tensors": [("t", (8,), 99, 0)]}, "'t' as type 99")],
)
def test_what_is_newer_than_this_program_is_not_called_damaged(tmp_path, contents, what):
    path = tmp_path / "new.gguf"
    path.write_bytes(header_bytes(**contents) + bytes(4096))
    with pytest.raises(UnsupportedModel, match=rf"new\.gguf .*{what}.*: update cordee"):
        read_header(path)


def test_the_hand_written_header_is_valid_without_a_lie(tmp_path):
    path = tmp_path / "honest.gguf"
    tensors = [("t", (8, 2), F32, 0), ("u", (32,), Q4_0, 64)]
    path.write_bytes(header_bytes([array(6, 1, bytes(4))], tensors, version=2) + bytes(96))
    header = read_header(path)
    assert [(t.name, t.nbytes) for t in header.tensors] == [("t", 64), ("u", 18)]
    assert header.get("x") == [0.0]


@pytest.mark.parametrize(
    ("metadata", "layers", "fault"),
    [
        ([], None, "no llama.block_count"),
        ([], 0, "block_count is 0"),
        ([], 513, "block_count is 513"),
        ([("llama.block_count", 3.5, GGUFValueType.FLOAT32, None)], None, "block_count is 3.5"),
        ([("llama.nextn_predict_layers", 4, GGUFValueType.UINT32, None)], 4, "nextn_predict_layers"),
    ],
)
def test_a_layer_count_that_makes_no_sense_is_refused(tmp_path, metadata, layers, fault):
    refused(write(tmp_path / "model.gguf", metadata, layers=layers), fault)


def test_a_model_must_say_its_architecture(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<IB", 0, 0))
    refused(path, "architecture")


# --- any damage at all ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specimen(tmp_path_factory) -> tuple[bytes, list[int]]:
    """A file with every kind of value and a few tensors, and the offsets of its counts and types."""
    metadata = [(f"x.{kind.name}", 1, kind, None) for kind in INTEGERS]
    metadata += [
        ("general.alignment", 32, GGUFValueType.UINT32, None),
        ("gpt-oss.attention.sliding_window", 8, GGUFValueType.UINT32, None),
        ("gpt-oss.attention.head_count_kv", [2, 2, 4, 4], GGUFValueType.ARRAY, GGUFValueType.UINT32),
        ("gpt-oss.leading_dense_block_count", 1, GGUFValueType.UINT32, None),
        ("gpt-oss.interleave_moe_layer_step", 1, GGUFValueType.UINT32, None),
        ("tokenizer.ggml.tokens", ["a", "bc", "é"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        ("tokenizer.ggml.scores", [0.5, 1.0, 2.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        ("tokenizer.chat_template", "{{ messages }}", GGUFValueType.STRING, None),
    ]
    tensors = [("token_embd.weight", np.ones((3, 8), np.float32)), ("output_norm.weight", np.ones(8))]
    tensors += [(f"blk.{layer}.attn_q.weight", np.ones((8, 8), np.float16)) for layer in range(4)]
    path = tmp_path_factory.mktemp("specimen") / "model.gguf"
    write(path, metadata, tensors, "gpt-oss", layers=4)
    return path.read_bytes(), number_places(path)


def number_places(path: Path) -> list[int]:
    """The offsets at which the reader reads a count, length, type or offset."""
    places: list[int] = []

    class Noting(reading._Reader):
        def take(self, count):
            if count in (4, 8):
                places.append(self.position)
            return super().take(count)

    with path.open("rb", buffering=0) as file:
        reading._parse(Noting(path, file), weights=True)
    return places


EXTREMES = [0, 1, 2, 31, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 1]


@st.composite
def damaged(draw, original: bytes, places: list[int]) -> bytes:
    """The original with one to four random changes."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["number", "number", "flip", "insert", "delete", "truncate", "copy"])):
            case "number":
                at = draw(st.sampled_from(places))
                value = draw(st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1) | st.integers(0, 99))
                width = draw(st.sampled_from([4, 8]))
                data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "delete":
                del data[at : at + draw(st.integers(1, 16))]
            case "truncate":
                del data[at:]
            case "copy":
                source = draw(st.integers(0, len(data)))
                piece = data[source : source + draw(st.integers(1, 64))]
                data[at : at + len(piece)] = piece
    return bytes(data)


def check_damaged(path: Path, data: bytes) -> None:
    """Only expected errors, or a valid header; only expected errors from what uses it."""
    path.write_bytes(data)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        header = read_header(path)
        use(header)
    except (BadModelFile, UnsupportedModel):
        return
    finally:
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY_LIMIT
    spans = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in header.tensors)
    assert all(0 < start < end <= len(data) for start, end in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert len({tensor.name for tensor in header.tensors}) == len(header.tensors)
    assert 1 <= header.layers <= 512


def use(header) -> None:
    """Do with a header what the rest of the package does."""
    for key, value in header.metadata.items():
        try:
            plain = header.get(key)
        except BadModelFile:
            continue
        if isinstance(value, Array):
            assert len(plain) == len(value)
    try:
        boundaries = even_cuts(header, 2)
        plan = plan_slice(header, boundaries[0], boundaries[1], force=True)
        assert plan.header.startswith(b"GGUF")
    except CordeeError:
        pass


def hunt(examples: int, specimen: tuple[bytes, list[int]], folder: Path) -> None:
    @given(damaged(*specimen))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    def any_damage(data: bytes) -> None:
        check_damaged(folder / "damaged.gguf", data)

    tracemalloc.start()
    try:
        any_damage()
    finally:
        tracemalloc.stop()


def test_any_damage_is_refused_or_harmless(specimen, tmp_path):
    hunt(500, specimen, tmp_path)


@pytest.mark.long
def test_much_damage_is_refused_or_harmless(specimen, tmp_path):
    hunt(20_000, specimen, tmp_path)


def test_the_specimen_itself_is_valid_and_can_be_cut(specimen, tmp_path):
    path = tmp_path / "specimen.gguf"
    path.write_bytes(specimen[0])
    header = read_header(path)
    assert plan_slice(header, *even_cuts(header, 2)[:2]).nbytes > 0
    assert len(specimen[1]) > 60


# --- a header without its weights -------------------------------------------------------------------


def test_a_header_alone_says_what_the_whole_file_says(tmp_path):
    whole = make_tiny("llama", tmp_path / "whole.gguf", tokenizer="bytes")
    full = read_header(whole)
    alone = tmp_path / "alone.gguf"
    for nbytes in (full.nbytes, full.nbytes + 1000):
        alone.write_bytes(whole.read_bytes()[:nbytes])
        with pytest.raises(BadModelFile, match="cut short"):
            read_header(alone)
        header = read_header(alone, weights=False)
        places = [[(t.name, t.shape, t.offset, t.nbytes) for t in h.tensors] for h in (header, full)]
        assert places[0] == places[1]
        assert header.get("tokenizer.ggml.tokens") == full.get("tokenizer.ggml.tokens")
        assert header.nbytes == full.nbytes
    alone.write_bytes(whole.read_bytes()[: full.nbytes - 1])
    with pytest.raises(BadModelFile, match="ends in the middle of its header"):
        read_header(alone, weights=False)
