"""Writing model files for the ternary engine: GGUF containers whose payloads are laid out for its kernels.

native/FORMAT.md defines the format; native/src/engine/load.c reads it. Writing streams strips of rows, so
memory depends on the widest row and not on the model.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState
from gguf.quants import quantize

from cordee.files import atomic_file
from cordee.models.gguf import TERNARY_KEY

ALIGNMENT = 64
COLUMN_PADDING = 16
BLOCK_ROWS = 16
EMBEDDING, HEAD, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
DIVISORS = "rope_freqs.weight"
# What may be in a rotated basis: what enters these matrices, and the rows of the embedding.
ROTATED = ("attn", "attn_output", "ffn", "ffn_down", "head", "embedding")
# How many rows are read, packed and written at a time: whole groups of every layout, some MB.
STRIP_ROWS = 320


@dataclass(frozen=True)
class Layout:
    """How weights are laid out in memory; see native/FORMAT.md. Weights are `-zero` to `largest`."""

    name: str
    blocks: int  # of BLOCK_ROWS rows in a group
    quad_bytes: int
    zero: int
    largest: int

    @property
    def group_rows(self) -> int:
        return self.blocks * BLOCK_ROWS

    def shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """(groups, quads, bytes of a quad) of a matrix."""
        return -(-rows // self.group_rows), -(-cols // COLUMN_PADDING) * COLUMN_PADDING // 4, self.quad_bytes

    @property
    def ternary(self) -> bool:
        return self.largest == 1


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("trit2", 4, 64, 1, 1),
        Layout("trit5", 5, 64, 1, 1),
        Layout("int8", 1, 64, 128, 127),
        Layout("int6", 4, 192, 32, 31),
        Layout("int4", 2, 64, 8, 7),
    )
}
# From five base-3 digits to the byte from which repeated multiplication by 3 yields them again.
_TRIT5_BYTES = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)


def pack(weights: np.ndarray, layout: Layout) -> np.ndarray:
    """(rows, cols) int8 weights -> (groups, quads, quad_bytes) uint8. Padding is weight 0."""
    groups, quads, _ = layout.shape(*weights.shape)
    codes = np.full((groups * layout.group_rows, quads * 4), layout.zero, dtype=np.uint8)
    codes[: weights.shape[0], : weights.shape[1]] = (weights.astype(np.int16) + layout.zero).astype(np.uint8)
    blocks = codes.reshape(groups, layout.blocks, BLOCK_ROWS, quads, 4).transpose(1, 0, 3, 2, 4)
    block = np.ascontiguousarray(blocks).reshape(layout.blocks, groups, quads, BLOCK_ROWS * 4)
    if layout.name == "trit2":
        return block[0] | block[1] << 2 | block[2] << 4 | block[3] << 6
    if layout.name == "trit5":
        number = block[0]  # at most 242, so it stays in a byte
        for digit in block[1:]:
            number = number * np.uint8(3) + digit
        return _TRIT5_BYTES[number]
    if layout.name == "int6":
        low, high = block & 15, block >> 4
        tops = high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6
        return np.concatenate([low[0] | low[1] << 4, low[2] | low[3] << 4, tops], axis=2)
    return block[0] | block[1] << 4 if layout.name == "int4" else block[0]


def unpack(payload: np.ndarray, layout: Layout, rows: int, cols: int) -> np.ndarray:
    """The inverse of `pack`: (rows, cols) int8."""
    groups, quads, _ = payload.shape
    if layout.name == "trit2":
        block = np.stack([payload >> 2 * field & 3 for field in range(4)])
    elif layout.name == "trit5":
        digits: list[np.ndarray] = []
        rest = payload
        for _ in range(5):
            digits.append((rest.astype(np.uint16) * 3 >> 8).astype(np.uint8))
            rest = rest * np.uint8(3)
        block = np.stack(digits)
    elif layout.name == "int6":
        first, second, tops = np.split(payload, 3, axis=2)
        low = np.stack([first & 15, first >> 4, second & 15, second >> 4])
        block = low | np.stack([tops >> 2 * field & 3 for field in range(4)]) << 4
    else:
        block = np.stack([payload & 15, payload >> 4]) if layout.name == "int4" else payload[None]
    codes = block.reshape(layout.blocks, groups, quads, BLOCK_ROWS, 4).transpose(1, 0, 3, 2, 4)
    weights = (
        codes.reshape(groups * layout.group_rows, quads * 4)[:rows, :cols].astype(np.int16) - layout.zero
    )
    return weights.astype(np.int8)


def pack_scales(scales: np.ndarray, layout: Layout) -> np.ndarray:
    """(rows, spans) scales of neighbouring columns -> (groups, spans, group_rows) float16; padding is 0."""
    rows, spans = scales.shape
    groups = -(-rows // layout.group_rows)
    padded = np.zeros((groups * layout.group_rows, spans), dtype="<f2")
    padded[:rows] = scales
    return np.ascontiguousarray(padded.reshape(groups, layout.group_rows, spans).transpose(0, 2, 1))


def unpack_scales(payload: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of `pack_scales`: (rows, spans) float32."""
    _, spans, _ = payload.shape
    return payload.transpose(0, 2, 1).reshape(-1, spans)[:rows].astype(np.float32)


def rounded(rows: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(n, cols) float32 -> int8 weights of the layout and (n,) float32 scales, one a row."""
    absmax = np.abs(rows).max(axis=1)
    scales = np.where(absmax > 0, absmax / layout.largest, 1).astype(np.float32)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


@dataclass(frozen=True)
class TernaryModel:
    """The sizes and settings of a model, as its file states them; names as in native/FORMAT.md."""

    architecture: str
    layers: int
    n_embd: int
    n_ff: int
    n_vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_base: float
    epsilon: float = 1e-5
    activation: Literal["silu", "relu2"] = "silu"
    rope: Literal["neox", "interleaved"] = "interleaved"
    sub_norms: bool = False
    head_norms: bool = False  # of each head's queries and keys
    divisors: bool = False  # of the rotary angles: "rope_freqs.weight"
    layout: Literal["trit2", "trit5", "pentium2"] = "trit2"
    planes: int = 1
    scale_columns: int = 0  # neighbouring columns that share a scale: 64, 128 or 256; 0: scales are of rows
    weight_planes: int = 1  # a layer's matrix is the sum of so many
    kept: frozenset[str] = frozenset()  # whole names of layers' matrices in int8, with scales of spans
    head: str = "int8"
    head_planes: int = 2
    embedding: GGMLQuantizationType | Literal["codes"] = GGMLQuantizationType.F16  # codes: as the head
    tied: bool = False  # the head is the embedding; both are codes
    rotation_block: int = 0
    rotated: tuple[str, ...] = ()  # what is rotated, of ROTATED
    experts: int = 0  # of each layer: n_ff is the width of one; 0: no mixture
    experts_used: int = 0  # for a row
    window: int = 0  # positions that a row of a windowed layer sees, its own included
    windowed: tuple[bool, ...] = ()  # by layer; empty without a window
    rope_dims: int = 0  # of a head's, the first so many are rotated; 0: all
    rope_layers: Literal["all", "windowed"] = "all"
    gate_limit: float = 0  # the gate is at most this, and what it multiplies within ±; 0: no limit
    embedding_scale: float = 0  # by which rows are multiplied that enter; 0: not
    residual_scale: float = 0  # by which what a block adds is multiplied; 0: not

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, cols) of each matrix of a layer by name, in the file's order.

        Those of experts stand one below the other: the rows of all of them.
        """
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        count, suffix = (self.experts, "_exps") if self.experts else (1, "")
        return {
            "attn_q": (wide, self.n_embd),
            "attn_k": (narrow, self.n_embd),
            "attn_v": (narrow, self.n_embd),
            "attn_output": (self.n_embd, wide),
            f"ffn_gate{suffix}": (count * self.n_ff, self.n_embd),
            f"ffn_up{suffix}": (count * self.n_ff, self.n_embd),
            f"ffn_down{suffix}": (count * self.n_embd, self.n_ff),
        }

    def matrices_in(self, name: str) -> int:
        """How many matrices stand one below the other in that one, of `matrices` or of a whole name."""
        return self.experts if name.removesuffix(".weight").endswith("_exps") else 1

    def routers(self) -> dict[str, tuple[int, int]]:
        """(rows, cols) of what chooses a layer's experts, in float32, by name."""
        return {"ffn_gate_inp": (self.experts, self.n_embd)} if self.experts else {}

    def norms(self) -> dict[str, int]:
        """The length of each norm of a layer by name."""
        sub = {"attn_sub_norm": self.heads * self.head_dim, "ffn_sub_norm": self.n_ff}
        heads = {"attn_q_norm": self.head_dim, "attn_k_norm": self.head_dim}
        return (
            {"attn_norm": self.n_embd, "ffn_norm": self.n_embd}
            | (sub if self.sub_norms else {})
            | (heads if self.head_norms else {})
        )

    def rotations(self) -> dict[str, int]:
        """The length of each vector of signs by name."""
        own = {"attn_output": self.heads * self.head_dim, "ffn_down": self.n_ff}
        return {f"rotation_{name}.signs": own.get(name, self.n_embd) for name in self.rotated}

    @property
    def version(self) -> int:
        """The oldest version of the layout that can say all of it."""
        if (
            self.experts
            or self.window
            or self.rope_dims
            or self.gate_limit
            or self.embedding_scale
            or self.residual_scale
        ):
            return 3
        new = (
            self.scale_columns
            or self.weight_planes > 1
            or self.head_norms
            or self.rotated
            or self.embedding == "codes"
        )
        return 2 if new else 1


class WeightSource(Protocol):
    """Where the weights come from. Names are GGUF's: "blk.3.attn_q.weight"."""

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of a matrix: int8 of -1, 0, 1 for those of layers, float32 for "token_embd" and "output".

        Where those are codes (`embedding`, `head`), they give int8, too; `kept` matrices go to 127.
        Planes of a matrix stand side by side, each padded with 0 to a multiple of COLUMN_PADDING columns.
        """
        ...

    def scales(self, name: str) -> np.ndarray:
        """The float32 scales of a matrix of codes: n of them, each for the next rows / n rows.

        With `scale_columns` they are (rows, spans): one for each row and so many columns, of each plane.
        """
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm, the divisors of rotary angles, the signs of a rotation, or a router row by row; float32."""
        ...


def write(
    path: Path,
    model: TernaryModel,
    source: WeightSource,
    *,
    describe: Callable[[GGUFWriter], None] | None = None,
    tensors: Iterable["OutputTensor"] | None = None,
) -> None:
    """Write a model file: complete, or not at all.

    `describe` adds the tokenizer and other keys; `tensors` replaces the tensors of the usual layouts
    (pentium2.py).

    Raises:
        StorageFailed: no room on disk.
    """
    writer = _described(model, describe)
    tensors = list(_tensors(model, source) if tensors is None else tensors)
    with atomic_file(path) as raw:
        file: io.BufferedWriter = io.BufferedWriter(cast(io.RawIOBase, raw))
        _write_header(writer, tensors, file)
        for tensor in tensors:
            writer.write_padding(file, file.tell(), ALIGNMENT)
            for array in tensor.arrays:
                file.write(np.ascontiguousarray(array).data)
        writer.write_padding(file, file.tell(), ALIGNMENT)
        file.detach()


def file_bytes(
    model: TernaryModel, source: WeightSource, *, describe: Callable[[GGUFWriter], None] | None = None
) -> int:
    """The size of the file that `write` would make; of `source` it reads only scales of rows."""
    header, tensors = io.BytesIO(), list(_tensors(model, source))
    _write_header(_described(model, describe), tensors, header)
    return sum(
        -(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in (header.tell(), *(t.nbytes for t in tensors))
    )


def _described(model: TernaryModel, describe: Callable[[GGUFWriter], None] | None) -> GGUFWriter:
    writer = GGUFWriter(None, model.architecture)
    _add_keys(writer, model)
    if describe:
        describe(writer)
    return writer


def _write_header(writer: GGUFWriter, tensors: list["OutputTensor"], file: BinaryIO) -> None:
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype=tensor.type)
    # A file that is open already.
    writer.fout, writer.state = [cast(io.BufferedWriter, file)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add_keys(writer: GGUFWriter, model: TernaryModel) -> None:
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_rope_dimension_count(model.rope_dims or model.head_dim)
    writer.add_vocab_size(model.n_vocab)
    for key in ("planes", "head_planes"):
        writer.add_uint32(f"cordee.ternary.{key}", getattr(model, key))
    for key in ("layout", "head", "activation", "rope"):
        writer.add_string(f"cordee.ternary.{key}", getattr(model, key))
    if model.scale_columns:
        writer.add_uint32("cordee.ternary.scale_columns", model.scale_columns)
    if model.weight_planes > 1:
        writer.add_uint32("cordee.ternary.weight_planes", model.weight_planes)
    if model.rotated:
        writer.add_uint32("cordee.ternary.rotation_block", model.rotation_block)
        writer.add_string("cordee.ternary.rotated", "".join(f"{name}," for name in model.rotated))
    _add_keys_of_version_3(writer, model)
    writer.add_uint32(TERNARY_KEY, model.version)


def _add_keys_of_version_3(writer: GGUFWriter, model: TernaryModel) -> None:
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.experts_used)
        writer.add_expert_feed_forward_length(model.n_ff)
        writer.add_string("cordee.ternary.router", "softmax")
    if model.window:
        writer.add_sliding_window(model.window)
        writer.add_sliding_window_pattern(model.windowed)
    if model.rope_layers != "all":
        writer.add_string("cordee.ternary.rope_layers", model.rope_layers)
    if model.gate_limit:
        writer.add_float32("cordee.ternary.gate_limit", model.gate_limit)
    if model.embedding_scale:
        writer.add_embedding_scale(model.embedding_scale)
    if model.residual_scale:
        writer.add_residual_scale(model.residual_scale)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; `shape` is numpy's, slowest dimension first, in bytes for blocked types."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    type: GGMLQuantizationType
    nbytes: int
    arrays: Iterator[np.ndarray]


def output_tensor(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, nbytes: int, arrays: Iterator[np.ndarray]
) -> OutputTensor:
    """A tensor of that type; `shape` as in `OutputTensor`."""
    dtypes = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    dtype = np.dtype(dtypes.get(kind, np.int8 if kind is GGMLQuantizationType.I8 else np.uint8))
    return OutputTensor(name, shape, dtype, kind, nbytes, arrays)


def strips(rows: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each strip of a matrix of `rows` rows; `last` is exclusive."""
    return ((first, min(first + STRIP_ROWS, rows)) for first in range(0, rows, STRIP_ROWS))


def vector_tensor(name: str, length: int, make: Callable[[], np.ndarray]) -> OutputTensor:
    """A vector of float32, made when it is written."""
    arrays = (np.asarray(make(), dtype="<f4") for _ in range(1))
    return output_tensor(name, (length,), GGMLQuantizationType.F32, length * 4, arrays)


def tensors_in_order(
    model: TernaryModel,
    source: WeightSource,
    *,
    embedding: Iterable[OutputTensor],
    payload: Callable[[str, int, int], OutputTensor],
    head: Iterable[OutputTensor],
) -> Iterator[OutputTensor]:
    """All tensors in the file's order; their bytes are made when they are written.

    `payload(name, rows, cols)` makes a layer's matrix.
    """
    yield from embedding
    divisors = {DIVISORS: (model.rope_dims or model.head_dim) // 2} if model.divisors else {}
    outside = model.rotations() | divisors
    for name, length in outside.items():
        yield vector_tensor(name, length, lambda name=name: source.vector(name))
    for layer in range(model.layers):
        for name, length in model.norms().items():
            full = f"blk.{layer}.{name}.weight"
            yield vector_tensor(full, length, lambda full=full: source.vector(full))
        for name, shape in model.routers().items():
            yield _router(f"blk.{layer}.{name}.weight", shape, source)
        for name, (rows, cols) in model.matrices().items():
            full = f"blk.{layer}.{name}.weight"
            yield scale_tensor(model, source, full, (rows, cols))
            yield payload(full, rows, cols)
    yield vector_tensor(OUTPUT_NORM, model.n_embd, lambda: source.vector(OUTPUT_NORM))
    yield from head


def _router(name: str, shape: tuple[int, int], source: WeightSource) -> OutputTensor:
    arrays = (np.asarray(source.vector(name), dtype="<f4") for _ in range(1))
    return output_tensor(name, shape, GGMLQuantizationType.F32, shape[0] * shape[1] * 4, arrays)


def scale_tensor(
    model: TernaryModel, source: WeightSource, name: str, shape: tuple[int, int], head: bool = False
) -> OutputTensor:
    """The scales of a matrix of codes of that shape, (rows, cols); `head`: in the head's layout."""
    full, count = name.replace("weight", "scale"), model.matrices_in(name)
    if not model.scale_columns:
        scales = source.scales(name)
        scales = np.repeat(scales, lcm(len(scales), count) // len(scales))  # each expert has its own
        return vector_tensor(full, len(scales), lambda: scales)
    rows, cols = shape[0] // count, shape[1]
    if head:
        layout, planes = LAYOUTS[model.head], 1
    else:
        layout, planes = layout_of(model, name)
    groups, spans = count * layout.shape(rows, cols)[0], planes * -(-cols // model.scale_columns)
    nbytes = groups * spans * layout.group_rows * 2
    arrays = (
        pack_scales(scales, layout) for _ in range(1) for scales in np.split(source.scales(name), count)
    )
    return output_tensor(full, (groups, spans, layout.group_rows), GGMLQuantizationType.F16, nbytes, arrays)


def layout_of(model: TernaryModel, name: str) -> tuple[Layout, int]:
    """The layout of a layer's matrix, and the number of its planes."""
    return (LAYOUTS["int8"], 1) if name in model.kept else (LAYOUTS[model.layout], model.weight_planes)


def padded(cols: int) -> int:
    """The columns of a plane, with padding."""
    return -(-cols // COLUMN_PADDING) * COLUMN_PADDING


def _tensors(model: TernaryModel, source: WeightSource) -> Iterator[OutputTensor]:
    def matrix(name: str, rows: int, cols: int) -> OutputTensor:
        layout, planes = layout_of(model, name)
        return codes(name, rows, planes * padded(cols) if planes > 1 else cols, layout)

    def codes(name: str, rows: int, cols: int, layout: Layout) -> OutputTensor:
        count = model.matrices_in(name)
        each = rows // count  # each expert begins a group
        packed = (
            pack(source.rows(name, start + first, start + last), layout)
            for start in range(0, rows, each)
            for first, last in strips(each)
        )
        return _payload(name, layout, (each, cols), packed, count)

    def table(name: str) -> Iterator[OutputTensor]:
        shape = (model.n_vocab, model.n_embd)
        yield scale_tensor(model, source, name, shape, head=True)
        yield codes(name, *shape, LAYOUTS[model.head])

    embedding = table(EMBEDDING) if model.embedding == "codes" else [_embedding(model, source)]
    head = table(HEAD) if LAYOUTS[model.head].ternary else _head(model, source)
    return tensors_in_order(
        model, source, embedding=embedding, payload=matrix, head=() if model.tied else head
    )


def _payload(
    name: str, layout: Layout, each: tuple[int, int], arrays: Iterator[np.ndarray], count: int = 1
) -> OutputTensor:
    """`count` matrices of (rows, cols) `each`."""
    groups, *group = layout.shape(*each)
    shape = (count * groups, *group)
    return output_tensor(name, shape, GGMLQuantizationType.I8, int(np.prod(shape, dtype=np.int64)), arrays)


def exact_type(source: WeightSource, rows: int) -> GGMLQuantizationType:
    """The smallest of F16, BF16 and F32 that holds every value of an embedding of `rows` rows exactly.

    Checkpoints on the hub are in BF16, and F16 cannot represent their smallest values.
    """
    is_half = is_bfloat = True
    for first, last in strips(rows):
        values = source.rows(EMBEDDING, first, last)
        with np.errstate(over="ignore"):
            is_half &= np.array_equal(values.astype(np.float16).astype(np.float32), values)
        is_bfloat &= not (values.view(np.uint32) & 0xFFFF).any()
    if is_half:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.BF16 if is_bfloat else GGMLQuantizationType.F32


def _embedding(model: TernaryModel, source: WeightSource) -> OutputTensor:
    kind = GGMLQuantizationType(cast(int, model.embedding))
    encoded = (quantize(source.rows(EMBEDDING, a, b), kind) for a, b in strips(model.n_vocab))
    [row] = quantize(np.zeros((1, model.n_embd), dtype=np.float32), kind)
    return output_tensor(EMBEDDING, (model.n_vocab, len(row)), kind, model.n_vocab * row.nbytes, encoded)


def _head(model: TernaryModel, source: WeightSource) -> Iterator[OutputTensor]:
    """The head. Its rows are read twice rather than kept: once for the scales, once for the weights."""
    layout, rows = LAYOUTS[model.head], model.n_vocab

    def codes() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (rounded(source.rows(HEAD, a, b), layout) for a, b in strips(rows))

    yield vector_tensor("output.scale", rows, lambda: np.concatenate([scales for _, scales in codes()]))
    packed = (pack(weights, layout) for weights, _ in codes())
    yield _payload(HEAD, layout, (rows, model.n_embd), packed)
