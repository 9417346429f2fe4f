"""llama.cpp's side of bench/ternary.py: models of random weights in its formats, and how to run them."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cordee.convert.ternary_file import TernaryModel
from plain import Plain

Q6_K_BLOCK, Q6_K_BYTES = 256, 210  # the last two bytes are the block's f16 scale


def write_peer(path: Path, model: TernaryModel, kind: GGMLQuantizationType) -> None:
    """The same shape as a llama.cpp model: layers in TQ1_0 or TQ2_0, the tied head in Q6_K.

    All layers have the same random weights, each stored separately.
    """
    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.n_vocab)
    writer.add_string("tokenizer.ggml.model", "none")
    table = draw.integers(0, 256, (model.n_vocab, model.n_embd // Q6_K_BLOCK, Q6_K_BYTES), dtype=np.uint8)
    table[..., -2:] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    table = table.reshape(model.n_vocab, -1)
    writer.add_tensor("token_embd.weight", table, raw_dtype=GGMLQuantizationType.Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(model.n_embd, np.float32))
    matrices = {
        name: quantize(draw.integers(-1, 2, shape).astype(np.float32) / np.sqrt(np.float32(shape[1])), kind)
        for name, shape in model.matrices().items()
    }
    for layer in range(model.layers):
        for name, length in model.norms().items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(length, np.float32))
        for name, rows in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
