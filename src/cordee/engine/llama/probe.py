"""A child process that tries libllama's extra buffer types on a tiny model, which may crash it.

Exit status 0 means that they work here.
"""

import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one

# Large enough for ggml's AMX and repacking kernels to take the matrices.
WIDTH, HEADS, VOCABULARY = 256, 4, 64


def write_model(path: Path) -> None:
    """A llama of one layer with random Q4_0 and Q8_0 matrices, types that those kernels take."""
    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, kind: GGMLQuantizationType = GGMLQuantizationType.Q4_0) -> None:
        values = draw.standard_normal((rows, WIDTH), dtype=np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", VOCABULARY)
    matrix("output.weight", VOCABULARY, GGMLQuantizationType.Q8_0)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        matrix(f"blk.0.{name}.weight", WIDTH)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Run a prefill and a decode with extra buffer types; 0 if the logits are finite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        write_model(path)
        stage = LlamaStage(path, StageConfig(context=64, sequences=1, batch_rows=32), extra_buffers=True)
        prefill = stage.decode(batch_of_one(range(16)))
        decode = stage.decode(batch_of_one([3], first_position=16))
        return 0 if np.isfinite(prefill).all() and np.isfinite(decode).all() else 1
