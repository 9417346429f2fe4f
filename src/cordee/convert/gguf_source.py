"""Ternary models in other GGUF files, as a source of weights: llama.cpp's types, and bitnet.cpp's I2_S.

A source is ternary when each row of a layer's matrix holds nothing but -s, 0 and s: stored as TQ1_0, TQ2_0,
or in any type that keeps such values apart (F32, F16, BF16, Q8_0, ...).

I2_S (microsoft/BitNet, src/ggml-bitnet-mad.cpp, quantize_i2_s) holds 128 consecutive weights in 32 bytes:
byte p has weights p, p + 32, p + 64 and p + 96 in bits 6, 4, 2 and 0, as weight + 1. After all weights comes
their one scale, float32, in 32 bytes. Published files are like this, and so is what x86 programs write unless
they were built without ACT_PARALLEL: then a byte has four rows. Programs for ARM write blocks of 64 in 16
bytes. Nothing in a file says which it is. Only the first kind is read here; instead of another, convert the
model that it was made from.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from cordee.convert import ends
from cordee.convert.minicpm import LONG_FACTORS, SHORT_FACTORS, Minicpm, minicpm_of
from cordee.convert.mixture import with_mixture
from cordee.convert.rotation import rotation_of
from cordee.convert.scales import found_scales, found_span_scales
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
from cordee.convert.yarn import Yarn, yarn_of
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.blocks import decoded
from cordee.models.fit import own_context, size_of
from cordee.models.gguf import (
    BLOCK,
    I2_BLOCK,
    I2_TAIL_BYTES,
    TERNARY_KEY,
    BitnetType,
    BlockType,
    Header,
    Tensor,
)
from cordee.models.metadata import CONVERT_AGAIN, FETCH_AGAIN, Array

# Architectures by their names in GGUF: their names in our files, and how RoPE pairs values.
ARCHITECTURES: dict[str, tuple[str, Literal["neox", "interleaved"]]] = {
    "bitnet": ("bitnet", "neox"),
    "bitnet-b1.58": ("bitnet", "neox"),
    "bitnet-25": ("bitnet", "neox"),
    "llama": ("llama", "interleaved"),
    "qwen3": ("qwen3", "neox"),
    "maple": ("maple", "neox"),
    "minicpm": ("minicpm", "interleaved"),
}
# Whose activations get so many planes where their scales are of rows; those of others were trained with one.
PLANES = {"maple": 2, "minicpm": 2}
# BitNet b1.58 2B 4T is the only model of that architecture with squared ReLU. It has the vocabulary of
# Llama 3, and its file does not say how text is split.
RELU2_VOCABULARY = 128_256
LLAMA3_PRE = "llama-bpe"
I2_BLOCK_BYTES, I2_SHIFTS = I2_BLOCK // 4, np.array([6, 4, 2, 0], dtype=np.uint8)[:, None]
# Types whose values F16 may not hold; it is more precise than all other types.
WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)


class GgufSource:
    """See `cordee.convert.convert.Convertible`."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.rotation = rotation_of(header)
        self._scales: dict[str, np.ndarray] = {}
        self._columns = 0  # that share a scale; 0: all of a row
        self._signs: dict[str, np.ndarray] = {}
        self._yarn: Yarn | None = None
        self._tables: tuple[str, ...] = (EMBEDDING, HEAD)  # what is no matrix of codes
        self._minicpm: Minicpm | None = None

    def model(self, layout: Literal["trit2", "trit5"], head: str) -> TernaryModel:
        """See `Convertible.model`."""
        if TERNARY_KEY in self.header.metadata:
            raise UnsupportedModel(f"{self.header.name} is a file for the ternary engine already.")
        model = _model(self.header, self, layout, head)
        if model.architecture == "minicpm":
            self._minicpm, model = minicpm_of(model, self.header)
        _refuse_unknown(self.header, model)
        self._yarn = yarn_of(self.header, model.head_dim, model.rope_base) if model.head_norms else None
        if self._yarn is None:
            _refuse_scaling(self.header, model)
        else:
            model = replace(model, divisors=True)
        _refuse_parts(self.header, model)
        self._columns = model.scale_columns
        if model.embedding == "codes":
            self._tables = ()
        if self.rotation is not None:
            name, rotations = self.header.name, model.rotations()
            self._signs = {key: self.rotation.vector(name, width) for key, width in rotations.items()}
        return model

    @property
    def is_tied(self) -> bool:
        """See `Convertible.is_tied`."""
        return self.header.tied

    def place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """See `Convertible.place`."""
        tensor = self.tensor(name)
        return name, _flat(tensor) if len(tensor.shape) > 1 else tensor.shape

    def check(self, name: str, rows: int, cols: int) -> None:
        """See `Convertible.check`."""
        if _flat(self.tensor(name)) != (rows, cols):
            raise BadModelFile(f"{self.header.name}: {name} is not {rows} x {cols}: {CONVERT_AGAIN}.")
        self.scales(name)

    def nbytes(self, name: str) -> int:
        """See `Convertible.nbytes`."""
        return self.tensor(name).nbytes

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; a tied head is the embedding.

        Raises:
            BadModelFile: there is none.
        """
        found = self.header.tensor(EMBEDDING if name == HEAD and self.header.tied else name)
        if found is None:
            raise BadModelFile(f"{self.header.name} has no tensor {name}: {CONVERT_AGAIN}.")
        return found

    def floats(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (exclusive) as float32."""
        tensor = self.tensor(name)
        if tensor.type is BitnetType.I2_S:
            return self._i2_weights(name, first, last).astype(np.float32) * self.scales(name)[0]
        rows = _flat(tensor)[0]
        row_bytes = tensor.nbytes // rows
        stored = _read(tensor, first * row_bytes, (last - first) * row_bytes).reshape(-1, row_bytes)
        if isinstance(tensor.type, BlockType):
            return decoded(stored, tensor.type)
        try:
            return dequantize(stored, tensor.type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{name} is stored as {tensor.type.name}, which cannot be read here: "
                "give a file whose head and embedding are F16, BF16, Q8_0 or K-quants."
            ) from error

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `WeightSource.rows`."""
        if self.tensor(name).type is BitnetType.I2_S and name not in self._tables:
            return self._i2_weights(name, first, last)
        floats = self.floats(name, first, last)
        return floats if name in self._tables else np.sign(floats).astype(np.int8)

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`.

        Raises:
            UnsupportedModel: the tensor is not ternary.
            BadModelFile: it is damaged.
        """
        tensor = self.tensor(name)
        if self._columns:  # as many as 1 % of all weights: they are found again rather than kept
            return found_span_scales(name, _flat(tensor)[0], partial(self.floats, name), self._columns)
        if name not in self._scales:
            if tensor.type is BitnetType.I2_S:
                self._scales[name] = self._i2_scale(name, tensor)
            else:
                self._scales[name] = found_scales(name, _flat(tensor)[0], partial(self.floats, name))
        return self._scales[name]

    def vector(self, name: str) -> np.ndarray:
        """See `WeightSource.vector`."""
        if name in self._signs:
            return self._signs[name]
        if self._yarn is not None and name == DIVISORS:
            return self._yarn.divisors
        if self._minicpm is not None and name == DIVISORS:
            return self.floats(SHORT_FACTORS, 0, 1)[0]
        values = self.floats(name, 0, _flat(self.tensor(name))[0]).reshape(-1)
        if self._minicpm is not None and name == OUTPUT_NORM:
            return values / self._minicpm.head_scale
        is_head_norm = name.endswith(("attn_q_norm.weight", "attn_k_norm.weight"))
        return values * self._yarn.factor if self._yarn is not None and is_head_norm else values

    def first_rows(self, name: str) -> np.ndarray:
        """Some rows of a matrix, as float32."""
        tensor = self.tensor(name)
        if len(tensor.shape) < 2:
            raise BadModelFile(f"{self.header.name}: {name} is no matrix: {CONVERT_AGAIN}.")
        first, last = next(strips(_flat(tensor)[0]))
        return self.floats(name, first, last)

    def describe(self, writer: GGUFWriter) -> None:
        """See `Convertible.describe`."""
        own = {f"general.{key}" for key in ("architecture", "alignment", "file_type", "quantization_version")}
        end = ends.of_gguf(self.header)
        if end is not None:
            own.add("tokenizer.ggml.eos_token_id")
        for key, value in self.header.metadata.items():
            if not key.startswith(("tokenizer.", "general.")) or key in own:
                continue
            if isinstance(value, Array):
                writer.add_key_value(key, value.values(), GGUFValueType.ARRAY, sub_type=value.type)
            else:
                writer.add_key_value(key, value, self.header.types[key])
        vocabulary = self.tensor(EMBEDDING).shape[-1]
        silent = self.header.text("tokenizer.ggml.model", "") == "gpt2" and not self.header.text(
            "tokenizer.ggml.pre", ""
        )
        if silent and vocabulary == RELU2_VOCABULARY:
            writer.add_tokenizer_pre(LLAMA3_PRE)
        if end is not None:
            ends.add(writer, [end])

    def _i2_weights(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of an I2_S matrix as int8 of -1, 0, 1. Blocks may span rows."""
        tensor = self.tensor(name)
        cols = tensor.shape[0]
        begin, end = first * cols // I2_BLOCK, -(-last * cols // I2_BLOCK)
        stored = _read(tensor, begin * I2_BLOCK_BYTES, (end - begin) * I2_BLOCK_BYTES)
        codes = stored.reshape(-1, 1, I2_BLOCK_BYTES) >> I2_SHIFTS & 3
        if codes.max() == 3:
            raise BadModelFile(f"{name} holds a code that stands for no weight: {FETCH_AGAIN}.")
        skipped = first * cols - begin * I2_BLOCK
        weights = codes.reshape(-1)[skipped : skipped + (last - first) * cols].astype(np.int8) - 1
        return weights.reshape(-1, cols)

    def _i2_scale(self, name: str, tensor: Tensor) -> np.ndarray:
        [scale] = _read(tensor, tensor.nbytes - I2_TAIL_BYTES, 4).view("<f4")
        used = False
        for first, last in strips(tensor.shape[1]):
            used |= bool(self._i2_weights(name, first, last).any())
        if used and not (np.isfinite(scale) and scale > 0):
            raise BadModelFile(f"{name} has the scale {scale}: {FETCH_AGAIN}.")
        return np.array([scale if used else 1], dtype=np.float32)


def _flat(tensor: Tensor) -> tuple[int, int]:
    """(rows, cols), the matrices of experts one below the other; a vector is one row."""
    return prod(tensor.shape[1:]), tensor.shape[0]


def _read(tensor: Tensor, offset: int, nbytes: int) -> np.ndarray:
    stored = np.fromfile(tensor.path, np.uint8, nbytes, offset=tensor.offset + offset)
    if len(stored) != nbytes:
        raise BadModelFile(f"{tensor.path} became shorter while it was read: {FETCH_AGAIN}.")
    return stored


def _model(header: Header, source: GgufSource, layout: Literal["trit2", "trit5"], head: str) -> TernaryModel:
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.name} is of architecture {header.architecture}; "
            f"the ternary engine runs {', '.join(ARCHITECTURES)}."
        )
    architecture, rope = ARCHITECTURES[header.architecture]
    n_embd, heads = size_of(header, ".embedding_length"), size_of(header, ".attention.head_count")
    n_vocab = source.tensor(EMBEDDING).shape[-1]
    for table in (EMBEDDING, HEAD):
        if source.tensor(table).shape != (n_embd, n_vocab):
            raise BadModelFile(f"{header.name}: {table} is not {n_vocab} x {n_embd}: {CONVERT_AGAIN}.")
    name, is_mixture = header.text("general.name", "").lower(), architecture == "maple"
    model = TernaryModel(
        architecture=architecture,
        layers=header.layers,
        n_embd=n_embd,
        n_ff=size_of(header, ".feed_forward_length", default=1 if is_mixture else None),
        n_vocab=n_vocab,
        heads=heads,
        kv_heads=size_of(header, ".attention.head_count_kv", default=heads),
        head_dim=size_of(header, ".attention.key_length", default=n_embd // max(heads, 1)),
        context=own_context(header) or 2048,
        rope_base=header.number(".rope.freq_base", 10_000.0),
        epsilon=header.number(".attention.layer_norm_rms_epsilon"),
        activation="relu2" if architecture == "bitnet" and n_vocab == RELU2_VOCABULARY else "silu",
        rope=rope,
        sub_norms=header.tensor("blk.0.attn_sub_norm.weight") is not None,
        head_norms=header.tensor("blk.0.attn_q_norm.weight") is not None,
        layout=layout,
        planes=3 if "trilm" in name else PLANES.get(architecture, 1),  # TriLM does not quantize them
        head=head,
    )
    if is_mixture:
        model = with_mixture(model, header)
    if not isinstance(source.tensor("blk.0.attn_q.weight").type, BitnetType):
        model = with_scales_of_spans(model, source.first_rows, tied=header.tied)
    if source.rotation is not None:
        rotated = source.rotation.rotated
        if "embedding" in rotated and model.embedding != "codes":
            raise UnsupportedModel(
                f"{header.name} rotates an embedding that is not ternary: our engine cannot."
            )
        model = replace(model, rotation_block=source.rotation.block, rotated=rotated)
    if model.embedding == "codes" or source.tensor(EMBEDDING).type not in WIDE:
        return model
    return replace(model, embedding=exact_type(source, n_vocab))


def _refuse_scaling(header: Header, model: TernaryModel) -> None:
    """Refuse scaled RoPE, unless its divisors were found."""
    if model.divisors:
        return
    kind = header.text(".rope.scaling.type", "linear")
    factors = [header.number(key, 1.0) for key in (".rope.scaling.factor", ".rope.scale_linear")]
    # As llama.cpp reads them: a factor of 0 is none.
    if kind != "none" and (kind != "linear" or any(factor not in (0, 1) for factor in factors)):
        raise UnsupportedModel(f"{header.name} scales RoPE ({kind}): the ternary engine cannot.")


def _refuse_parts(header: Header, model: TernaryModel) -> None:
    """Refuse heads of which only a part is rotated, where that is no part of the architecture, or kept."""
    if model.rope_dims:
        return
    for key in (".rope.dimension_count", ".attention.value_length"):
        if header.number(key, model.head_dim) != model.head_dim:
            raise UnsupportedModel(f"{header.name} applies RoPE to parts of heads: our engine cannot.")


def _refuse_unknown(header: Header, model: TernaryModel) -> None:
    """Refuse a tensor that the engine would not use: the model needs it."""
    of_layers = {f"{name}.weight" for name in (*model.matrices(), *model.norms(), *model.routers())}
    outside = (EMBEDDING, HEAD, OUTPUT_NORM, *((SHORT_FACTORS, LONG_FACTORS) if model.divisors else ()))
    for tensor in header.tensors:
        block = BLOCK.fullmatch(tensor.name)
        known = block[2] in of_layers if block else tensor.name in outside
        if not known:
            raise UnsupportedModel(f"{header.name} has {tensor.name}, which the ternary engine does not use.")
