"""Ternary models as llama.cpp and bitnet.cpp store them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize

from cordee.models.gguf import BitnetType
from ternary_models import FAMILIES, Weights
from tiny import add_byte_tokenizer

NARROW = {"n_embd": 32, "n_ff": 64, "heads": 2, "kv_heads": 1, "head_dim": 16}


CHANGES = {"n_embd": 256, "n_ff": 512, "heads": 8, "kv_heads": 8, "head_dim": 32, "layers": 2}


def i2_s(weights: np.ndarray, scale: float) -> np.ndarray:
    """bitnet.cpp's bytes of a matrix: 128 weights in 32, then 32 with the scale."""
    block = (weights + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = block[:, 0] << 6 | block[:, 1] << 4 | block[:, 2] << 2 | block[:, 3]
    tail = np.zeros(32, dtype=np.uint8)
    tail[:4] = np.array([scale], dtype="<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def write_source(
    path: Path,
    weights: Weights,
    kind: GGMLQuantizationType | BitnetType,
    *,
    spoil: str = "",
    architecture: str = "",
    plain: bool = False,
    keys: dict[str, str | int | float] | None = None,
) -> None:
    """Write the model as llama.cpp or bitnet.cpp stores it.

    `spoil` names a matrix that gets a second magnitude; a `plain` one has only its tokenizer's kind; `keys`
    replace the right ones.
    """
    model = weights.model
    writer = GGUFWriter(path, architecture or model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.rope_base)
    for key, value in (keys or {}).items():
        writer.kv_data[0][key] = GGUFValue(value, GGUFValueType.get_type(value))
    if plain:
        writer.add_tokenizer_model("gpt2")
    else:
        add_byte_tokenizer(writer)
    for name, array in weights.arrays.items():
        if "blk" in name and array.ndim == 2:
            _, layer, matrix, _ = name.split(".")
            if kind is BitnetType.I2_S:
                stored = i2_s(array, weights.scales(name)[0]).view(np.int8)
                writer.add_tensor(name, stored, raw_shape=array.shape, raw_dtype=kind)
                continue
            # llama.cpp keeps scales in f16: round them first, so that none is lost.
            scales = weights.scales(name)
            scales[:] = scales.astype(np.float16)
            dense = weights.dense(int(layer), matrix).astype(np.float32)
            if name == spoil:
                dense[7, 9] = dense.max() * 0.5
            writer.add_tensor(name, quantize(dense, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_of(family: str) -> Weights:
    return Weights(replace(FAMILIES[family], **CHANGES), 3)
