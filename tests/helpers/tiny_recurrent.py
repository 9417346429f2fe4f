"""Tiny models of random weights whose state cannot be shortened: mamba, and jamba, which has both kinds.

Names and shapes of tensors as llama.cpp's loader asks for them (src/models/mamba.cpp, jamba.cpp).
"""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tiny import add_byte_tokenizer

VOCAB, EMBD, INNER, STATE, CONV, RANK, FF, HEADS = 320, 64, 128, 16, 4, 8, 96, 4
CONTEXT = 512


class Maker:
    """Writes one model. In jamba every other layer attends, and each has a feed-forward part."""

    def __init__(self, architecture: str, path: Path, layers: int, seed: int) -> None:
        self.name, self.is_hybrid = architecture, architecture == "jamba"
        self.attends = [self.is_hybrid and layer % 2 == 1 for layer in range(layers)]
        self.writer = GGUFWriter(path, architecture)
        self.draw = np.random.default_rng(seed)

    def metadata(self) -> None:
        numbers = {
            "block_count": len(self.attends),
            "context_length": CONTEXT,
            "embedding_length": EMBD,
            "feed_forward_length": FF if self.is_hybrid else 0,
            "vocab_size": VOCAB,
            "attention.head_count": HEADS if self.is_hybrid else 0,
            "ssm.conv_kernel": CONV,
            "ssm.inner_size": INNER,
            "ssm.state_size": STATE,
            "ssm.time_step_rank": RANK,
        }
        for key, value in numbers.items():
            self.writer.add_uint32(f"{self.name}.{key}", value)
        if self.is_hybrid:
            heads = [HEADS * attends for attends in self.attends]
            self.writer.add_array(f"{self.name}.attention.head_count_kv", heads)
        self.writer.add_float32(f"{self.name}.attention.layer_norm_rms_epsilon", 1e-5)
        add_byte_tokenizer(self.writer)

    def matrix(self, name: str, *shape: int, gain: float = 1.6) -> None:
        """A random matrix; `shape` in ggml's order."""
        rows = self.draw.standard_normal(shape[::-1]).astype(np.float32)
        self.writer.add_tensor(name, rows * np.float32(gain / np.sqrt(shape[0])))

    def norm(self, name: str, length: int) -> None:
        self.writer.add_tensor(name, np.ones(length, dtype=np.float32))

    def tensors(self) -> None:
        self.matrix("token_embd.weight", EMBD, VOCAB)
        self.matrix("output.weight", EMBD, VOCAB)
        self.norm("output_norm.weight", EMBD)
        for layer, attends in enumerate(self.attends):
            at = f"blk.{layer}"
            self.norm(f"{at}.attn_norm.weight", EMBD)
            if attends:
                for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                    self.matrix(f"{at}.{name}.weight", EMBD, EMBD)
            else:
                self.state_space(at)
            if self.is_hybrid:
                self.norm(f"{at}.ffn_norm.weight", EMBD)
                self.matrix(f"{at}.ffn_gate.weight", EMBD, FF)
                self.matrix(f"{at}.ffn_up.weight", EMBD, FF)
                self.matrix(f"{at}.ffn_down.weight", FF, EMBD)

    def state_space(self, at: str) -> None:
        self.matrix(f"{at}.ssm_in.weight", EMBD, 2 * INNER)
        self.matrix(f"{at}.ssm_conv1d.weight", CONV, INNER)
        self.matrix(f"{at}.ssm_conv1d.bias", INNER, gain=0.1)
        self.matrix(f"{at}.ssm_x.weight", INNER, RANK + 2 * STATE)
        self.matrix(f"{at}.ssm_dt.weight", RANK, INNER)
        self.matrix(f"{at}.ssm_dt.bias", INNER, gain=0.1)
        decay = -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (INNER, 1))
        self.writer.add_tensor(f"{at}.ssm_a", decay)
        self.matrix(f"{at}.ssm_d", INNER, gain=1)
        self.matrix(f"{at}.ssm_out.weight", INNER, EMBD)
        if self.is_hybrid:
            self.norm(f"{at}.ssm_dt_norm.weight", RANK)
            self.norm(f"{at}.ssm_b_norm.weight", STATE)
            self.norm(f"{at}.ssm_c_norm.weight", STATE)


def make_recurrent(architecture: str, path: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """Write a tiny model, `mamba` or `jamba`, with the vocabulary of bytes of `tiny.py`."""
    maker = Maker(architecture, path, layers, seed)
    maker.metadata()
    maker.tensors()
    maker.writer.write_header_to_file()
    maker.writer.write_kv_data_to_file()
    maker.writer.write_tensors_to_file()
    maker.writer.close()
    return path
