"""Ternary models as checkpoints of the hub: config.json, safetensors and a tokenizer, as a source of weights.

A layer's matrix comes in one of three ways (transformers, integrations/bitnet.py):

- packed, uint8: four rows in a byte. Of P = rows / 4 packed rows (rounded up), packed row p has rows p,
  p + P, p + 2 P and p + 3 P in bits 0, 2, 4 and 6, as weight + 1. Beside it, products are *divided* by
  `weight_scale` where config.json's linear_class is "bitlinear" (the default), and *multiplied* by it where
  that is "autobitlinear": the same name for a scale and for its inverse.
- masters (quantization_mode "online", and the first b1.58 models, BitnetForCausalLM): they are rounded by
  their mean magnitude each time they are used, so the rounded ones are the model.
- floats that are ternary already, as in TriLM. Where config.json has no quantization, activations are not
  rounded either, and they get all planes; but one where each group of columns has a scale of its own, as in
  Ternary-Bonsai, since activations then have such scales, too (native/FORMAT.md).

Rows of queries and keys keep the order of the hub, whose rotary embedding pairs halves; GGUF's `llama` has
them reordered.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from cordee.convert.llama3_rope import llama3_divisors
from cordee.convert.minicpm import Minicpm, minicpm_of_config
from cordee.convert.mixture import with_mixture_of_config
from cordee.convert.mlx import plain_tensors
from cordee.convert.safetensors import StoredTensor, is_array, is_object, read_json, stored_tensors
from cordee.convert.scales import (
    Read,
    found_scales,
    found_span_scales,
    grouped,
    mean_scale,
    rounded_masters,
)
from cordee.convert.spans import with_scales_of_spans
from cordee.convert.ternary_file import (
    DIVISORS,
    EMBEDDING,
    HEAD,
    OUTPUT_NORM,
    TernaryModel,
    exact_type,
    strips,
)
from cordee.convert.tokenizer import add_tokenizer
from cordee.convert.yarn import Yarn, yarn_of_config
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import LAYERS_LIMIT
from cordee.models.metadata import FETCH_AGAIN

# The hub's classes of models: the architecture in GGUF, and the activation if config.json does not give it.
ARCHITECTURES = {
    "BitNetForCausalLM": ("bitnet", "relu2"),  # 2B 4T
    "BitnetForCausalLM": ("bitnet", "silu"),  # bitnet_b1_58-large and -3B
    "LlamaForCausalLM": ("llama", "silu"),  # Llama3-8B-1.58, Falcon3, Falcon-E, TriLM
    "Qwen3ForCausalLM": ("qwen3", "silu"),  # Ternary-Bonsai
    "MapleForCausalLM": ("maple", "silu"),
    "MiniCPMForCausalLM": ("minicpm", "silu"),  # BitCPM
}
# In which ways that have a file of their own here RoPE may be stretched.
STRETCHED = {"llama": ("yarn", "llama3"), "qwen3": ("yarn",), "maple": ("yarn",), "minicpm": ("longrope",)}
# Whose activations get so many planes, not all, with scales of rows: two round next to nothing away.
PLANES = {"maple": 2, "minicpm": 2}
ACTIVATIONS: dict[str, Literal["silu", "relu2"]] = {"silu": "silu", "relu2": "relu2"}
# The names of each tensor on the hub; some have had two.
OUTSIDE_LAYERS = {
    EMBEDDING: ("model.embed_tokens", "model.word_embeddings"),
    HEAD: ("lm_head",),
    OUTPUT_NORM: ("model.norm",),
}
IN_LAYERS = {
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_output": ("self_attn.o_proj",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_down": ("mlp.down_proj",),
    "ffn_gate_inp": ("mlp.gate",),
    "ffn_gate_exps": ("mlp.experts.gate_proj", "mlp.switch_mlp.gate_proj"),
    "ffn_up_exps": ("mlp.experts.up_proj", "mlp.switch_mlp.up_proj"),
    "ffn_down_exps": ("mlp.experts.down_proj", "mlp.switch_mlp.down_proj"),
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "attn_q_norm": ("self_attn.q_norm",),
    "attn_k_norm": ("self_attn.k_norm",),
    "attn_sub_norm": ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
}
BUFFERS = "rotary_emb.inv_freq"  # computed from config.json
PACKED_ROWS = 4
MASTERS = (
    ' If these are masters of a b1.58 model, its config.json must say so: "quantization_config": '
    '{"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}.'
)


@dataclass(frozen=True)
class Quantization:
    """What config.json says about the layers' matrices."""

    declared: bool  # b1.58: activations are rounded to int8
    masters: bool  # floats are rounded when they are used
    divides: bool  # products are divided by weight_scale


class Checkpoint:
    """See `cordee.convert.convert.Convertible`.

    `source` is a folder, or a safetensors file in one. Without a `title` the model is named after the folder.
    """

    def __init__(self, source: Path, pre: str | None = None, title: str | None = None) -> None:
        """Raises BadModelFile or UnsupportedModel."""
        self._folder = source if source.is_dir() else source.parent
        self._title = title or self._folder.resolve().name
        self._config = read_json(self._folder / "config.json")
        self._tensors = plain_tensors(stored_tensors(source), self._config)
        self._quantization = quantization(self._config, self._title)
        self._tied = self._is_tied()
        self._pre = pre
        self._scales: dict[str, np.ndarray] = {}
        self._means: dict[str, np.float32] = {}
        self._columns = 0  # that share a scale; 0: all of a row
        self._tables: tuple[str, ...] = (EMBEDDING, HEAD)  # what is no matrix of codes
        self._yarn: Yarn | None = None
        self._divisors: np.ndarray | None = None
        self._minicpm: Minicpm | None = None

    def model(self, layout: Literal["trit2", "trit5"], head: str) -> TernaryModel:
        """See `Convertible.model`."""
        heads = self._size("num_attention_heads")
        n_embd = self._size("hidden_size")
        architecture, usual = self._architecture()
        activation = self._config.get("hidden_act", usual)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedModel(f"{self._title} has the activation {activation}, which is unknown here.")
        n_vocab = self._vocabulary_size(n_embd)
        model = TernaryModel(
            architecture=architecture,
            layers=self._size("num_hidden_layers", LAYERS_LIMIT),
            n_embd=n_embd,
            n_ff=self._size("intermediate_size"),
            n_vocab=n_vocab,
            heads=heads,
            kv_heads=self._size("num_key_value_heads", default=heads),
            head_dim=self._size("head_dim", default=n_embd // heads),
            context=self._size("max_position_embeddings", default=2048),
            rope_base=_rope_base(self._config, self._title, *STRETCHED.get(architecture, ())),
            epsilon=self._number("rms_norm_eps"),
            activation=ACTIVATIONS[activation],
            rope="neox",
            sub_norms=self._find("blk.0.attn_sub_norm.weight") is not None,
            head_norms=self._find("blk.0.attn_q_norm.weight") is not None,
            layout=layout,
            planes=1 if self._quantization.declared else PLANES.get(architecture, 3),
            head=head,
        )
        if architecture == "maple":
            model = with_mixture_of_config(model, self._config, self._title)
        if architecture == "minicpm":
            self._minicpm, model = minicpm_of_config(model, self._config, self._title)
        self._refuse_unknown(model)
        model = self._stretched(model)
        if not self._quantization.declared and self._stored("blk.0.attn_q.weight").dtype != "U8":
            model = with_scales_of_spans(model, self.first_rows, tied=self._tied)
        self._columns = model.scale_columns
        if model.embedding == "codes":
            self._tables = ()
            return model
        if self._stored(EMBEDDING).computed is not None:  # MLX's codes of 4 bits: 8 hold them well
            return replace(model, embedding=GGMLQuantizationType.Q8_0)
        return replace(model, embedding=exact_type(self, n_vocab))

    def first_rows(self, name: str) -> np.ndarray:
        """Some rows of a matrix, as float32."""
        stored = self._stored(name)
        if len(stored.shape) != 2:
            raise BadModelFile(f"{stored.name} is no matrix: {FETCH_AGAIN}.")
        return self.floats(name, *next(strips(stored.shape[0])))

    def nbytes(self, name: str) -> int:
        """See `Convertible.nbytes`."""
        return self._stored(name).nbytes

    @property
    def is_tied(self) -> bool:
        """See `Convertible.is_tied`."""
        return self._tied

    def place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """See `Convertible.place`."""
        stored = self._stored(name)
        return stored.name, stored.shape

    def check(self, name: str, rows: int, cols: int) -> None:
        """See `Convertible.check`."""
        stored = self._stored(name)
        packed = stored.dtype == "U8"
        expected = (-(-rows // PACKED_ROWS) if packed else rows, cols)
        if stored.shape != expected:
            raise BadModelFile(f"{stored.name} is {stored.shape}, not {expected}: {FETCH_AGAIN}.")
        found = self._found_scales(name, stored, rows)
        if not self._columns:  # such are as many as 1 % of all weights: they are found again rather than kept
            self._scales[name] = found

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`; the matrix was checked."""
        stored = self._stored(name)
        return (
            self._scales[name] if name in self._scales else self._found_scales(name, stored, stored.shape[0])
        )

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `WeightSource.rows`."""
        stored = self._stored(name)
        if stored.dtype == "U8" and name not in self._tables:
            return unpacked_rows(stored.rows, stored.shape[0], first, last)
        values = self.floats(name, first, last)
        if name in self._tables:
            return values
        if self._quantization.masters:
            return rounded_masters(values, self._means[name])
        return np.sign(values).astype(np.int8)

    def floats(self, name: str, first: int, last: int) -> np.ndarray:
        """See `Convertible.floats`."""
        stored = self._stored(name)
        if stored.dtype == "U8":
            raise UnsupportedModel(f"{stored.name} is packed, which only matrices of layers may be.")
        return stored.rows(first, last)

    def vector(self, name: str) -> np.ndarray:
        """See `WeightSource.vector`."""
        if self._divisors is not None and name == DIVISORS:
            return self._divisors
        if self._yarn is not None and name == DIVISORS:
            return self._yarn.divisors
        if self._minicpm is not None and name == DIVISORS:
            return np.asarray(self._minicpm.divisors)
        values = self._stored(name).all()
        if self._minicpm is not None and name == OUTPUT_NORM:
            return values / self._minicpm.head_scale
        is_head_norm = name.endswith(("attn_q_norm.weight", "attn_k_norm.weight"))
        return values * self._yarn.factor if self._yarn is not None and is_head_norm else values

    def describe(self, writer: GGUFWriter) -> None:
        """See `Convertible.describe`."""
        writer.add_name(self._title)
        add_tokenizer(writer, self._folder, self._stored(EMBEDDING).shape[0], self._pre)

    def _found_scales(self, name: str, stored: StoredTensor, rows: int) -> np.ndarray:
        """The scales of a matrix; reads all of it."""
        stated = self._stated_scale(name, rows)
        if stored.dtype == "U8":
            if stated is None:
                raise BadModelFile(f"{stored.name} is packed, but has no weight_scale: {FETCH_AGAIN}.")
            _check_codes(stored)
            return stated
        read = partial(self.floats, name)
        if self._quantization.masters:
            mean = mean_scale(stored.name, rows, read)
            self._means[name] = mean
            return np.array([1 / (np.float32(1) / mean)], dtype=np.float32)  # the definition inverts it twice
        remedy = "" if self._quantization.declared else MASTERS
        if self._columns:
            return found_span_scales(stored.name, rows, read, self._columns)
        found = found_scales(stored.name, rows, read, remedy)
        return found if stated is None else _product(found, stated)

    def _stretched(self, model: TernaryModel) -> TernaryModel:
        """The model with Llama 3's divisors or YaRN, if it has that."""
        parameters = self._config.get("rope_parameters") or self._config.get("rope_scaling")
        kinds = (parameters.get("rope_type"), parameters.get("type")) if is_object(parameters) else ()
        if is_object(parameters) and "llama3" in kinds:
            self._divisors = llama3_divisors(parameters, model.head_dim, model.rope_base, self._title)
            return replace(model, divisors=True)
        if not is_object(parameters) or "yarn" not in kinds:
            return model
        if not model.head_norms:
            raise UnsupportedModel(
                f"{self._title} has RoPE of type yarn, which the ternary engine does not have."
            )
        self._yarn = yarn_of_config(parameters, model.head_dim, model.rope_base, self._title)
        return replace(model, divisors=True)

    def _stated_scale(self, name: str, rows: int) -> np.ndarray | None:
        """The factors by which weight_scale multiplies a matrix; None if there is none."""
        stored = self._tensors.get(f"{self._stored(name).name.removesuffix('.weight')}.weight_scale")
        if stored is None:
            return None
        if not self._quantization.declared or self._quantization.masters:
            raise BadModelFile(
                f"{self._folder}: config.json does not say whether to multiply by {stored.name} or to divide "
                f"(quantization_config, linear_class): {FETCH_AGAIN}."
            )
        scales = stored.all().astype(np.float32)
        if len(scales) not in (1, rows):
            raise BadModelFile(f"{stored.name} has {len(scales)} values for {rows} rows: {FETCH_AGAIN}.")
        with np.errstate(divide="ignore", over="ignore"):
            factors = np.float32(1) / scales if self._quantization.divides else scales
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise BadModelFile(f"{stored.name} holds a scale that is not a positive number: {FETCH_AGAIN}.")
        return grouped(factors)

    def _architecture(self) -> tuple[str, str]:
        found = self._config.get("architectures")
        name = found[0] if is_array(found) and found else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{self._title} is of class {name}; the ternary engine runs {', '.join(ARCHITECTURES)}."
            )
        return ARCHITECTURES[name]

    def _is_tied(self) -> bool:
        has_head = any(name in self._tensors for name in _hub_names(HEAD))
        return bool(self._config.get("tie_word_embeddings", not has_head))

    def _vocabulary_size(self, n_embd: int) -> int:
        """The rows of embedding and head, which both have all tokens."""
        embedding, head = self._stored(EMBEDDING), self._stored(HEAD)
        if len(embedding.shape) != 2 or embedding.shape[1] != n_embd or not embedding.shape[0]:
            raise BadModelFile(f"{embedding.name} is {embedding.shape}, not {n_embd} wide: {FETCH_AGAIN}.")
        if head.shape != embedding.shape:
            raise BadModelFile(f"{head.name} is {head.shape}, not {embedding.shape}: {FETCH_AGAIN}.")
        return embedding.shape[0]

    def _find(self, name: str) -> StoredTensor | None:
        """The stored tensor that has this name in our file; None if there is none."""
        if name == HEAD and self._tied:
            name = EMBEDDING
        return next(filter(None, map(self._tensors.get, _hub_names(name))), None)

    def _stored(self, name: str) -> StoredTensor:
        found = self._find(name)
        if found is None:
            raise BadModelFile(f"{self._folder} has no tensor {_hub_names(name)[0]}: {FETCH_AGAIN}.")
        return found

    def _refuse_unknown(self, model: TernaryModel) -> None:
        """Refuse a tensor that the engine would not use: the model needs it."""
        known = {name for ours in OUTSIDE_LAYERS for name in _hub_names(ours)}
        for layer in range(model.layers):
            for ours in (*model.matrices(), *model.norms(), *model.routers()):
                names = _hub_names(f"blk.{layer}.{ours}.weight")
                known.update(names)
                if ours in model.matrices():
                    known.update(f"{name}_scale" for name in names)
        for name in self._tensors:
            if name not in known and not name.endswith(BUFFERS):
                raise UnsupportedModel(f"{self._title} has {name}, which the ternary engine does not use.")

    def _number(self, key: str) -> float:
        value: object = self._config.get(key)
        if not _is_positive(value):
            raise BadModelFile(f"{self._folder}: config.json has no number {key}: {FETCH_AGAIN}.")
        return value

    def _size(self, key: str, limit: int = 1 << 31, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < limit:
            raise BadModelFile(f"{self._folder}: config.json has no size {key}: {FETCH_AGAIN}.")
        return value


def _hub_names(name: str) -> list[str]:
    """The names that a tensor of our file may have on the hub."""
    if name in OUTSIDE_LAYERS:
        return [f"{hub}.weight" for hub in OUTSIDE_LAYERS[name]]
    _, layer, ours, _ = name.split(".")
    return [f"model.layers.{layer}.{hub}.weight" for hub in IN_LAYERS[ours]]


def is_ternary(config: dict[str, Any], title: str) -> bool:
    """Whether a config.json says by itself that a model is ternary. Raises as `quantization`."""
    return config.get("architectures") == ["MapleForCausalLM"] or quantization(config, title).declared


def quantization(config: dict[str, Any], title: str) -> Quantization:
    """What the config.json of a model says about its matrices; `title` names the model in errors.

    Raises:
        UnsupportedModel: they are of a kind that the ternary engine does not have.
    """
    found = config.get("quantization_config")
    if not found or found == config.get("quantization"):  # the latter is MLX's, read in mlx.py
        first = config.get("architectures") == ["BitnetForCausalLM"]
        return Quantization(declared=first, masters=first, divides=True)
    if not is_object(found) or found.get("quant_method") != "bitnet":
        method = found.get("quant_method") if is_object(found) else found
        raise UnsupportedModel(f"{title} is quantized by {method}, which is not a ternary method known here.")
    if found.get("use_rms_norm"):
        raise UnsupportedModel(
            f"{title} has a norm before each matrix, which the ternary engine does not support."
        )
    multiplies = found.get("linear_class", "bitlinear") == "autobitlinear"
    return Quantization(
        declared=True,
        masters=multiplies and found.get("quantization_mode", "offline") == "online",
        divides=not multiplies,
    )


def _rope_base(config: dict[str, Any], title: str, *known: str) -> float:
    """The base of RoPE, of one of the `known` types or plain. Newer configurations have it among others."""
    parameters: object = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not is_object(parameters):
        raise BadModelFile(f"{title}: config.json has no parameters of RoPE: {FETCH_AGAIN}.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", *known) and not (kind == "linear" and parameters.get("factor") == 1):
        raise UnsupportedModel(f"{title} has RoPE of type {kind}, which the ternary engine does not have.")
    base = config.get("rope_theta") or parameters.get("rope_theta") or 10_000.0
    if not _is_positive(base):
        raise BadModelFile(f"{title}: config.json has the rope_theta {base}: {FETCH_AGAIN}.")
    return float(base)


def _is_positive(value: object) -> TypeGuard[float]:
    """Whether it is a positive number that float32 can hold."""
    return isinstance(value, int | float) and 0 < value <= float(np.finfo(np.float32).max)


def unpacked_rows(read: Read, quarter: int, first: int, last: int) -> np.ndarray:
    """Rows of a packed matrix as int8 of -1, 0, 1; `read` gives some of its `quarter` packed rows."""
    blocks: list[np.ndarray] = []
    while first < last:
        number, at = divmod(first, quarter)
        end = min(quarter, at + last - first)
        blocks.append((read(at, end) >> 2 * number & 3).astype(np.int8) - 1)
        first += end - at
    return np.concatenate(blocks)


def _check_codes(stored: StoredTensor) -> None:
    """Refuse a packed matrix with a code of 3, which stands for no weight."""
    for first, last in strips(stored.shape[0]):
        packed = stored.rows(first, last)
        if (packed & packed >> 1 & 0b01010101).any():
            raise UnsupportedModel(
                f"{stored.name} is not ternary: it holds a code that stands for no weight."
            )


def _product(found: np.ndarray, stated: np.ndarray) -> np.ndarray:
    """Scales found in the values, times those stated beside them."""
    count = lcm(len(found), len(stated))
    return np.repeat(found, count // len(found)) * np.repeat(stated, count // len(stated))
