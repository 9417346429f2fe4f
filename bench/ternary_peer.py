"""llama.cpp's side of bench/ternary.py: models of random weights in its formats, and how to run them."""

from pathlib import Path
from typing import cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cordee.convert.ternary_file import STRIP_ROWS, TernaryModel
from cordee.models.gguf import BlockType, TensorType
from plain import Plain

Q6_K_BLOCK, Q6_K_BYTES = 256, 210  # the last two bytes are the block's f16 scale


Q2_0_BLOCK, Q2_0_BYTES = 64, 18  # the first two bytes are the block's f16 scale


def write_peer(path: Path, model: TernaryModel, kind: TensorType) -> None:
    """The same shape as a llama.cpp model: layers in that type, and a tied head in Q6_K.

    Where our embedding and head are ternary, they are of that type, too. All layers have the same random
    weights, each stored separately.
    """
    draw = np.random.default_rng(0)
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
    writer.add_rope_dimension_count(model.rope_dims or model.head_dim)
    if model.experts:
        _add_mixture(writer, model)
    writer.add_vocab_size(model.n_vocab)
    writer.add_string("tokenizer.ggml.model", "none")
    is_ternary = model.embedding == "codes"
    shape = model.n_vocab, model.n_embd
    table = _ternary(draw, shape, kind) if is_ternary else _q6_k(draw, shape)
    own = kind if is_ternary else GGMLQuantizationType.Q6_K
    _add(writer, "token_embd.weight", table, shape, own)
    if model.experts or (is_ternary and not model.tied):  # libllama wants a head of its own for the first
        _add(writer, "output.weight", table, shape, own)
    writer.add_tensor("output_norm.weight", np.ones(model.n_embd, np.float32))
    matrices = {name: (_ternary(draw, shape, kind), shape) for name, shape in model.matrices().items()}
    routers = {
        name: draw.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1]))
        for name, shape in model.routers().items()
    }
    for layer in range(model.layers):
        for name, router in routers.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", router)
        for name, length in model.norms().items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(length, np.float32))
        for name, (rows, shape) in matrices.items():
            count = model.matrices_in(name)
            experts = (count, shape[0] // count, shape[1]) if count > 1 else shape
            _add(writer, f"blk.{layer}.{name}.weight", rows, experts, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_mixture(writer: GGUFWriter, model: TernaryModel) -> None:
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.experts_used)
    writer.add_expert_feed_forward_length(model.n_ff)
    writer.add_sliding_window(model.window)
    writer.add_sliding_window_pattern(model.windowed)
    writer.add_swiglu_clamp_exp([model.gate_limit] * model.layers)


def _q6_k(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    table = draw.integers(0, 256, (shape[0], shape[1] // Q6_K_BLOCK, Q6_K_BYTES), dtype=np.uint8)
    table[..., -2:] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    return table.reshape(shape[0], -1)


def _ternary(draw: np.random.Generator, shape: tuple[int, int], kind: TensorType) -> np.ndarray:
    """(rows, bytes) of random weights with one scale."""
    scale = 1 / np.sqrt(np.float32(shape[1]))
    if kind is not BlockType.Q2_0:
        strips = np.array_split(np.arange(shape[0]), max(shape[0] // STRIP_ROWS, 1))
        drawn = (draw.integers(-1, 2, (len(rows), shape[1])).astype(np.float32) for rows in strips)
        return np.concatenate([quantize(rows * scale, GGMLQuantizationType(kind)) for rows in drawn])
    # Of the codes 0, 1 and 2, four to a byte.
    bytes_of = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in np.ndindex(3, 3, 3, 3)], np.uint8)
    table = np.empty((shape[0], shape[1] // Q2_0_BLOCK, Q2_0_BYTES), dtype=np.uint8)
    table[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    table[..., 2:] = bytes_of[draw.integers(0, len(bytes_of), table[..., 2:].shape)]
    return table.reshape(shape[0], -1)


def _add(writer: GGUFWriter, name: str, stored: np.ndarray, shape: tuple[int, ...], kind: TensorType) -> None:
    raw_dtype = cast(GGMLQuantizationType, kind)  # the writer looks at its number only
    writer.add_tensor(name, stored.view(np.int8), raw_shape=shape, raw_dtype=raw_dtype)


class LlamaPeer:
    """A llama.cpp model with its default settings."""

    def __init__(self, path: Path, threads: int, rows: int) -> None:
        self._model = Plain(
            path, context=1024, sequences=1, batch_rows=rows, threads=threads, batch_invariant=False
        )

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def run(self, rows: int, position: int) -> None:
        """Decode `rows` rows after the first `position` ones; the last one's logits are wanted."""
        self._model.trim(0, position)
        self._model.decode([(i % 60, position + i, 0, i == rows - 1) for i in range(rows)])
