"""Mixtures of experts in the formats of others become files for our engine: GGUF, MLX's words, masters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from checkpoint_files import bf16, from_bf16, vocabulary_size, write_safetensors, write_tokenizer
from cordee.convert.convert import convert
from cordee.convert.ternary_file import LAYOUTS, TernaryModel, unpack
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.models.gguf import engine_of, read_header
from ternary_models import FAMILIES, Weights, assert_computes
from tiny import add_byte_tokenizer

CONFIG = StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
# What libllama's types of 256 columns want.
WIDE = {"n_embd": 256, "n_ff": 256, "heads": 4, "head_dim": 64, "rope_dims": 32}
HUB = {
    "token_embd": "model.word_embeddings",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.{}.gate_proj",
    "ffn_up_exps": "mlp.{}.up_proj",
    "ffn_down_exps": "mlp.{}.down_proj",
}


def maple(**changes: object) -> Weights:
    """A small Maple with a scale for each row, as bfloat16 holds them."""
    model = replace(FAMILIES["maple"], **changes)
    weights = Weights(model, 7)
    for name, array in weights.arrays.items():
        if array.dtype == np.int8:
            rows = weights.scales(name)
            around = 1 + 0.2 * np.random.default_rng(len(name)).random(len(array))
            weights._scales[name.replace("weight", "scale")] = from_bf16(bf16(rows[0] * around))
        else:
            array[:] = from_bf16(bf16(array))
    return weights


def of_experts(weights: Weights, name: str, array: np.ndarray) -> np.ndarray:
    """(experts, rows, cols) of a matrix whose experts stand one below the other; others as they are."""
    count = weights.model.matrices_in(name)
    return array.reshape(count, -1, *array.shape[1:]) if count > 1 else array


def write_gguf(
    path: Path, weights: Weights, kind: GGMLQuantizationType, changes: dict[str, object] | None = None
) -> None:
    """As llama.cpp stores it: scales become f16, those of `weights`, too. Keys of None are left out."""
    model = weights.model
    writer = GGUFWriter(path, "maple")
    keys = {
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.n_embd,
        "feed_forward_length": 4 * model.n_ff,  # which no layer uses
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.epsilon,
        "rope.freq_base": model.rope_base,
        "rope.dimension_count": model.rope_dims,
        "attention.sliding_window": model.window,
        "attention.sliding_window_pattern": list(model.windowed),
        "expert_count": model.experts,
        "expert_used_count": model.experts_used,
        "expert_feed_forward_length": model.n_ff,
        "swiglu_clamp_exp": [model.gate_limit] * model.layers,
    }
    for key, value in (keys | (changes or {})).items():
        add = writer.add_array if isinstance(value, list) else None
        add = add or (writer.add_bool if isinstance(value, bool) else None)
        add = add or (writer.add_uint32 if isinstance(value, int) else writer.add_float32)
        if value is not None:
            add(f"maple.{key}", value)
    add_byte_tokenizer(writer)
    for name, array in weights.arrays.items():
        if array.dtype != np.int8:
            writer.add_tensor(name, array)
            continue
        scales = weights.scales(name)
        scales[:] = scales.astype(np.float16)
        writer.add_tensor(
            name, quantize(of_experts(weights, name, weights.floats(name)), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """(..., cols) codes -> (..., cols * bits / 32) uint32, the first in the lowest bits."""
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] * bits // 32), dtype="<u4")
    for column in range(codes.shape[-1]):
        place = column * bits % 32
        out[..., column * bits // 32] |= codes[..., column].astype("<u4") << np.uint32(place)
    return out


def hub_name(name: str, form: str) -> str:
    parts = name.split(".")
    own = HUB[parts[-2]].format("switch_mlp" if form == "mlx" else "experts")
    return f"model.layers.{parts[1]}.{own}" if len(parts) == 4 else own


def config_of(model: TernaryModel, form: str) -> dict[str, object]:
    """config.json."""
    config = {
        "architectures": ["MapleForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": model.n_embd,
        "intermediate_size": 4 * model.n_ff,
        "moe_intermediate_size": model.n_ff,
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_used,
        "norm_topk_prob": True,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.rope_base,
        "partial_rotary_factor": model.rope_dims / model.head_dim,
        "nope_on_global_attention": True,
        "sliding_window": model.window,
        "layer_types": [("full", "sliding")[windowed] + "_attention" for windowed in model.windowed],
        "tie_word_embeddings": False,
        "vocab_size": model.n_vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if form == "mlx":
        packing = {"group_size": 64, "bits": 4, "mode": "affine"}
        config |= {"quantization": packing, "quantization_config": packing}
    return config


def write_hub(folder: Path, weights: Weights, form: str, **changes: object) -> None:
    """A checkpoint: `mlx` with words of two bits and affine tables, or `masters` with experts one by one."""
    model, tensors = weights.model, {}
    for name, array in weights.arrays.items():
        hub = hub_name(name, form)
        if array.dtype == np.int8 and form == "mlx":
            tensors[f"{hub}.weight"] = ("U32", words(of_experts(weights, name, array + 1), 2))
            alpha = of_experts(weights, name, bf16(weights.scales(name)))
            tensors[f"{hub}.row_alpha"] = ("BF16", alpha)
        elif array.dtype == np.int8:
            dense = of_experts(weights, name, weights.floats(name))
            experts = dense if dense.ndim == 3 else [dense]
            for number, one in enumerate(experts):
                own = hub.replace("experts", f"experts.{number}") if dense.ndim == 3 else hub
                tensors[f"{own}.weight"] = ("BF16", bf16(one))
        elif name in ("token_embd.weight", "output.weight") and form == "mlx":
            codes = np.random.default_rng(len(name)).integers(0, 16, array.shape).astype(np.uint8)
            scales = from_bf16(
                bf16(0.02 + 0.01 * np.ptp(array, axis=1)[:, None].repeat(array.shape[1] // 64, 1))
            )
            biases = from_bf16(bf16(-7.5 * scales))
            array[:] = codes * scales.repeat(64, axis=1) + biases.repeat(64, axis=1)
            tensors[f"{hub}.weight"] = ("U32", words(codes, 4))
            tensors |= {f"{hub}.scales": ("BF16", bf16(scales)), f"{hub}.biases": ("BF16", bf16(biases))}
        else:
            tensors[f"{hub}.weight"] = (
                "F32" if "mlp.gate" in hub else "BF16",
                array if "mlp.gate" in hub else bf16(array),
            )
    if form == "mlx":
        tensors["lm_head_flash.weight"] = ("U32", np.zeros((4, 4), "<u4"))  # no part of the model
    config = config_of(model, form)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    write_safetensors(folder / "model.safetensors", tensors)
    write_tokenizer(folder)


def assert_same_model(model: TernaryModel, weights: Weights) -> None:
    """All settings; numbers as float32 holds them, the embedding in the smallest type."""
    for name in ("epsilon", "gate_limit"):
        assert np.float32(getattr(model, name)) == np.float32(getattr(weights.model, name))
        model = replace(model, **{name: getattr(weights.model, name)})
    assert replace(model, embedding=weights.model.embedding) == weights.model


def assert_exact(path: Path, weights: Weights) -> None:
    """Every weight and scale of every expert, and every number of the routers."""
    header, model = read_header(path), weights.model
    layout = LAYOUTS[header.text("cordee.ternary.layout")]
    for name, array in weights.arrays.items():
        tensor = header.tensor(name)
        stored = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        if "ffn_gate_inp" in name:
            assert (stored.view("<f4").reshape(array.shape) == array).all()
        if array.dtype != np.int8:
            continue
        count = model.matrices_in(name)
        rows, cols = array.shape[0] // count, array.shape[1]
        payload = stored.reshape(count, *layout.shape(rows, cols))
        assert (np.concatenate([unpack(each, layout, rows, cols) for each in payload]) == array).all(), name
        beside = header.tensor(name.replace("weight", "scale"))
        scales = np.fromfile(beside.path, "<f4", len(array), offset=beside.offset)
        assert (scales == weights.scales(name)).all(), name


@pytest.mark.parametrize("layout", ("trit2", "trit5"))
@pytest.mark.parametrize(
    "kind", (GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0), ids=("TQ1_0", "TQ2_0")
)
def test_a_gguf_of_experts_loses_nothing(kind: GGMLQuantizationType, layout: str, tmp_path: Path) -> None:
    weights = maple(**WIDE)
    write_gguf(tmp_path / "source.gguf", weights, kind)
    assert engine_of(read_header(tmp_path / "source.gguf")) == "llama"
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf", layout=layout)
    assert_same_model(replace(model, layout="trit5"), weights)
    assert_exact(tmp_path / "ours.gguf", weights)
    assert_computes(tmp_path / "ours.gguf", weights)


@pytest.mark.parametrize("form", ("mlx", "masters"))
def test_a_checkpoint_of_experts_loses_nothing(form: str, tmp_path: Path) -> None:
    weights = maple(n_vocab=vocabulary_size(), n_ff=64, gate_limit=7.0)
    write_hub(tmp_path / "hub", weights, form)
    model = convert(tmp_path / "hub", tmp_path / "ours.gguf", layout="trit5")
    assert_same_model(model, weights)
    assert_exact(tmp_path / "ours.gguf", weights)
    assert_computes(tmp_path / "ours.gguf", weights)


def test_libllama_computes_what_a_converted_mixture_does(tmp_path: Path) -> None:
    """Maple by its own implementation: a reference that shares nothing with ours."""
    weights = maple(**WIDE, window=12)
    write_gguf(tmp_path / "source.gguf", weights, GGMLQuantizationType.TQ2_0)
    convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    batches = [batch_of_one(np.arange(10, 40)), *(batch_of_one([i], i) for i in range(30, 50))]
    logits = []
    for engine, name in ((TernaryStage, "ours"), (LlamaStage, "source")):
        stage = engine(tmp_path / f"{name}.gguf", CONFIG)
        logits.append(np.concatenate([stage.decode(batch) for batch in batches]))
        stage.close()
    ours, theirs = logits
    assert np.abs(ours - theirs).max() < 0.3 * theirs.std()
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"expert_weights_norm": False}, "expert_weights_norm is False"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ({"swiglu_clamp_exp": [7.0, 7.0, 7.0, 6.0]}, "swiglu_clamp_exp differs"),
        ({"expert_used_count": 13}, "experts"),
        ({"rope.dimension_count": 33}, "rotation"),
        ({"attention.sliding_window_pattern": None}, "which layers have a window"),
        ({"attention.sliding_window_pattern": [True] * 3}, "which layers have a window"),
        ({"expert_count": None}, "expert_count"),
    ],
)
def test_what_is_unknown_of_a_mixture_is_refused_by_name(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "source.gguf", maple(**WIDE), GGMLQuantizationType.TQ2_0, changes)
    with pytest.raises((UnsupportedModel, BadModelFile), match=message):
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        ({"num_shared_experts": 1}, "num_shared_experts 1"),
        ({"layer_types": ["sliding_attention"] * 3}, "which layers have a window"),
        ({"num_experts_per_tok": 0}, "experts_used"),
    ],
)
def test_what_is_unknown_of_a_checkpoint_is_refused_by_name(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_hub(tmp_path / "hub", maple(n_vocab=vocabulary_size()), "masters", **changes)
    with pytest.raises(CordeeError, match=message):
        convert(tmp_path / "hub", tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()
