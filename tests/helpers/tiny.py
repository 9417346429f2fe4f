"""Maker of tiny models: random weights, real files, for as many architectures as libllama loads.

`make_tiny("qwen3", path)` writes a GGUF of a few hundred kB with everything libllama's loader asks of that
architecture (tensor names and hyperparameters after llama.cpp's src/models/*.cpp). Seeded: the same call
gives the same bytes. With `tokenizer="bytes"` the model has a small real vocabulary and a chat template.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

EMBD, HEADS, KV_HEADS, HEAD = 128, 4, 2, 32
FF, VOCAB, CONTEXT, WINDOW = 192, 320, 4096, 8
EXPERTS, EXPERTS_USED, EXPERT_FF = 8, 4, 64
Q_RANK, KV_RANK, LATENT_HEAD = 64, 96, 64

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What an architecture has beyond or instead of a plain llama block."""

    numbers: dict[str, int] = field(default_factory=dict)  # further uint32 metadata, after the prefix
    floats: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    kv_heads: int = KV_HEADS
    tied: bool = False
    embedding_gain: float = 3.0  # small beside the layers, so that a layer in the wrong position shows
    extra: Callable[["Maker"], None] | None = None  # further metadata or tensors of the whole model
    attention: str = "separate"  # "fused": one qkv tensor; "latent": multi-head latent attention
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    qk_norm: str = ""  # "head", "row" (over all heads), "per_head"
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    layer_norm: bool = False  # epsilon under another key
    norm_bias: bool = False
    head_bias: bool = False
    ffn: str = "gated"  # "gated", "plain", "fused" (gate and up in one), "experts"
    ffn_bias: bool = False
    expert_bias: bool = False  # added to the router's choice
    shared_expert: bool = False
    leading_dense: int = 0
    extra_layers: int = 0  # for multi-token prediction, after the others; libllama does not run them
    layer: Callable[["Maker", str], None] | None = None  # further tensors of a layer


EXPERT_NUMBERS = {
    "expert_count": EXPERTS,
    "expert_used_count": EXPERTS_USED,
    "expert_feed_forward_length": EXPERT_FF,
}


class Maker:
    """Writes one model."""

    def __init__(self, name: str, recipe: Recipe, path: Path, layers: int, seed: int) -> None:
        self.name, self.recipe, self.layers = name, recipe, layers
        self.writer = GGUFWriter(path, name)
        self.random = np.random.default_rng(seed)
        self.quantization: GGMLQuantizationType | None = None
        self.template, self.control = CHAT_TEMPLATE, ()

    def number(self, key: str, value: int) -> None:
        self.writer.add_uint32(f"{self.name}.{key}", value)

    def matrix(self, name: str, *shape: int, gain: float = 1.6, exact: bool = False) -> None:
        """A random matrix; `shape` in ggml's order; `exact` ones are never quantized."""
        rows = self.random.standard_normal(shape[::-1]).astype(np.float32)
        rows *= np.float32(gain / np.sqrt(shape[0]))
        kind = None if exact else self.quantization
        if kind is not None and self.name == "gpt-oss" and "_exps" in name:
            kind = GGMLQuantizationType.MXFP4
        if kind is None:
            self.writer.add_tensor(name, rows)
        else:
            self.writer.add_tensor(name, quantize(rows, kind), raw_dtype=kind)

    def bias(self, name: str, *shape: int) -> None:
        self.writer.add_tensor(name, 0.1 * self.random.standard_normal(shape[::-1]).astype(np.float32))

    def norm(self, name: str, *shape: int) -> None:
        around_one = 1 + 0.1 * self.random.standard_normal(shape[::-1])
        self.writer.add_tensor(f"{name}.weight", around_one.astype(np.float32))
        if self.recipe.norm_bias:
            self.bias(f"{name}.bias", *shape)

    def per_layer(self, key: str, values: list, kind: GGUFValueType) -> None:
        self.writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=kind)

    def metadata(self, tokenizer: str) -> None:
        numbers = {
            "block_count": self.layers + self.recipe.extra_layers,
            "context_length": CONTEXT,
            "embedding_length": EMBD,
            "feed_forward_length": FF,
            "vocab_size": VOCAB,
            "attention.head_count": HEADS,
            "attention.head_count_kv": self.recipe.kv_heads,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "rope.dimension_count": HEAD,
        }
        epsilon = "layer_norm_epsilon" if self.recipe.layer_norm else "layer_norm_rms_epsilon"
        floats = {f"attention.{epsilon}": 1e-5, "rope.freq_base": 10_000.0}
        for key, value in (numbers | self.recipe.numbers).items():
            self.number(key, value)
        for key, value in (floats | self.recipe.floats).items():
            self.writer.add_float32(f"{self.name}.{key}", value)
        for key, text in self.recipe.texts.items():
            self.writer.add_string(f"{self.name}.{key}", text)
        for key, flag in self.recipe.flags.items():
            self.writer.add_bool(f"{self.name}.{key}", flag)
        if self.recipe.extra_layers:
            self.number("nextn_predict_layers", self.recipe.extra_layers)
        if self.recipe.leading_dense:
            self.number("leading_dense_block_count", self.recipe.leading_dense)
        if tokenizer == "bytes":
            add_byte_tokenizer(self.writer, self.template, self.control)
        else:
            add_no_tokenizer(self.writer)

    def tensors(self) -> None:
        self.matrix("token_embd.weight", EMBD, VOCAB, gain=self.recipe.embedding_gain)
        self.norm("output_norm", EMBD)
        if not self.recipe.tied:
            self.matrix("output.weight", EMBD, VOCAB)
        if self.recipe.head_bias:
            self.bias("output.bias", VOCAB)
        if self.recipe.extra:
            self.recipe.extra(self)
        for index in range(self.layers + self.recipe.extra_layers):
            if index >= self.layers:
                self.prediction(f"blk.{index}.nextn.")
            self.attention(f"blk.{index}.")
            self.feed_forward(f"blk.{index}.", dense=index < self.recipe.leading_dense)
            if self.recipe.layer:
                self.recipe.layer(self, f"blk.{index}.")

    def prediction(self, at: str) -> None:
        """What a multi-token-prediction layer has beside the tensors of a plain one."""
        self.matrix(f"{at}eh_proj.weight", 2 * EMBD, EMBD)
        self.norm(f"{at}enorm", EMBD)
        self.norm(f"{at}hnorm", EMBD)

    def attention(self, at: str) -> None:
        recipe = self.recipe
        for name in recipe.norms:
            self.norm(at + name, EMBD)
        if recipe.attention == "latent":
            self.latent_attention(at)
            return
        kv_width = recipe.kv_heads * HEAD
        widths = {"q": HEADS * HEAD, "k": kv_width, "v": kv_width}
        if recipe.attention == "fused":
            widths = {"qkv": sum(widths.values())}
        for part, width in widths.items():
            self.matrix(f"{at}attn_{part}.weight", EMBD, width)
            if recipe.qkv_bias:
                self.bias(f"{at}attn_{part}.bias", width)
        self.matrix(f"{at}attn_output.weight", HEADS * HEAD, EMBD)
        if recipe.output_bias:
            self.bias(f"{at}attn_output.bias", EMBD)
        shapes = {
            "head": ((HEAD,), (HEAD,)),
            "row": ((HEADS * HEAD,), (kv_width,)),
            "per_head": ((HEAD, HEADS), (HEAD, recipe.kv_heads)),
        }
        if recipe.qk_norm:
            for part, shape in zip("qk", shapes[recipe.qk_norm], strict=True):
                around_one = 1 + 0.1 * self.random.standard_normal(shape[::-1])
                self.writer.add_tensor(f"{at}attn_{part}_norm.weight", around_one.astype(np.float32))

    def latent_attention(self, at: str) -> None:
        """Multi-head latent attention: queries and keys of low rank, their rotated values apart."""
        plain = LATENT_HEAD - HEAD
        for part, width in {"q_a": Q_RANK, "kv_a": KV_RANK}.items():
            self.norm(f"{at}attn_{part}_norm", width)
        self.matrix(f"{at}attn_q_a.weight", EMBD, Q_RANK)
        self.matrix(f"{at}attn_q_b.weight", Q_RANK, HEADS * LATENT_HEAD)
        self.matrix(f"{at}attn_kv_a_mqa.weight", EMBD, KV_RANK + HEAD)
        self.matrix(f"{at}attn_k_b.weight", plain, KV_RANK, HEADS)
        self.matrix(f"{at}attn_v_b.weight", KV_RANK, HEAD, HEADS)
        self.matrix(f"{at}attn_output.weight", HEADS * HEAD, EMBD)

    def feed_forward(self, at: str, dense: bool) -> None:
        if self.recipe.ffn == "experts" and not dense:
            self.experts(at)
            return
        matrices = {"ffn_gate": (EMBD, FF), "ffn_up": (EMBD, FF), "ffn_down": (FF, EMBD)}
        if self.recipe.ffn in ("plain", "fused"):
            del matrices["ffn_gate"]
        if self.recipe.ffn == "fused":
            matrices["ffn_up"] = (EMBD, 2 * FF)
        for name, shape in matrices.items():
            self.matrix(f"{at}{name}.weight", *shape)
            if self.recipe.ffn_bias:
                self.bias(f"{at}{name}.bias", shape[1])

    def experts(self, at: str) -> None:
        width = EXPERT_FF if "expert_feed_forward_length" in self.recipe.numbers else FF
        shapes = {"gate": (EMBD, width), "up": (EMBD, width), "down": (width, EMBD)}
        self.matrix(f"{at}ffn_gate_inp.weight", EMBD, EXPERTS, exact=True)
        if self.recipe.ffn_bias:
            self.bias(f"{at}ffn_gate_inp.bias", EXPERTS)
        if self.recipe.expert_bias:
            self.bias(f"{at}exp_probs_b.bias", EXPERTS)
        for part, shape in shapes.items():
            self.matrix(f"{at}ffn_{part}_exps.weight", *shape, EXPERTS)
            if self.recipe.ffn_bias:
                self.bias(f"{at}ffn_{part}_exps.bias", shape[1], EXPERTS)
            if self.recipe.shared_expert:
                self.matrix(f"{at}ffn_{part}_shexp.weight", *shape)


def add_no_tokenizer(writer: GGUFWriter) -> None:
    writer.add_string("tokenizer.ggml.model", "none")


def add_byte_tokenizer(
    writer: GGUFWriter, template: str = CHAT_TEMPLATE, control: Sequence[str] = ()
) -> None:
    """A vocabulary in SentencePiece style: control tokens, all bytes, then some text pieces. Further
    `control` tokens take the places of the last pieces."""
    control_type, unknown, byte, normal = 3, 2, 6, 1
    tokens = ["<unk>", "<s>", "</s>"]
    types = [unknown, control_type, control_type]
    tokens += [f"<0x{value:02X}>" for value in range(256)]
    types += [byte] * 256
    tokens += ["<|im_start|>", "<|im_end|>"]
    types += [control_type, control_type]
    tokens += control
    types += [control_type] * len(control)
    letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,"
    pieces = ["\N{LOWER ONE EIGHTH BLOCK}", *letters][: VOCAB - len(tokens)]
    tokens += pieces
    types += [normal] * len(pieces)
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [-float(index) for index in range(len(tokens))])
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", tokens.index("<|im_end|>"))
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    writer.add_string("tokenizer.chat_template", template)


def _apertus(maker: Maker) -> None:
    for name in ("alpha_n", "alpha_p", "beta"):
        values = [float(value) for value in 0.5 + maker.random.random(maker.layers)]
        maker.per_layer(f"xielu.{name}", values, GGUFValueType.FLOAT32)
    maker.per_layer("xielu.eps", [-1e-6] * maker.layers, GGUFValueType.FLOAT32)
    around_one = 1 + 0.1 * maker.random.standard_normal(HEAD // 2)
    maker.writer.add_tensor("rope_freqs.weight", around_one.astype(np.float32))


def _attention_sinks(maker: Maker, at: str) -> None:
    maker.bias(f"{at}attn_sinks.weight", HEADS)


def _scaled_experts(maker: Maker, at: str) -> None:
    maker.bias(f"{at}ffn_gate_inp_shexp.weight", EMBD)


def _odd_window(maker: Maker) -> None:
    pattern = [layer % 5 not in (1, 3) for layer in range(maker.layers)]
    maker.per_layer(f"{maker.name}.attention.sliding_window_pattern", pattern, GGUFValueType.BOOL)


def _maple(maker: Maker) -> None:
    _odd_window(maker)
    limits = [0.5] * maker.layers
    maker.per_layer(f"{maker.name}.swiglu_clamp_exp", limits, GGUFValueType.FLOAT32)


def _gemma4(maker: Maker) -> None:
    _odd_window(maker)
    around_one = 1 + 0.1 * maker.random.standard_normal(HEAD // 2)
    maker.writer.add_tensor("rope_freqs.weight", around_one.astype(np.float32))


def _layer_scale(maker: Maker, at: str) -> None:
    maker.writer.add_tensor(f"{at}layer_output_scale.weight", np.array([0.9], np.float32))


FULL_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
SLIDING = {"attention.sliding_window": WINDOW}
SHARED_EXPERTS = EXPERT_NUMBERS | {"expert_shared_count": 1}
SIGMOID = {"expert_gating_func": 2}
PLAIN = Recipe()
EXPERTISE = replace(PLAIN, ffn="experts", numbers=EXPERT_NUMBERS)
LAYER_NORM = replace(PLAIN, layer_norm=True, norm_bias=True)
SCALES = {"logit_scale": 8.0, "residual_scale": 0.22, "embedding_scale": 12.0, "attention.scale": 0.1}
RECIPES = {
    "apertus": replace(PLAIN, qk_norm="head", ffn="plain", extra=_apertus),
    "arcee": replace(PLAIN, ffn="plain"),
    "bailingmoe": replace(EXPERTISE, shared_expert=True, numbers=SHARED_EXPERTS),
    "bailingmoe2": replace(
        EXPERTISE,
        attention="fused",
        qk_norm="head",
        expert_bias=True,
        shared_expert=True,
        leading_dense=2,
        numbers=SHARED_EXPERTS | SIGMOID,
    ),
    "bitnet": replace(
        PLAIN,
        tied=True,
        norms=("attn_norm", "attn_sub_norm", "ffn_norm"),
        layer=lambda maker, at: maker.norm(f"{at}ffn_sub_norm", FF),
    ),
    "chatglm": replace(PLAIN, attention="fused", qkv_bias=True, ffn="fused"),
    "cohere2": replace(
        PLAIN,
        layer_norm=True,
        tied=True,
        norms=("attn_norm",),
        numbers=SLIDING,
        floats={"logit_scale": 0.25},
    ),
    "command-r": replace(
        PLAIN, layer_norm=True, tied=True, norms=("attn_norm",), floats={"logit_scale": 0.25}
    ),
    "deepseek": replace(EXPERTISE, shared_expert=True, leading_dense=1, numbers=SHARED_EXPERTS),
    "deepseek2": replace(
        EXPERTISE,
        attention="latent",
        kv_heads=1,
        shared_expert=True,
        expert_bias=True,
        leading_dense=3,
        numbers=SHARED_EXPERTS
        | SIGMOID
        | {
            "attention.q_lora_rank": Q_RANK,
            "attention.kv_lora_rank": KV_RANK,
            "attention.key_length": KV_RANK + HEAD,
            "attention.value_length": KV_RANK,
            "attention.key_length_mla": LATENT_HEAD,
            "attention.value_length_mla": HEAD,
        },
    ),
    "dots1": replace(
        EXPERTISE,
        kv_heads=HEADS,
        qk_norm="head",
        expert_bias=True,
        shared_expert=True,
        leading_dense=1,
        numbers=SHARED_EXPERTS | SIGMOID,
    ),
    "ernie4_5": replace(PLAIN, tied=True),
    "ernie4_5-moe": replace(
        EXPERTISE,
        tied=True,
        expert_bias=True,
        shared_expert=True,
        leading_dense=1,
        numbers=EXPERT_NUMBERS
        | {"expert_shared_feed_forward_length": EXPERT_FF, "interleave_moe_layer_step": 1},
    ),
    "exaone": replace(PLAIN, tied=True),
    "exaone4": replace(PLAIN, qk_norm="head", norms=("post_attention_norm", "post_ffw_norm"), extra_layers=1),
    "falcon": replace(LAYER_NORM, attention="fused", tied=True, norms=("attn_norm",), ffn="plain"),
    "gemma3": replace(
        PLAIN,
        tied=True,
        embedding_gain=0.3,
        qk_norm="head",
        norms=FULL_NORMS,
        numbers=SLIDING,
        floats={"rope.freq_base_swa": 1000.0},
    ),
    "gemma4": replace(
        PLAIN,
        tied=True,
        embedding_gain=0.3,
        qk_norm="head",
        norms=FULL_NORMS,
        numbers=SLIDING
        | {
            "embedding_length_per_layer_input": 0,
            "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD,
            "rope.dimension_count_swa": HEAD,
        },
        floats={"rope.freq_base_swa": 1000.0, "final_logit_softcapping": 30.0},
        extra=_gemma4,
        layer=_layer_scale,
    ),
    "gpt-oss": replace(
        EXPERTISE,
        qkv_bias=True,
        output_bias=True,
        norms=("attn_norm", "post_attention_norm"),
        ffn_bias=True,
        numbers=EXPERT_NUMBERS | SLIDING | {"rope.scaling.original_context_length": 128},
        floats={"rope.freq_base": 150_000.0, "rope.scaling.factor": 32.0},
        texts={"rope.scaling.type": "yarn"},
        layer=_attention_sinks,
    ),
    "gptneox": replace(
        LAYER_NORM,
        kv_heads=HEADS,
        attention="fused",
        qkv_bias=True,
        output_bias=True,
        ffn="plain",
        ffn_bias=True,
        flags={"use_parallel_residual": True},
    ),
    "granite": replace(PLAIN, tied=True, embedding_gain=0.3, floats=SCALES),
    "granitemoe": replace(
        EXPERTISE,
        tied=True,
        embedding_gain=0.3,
        shared_expert=True,
        numbers={
            "expert_count": EXPERTS,
            "expert_used_count": EXPERTS_USED,
            "expert_shared_feed_forward_length": FF,
        },
        floats=SCALES,
    ),
    "hunyuan-dense": replace(PLAIN, tied=True, qk_norm="head"),
    "hunyuan-moe": replace(
        EXPERTISE,
        tied=True,
        qk_norm="head",
        shared_expert=True,
        numbers=EXPERT_NUMBERS | {"feed_forward_length": EXPERT_FF},
    ),
    "internlm2": PLAIN,
    "llama": replace(PLAIN, tied=True),
    "maple": replace(EXPERTISE, qk_norm="head", numbers=EXPERT_NUMBERS | SLIDING, extra=_maple),
    "mellum": replace(EXPERTISE, qk_norm="head", numbers=EXPERT_NUMBERS | SLIDING),
    "mimo2": replace(
        EXPERTISE,
        expert_bias=True,
        leading_dense=1,
        numbers=EXPERT_NUMBERS | SLIDING,
        floats={"rope.freq_base_swa": 1000.0},
        extra=_odd_window,
        layer=_attention_sinks,
    ),
    "minicpm": replace(PLAIN, tied=True, embedding_gain=0.3, floats=SCALES),
    "minimax-m2": replace(
        EXPERTISE,
        qk_norm="row",
        expert_bias=True,
        numbers=EXPERT_NUMBERS | SIGMOID | {"feed_forward_length": EXPERT_FF},
    ),
    "mistral3": PLAIN,
    "nemotron": replace(LAYER_NORM, ffn="plain"),
    "olmo2": replace(PLAIN, qk_norm="row", norms=("post_attention_norm", "post_ffw_norm"), numbers=SLIDING),
    "olmoe": replace(
        EXPERTISE,
        kv_heads=HEADS,
        qk_norm="row",
        numbers={"expert_count": EXPERTS, "expert_used_count": EXPERTS_USED},
    ),
    "orion": LAYER_NORM,
    "phi2": replace(
        LAYER_NORM,
        norms=("attn_norm",),
        qkv_bias=True,
        output_bias=True,
        head_bias=True,
        ffn="plain",
        ffn_bias=True,
    ),
    "phi3": replace(PLAIN, attention="fused", ffn="fused"),
    "phimoe": replace(
        EXPERTISE,
        norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        head_bias=True,
        numbers={"expert_count": EXPERTS, "expert_used_count": EXPERTS_USED},
    ),
    "qwen2": replace(PLAIN, tied=True, qkv_bias=True),
    "qwen2moe": replace(
        EXPERTISE,
        qkv_bias=True,
        shared_expert=True,
        layer=_scaled_experts,
        numbers=EXPERT_NUMBERS | {"expert_shared_feed_forward_length": EXPERT_FF},
    ),
    "qwen3": replace(PLAIN, qk_norm="head"),
    "qwen3moe": replace(EXPERTISE, qk_norm="head"),
    "seed_oss": replace(PLAIN, qkv_bias=True, norms=("attn_norm", "post_attention_norm")),
    "smallthinker": replace(EXPERTISE, numbers=EXPERT_NUMBERS | SLIDING | SIGMOID),
    "smollm3": replace(PLAIN, tied=True),
    "stablelm": replace(LAYER_NORM, numbers={"rope.dimension_count": 8}),
    "starcoder2": replace(LAYER_NORM, tied=True, qkv_bias=True, output_bias=True, ffn="plain", ffn_bias=True),
    "xverse": PLAIN,
}
ARCHITECTURES = tuple(RECIPES)


def make_tiny(
    architecture: str,
    path: Path,
    *,
    layers: int = 6,
    seed: int = 0,
    quantization: GGMLQuantizationType | None = None,
    tokenizer: str = "none",
    template: str = CHAT_TEMPLATE,
    control: Sequence[str] = (),
) -> Path:
    """Write a tiny model of an architecture in RECIPES; `tokenizer` is 'none' or 'bytes', which has the chat
    template and, beside its own, the control tokens that are given."""
    maker = Maker(architecture, RECIPES[architecture], path, layers, seed)
    maker.template, maker.control = template, control
    maker.quantization = quantization
    maker.metadata(tokenizer)
    maker.tensors()
    writer = maker.writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
