"""Headers of large models: real dimensions and types (after the published configurations), no data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from cordee.convert import ternary_file
from cordee.convert.ternary_file import TernaryModel

F32, Q8, Q5_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0
Q4_K, Q6_K, MXFP4 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.MXFP4

Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType]


@dataclass(frozen=True)
class Model:
    """A model's dimensions; `experts` 0 is a dense one, `tied` one whose head is the embedding.

    `file_bytes` is the size of the published file, 0 where it is not known here: beside the tensors it has
    the vocabulary and the rest of the metadata.
    """

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
    tied: bool = False
    all_q8: bool = False
    file_bytes: int = 0


MODELS = {
    "gpt-oss-20b": Model("gpt-oss", 24, 2880, 2880, 64, 8, 64, 201088, 131072, experts=32),
    "gpt-oss-120b": Model("gpt-oss", 36, 2880, 2880, 64, 8, 64, 201088, 131072, experts=128),
    "apertus-8b": Model("apertus", 32, 4096, 21504, 32, 8, 128, 131072, 65536),
    "apertus-70b": Model("apertus", 80, 8192, 43008, 64, 8, 128, 131072, 65536),
    "llama3.2-1b": Model(
        "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied=True, file_bytes=807_694_464
    ),
    "llama3.2-3b": Model(
        "llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072, tied=True, file_bytes=2_019_377_696
    ),
    "mistral-small": Model("llama", 40, 5120, 32768, 32, 8, 128, 131072, 131072, file_bytes=14_333_922_848),
    "qwen3-0.6b": Model(
        "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, tied=True, all_q8=True, file_bytes=639_446_688
    ),
    "qwen3-1.7b": Model(
        "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960, tied=True, all_q8=True, file_bytes=1_834_426_016
    ),
    "qwen3-4b": Model(
        "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 40960, tied=True, file_bytes=2_497_280_256
    ),
    "qwen3-8b": Model("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, file_bytes=5_027_783_488),
    "qwen3-30b-a3b": Model(
        "qwen3moe", 48, 2048, 768, 32, 4, 128, 151936, 40960, experts=128, file_bytes=18_556_685_824
    ),
    "gemma3-1b": Model("gemma3", 26, 1152, 6912, 4, 1, 256, 262144, 32768, tied=True, file_bytes=806_058_240),
    "gemma3-4b": Model(
        "gemma3", 34, 2560, 10240, 8, 4, 256, 262144, 131072, tied=True, file_bytes=2_489_757_856
    ),
    "gemma3-12b": Model(
        "gemma3", 48, 3840, 15360, 16, 8, 256, 262144, 131072, tied=True, file_bytes=7_300_574_880
    ),
}


def bonsai(
    layers: int, n_embd: int, n_ff: int, heads: int, context: int, *, tied: bool = True
) -> TernaryModel:
    """Ternary-Bonsai as `pull` leaves it: converted, with 2 bits a weight."""
    return TernaryModel(
        architecture="qwen3",
        layers=layers,
        n_embd=n_embd,
        n_ff=n_ff,
        n_vocab=151_936,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        context=context,
        rope_base=1e6,
        rope="neox",
        head_norms=True,
        divisors=True,
        scale_columns=128,
        embedding="codes",
        head="trit2",
        head_planes=1,
        tied=tied,
    )


# Maple as `pull` leaves it: a scale for each row, an embedding of 8 bits.
MAPLE = TernaryModel(
    architecture="maple",
    layers=24,
    n_embd=2048,
    n_ff=512,
    n_vocab=151_936,
    heads=16,
    kv_heads=4,
    head_dim=128,
    context=131_072,
    rope_base=10_000.0,
    rope="neox",
    head_norms=True,
    planes=2,
    embedding=Q8,
    experts=256,
    experts_used=8,
    window=512,
    windowed=(True, True, True, False) * 6,
    rope_dims=64,
    rope_layers="windowed",
    gate_limit=7.0,
)
TERNARY = {
    "maple": MAPLE,
    "ternary-bonsai-1.7b": bonsai(28, 2048, 6144, 16, 32_768),
    "ternary-bonsai-4b": bonsai(36, 2560, 9728, 32, 32_768),
    "ternary-bonsai-8b": bonsai(36, 4096, 12_288, 32, 65_536, tied=False),
}
# The experts that are used for each token.
EXPERTS_USED = {"gpt-oss": 4, "qwen3moe": 8}
SLIDING_WINDOWS = {"gpt-oss": 128, "gemma3": 1024}


def write_header(name: str, path: Path) -> Path:
    """Write the header of one of MODELS or TERNARY, and nothing after its list of tensors."""
    if name in TERNARY:
        write_ternary_header(TERNARY[name], path)
        return path
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
        writer.add_expert_used_count(EXPERTS_USED[model.architecture])
    if model.architecture in SLIDING_WINDOWS:
        writer.add_sliding_window(SLIDING_WINDOWS[model.architecture])
    for title, shape, kind in tensors(model):
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(title, shape[::-1], np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class ScalesOfRows:
    """All of a model's weights that its header needs: how many scales there are."""

    model: TernaryModel

    def scales(self, name: str) -> np.ndarray:
        return np.ones(self.model.matrices()[name.split(".")[2]][0], dtype=np.float32)


def write_ternary_header(model: TernaryModel, path: Path) -> None:
    writer = GGUFWriter(path, model.architecture)
    ternary_file._add_keys(writer, model)
    for tensor in ternary_file._tensors(model, cast(ternary_file.WeightSource, ScalesOfRows(model))):
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def tensors(model: Model) -> Iterator[Tensor]:
    """All tensors, in ggml's order of dimensions, as `MXFP4` and `Q4_K_M` files have them."""
    is_mxfp4 = model.architecture == "gpt-oss"
    embedding = Q8 if is_mxfp4 else Q6_K if model.tied else Q4_K
    yield "token_embd.weight", (model.embd, model.vocab), stored(model, model.embd, embedding)
    if not model.tied:
        yield "output.weight", (model.embd, model.vocab), Q8 if is_mxfp4 else Q6_K
    yield "output_norm.weight", (model.embd,), F32
    if model.architecture == "llama" and model.tied:  # Llama 3.2 stretches its rotation
        yield "rope_freqs.weight", (model.head // 2,), F32
    for layer in range(model.layers):
        for title, shape, kind in gpt_oss_layer(model) if is_mxfp4 else usual_layer(model, layer):
            yield f"blk.{layer}.{title}", shape, stored(model, shape[0], kind)


def stored(model: Model, width: int, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that llama.cpp's quantizer stores: one of smaller blocks where 256 do not divide the rows."""
    if model.all_q8 and kind in (Q4_K, Q6_K):
        return Q8
    return {Q4_K: Q5_0, Q6_K: Q8}.get(kind, kind) if width % 256 else kind


def gpt_oss_layer(model: Model) -> Iterator[Tensor]:
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


def usual_layer(model: Model, layer: int) -> Iterator[Tensor]:
    embd, wide, narrow = model.embd, model.heads * model.head, model.kv_heads * model.head
    eighth = model.layers // 8  # Q4_K_M: which layers get more bits (llama.cpp, use_more_bits)
    more = layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2
    norms = ["attn_norm", "ffn_norm"]
    if model.architecture == "gemma3":
        norms += ["post_attention_norm", "post_ffw_norm"]
    for norm in norms:
        yield f"{norm}.weight", (embd,), F32
    if model.architecture != "llama":
        for norm in ("attn_q_norm", "attn_k_norm"):
            yield f"{norm}.weight", (model.head,), F32
    yield "attn_q.weight", (embd, wide), Q4_K
    yield "attn_k.weight", (embd, narrow), Q4_K
    yield "attn_v.weight", (embd, narrow), Q6_K if more else Q4_K
    yield "attn_output.weight", (wide, embd), Q4_K
    experts, suffix = (), ""
    if model.experts:
        experts, suffix = (model.experts,), "_exps"
        yield "ffn_gate_inp.weight", (embd, model.experts), F32
    if model.architecture != "apertus":  # whose activation needs no gate
        yield f"ffn_gate{suffix}.weight", (embd, model.ffn, *experts), Q4_K
    yield f"ffn_up{suffix}.weight", (embd, model.ffn, *experts), Q4_K
    yield f"ffn_down{suffix}.weight", (model.ffn, embd, *experts), Q6_K if more else Q4_K
