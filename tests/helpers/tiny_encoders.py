"""Maker of tiny models that turn texts into vectors, or rank documents: BERT with random weights.

`make_bert(path)` writes a GGUF with everything that libllama's loader asks of the architecture (tensor names
and hyperparameters after llama.cpp's src/models/bert.cpp). Seeded: the same call gives the same bytes.
"""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

EMBD, HEADS, FF, LAYERS, CONTEXT = 64, 4, 96, 2, 64
POOLING_MEAN, POOLING_CLS, POOLING_RANK = 1, 2, 4  # enum llama_pooling_type
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Of a WordPiece vocabulary libllama writes the beginning of a word as U+2581, as converters do.
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
WORDS = tuple(f"\u2581{word}" for word in (*LETTERS, "cat", "dog"))


def make_bert(path: Path, pooling: int = POOLING_MEAN, seed: int = 1) -> Path:
    """Write the model; POOLING_RANK gives one that ranks."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "bert")
    writer.add_name("tiny-bert")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBD)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", pooling)
    _vocabulary(writer)

    def matrix(name: str, *shape: int) -> None:
        rows = random.standard_normal(shape[::-1]).astype(np.float32) * np.float32(1.6 / np.sqrt(shape[0]))
        writer.add_tensor(f"{name}.weight", rows)

    def linear(name: str, *shape: int) -> None:
        matrix(name, *shape)
        writer.add_tensor(f"{name}.bias", 0.1 * random.standard_normal(shape[1]).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * random.standard_normal(EMBD)).astype(np.float32))
        writer.add_tensor(f"{name}.bias", 0.1 * random.standard_normal(EMBD).astype(np.float32))

    matrix("token_embd", EMBD, len(SPECIAL) + len(WORDS) + len(LETTERS))
    matrix("token_types", EMBD, 2)
    matrix("position_embd", EMBD, CONTEXT)
    norm("token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{block}.{name}", EMBD, EMBD)
        norm(f"{block}.attn_output_norm")
        linear(f"{block}.ffn_up", EMBD, FF)
        linear(f"{block}.ffn_down", FF, EMBD)
        norm(f"{block}.layer_output_norm")
    if pooling == POOLING_RANK:
        linear("cls", EMBD, EMBD)
        linear("cls.output", EMBD, 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer: GGUFWriter) -> None:
    tokens = [*SPECIAL, *WORDS, *LETTERS]
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(WORDS) + len(LETTERS))
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_unk_token_id(1)
    writer.add_uint32("tokenizer.ggml.cls_token_id", 2)
    writer.add_bos_token_id(2)
    writer.add_uint32("tokenizer.ggml.seperator_token_id", 3)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_uint32("tokenizer.ggml.mask_token_id", 4)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_bool("tokenizer.ggml.add_sep_token", True)
