"""How much memory a stage will take, from the header alone: a formula, fast enough to try many placements.

The formula and its derivation are in cluster/memory.py; here it gets its numbers from a GGUF header.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from cordee.cluster.demand import SizeRequest, described, gigabytes, options, smaller
from cordee.cluster.memory import Demand, Fit, Sizes, StageShape
from cordee.errors import UnsupportedModel
from cordee.models.architectures import Architecture, architecture
from cordee.models.gguf import BLOCK, UPDATE, Header, Tensor, engine_of
from cordee.models.slices import SliceTensor, even_cuts, plan_slice, window_pattern

# The tensors of one layer of a slice or of a model, by their names within the layer, without `.weight`.
Tensors = Mapping[str, SliceTensor | Tensor]

KV_NUMBER_BYTES = 2  # f16 and bf16
TERNARY_LANES = 16  # native/src/engine/cache.h, LANES
# The share of free memory that may be promised: the estimate is right to a tenth.
USABLE = 0.9
# No dimension of a published model is near it; so what is computed from two of them fits 64 bits.
SIZE_LIMIT = 1 << 24


def stage_shape(header: Header, first: int, last: int) -> StageShape:
    """The shape of layers `first` to `last` (exclusive).

    Raises:
        UnsupportedModel, BadRequest: there is no such slice.
        BadModelFile: the metadata lacks a size.
    """
    pieces = plan_slice(header, first, last, force=True).pieces
    layers: list[dict[str, SliceTensor]] = [{} for _ in range(last - first)]
    weights = 0
    for piece in pieces:
        block = BLOCK.fullmatch(piece.name)
        if block and int(block[1]) >= len(layers):
            continue  # a layer for multi-token prediction, which libllama does not load
        if block:
            layers[int(block[1])][block[2].removesuffix(".weight")] = piece
        weights += piece.nbytes
    rules = architecture(header.architecture) or Architecture(header.architecture)
    windowed = (window_pattern(header, rules) or [False] * header.layers)[first:last]
    return StageShape(
        weights_bytes=weights,
        cell_bytes=sum(cell_bytes(header, first + i, window) for i, window in enumerate(windowed)),
        masks=len(set(windowed[1:])) or 1,  # a mask that only the first layer uses is freed after it
        row_floats=max(row_floats(header, tensors) for tensors in layers),
        n_embd=size_of(header, ".embedding_length"),
        layers=last - first,
        vocabulary=vocabulary_size(header) if last == header.layers else 0,
    )


def estimate(header: Header, first: int, last: int, sizes: Sizes) -> Fit:
    """The memory that layers `first` to `last` (exclusive) will take as a stage. Raises as `stage_shape`."""
    return stage_shape(header, first, last).fit(sizes)


def vocabulary_size(header: Header) -> int:
    """The width of the logits; 0 for a file without a head."""
    if engine_of(header) == "ternary":
        return size_of(header, ".vocab_size")
    head = header.tensor("token_embd.weight" if header.tied else "output.weight")
    return head.shape[-1] if head else 0


def keeps_positions(header: Header) -> bool:
    """Whether the state of a sequence is kept by position, so that it can be shortened: not in models that
    have a recurrent state (mamba, rwkv, hybrids with attention)."""
    recurrent = (".ssm.", ".wkv.", ".shortconv.", ".token_shift_count", ".kda.")
    return not any(mark in key for key in header.metadata for mark in recurrent)


def parameter_count(header: Header) -> int:
    """The number of weights in a model file; a head equal to the embedding counts if the file holds it.

    In files for the ternary engine a byte holds several weights, and some are padding.

    Raises:
        BadModelFile: the metadata lacks a size.
        UnsupportedModel: no engine runs it.
    """
    if engine_of(header) == "llama":
        return sum(prod(tensor.shape) for tensor in header.tensors)
    embd, width = (size_of(header, key) for key in (".embedding_length", ".feed_forward_length"))
    heads, groups, head_dim = _ternary_heads(header)
    tables = sum(tensor.name in ("token_embd.weight", "output.weight") for tensor in header.tensors)
    vectors = (tensor.shape[0] for tensor in header.tensors if tensor.name.endswith("norm.weight"))
    layer = 2 * (heads + groups) * head_dim + 3 * width
    return embd * (header.layers * layer + tables * vocabulary_size(header)) + sum(vectors)


def cell_bytes(header: Header, layer: int, windowed: bool) -> int:
    """The KV cache of one token in one layer (llama_hparams::n_embd_k_gqa and n_embd_v_gqa)."""
    heads = size_of(header, ".attention.head_count", layer)
    groups = size_of(header, ".attention.head_count_kv", layer, heads)
    usual = size_of(header, ".embedding_length") // max(heads, 1)
    key = size_of(header, ".attention.key_length", default=usual)
    value = size_of(header, ".attention.value_length", default=usual)
    if windowed:
        key = size_of(header, ".attention.key_length_swa", default=key)
        value = size_of(header, ".attention.value_length_swa", default=value)
    if header.count(".attention.key_length_mla", 0):
        value = 0  # multi-head latent attention: V is within K
    if engine_of(header) == "ternary":
        value = _padded(value)
    return groups * (key + value) * KV_NUMBER_BYTES


def size_of(header: Header, key: str, layer: int = 0, default: int | None = None) -> int:
    """A dimension in the metadata; that of `layer` where the file gives one per layer.

    Raises:
        BadModelFile: it is missing, or not a size.
        UnsupportedModel: it is missing, but models of this architecture may have no such size.
    """
    is_missing = default is None and header.key(key) not in header.metadata
    if is_missing and architecture(header.architecture) is None:
        raise UnsupportedModel(
            f"{header.name} is of architecture {header.architecture!r}, which this program does not know, "
            f"and has no {header.key(key)}: {UPDATE}."
        )
    return header.count_of_layer(key, layer, default, limit=SIZE_LIMIT)


def own_context(header: Header) -> int | None:
    """The tokens that a model was made for; None if its file does not say.

    Raises:
        BadModelFile: what it says is no number of tokens.
    """
    return header.count(".context_length", 0) or None


def row_floats(header: Header, tensors: Tensors) -> int:
    """Floats that the buffers of one layer hold for each row at their peak."""
    embd = size_of(header, ".embedding_length")
    if engine_of(header) == "ternary":
        return _ternary_row_floats(header, embd)
    queries = _width_in(tensors, "attn_output")
    options = [
        _attention(header, tensors, queries),
        _dense(tensors, embd + queries),
        _experts(header, tensors, embd + queries),
    ]
    return 3 * embd + queries + max(options)


def _ternary_row_floats(header: Header, embd: int) -> int:
    """The same in the ternary engine, whose buffers last a batch (native/src/engine/session.c, cut_batch)."""
    width, (heads, groups, head_dim) = size_of(header, ".feed_forward_length"), _ternary_heads(header)
    planes = max(size_of(header, f"cordee.ternary.{key}") for key in ("planes", "head_planes"))
    widest = max(width, heads * head_dim, embd)
    columns = size_of(header, "cordee.ternary.scale_columns", default=0)
    spans = -(-widest // columns) if columns else 1
    digits = planes * _padded(widest)  # of activations, in bytes
    scales = spans * (planes + 1)
    return 2 * embd + (heads + 2 * groups + 1) * head_dim + 2 * width + digits // 4 + scales


def _ternary_heads(header: Header) -> tuple[int, int, int]:
    """The number of query heads, the number of key-value heads, and the width of a head."""
    heads = size_of(header, ".attention.head_count")
    groups = size_of(header, ".attention.head_count_kv", default=heads)
    usual = size_of(header, ".embedding_length") // max(heads, 1)
    return heads, groups, size_of(header, ".attention.key_length", default=usual)


def _padded(count: int) -> int:
    """Rounded up as the ternary engine pads what it reads in vectors."""
    return -(-count // TERNARY_LANES) * TERNARY_LANES


def _attention(header: Header, tensors: Tensors, queries: int) -> int:
    if "attn_k_b" in tensors:  # multi-head latent attention: three times the queries, as wide as the cache
        wide = size_of(header, ".attention.head_count") * size_of(header, ".attention.key_length")
        return 3 * wide - size_of(header, ".embedding_length") - queries
    if "attn_qkv" in tensors:
        return queries + _width_out(tensors, "attn_qkv")
    return queries + _width_out(tensors, "attn_k")


def _dense(tensors: Tensors, free_floats: int) -> int:
    """A feed-forward block: in place without a gate, otherwise gate, up and their product.

    Where the gate fits into the `free_floats` that attention leaves in the buffers, about half goes there.
    """
    width = _width_in(tensors, "ffn_down")
    if "ffn_gate" not in tensors and _width_out(tensors, "ffn_up") == width:
        return width
    return width * 5 // 2 if width <= free_floats else 3 * width


def _experts(header: Header, tensors: Tensors, free_floats: int) -> int:
    """A mixture of experts: gate, up and product of the chosen experts, and their results.

    The results fit where gate and up were, unless the experts are narrow; those may fit into the
    `free_floats` that attention leaves in the buffers, which a shared expert keeps in use.
    """
    if "ffn_down_exps" not in tensors:
        return 0
    used = size_of(header, ".expert_used_count")
    width, embd = tensors["ffn_down_exps"].shape[:2]
    shared = _width_in(tensors, "ffn_down_shexp")
    inner, results = 3 * used * width, used * embd
    fits = 2 * width >= embd or (inner <= free_floats and not shared)
    return max(max(inner, results) if fits else inner + results, 3 * shared)


def _width_in(tensors: Tensors, name: str) -> int:
    return tensors[name].shape[0] if name in tensors else 0


def _width_out(tensors: Tensors, name: str) -> int:
    return tensors[name].shape[1] if name in tensors else 0


@dataclass(frozen=True)
class Verdict:
    """How a model would be served. `have_bytes` is the usable share of the given memory; `advice` sentences.

    `demand` is what it gets; if nothing that was asked for fits, the least of that.
    """

    fits: bool
    demand: Demand
    need_bytes: int
    have_bytes: int
    stages: tuple[Fit, ...]
    advice: str


def verdict(
    shapes: Sequence[StageShape], requested: SizeRequest, memory_bytes: int, command: str = ""
) -> Verdict:
    """How much of what is asked of these stages fits into `memory_bytes` of one machine.

    `command` is what people would type to be served with other options, as in "cordee serve starter"; without
    one there are no such options.
    """
    have = int(memory_bytes * USABLE)

    def need(demand: Demand) -> int:
        return sum(shape.fit(demand).total_bytes for shape in shapes)

    def fits(demand: Demand) -> bool:
        return need(demand) <= have

    found = requested.largest(fits)
    demand = found or requested.least
    wants, has = gigabytes(need(demand), have)
    if found is None:
        instead = smaller(demand, fits) if command else None
        advice = f"It needs {wants} of memory for {described(demand)}, and {has} may be used: "
        if instead:
            advice += f"`{command} {options(demand, instead)}` fits."
        else:
            advice += "take a smaller quantization, or more machines."
    else:
        advice = f"It fits: it needs {wants} of memory, and {has} may be used."
        if lacks := requested.shortened(found):
            advice += f" Memory is short: {lacks}."
    return Verdict(
        found is not None,
        demand,
        need(demand),
        have,
        tuple(shape.fit(demand) for shape in shapes),
        advice,
    )


def stage_shapes(header: Header, stages: int) -> list[StageShape]:
    """The shapes of a model's stages, cut evenly.

    Raises:
        BadRequest, UnsupportedModel: it cannot be cut into that many stages.
    """
    return [stage_shape(header, first, last) for first, last in pairwise(even_cuts(header, stages))]
