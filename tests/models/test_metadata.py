"""Metadata by type: whatever type a file gives to whichever key, it is used rightly or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.cluster.demand import SizeRequest, usual_context
from cordee.convert.gguf_source import GgufSource
from cordee.distribution.hub_ranges import _joined
from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.machine.sizing import size_request
from cordee.models.embedding import Embedding
from cordee.models.fit import own_context, parameter_count, stage_shapes, verdict
from cordee.models.gguf import Header, read_header
from cordee.models.shape import model_shape
from cordee.models.slices import even_cuts, plan_outside, plan_slice
from cordee.models.store import Store
from model_files import ODD_FIELDS, Field, Original
from tiny import make_tiny

ARCHITECTURES = ("llama", "gpt-oss", "gemma3", "apertus", "deepseek2", "qwen3moe")
# Keys that the package reads where a file has them.
OPTIONAL = (
    *("general.alignment", "general.name", "general.license", "general.tensor_extra.name"),
    *("split.count", "split.no", "split.tensors.count"),
    *("tokenizer.ggml.pre", "tokenizer.ggml.model", "cordee.ternary.version", "cordee.ternary.layout"),
)
OF_ARCHITECTURE = (
    *("context_length", "vocab_size", "nextn_predict_layers", "leading_dense_block_count"),
    *("interleave_moe_layer_step", "embedding_scale", "expert_used_count"),
    *("attention.key_length_mla", "attention.key_length_swa", "attention.sliding_window"),
    *("attention.sliding_window_pattern", "attention.value_length", "attention.shared_kv_layers"),
    *("rope.dimension_sections", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    folder = tmp_path_factory.mktemp("originals")
    return [
        Original(make_tiny(name, folder / f"{name}.gguf", layers=4, tokenizer="bytes"))
        for name in ARCHITECTURES
    ]


def plan_halves(header: Header) -> None:
    first, cut, _ = even_cuts(header, 2)
    plan_slice(header, first, cut, force=True)


def requested(header: Header) -> SizeRequest:
    return size_request(own_context(header), None, None, header.name)


# What the verbs, the server and the agent do with a header.
USES: tuple[Callable[[Header], object], ...] = (
    lambda header: model_shape(header, "digest"),
    lambda header: verdict(stage_shapes(header, 1), requested(header), 1 << 30),
    parameter_count,
    own_context,
    plan_halves,
    lambda header: plan_outside(header, ()),
    Embedding,
    lambda header: GgufSource(header).model("trit2", "f16"),
    lambda header: _joined(header, header.path.parent),
    lambda header: header.text("general.name", ""),
)


def faults(path: Path, name: str) -> list[CordeeError]:
    """All that is refused of a file, by each use of it; any other exception ends the test."""
    found: list[CordeeError] = []
    try:
        header = read_header(path, name=name)
    except CordeeError as error:
        return [error]
    for use in USES:
        try:
            use(header)
        except CordeeError as error:
            found.append(error)
    return found


@st.composite
def changes(draw: st.DrawFn, originals: list[Original]) -> tuple[Original, str, Field]:
    original = draw(st.sampled_from(originals))
    prefix = original.header.architecture
    keys = [*original.fields, *OPTIONAL, *(f"{prefix}.{name}" for name in OF_ARCHITECTURE)]
    key, field = draw(st.sampled_from(keys)), draw(st.sampled_from(ODD_FIELDS))
    return original, key, field


def hunt(examples: int, originals: list[Original], folder: Path) -> None:
    @given(changes(originals))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    def any_type(change: tuple[Original, str, Field]) -> None:
        original, key, field = change
        path = original.write(folder / "odd.gguf", {key: field})
        for error in faults(path, "my-model"):
            assert "my-model" in error.message or str(path) in error.message
            if isinstance(error, BadModelFile) and field.kind is not original_kind(original, key):
                named = (
                    key.rpartition(".")[2],
                    "shards",
                    "cordee.ternary.",
                )  # of a set, or another engine's file
                assert any(name in error.message for name in named), error.message

    any_type()


def original_kind(original: Original, key: str) -> GGUFValueType | None:
    return original.fields[key].kind if key in original.fields else None


def test_a_key_of_any_other_type_is_used_rightly_or_refused_by_name(originals, tmp_path) -> None:
    hunt(300, originals, tmp_path)


@pytest.mark.long
def test_many_keys_of_other_types(originals, tmp_path) -> None:
    hunt(20_000, originals, tmp_path)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("llama.context_length", Field(GGUFValueType.STRING, "many")),
        ("llama.context_length", Field(GGUFValueType.FLOAT32, 4096.0)),
        ("llama.context_length", Field(GGUFValueType.ARRAY, [4096], GGUFValueType.UINT32)),
        ("split.count", Field(GGUFValueType.ARRAY, [1, 2], GGUFValueType.UINT16)),
        ("split.count", Field(GGUFValueType.STRING, "1")),
        ("split.no", Field(GGUFValueType.FLOAT64, 0.5)),
        ("general.architecture", Field(GGUFValueType.UINT32, 1)),
        ("general.alignment", Field(GGUFValueType.STRING, "32")),
        ("llama.embedding_length", Field(GGUFValueType.UINT64, 2**64 - 1)),
        ("llama.attention.head_count_kv", Field(GGUFValueType.ARRAY, [2], GGUFValueType.UINT32)),
    ],
)
def test_what_is_wrong_is_named(originals, tmp_path, key, field) -> None:
    path = originals[0].write(tmp_path / "odd.gguf", {key: field})
    found = [error for error in faults(path, "my-model") if isinstance(error, BadModelFile)]
    assert found
    for error in found:
        assert error.message.startswith("my-model")
        assert key in error.message


@pytest.mark.parametrize(
    "key", ["context_length", "embedding_length", "attention.head_count", "rope.freq_base"]
)
def test_a_number_of_the_right_type_and_an_absurd_value_is_refused_or_fits_a_message(
    originals, tmp_path, key
) -> None:
    import msgspec

    for value in (0, 2**24, 2**31 - 1, 2**32 - 1):
        path = originals[0].write(tmp_path / "odd.gguf", {f"llama.{key}": Field(GGUFValueType.UINT32, value)})
        try:
            shape = model_shape(read_header(path), "digest")
        except BadModelFile:
            continue
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(shape), type=type(shape)) == shape


def test_a_stored_model_is_called_by_its_name(originals, tmp_path) -> None:
    store = Store(tmp_path / "store")
    model = store.add_file(originals[0].header.path, "my-model")
    for header in (read_header(model.path, name=model.name), read_header(model.path)):
        with pytest.raises(BadModelFile) as caught:
            header.count("llama.nothing")
        assert ("sha256-" in caught.value.message) is (header.name != "my-model")
    original = Original(model.path)
    original.write(model.path, {"llama.context_length": Field(GGUFValueType.STRING, "many")})
    with pytest.raises(BadModelFile, match=r"^my-model: llama.context_length is the text 'many'"):
        usual_context(own_context(read_header(model.path, name=model.name)))


@pytest.mark.parametrize("architecture", ["llama9", "a" * 300])
def test_sizes_that_an_unknown_architecture_lacks_say_that_it_is_unknown(
    originals, tmp_path, architecture
) -> None:
    text, number = GGUFValueType.STRING, GGUFValueType.UINT32
    path = originals[0].write(
        tmp_path / "new.gguf",
        {
            "general.architecture": Field(text, architecture),
            f"{architecture}.block_count": Field(number, 4),
        },
    )
    with pytest.raises(UnsupportedModel, match=r"does not know.*update cordee"):
        model_shape(read_header(path), "digest")
