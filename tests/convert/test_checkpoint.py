"""Checkpoints of the hub become files for the ternary engine: every weight and every scale, or a refusal."""

import json
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_files import (
    QUANTIZATIONS,
    assert_same,
    bf16,
    checkpoint_weights,
    config_of,
    hub_name,
    packed,
    stored,
    tensors_of,
    write_checkpoint,
    write_safetensors,
    write_tokenizer,
)
from cordee.cli.main import cordee
from cordee.convert.checkpoint import unpacked_rows
from cordee.convert.convert import convert
from cordee.convert.safetensors import stored_tensors
from cordee.convert.scales import grouped, mean_scale, rounded_masters
from cordee.convert.ternary_file import EMBEDDING, exact_type, write
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.models.gguf import read_header
from ternary_models import Weights, assert_computes

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("family", "form", "layout", "shards"),
    [
        ("bitnet", "multiplied", "trit2", 1),  # BitNet b1.58 2B 4T
        ("bitnet", "masters", "trit5", 3),  # its bf16 edition
        ("bitnet-silu", "masters", "trit2", 1),  # bitnet_b1_58-large and -3B
        ("llama", "divided", "trit5", 2),  # Llama3-8B-1.58, Falcon3, Falcon-E
        ("trilm", "floats", "trit2", 1),
    ],
)
def test_no_weight_and_no_scale_is_lost(
    family: str, form: str, layout: str, shards: int, tmp_path: Path
) -> None:
    weights = checkpoint_weights(family)
    folder = write_checkpoint(tmp_path / "hub", weights, form, shards=shards)
    model = convert(folder, tmp_path / "ours.gguf", layout=layout)
    assert_same(tmp_path / "ours.gguf", weights)
    assert (model.planes, model.rope, model.sub_norms) == (
        weights.model.planes,
        "neox",
        weights.model.sub_norms,
    )
    assert model.activation == weights.model.activation


@settings(max_examples=25)
@given(
    st.sampled_from(["divided", "multiplied", "masters", "floats"]),
    st.sampled_from(["trit2", "trit5"]),
    st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(3, 90)
    ),
    st.integers(0, 2**32 - 1),
)
def test_models_of_any_shape_are_the_same_afterwards(
    form: str, layout: str, sizes: tuple[int, ...], seed: int
) -> None:
    """Rows that fill no byte, columns that fill no vector."""
    groups, kv_heads, half, n_embd, n_ff = sizes
    changes = {"heads": groups * kv_heads, "kv_heads": kv_heads, "head_dim": 2 * half, "layers": 1}
    model = replace(checkpoint_weights("llama").model, n_embd=n_embd, n_ff=n_ff, **changes)
    weights = Weights(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        convert(write_checkpoint(Path(folder) / "hub", weights, form), Path(folder) / "m.gguf", layout=layout)
        assert_same(Path(folder) / "m.gguf", weights, varied=False)


@pytest.mark.parametrize(("family", "form"), (("bitnet", "multiplied"), ("llama", "divided")))
def test_a_converted_checkpoint_computes_what_it_means(family: str, form: str, tmp_path: Path) -> None:
    weights = checkpoint_weights(family)
    convert(write_checkpoint(tmp_path / "hub", weights, form), tmp_path / "ours.gguf")
    assert_computes(tmp_path / "ours.gguf", weights)


@pytest.mark.parametrize(
    ("values", "kind"),
    (
        ([0.5, -3, 65504], GGMLQuantizationType.F16),
        ([1 / 3, 6e-8], GGMLQuantizationType.F16),
        ([0.5, 2.0**17], GGMLQuantizationType.BF16),  # too large for F16
        ([0.5, 2.0**-26], GGMLQuantizationType.BF16),  # too small
        ([1 + 2.0**-20], GGMLQuantizationType.F32),
        ([1 + 2.0**-10, 2.0**17], GGMLQuantizationType.F32),
    ),
)
def test_an_embedding_takes_the_smallest_type_that_loses_nothing(
    values: list[float], kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    weights = checkpoint_weights("llama")
    table = weights.arrays[EMBEDDING]
    table[:] = np.resize(np.array(values, np.float16 if kind.name == "F16" else np.float32), table.shape)
    assert exact_type(weights, len(table)) == kind
    path = tmp_path / "model.gguf"
    write(path, replace(weights.model, embedding=kind), weights)
    found = dequantize(stored(read_header(path), EMBEDDING), kind)
    assert np.array_equal(found, table.reshape(-1))


def test_rows_of_bfloat16_are_looked_up_as_they_are(tmp_path: Path) -> None:
    weights = checkpoint_weights("llama")
    convert(write_checkpoint(tmp_path / "hub", weights, "divided"), tmp_path / "ours.gguf")
    assert read_header(tmp_path / "ours.gguf").tensor(EMBEDDING).type is GGMLQuantizationType.BF16
    stage = TernaryStage(
        tmp_path / "ours.gguf", StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
    )
    tokens = np.arange(10, 50)
    logits = stage.decode(batch_of_one(tokens))
    stage.clear()
    rows = batch_of_one(weights.arrays[EMBEDDING][tokens])
    assert np.array_equal(stage.decode(rows), logits)
    stage.close()


def test_the_same_number_beside_a_matrix_is_a_scale_or_its_inverse(tmp_path: Path) -> None:
    weights = checkpoint_weights("llama")
    folder = write_checkpoint(tmp_path / "hub", weights, "divided")
    convert(folder, tmp_path / "divided.gguf")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "autobitlinear"
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "multiplied.gguf")
    name = "blk.1.attn_q.scale"
    [divided], [multiplied] = (
        stored(read_header(tmp_path / f"{form}.gguf"), name).view(np.float32)
        for form in ("divided", "multiplied")
    )
    assert divided == np.float32(1) / multiplied
    assert divided != multiplied


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hub", checkpoint_weights("llama"), "divided")
    convert(folder, tmp_path / "ours.gguf")
    header = read_header(tmp_path / "ours.gguf")
    described = json.loads((folder / "tokenizer.json").read_text())
    assert header.get("tokenizer.ggml.pre") == "llama-bpe"
    vocabulary = header.get("tokenizer.ggml.tokens")
    assert all(vocabulary[number] == text for text, number in described["model"]["vocab"].items())
    assert len(header.get("tokenizer.ggml.merges")) == len(described["model"]["merges"])
    assert header.get("tokenizer.chat_template") == "{{ messages }}"
    assert vocabulary[header.get("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert header.get("general.name") == "hub"


def spoiled(change: Callable[[dict], object]) -> Callable[[dict, dict], object]:
    return lambda tensors, config: change(tensors)


def configured(change: Callable[[dict], object]) -> Callable[[dict, dict], object]:
    return lambda tensors, config: change(config)


SCALE = QUERY.replace("weight", "weight_scale")


@pytest.mark.parametrize(
    ("form", "change", "kind", "message"),
    [
        ("divided", spoiled(lambda t: t[QUERY][1].__setitem__((3, 4), 0b11)), UnsupportedModel, QUERY),
        ("divided", spoiled(lambda t: t.pop(SCALE)), BadModelFile, f"{QUERY} is packed, but has no"),
        ("divided", spoiled(lambda t: t.update({SCALE: ("F32", np.zeros(1))})), BadModelFile, SCALE),
        ("divided", spoiled(lambda t: t.update({SCALE: ("F32", np.full(1, np.nan))})), BadModelFile, SCALE),
        ("divided", spoiled(lambda t: t.update({SCALE: ("F32", -np.ones(1))})), BadModelFile, SCALE),
        ("divided", spoiled(lambda t: t.update({SCALE: ("F32", np.ones(3))})), BadModelFile, "3 values for"),
        ("divided", spoiled(lambda t: t.update({QUERY: ("U8", t[QUERY][1][1:])})), BadModelFile, QUERY),
        ("divided", spoiled(lambda t: t.pop(QUERY)), BadModelFile, f"no tensor {QUERY}"),
        ("divided", spoiled(lambda t: t.pop("lm_head.weight")), BadModelFile, "no tensor lm_head"),
        (
            "divided",
            spoiled(lambda t: t.update({QUERY.replace("weight", "bias"): ("F32", np.ones(8))})),
            UnsupportedModel,
            r"q_proj\.bias, which",
        ),
        (
            "divided",
            spoiled(lambda t: t.update({"lm_head.weight": ("BF16", t["lm_head.weight"][1][1:])})),
            BadModelFile,
            "lm_head.weight is",
        ),
        (
            "divided",
            spoiled(lambda t: t.update({"lm_head.weight_scale": ("F32", np.ones(1))})),
            UnsupportedModel,
            r"lm_head\.weight_scale, which",
        ),
        ("divided", configured(lambda c: c.update(rms_norm_eps=2)), BadModelFile, "that no model has"),
        ("divided", configured(lambda c: c.pop("quantization_config")), BadModelFile, "whether to multiply"),
        (
            "divided",
            configured(lambda c: c["quantization_config"].update(use_rms_norm=True)),
            UnsupportedModel,
            "norm before",
        ),
        ("divided", configured(lambda c: c.update(hidden_act="gelu")), UnsupportedModel, "gelu"),
        ("divided", configured(lambda c: c.update(architectures=["Qwen3"])), UnsupportedModel, "Qwen3"),
        (
            "divided",
            configured(lambda c: c.update(rope_scaling={"rope_type": "yarn"})),
            UnsupportedModel,
            "yarn",
        ),
        (
            "divided",
            configured(lambda c: c.update(num_hidden_layers=10**9)),
            BadModelFile,
            "num_hidden_layers",
        ),
        ("divided", configured(lambda c: c.update(num_hidden_layers=1)), UnsupportedModel, r"layers\.1\."),
        (
            "masters",
            configured(lambda c: c.pop("quantization_config")),
            UnsupportedModel,
            "masters of a b1.58",
        ),
        (
            "masters",
            spoiled(lambda t: t[QUERY][1].__setitem__((5, 6), bf16(np.full(1, np.inf))[0])),
            BadModelFile,
            f"{QUERY} holds a weight that is not a number, in row 5",
        ),
        (
            "floats",
            spoiled(lambda t: t[QUERY][1].__setitem__((7, 9), 0.5 * t[QUERY][1].max())),
            UnsupportedModel,
            "row 7",
        ),
        (
            "floats",
            spoiled(lambda t: t[QUERY][1].__setitem__((7, 9), (1 - 2**-10) * t[QUERY][1].max())),
            UnsupportedModel,
            "row 7",
        ),
        (
            "floats",
            spoiled(lambda t: t["model.norm.weight"][1].__setitem__(3, bf16(np.full(1, np.nan))[0])),
            BadModelFile,
            r"output_norm\.weight",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    form: str, change: Callable, kind: type[CordeeError], message: str, tmp_path: Path
) -> None:
    weights = checkpoint_weights("llama")
    tensors, config = tensors_of(weights, form), config_of(weights.model, form)
    change(tensors, config)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    with pytest.raises(kind, match=message):
        convert(tmp_path, tmp_path / "ours.gguf")
    assert not list(tmp_path.glob("*ours.gguf*"))


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hub", checkpoint_weights("llama"), "divided", shards=2)
    first = folder / "model-00001-of-00002.safetensors"
    whole = first.read_bytes()
    for content, message in (
        (whole[:-1], "00001.*is damaged"),
        (whole[:5], "00001.*is damaged"),
        (b"", "00001.*is damaged"),
        (None, "00001.*cannot be read"),
    ):
        first.unlink() if content is None else first.write_bytes(content)
        with pytest.raises(BadModelFile, match=message):
            convert(folder, tmp_path / "ours.gguf")
    first.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    for weight_map, message in (
        ({**placed["weight_map"], "model.more": first.name}, "lacks model.more"),
        ({"model.norm.weight": "../model.safetensors"}, "does not say which file"),
        (None, "does not say which file"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadModelFile, match=message):
            convert(folder, tmp_path / "ours.gguf")
    index.unlink()
    with pytest.raises(BadModelFile, match="2 safetensors files and no"):
        convert(folder, tmp_path / "ours.gguf")
    index.write_text(json.dumps(placed))
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{")
        with pytest.raises(BadModelFile, match=f"{name} is not JSON"):
            convert(folder, tmp_path / "ours.gguf")


def test_text_that_is_split_in_an_unknown_way_is_refused_unless_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hub", checkpoint_weights("llama"), "divided")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    (folder / "tokenizer.json").write_text(json.dumps(described))
    arguments = ["convert", str(folder / "model.safetensors"), "-o", str(tmp_path / "ours.gguf")]
    result = CliRunner().invoke(cordee, arguments)
    assert result.exit_code == UnsupportedModel.exit_code
    assert "splits text in none of the known ways" in result.stderr
    result = CliRunner().invoke(cordee, [*arguments, "--pre", "falcon3"])
    assert result.exit_code == 0, result.stderr
    assert read_header(tmp_path / "ours.gguf").get("tokenizer.ggml.pre") == "falcon3"


@settings(max_examples=60)
@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_any_strip_of_a_packed_matrix_is_what_was_packed(
    rows: int, cols: int, seed: int, data: st.DataObject
) -> None:
    weights = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)
    codes = packed(weights)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    found = unpacked_rows(lambda a, b: codes[a:b], len(codes), first, last)
    assert np.array_equal(found, weights[first:last])


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.75, 1.25])), min_size=1, max_size=8)
)
def test_as_few_scales_as_say_the_same(runs: list[tuple[int, float]]) -> None:
    scales = np.repeat([s for _, s in runs], [n for n, _ in runs]).astype("f4")
    few = grouped(scales)
    assert len(scales) % len(few) == 0
    assert (few > 0).all()
    again = np.repeat(few, len(scales) // len(few))
    assert np.array_equal(again[scales > 0], scales[scales > 0])


@settings(max_examples=60)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_masters_are_rounded_by_their_mean(rows: int, cols: int, seed: int) -> None:
    masters = np.random.default_rng(seed).standard_normal((rows, cols)).astype("f4")
    mean = mean_scale("m", rows, lambda first, last: masters[first:last])
    assert mean == np.float32(max(np.abs(masters).mean(dtype=np.float64), 1e-5))
    rounded = rounded_masters(masters, mean)
    assert (np.abs(masters - rounded * mean)[np.abs(masters) < 1.5 * mean] <= 0.5001 * mean).all()
    assert set(np.unique(rounded)) <= {-1, 0, 1}


def test_scales_of_columns_become_those_of_the_rows_that_meet_them(tmp_path: Path) -> None:
    """As training a matrix in shards on two machines leaves them: half of the columns are twice as large."""
    weights = checkpoint_weights("trilm", kv_heads=4)
    for layer in range(2):
        for producer in ("attn_v", "ffn_up"):
            scales = weights.scales(f"blk.{layer}.{producer}.weight")
            scales[1] = 2 * scales[0]
    tensors = tensors_of(weights, "floats")
    for layer in range(2):
        for producer, consumer in (("v_proj", "o_proj"), ("up_proj", "down_proj")):
            block = "self_attn" if producer == "v_proj" else "mlp"
            _, rows = tensors[f"model.layers.{layer}.{block}.{producer}.weight"]
            _, columns = tensors[f"model.layers.{layer}.{block}.{consumer}.weight"]
            rows[len(rows) // 2 :] /= 2
            columns[:, columns.shape[1] // 2 :] *= 2
    for layer in range(2):  # one scale each, by rows as they should be
        for name in ("attn_output", "ffn_down"):
            scales = weights.scales(f"blk.{layer}.{name}.weight")
            hub = hub_name(f"blk.{layer}.{name}.weight")
            dense = tensors[hub][1]
            dense[len(dense) // 2 :] *= scales[0] / scales[1]
            scales[1] = scales[0]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_tokenizer(tmp_path)
    config = config_of(weights.model, "floats")
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "ours.gguf")
    assert_same(tmp_path / "ours.gguf", weights)
    config["quantization_config"] = QUANTIZATIONS["multiplied"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"o_proj\.weight is not ternary: row 0"):
        convert(tmp_path, tmp_path / "other.gguf")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (1, 5):
        model = replace(checkpoint_weights("llama", n_embd=256, n_ff=512).model, layers=layers)
        folder = write_checkpoint(tmp_path / str(layers), Weights(model, 1), "floats")
        tracemalloc.start()
        convert(folder, tmp_path / "ours.gguf")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((folder / "model.safetensors").stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 20


def test_the_first_models_names_of_norms_and_class(tmp_path: Path) -> None:
    """bitnet_b1_58-large and -3B: masters by their class alone, two norms under other names, tied."""
    weights = checkpoint_weights("bitnet-silu")
    folder = write_checkpoint(tmp_path / "hub", weights, "masters")
    tensors = tensors_of(weights, "masters")
    old = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    for name in [name for name in tensors if "sub_norm" in name]:
        norm = name.split(".")[-2]
        tensors[name.replace(norm, old[norm])] = tensors.pop(name)
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(10))
    write_safetensors(folder / "model.safetensors", tensors)
    config = config_of(weights.model, "masters") | {"architectures": ["BitnetForCausalLM"]}
    del config["quantization_config"], config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    model = convert(folder, tmp_path / "ours.gguf")
    assert_same(tmp_path / "ours.gguf", weights)
    assert (model.planes, model.sub_norms) == (1, True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some kB, to be damaged."""
    changes = {"n_embd": 32, "n_ff": 64, "heads": 2, "kv_heads": 1, "head_dim": 16}
    folder = tmp_path_factory.mktemp("small") / "hub"
    return write_checkpoint(folder, checkpoint_weights("llama", **changes), "divided")


@settings(max_examples=100)
@given(
    st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damage_ends_in_a_file_or_in_a_sentence(
    small: Path, name: str, changes: list[tuple[int, int]]
) -> None:
    """The first kilobytes are headers and settings; what is still a model may well convert."""
    path = small / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for at, value in changes:
        damaged[at % min(len(whole), 5000)] = value
    path.write_bytes(damaged)
    try:
        convert(small, small / "ours.gguf")
    except CordeeError as error:
        assert error.message.endswith(".")
    finally:
        path.write_bytes(whole)


def test_a_header_that_lies_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for offsets, shape in (([0, 1 << 40], [1 << 40]), ([0, 4], [2]), ([4, 8], [4])):
        header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": offsets}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(BadModelFile, match="is damaged"):
            stored_tensors(path)
