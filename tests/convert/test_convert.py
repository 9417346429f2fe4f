"""Ternary models in llama.cpp's formats become files for the ternary engine, and lose nothing on the way."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.cli.main import cordee
from cordee.convert.convert import convert
from cordee.convert.ternary_file import LAYOUTS, unpack
from cordee.engine.stage import StageConfig
from cordee.engine.ternary import TernaryStage
from cordee.errors import BadModelFile, BadRequest, CordeeError, UnsupportedModel
from cordee.models.gguf import BitnetType, Header, read_header
from ternary_models import FAMILIES, Weights, assert_computes
from ternary_sources import CHANGES, NARROW, weights_of, write_source


def payload_of(header: Header, name: str) -> np.ndarray:
    tensor = header.tensor(name)
    return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)


def matrix_of(header: Header, name: str, rows: int, cols: int) -> np.ndarray:
    """A layer's matrix in a file of ours: int8 of -1, 0, 1."""
    layout = LAYOUTS[header.get("cordee.ternary.layout")]
    return unpack(payload_of(header, name).reshape(layout.shape(rows, cols)), layout, rows, cols)


@pytest.mark.parametrize("kind", ("TQ1_0", "TQ2_0", "F16", "F32"))
@pytest.mark.parametrize("layout", ("trit2", "trit5"))
def test_no_weight_is_lost(kind: str, layout: str, tmp_path: Path) -> None:
    weights = weights_of("llama")
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType[kind])
    source = read_header(tmp_path / "source.gguf")
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf", layout=layout)
    ours = read_header(tmp_path / "ours.gguf")
    for layer in range(model.layers):
        for matrix, (rows, cols) in model.matrices().items():
            name = f"blk.{layer}.{matrix}.weight"
            original = source.tensor(name)
            stored = np.fromfile(original.path, np.uint8, original.nbytes, offset=original.offset)
            expected = dequantize(stored.reshape(rows, -1), original.type)
            [scale] = payload_of(ours, name.replace("weight", "scale")).view(np.float32)
            assert (matrix_of(ours, name, rows, cols) * scale == expected).all()
            assert len(np.unique(expected)) == 3
    assert ours.get("tokenizer.ggml.tokens") == source.get("tokenizer.ggml.tokens")
    assert ours.get("tokenizer.chat_template") == source.get("tokenizer.chat_template")


@pytest.mark.parametrize("columns", (256, 96))
def test_no_weight_of_bitnet_cpps_own_format_is_lost(columns: int, tmp_path: Path) -> None:
    """Its blocks span rows where rows are not a multiple of 128."""
    changes = CHANGES | {"n_embd": columns, "heads": columns // 32, "kv_heads": columns // 32, "n_ff": 512}
    weights = Weights(replace(FAMILIES["bitnet"], **changes), 3)
    write_source(tmp_path / "source.gguf", weights, BitnetType.I2_S, architecture="bitnet-b1.58")
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    ours = read_header(tmp_path / "ours.gguf")
    assert (ours.architecture, model.sub_norms, model.planes) == ("bitnet", True, 1)
    for name, expected in weights.arrays.items():
        if "blk" in name and expected.ndim == 2:
            assert (matrix_of(ours, name, *expected.shape) == expected).all()
            assert payload_of(ours, name.replace("weight", "scale")).view("<f4") == weights.scales(name)
            assert len(np.unique(expected)) == 3


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"\xff", r"blk\.1\.ffn_up\.weight holds a code that stands for no weight"),
        (-32, np.float32(np.nan).tobytes(), r"blk\.1\.ffn_up\.weight has the scale nan"),
        (-32, bytes(4), r"blk\.1\.ffn_up\.weight has the scale 0"),
    ],
)
def test_a_damaged_file_of_bitnet_cpp_is_named(
    offset: int, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "source.gguf"
    write_source(path, weights_of("llama"), BitnetType.I2_S)
    tensor = read_header(path).tensor("blk.1.ffn_up.weight")
    whole = bytearray(path.read_bytes())
    at = tensor.offset + offset % tensor.nbytes
    whole[at : at + len(content)] = content
    path.write_bytes(whole)
    with pytest.raises(BadModelFile, match=message):
        convert(path, tmp_path / "ours.gguf")
    path.write_bytes(whole[: tensor.offset + tensor.nbytes - 1])
    with pytest.raises(BadModelFile, match="cut short"):
        convert(path, tmp_path / "ours.gguf")


def test_a_vocabulary_that_does_not_say_how_it_splits_is_llama_3s(tmp_path: Path) -> None:
    """BitNet b1.58 2B 4T's own GGUF does not."""
    weights = Weights(replace(FAMILIES["bitnet"], n_vocab=128_256, layers=1, **NARROW), 3)
    path = tmp_path / "source.gguf"
    write_source(path, weights, BitnetType.I2_S, architecture="bitnet-b1.58", plain=True)
    assert convert(path, tmp_path / "ours.gguf").activation == "relu2"
    assert read_header(tmp_path / "ours.gguf").get("tokenizer.ggml.pre") == "llama-bpe"


@pytest.mark.parametrize("family", ("llama", "bitnet-silu"))
def test_a_converted_model_computes_what_the_source_means(family: str, tmp_path: Path) -> None:
    weights = weights_of(family)
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.TQ2_0)
    convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert_computes(tmp_path / "ours.gguf", weights)


def test_what_is_not_ternary_is_refused_by_name(starter_path: Path, tmp_path: Path) -> None:
    weights = weights_of("llama")
    name = "blk.1.ffn_up.weight"
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.F32, spoil=name)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_up\.weight is not ternary: row 7"):
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.weight is not ternary"):
        convert(starter_path, tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"rope.scaling.type": "yarn"}, UnsupportedModel, "scales RoPE"),
        ({"rope.scaling.factor": 2.0}, UnsupportedModel, "scales RoPE"),
        ({"rope.dimension_count": 16}, UnsupportedModel, "applies RoPE to parts of heads"),
        ({"attention.value_length": 16}, UnsupportedModel, "applies RoPE to parts of heads"),
        ({"attention.head_count": 0}, BadModelFile, "that no model has"),
        ({"attention.head_count_kv": 3}, BadModelFile, "that no model has"),
        ({"attention.layer_norm_rms_epsilon": 2.0}, BadModelFile, "that no model has"),
        ({"embedding_length": 128}, BadModelFile, r"token_embd\.weight is not 320 x 128"),
        ({"feed_forward_length": -1}, BadModelFile, "is -1, not a whole number"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None, ""),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None, ""),
    ],
)
def test_settings_that_the_engine_does_not_have_are_refused(
    keys: dict[str, str | int | float], kind: type[CordeeError] | None, message: str, tmp_path: Path
) -> None:
    prefixed = {f"llama.{key}": value for key, value in keys.items()}
    write_source(tmp_path / "source.gguf", weights_of("llama"), GGMLQuantizationType.TQ2_0, keys=prefixed)
    with pytest.raises(kind, match=message) if kind else nullcontext():
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").exists() == (kind is None)


def test_a_head_of_other_size_than_the_embedding_is_refused(tmp_path: Path) -> None:
    weights = weights_of("llama")
    weights.arrays["output.weight"] = weights.arrays["output.weight"][1:]
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.TQ2_0)
    with pytest.raises(BadModelFile, match=r"output\.weight is not 320 x 256"):
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of some kB, to be damaged."""
    path = tmp_path_factory.mktemp("small") / "source.gguf"
    write_source(path, Weights(replace(FAMILIES["llama"], layers=1, **NARROW), 3), BitnetType.I2_S)
    return path


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_ends_in_a_file_that_runs_or_in_a_sentence(
    small: Path, changes: list[tuple[int, int]]
) -> None:
    """Settings are at the header's beginning, names and sizes of tensors at its end."""
    whole, header = small.read_bytes(), read_header(small)
    ends = [*range(700), *range(header.nbytes - 1000, header.nbytes)]
    damaged = bytearray(whole)
    for at, value in changes:
        damaged[ends[at % len(ends)]] = value
    source, ours = small.with_name("damaged.gguf"), small.with_name("ours.gguf")
    source.write_bytes(damaged)
    try:
        convert(source, ours)
    except CordeeError as error:
        assert error.message.endswith(".")
    else:
        TernaryStage(ours, StageConfig(context=64, sequences=1, batch_rows=8, threads=1)).close()


def test_the_verb_says_what_it_wrote(tmp_path: Path) -> None:
    write_source(tmp_path / "source.gguf", weights_of("llama"), GGMLQuantizationType.TQ1_0)
    arguments = [
        "convert",
        str(tmp_path / "source.gguf"),
        "-o",
        str(tmp_path / "ours.gguf"),
        "--layout",
        "trit5",
    ]
    result = CliRunner().invoke(cordee, [*arguments[:2], "-o", arguments[1]])
    assert (result.exit_code, "name another file" in result.stderr) == (BadRequest.exit_code, True)
    result = CliRunner().invoke(cordee, arguments)
    assert result.exit_code == 0, result.output
    assert "ours.gguf  llama, 2 layers" in result.stdout
    assert read_header(tmp_path / "ours.gguf").get("cordee.ternary.layout") == "trit5"
