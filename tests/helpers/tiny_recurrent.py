"""Tiny models of random weights whose state cannot be shortened: mamba, and jamba, which has both kinds.

Names and shapes of tensors as llama.cpp's loader asks for them (src/models/mamba.cpp, jamba.cpp).
"""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tiny import add_byte_tokenizer

VOCAB, EMBD, INNER, STATE, CONV, RANK, FF, HEADS = 320, 64, 128, 16, 4, 8, 96, 4
CONTEXT = 512


def make_recurrent(architecture: str, path: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """Write a tiny model, `mamba` or `jamba`, with the vocabulary of bytes of `tiny.py`."""
    draw = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    attention = [architecture == "jamba" and layer % 2 == 1 for layer in range(layers)]
    numbers = {
        "block_count": layers,
        "context_length": CONTEXT,
        "embedding_length": EMBD,
        "feed_forward_length": FF if any(attention) else 0,
        "vocab_size": VOCAB,
        "attention.head_count": HEADS if any(attention) else 0,
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": RANK,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    if any(attention):
        writer.add_array(f"{architecture}.attention.head_count_kv", [HEADS * each for each in attention])
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    add_byte_tokenizer(writer)

    def matrix(name: str, *shape: int, gain: float = 1.6) -> None:
        rows = draw.standard_normal(shape[::-1]).astype(np.float32) * np.float32(gain / np.sqrt(shape[0]))
        writer.add_tensor(name, rows)

    def norm(name: str, length: int) -> None:
        writer.add_tensor(name, np.ones(length, dtype=np.float32))

    matrix("token_embd.weight", EMBD, VOCAB)
    matrix("output.weight", EMBD, VOCAB)
    norm("output_norm.weight", EMBD)
    for layer, attends in enumerate(attention):
        at = f"blk.{layer}"
        norm(f"{at}.attn_norm.weight", EMBD)
        if attends:
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                matrix(f"{at}.{name}.weight", EMBD, EMBD)
        else:
            matrix(f"{at}.ssm_in.weight", EMBD, 2 * INNER)
            matrix(f"{at}.ssm_conv1d.weight", CONV, INNER)
            matrix(f"{at}.ssm_conv1d.bias", INNER, gain=0.1)
            matrix(f"{at}.ssm_x.weight", INNER, RANK + 2 * STATE)
            matrix(f"{at}.ssm_dt.weight", RANK, INNER)
            matrix(f"{at}.ssm_dt.bias", INNER, gain=0.1)
            writer.add_tensor(f"{at}.ssm_a", -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (INNER, 1)))
            matrix(f"{at}.ssm_d", INNER, gain=1)
            matrix(f"{at}.ssm_out.weight", INNER, EMBD)
            if any(attention):
                norm(f"{at}.ssm_dt_norm.weight", RANK)
                norm(f"{at}.ssm_b_norm.weight", STATE)
                norm(f"{at}.ssm_c_norm.weight", STATE)
        if any(attention):
            norm(f"{at}.ffn_norm.weight", EMBD)
            matrix(f"{at}.ffn_gate.weight", EMBD, FF)
            matrix(f"{at}.ffn_up.weight", EMBD, FF)
            matrix(f"{at}.ffn_down.weight", FF, EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
