"""Headers of large models: real dimensions and types (after the published configurations), no data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

F32, Q8 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
Q4_K, Q6_K, MXFP4 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.MXFP4

Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType]


@dataclass(frozen=True)
class Model:
    """A model's dimensions; `experts` 0 is a dense one."""

    architecture: str
    layers: int
    embd: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    context: int
    experts: int = 0


MODELS = {
    "gpt-oss-20b": Model("gpt-oss", 24, 2880, 2880, 64, 8, 64, 201088, 131072, experts=32),
    "gpt-oss-120b": Model("gpt-oss", 36, 2880, 2880, 64, 8, 64, 201088, 131072, experts=128),
    "apertus-8b": Model("apertus", 32, 4096, 21504, 32, 8, 128, 131072, 65536),
    "apertus-70b": Model("apertus", 80, 8192, 43008, 64, 8, 128, 131072, 65536),
}


def write_header(name: str, path: Path) -> Path:
    """Write the header of one of MODELS, and nothing after its list of tensors."""
    model = MODELS[name]
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.embd)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head)
    writer.add_value_length(model.head)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(4)
        writer.add_sliding_window(128)
    for title, shape, kind in tensors(model):
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(title, shape[::-1], np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def tensors(model: Model) -> Iterator[Tensor]:
    """All tensors, in ggml's order of dimensions, as `MXFP4` and `Q4_K_M` files have them."""
    yield "token_embd.weight", (model.embd, model.vocab), Q8 if model.experts else Q4_K
    yield "output.weight", (model.embd, model.vocab), Q8 if model.experts else Q6_K
    yield "output_norm.weight", (model.embd,), F32
    for layer in range(model.layers):
        for title, shape, kind in expert_layer(model) if model.experts else dense_layer(model, layer):
            yield f"blk.{layer}.{title}", shape, kind


def expert_layer(model: Model) -> Iterator[Tensor]:
    embd, wide, narrow = model.embd, model.heads * model.head, model.kv_heads * model.head
    yield "attn_norm.weight", (embd,), F32
    yield "post_attention_norm.weight", (embd,), F32
    yield "attn_sinks.weight", (model.heads,), F32
    for matrix, shape in {
        "q": (embd, wide),
        "k": (embd, narrow),
        "v": (embd, narrow),
        "output": (wide, embd),
    }.items():
        yield f"attn_{matrix}.weight", shape, Q8
        yield f"attn_{matrix}.bias", shape[1:], F32
    yield "ffn_gate_inp.weight", (embd, model.experts), F32
    yield "ffn_gate_inp.bias", (model.experts,), F32
    for matrix in ("gate", "up", "down"):
        yield f"ffn_{matrix}_exps.weight", (embd, model.ffn, model.experts), MXFP4
        yield f"ffn_{matrix}_exps.bias", (model.ffn, model.experts), F32


def dense_layer(model: Model, layer: int) -> Iterator[Tensor]:
    embd, wide, narrow = model.embd, model.heads * model.head, model.kv_heads * model.head
    eighth = model.layers // 8  # Q4_K_M: which layers get more bits (llama.cpp, use_more_bits)
    more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    for norm in ("attn_norm", "ffn_norm"):
        yield f"{norm}.weight", (embd,), F32
    for norm in ("attn_q_norm", "attn_k_norm"):
        yield f"{norm}.weight", (model.head,), F32
    yield "attn_q.weight", (embd, wide), Q4_K
    yield "attn_k.weight", (embd, narrow), Q4_K
    yield "attn_v.weight", (embd, narrow), Q6_K if more else Q4_K
    yield "attn_output.weight", (wide, embd), Q4_K
    yield "ffn_up.weight", (embd, model.ffn), Q4_K
    yield "ffn_down.weight", (model.ffn, embd), Q6_K if more else Q4_K
