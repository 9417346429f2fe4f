"""Ternary models as llama.cpp and bitnet.cpp store them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize

from cordee.models.gguf import BitnetType, BlockType
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


def q2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(n, block) codes 0 to 3 and (n,) scales -> (n, bytes), one weight after the other."""
    out = np.zeros((len(codes), 2 + codes.shape[1] // 4), dtype=np.uint8)
    out[:, :2] = scales.astype("<f2")[:, None].view(np.uint8)
    for j in range(codes.shape[1]):
        out[:, 2 + j // 4] |= codes[:, j].astype(np.uint8) << 2 * (j % 4)
    return out


def q1_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same of codes 0 and 2."""
    out = np.zeros((len(codes), 2 + codes.shape[1] // 8), dtype=np.uint8)
    out[:, :2] = scales.astype("<f2")[:, None].view(np.uint8)
    for j in range(codes.shape[1]):
        out[:, 2 + j // 8] |= (codes[:, j] // 2).astype(np.uint8) << j % 8
    return out


def ptq1_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same of codes 0 to 2 in blocks of 128: where each weight lies is as the page lists it."""
    values = np.zeros((len(codes), 26), dtype=np.uint32)
    for first, byte, count, digits in ((0, 0, 16, 5), (80, 16, 8, 5), (120, 24, 2, 4)):
        for m in range(count):
            for n in range(digits):
                values[:, byte + m] += codes[:, first + m + count * n].astype(np.uint32) * 3 ** (4 - n)
    carriers = ((values * 256 + 242) // 243).astype(np.uint8)
    return np.concatenate([carriers, scales.astype("<f2")[:, None].view(np.uint8)], axis=1)


ENCODERS = {
    BlockType.Q1_0: q1_0,
    BlockType.Q2_0: q2_0,
    BlockType.Q2_0_OF_128: q2_0,
    BlockType.PQ2_0: q2_0,
    BlockType.PTQ1_0: ptq1_0,
}


def blocks(weights: np.ndarray, scales: np.ndarray, kind: BlockType) -> np.ndarray:
    """(rows, cols) int8 and (rows, blocks of a row) scales -> (rows, bytes) uint8."""
    codes = (weights + 1).reshape(-1, kind.block)
    return ENCODERS[kind](codes, scales.reshape(-1)).reshape(len(weights), -1)


def write_grouped(
    path: Path,
    weights: Weights,
    kind: BlockType,
    *,
    keys: dict[str, str | int | float | bool | list[str] | list[int]] | None = None,
) -> None:
    """A `bonsai` family as its makers store it: everything but norms in blocks of that type."""
    model = weights.model
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.rope_base)
    add_byte_tokenizer(writer)
    for key, value in (keys or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif type(value) is int:
            writer.add_uint32(key, value)
        else:
            writer.kv_data[0][key] = GGUFValue(value, GGUFValueType.get_type(value))
    number = BlockType.Q2_0 if kind is BlockType.Q2_0_OF_128 else kind
    for name, array in weights.arrays.items():
        if name.endswith(".signs") or (name == "output.weight" and model.tied):
            continue
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        stored = blocks(array, weights.scales(name), kind).view(np.int8)
        writer.add_tensor(name, stored, raw_shape=array.shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def grouped_weights(kind: BlockType, **changes: object) -> Weights:
    """A small Ternary-Bonsai whose weights that type can hold."""
    small = {"n_embd": 256, "n_ff": 384, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2}
    own = {"planes": 1, "head_planes": 1, "scale_columns": kind.block, "layout": "trit2", "head": "trit2"}
    weights = Weights(replace(FAMILIES["bonsai"], **small | own | changes), 5)
    if kind is BlockType.Q1_0:
        for array in weights.arrays.values():
            if array.dtype == np.int8:
                array[array == 0] = 1
    return weights


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
