"""How much memory a stage will take, from the header alone: a formula, fast enough to try many placements.

The formula and its derivation are in cluster/memory.py; here it gets its numbers from a GGUF header.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from cordee.cluster.memory import CELLS_STEP, Fit, Sizes, StageShape
from cordee.errors import DoesNotFit, UnsupportedModel
from cordee.models.architectures import Architecture, architecture
from cordee.models.gguf import BLOCK, UPDATE, Header, Tensor, engine_of
from cordee.models.slices import SliceTensor, even_cuts, plan_slice, window_pattern

# The tensors of one layer of a slice or of a model, by their names within the layer, without `.weight`.
Tensors = Mapping[str, SliceTensor | Tensor]

KV_NUMBER_BYTES = 2  # f16 and bf16
TERNARY_LANES = 16  # native/src/engine/cache.h, LANES
# The share of free memory that may be promised: the estimate is right to a tenth.
USABLE = 0.9
# A shorter context is of no use.
CONTEXT_MIN = CELLS_STEP
# The longest context is searched up to here: 16 million tokens, a hundred times what models are made for.
STEPS_MAX = 65_536
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
    digits = planes * _padded(max(width, heads * head_dim, embd))  # of activations, in bytes
    return 2 * embd + (heads + 2 * groups + 1) * head_dim + 2 * width + digits // 4


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
    """Whether a model fits. `have_bytes` is the usable share of the given memory; `advice` is a sentence."""

    fits: bool
    need_bytes: int
    have_bytes: int
    stages: tuple[Fit, ...]
    longest_context: int  # tokens per sequence that fit, at most what the model was made for; 0 if none do
    advice: str


@dataclass(frozen=True)
class _Context:
    """A configuration in numbers."""

    context: int
    sequences: int
    batch_rows: int


def verdict(header: Header, sizes: Sizes, memory_bytes: int, stages: int = 1) -> Verdict:
    """Whether a model in this number of stages fits into `memory_bytes` of one machine.

    Raises:
        BadRequest, UnsupportedModel: it cannot be cut into that many stages.
    """
    shapes = _shapes(header, stages)
    fits = tuple(shape.fit(sizes) for shape in shapes)
    need, have = sum(fit.total_bytes for fit in fits), int(memory_bytes * USABLE)
    own = own_context(header) or STEPS_MAX * CELLS_STEP
    longest = min(own, _longest_context(shapes, sizes, have))
    return Verdict(need <= have, need, have, fits, longest, _advice(need, have, longest, sizes))


def sized_context(
    header: Header, memory_bytes: int, *, sequences: int, batch_rows: int, limit: int, stages: int = 1
) -> int:
    """The longest context per sequence that fits: at most `limit` and what the model was made for.

    Raises:
        DoesNotFit: not even CONTEXT_MIN tokens fit; says what to do.
        BadRequest, UnsupportedModel: it cannot be cut into that many stages.
    """
    own = own_context(header) or limit
    shortest = min(CONTEXT_MIN, limit, own)
    found = verdict(header, _Context(shortest, sequences, batch_rows), memory_bytes, stages)
    if not found.fits:
        raise DoesNotFit(f"{header.name} does not fit. {found.advice}")
    return min(limit, found.longest_context)


def _shapes(header: Header, stages: int) -> list[StageShape]:
    return [stage_shape(header, first, last) for first, last in pairwise(even_cuts(header, stages))]


def _longest_context(shapes: Sequence[StageShape], sizes: Sizes, have_bytes: int) -> int:
    """The most cells per sequence, in whole steps."""

    def need(steps: int) -> int:
        tried = _Context(steps * CELLS_STEP, sizes.sequences, sizes.batch_rows)
        return sum(shape.fit(tried).total_bytes for shape in shapes)

    return max(0, bisect_right(range(STEPS_MAX), have_bytes, key=need) - 1) * CELLS_STEP


def _advice(need: int, have: int, longest: int, sizes: Sizes) -> str:
    state = f"it needs {need / 1e9:.1f} GB of memory, and {have / 1e9:.1f} GB may be used"
    if need <= have:
        return f"It fits: {state}."
    if longest:
        return f"With a context of {sizes.context} tokens {state}: with `--context {longest}` it fits."
    return f"{state[0].upper()}{state[1:]}: take a smaller quantization, or more machines."
