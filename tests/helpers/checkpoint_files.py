"""Maker of tiny checkpoints as the hub has them: config.json, safetensors in every form, small tokenizers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from cordee.convert.ternary_file import LAYOUTS, TernaryModel, unpack
from cordee.models.gguf import Header, read_header
from ternary_models import FAMILIES, Weights
from tokenizer_references import trained_bytes

HUB_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# What config.json says for each form.
QUANTIZATIONS: dict[str, dict | None] = {
    "divided": {"quant_method": "bitnet"},
    "multiplied": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    "masters": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
    "floats": None,
}
DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "BF16": "<u2", "U32": "<u4"}

Tensors = dict[str, tuple[str, np.ndarray]]


def bf16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each float32, as its 16 bits; ties to even."""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def packed(weights: np.ndarray) -> np.ndarray:
    """(rows, cols) of -1, 0, 1 -> (rows / 4, cols) uint8: a quarter of the rows in each pair of bits."""
    quarter = -(-len(weights) // 4)
    codes = np.zeros((4 * quarter, weights.shape[1]), dtype=np.uint8)
    codes[: len(weights)] = weights + 1
    quarters = codes.reshape(4, quarter, -1)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """The format's header and bytes; bfloat16, which the package's numpy side lacks, included."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    arrays = {name: np.asarray(array, DTYPES[dtype]) for name, (dtype, array) in tensors.items()}
    at = 0
    for name, array in arrays.items():
        dtype = tensors[name][0]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    bodies = (array.tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(bodies))


def hub_name(name: str) -> str:
    """Our name of a tensor -> the hub's."""
    outside = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
    if name in outside or name == "output_norm.weight":
        return f"{outside.get(name, 'model.norm')}.weight"
    _, layer, ours, _ = name.split(".")
    return f"model.layers.{layer}.{HUB_NAMES[ours]}.weight"


def tensors_of(weights: Weights, form: str, seed: int = 0) -> Tensors:
    """All tensors of a checkpoint. Scales become what the form can state; `weights` is changed so."""
    draw, tensors = np.random.default_rng(seed), Tensors()
    for name, array in weights.arrays.items():
        hub = hub_name(name)
        if "blk" not in name or array.ndim == 1:
            array[:] = from_bf16(bf16(array))
            tensors[hub] = ("BF16", bf16(array))
            continue
        scales = weights.scales(name)
        if form == "floats":
            scales[:] = scales.astype(np.float16)
            dense = array * np.repeat(scales, len(array) // len(scales))[:, None]
            tensors[hub] = ("F16", dense)
        elif form == "masters":
            masters = from_bf16(bf16(draw.standard_normal(array.shape).astype("<f4") * 0.7 * scales[0]))
            tensors[hub] = ("BF16", bf16(masters))
            factor = np.float32(1) / np.abs(masters).mean(dtype=np.float64).astype("<f4")
            array[:] = np.clip(np.rint(masters * factor), -1, 1)
            scales[:] = np.float32(1) / factor
        else:
            tensors[hub] = ("U8", packed(array))
            stated = from_bf16(bf16(1 / scales if form == "divided" else scales))
            scales[:] = np.float32(1) / stated if form == "divided" else stated
            tensors[hub.replace("weight", "weight_scale")] = ("BF16", bf16(stated))
    return tensors


def config_of(model: TernaryModel, form: str) -> dict[str, Any]:
    """config.json."""
    config = {
        "architectures": ["BitNetForCausalLM" if model.architecture == "bitnet" else "LlamaForCausalLM"],
        "hidden_act": model.activation,
        "hidden_size": model.n_embd,
        "intermediate_size": model.n_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": False,
        "vocab_size": model.n_vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    quantization = QUANTIZATIONS[form]
    return config | ({"quantization_config": dict(quantization)} if quantization else {})


def write_tokenizer(folder: Path, pre: str = "llama-bpe") -> None:
    """tokenizer.json of the trained vocabulary of that kind, and a chat template."""
    _, reference = trained_bytes(pre)
    reference.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": "{{ messages }}", "add_bos_token": False, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def vocabulary_size(pre: str = "llama-bpe") -> int:
    """How many tokens that vocabulary has."""
    return trained_bytes(pre)[1].get_vocab_size(with_added_tokens=True)


def write_checkpoint(folder: Path, weights: Weights, form: str, *, shards: int = 1) -> Path:
    """A whole checkpoint; with more than one of `shards`, in that many files with an index."""
    folder.mkdir()
    tensors = tensors_of(weights, form)
    (folder / "config.json").write_text(json.dumps(config_of(weights.model, form)))
    write_tokenizer(folder)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    placed = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        shard = dict(list(tensors.items())[number::shards])
        write_safetensors(folder / name, shard)
        placed |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoint_weights(family: str, **changes: object) -> Weights:
    model = replace(FAMILIES[family], rope="neox", layers=2, n_vocab=vocabulary_size(), **changes)
    return Weights(model, 3, scales=2 if family == "trilm" else 1)


def stored(header: Header, name: str) -> np.ndarray:
    tensor = header.tensor(name)
    return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)


def assert_same(path: Path, weights: Weights, *, varied: bool = True) -> None:
    """Every weight and every scale of every matrix, every norm, and the embedding."""
    header, model = read_header(path), weights.model
    layout = LAYOUTS[header.get("cordee.ternary.layout")]
    for name, expected in weights.arrays.items():
        if name == "output.weight":
            continue  # rounded to the layout asked for
        if "blk" not in name or expected.ndim == 1:
            found = dequantize(stored(header, name), header.tensor(name).type)
            assert np.array_equal(found.reshape(expected.shape), expected), name
            continue
        rows, cols = expected.shape
        payload = stored(header, name).reshape(layout.shape(rows, cols))
        assert np.array_equal(unpack(payload, layout, rows, cols), expected), name
        scales = stored(header, name.replace("weight", "scale")).view(np.float32)
        assert not expected.any() or np.array_equal(
            np.repeat(scales, rows // len(scales)),
            np.repeat(weights.scales(name), rows // len(weights.scales(name))),
        ), name
        assert len(np.unique(expected)) == 3 or not varied
    assert header.get(".block_count") == model.layers
    assert header.get(".rope.freq_base") == model.rope_base
