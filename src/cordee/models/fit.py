"""How much memory a stage will take, from the header alone: a formula, fast enough to try many placements.

What the parts are, and where they come from (llama.cpp, read and measured at the build that
llama-cpp-python 0.3.36 carries, on the CPU, with flash attention on and a KV cache per sequence of full
length in every layer):

- weights: the tensors of the slice; they are mapped, not copied.
- KV cache: exact. Cells are counted in steps of CELLS_STEP per sequence; K and V take two bytes a number.
- scratch: libllama's compute and output buffers. Its allocator reuses memory, so the peak of one layer is
  what counts: for each row of a batch three hidden rows, the queries, and the widest of attention,
  feed-forward and experts; beside that the attention masks. Fitted on 1,200 stages of random shapes of all
  certified architectures; on 559 others it is 0.88 to 1.15 times what libllama takes, 94 % of them within a
  tenth, and exact for the shapes of nearly all models that have cards.
- runtime: Python, numpy and libllama themselves, copies of a batch's rows on their way, the vocabulary.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from cordee.errors import BadModelFile, DoesNotFit
from cordee.models.architectures import Architecture, architecture
from cordee.models.gguf import BLOCK, CONVERT_AGAIN, Header
from cordee.models.slices import Piece, even_cuts, plan_slice, window_pattern

# libllama rounds each sequence's cells up to a multiple of this.
CELLS_STEP = 256
KV_NUMBER_BYTES = 2  # f16 and bf16
MASK_NUMBER_BYTES = 2  # f16, which flash attention wants
FLOAT_BYTES = 4
# Token, position, two cell indices (64 bits) of a row of a batch.
ROW_INDEX_BYTES = 24
# A worker process that has loaded nothing yet: the interpreter and its heap, numpy, libllama.
PROCESS_BYTES = 53_000_000
# Copies of a batch's rows between socket and graph, in the worker and in libllama.
ROW_COPIES = 8
# The graph's nodes, three times, and libllama's own records.
LAYER_BYTES = 70_000
# Strings, scores, merges and their hash tables.
TOKEN_BYTES = 220
# The estimate is right to a tenth, so so much of the memory that is free may be promised.
USABLE = 0.9
# Shorter is of no use to anybody.
CONTEXT_MIN = CELLS_STEP
# Up to here the longest context is looked for: 16 million tokens, a hundred times what models are made for.
STEPS_MAX = 65_536


class Sizes(Protocol):
    """What of a stage's configuration decides its size; `StageConfig` is one."""

    @property
    def context(self) -> int: ...

    @property
    def sequences(self) -> int: ...

    @property
    def batch_rows(self) -> int: ...


@dataclass(frozen=True)
class Fit:
    """The memory of one stage, by what it is for."""

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.scratch_bytes + self.runtime_bytes


@dataclass(frozen=True)
class StageShape:
    """What of a slice decides its size, whatever its configuration.

    `cell_bytes` is the KV cache of one token in all its layers; `masks` the number of attention masks (one
    more for layers with a sliding window); `row_floats` what a batch's row needs at the peak of a layer;
    `vocabulary` the width of the logits, 0 for a stage without a head.
    """

    weights_bytes: int
    cell_bytes: int
    masks: int
    row_floats: int
    n_embd: int
    layers: int
    vocabulary: int

    def fit(self, sizes: Sizes) -> Fit:
        """The stage's memory in a configuration."""
        cells = _whole_steps(sizes.context)
        rows = min(sizes.batch_rows, sizes.context * sizes.sequences)
        outputs = min(sizes.sequences, rows) * self.vocabulary * FLOAT_BYTES
        mask_bytes = self.masks * cells * MASK_NUMBER_BYTES
        peak_bytes = max(self.row_floats * FLOAT_BYTES * rows, outputs)
        return Fit(
            weights_bytes=self.weights_bytes,
            kv_bytes=self.cell_bytes * cells * sizes.sequences,
            scratch_bytes=rows * (mask_bytes + ROW_INDEX_BYTES) + peak_bytes + outputs,
            runtime_bytes=PROCESS_BYTES
            + ROW_COPIES * rows * self.n_embd * FLOAT_BYTES
            + LAYER_BYTES * self.layers
            + TOKEN_BYTES * self.vocabulary,
        )


def stage_shape(header: Header, first: int, last: int) -> StageShape:
    """The shape of layers `first` to `last` (exclusive).

    Raises:
        UnsupportedModel, BadRequest: there is no such slice.
        BadModelFile: the file does not say how large its parts are.
    """
    pieces = plan_slice(header, first, last, force=True).pieces
    layers: list[dict[str, Piece]] = [{} for _ in range(last - first)]
    weights = 0
    for piece in pieces:
        block = BLOCK.fullmatch(piece.name)
        if block and int(block[1]) >= len(layers):
            continue  # of a layer for multi-token prediction, which libllama does not load
        if block:
            layers[int(block[1])][block[2].removesuffix(".weight")] = piece
        weights += piece.nbytes
    rules = architecture(header.architecture) or Architecture(header.architecture)
    windowed = (window_pattern(header, rules) or [False] * header.layers)[first:last]
    head = header.tensor("token_embd.weight" if header.tied else "output.weight")
    return StageShape(
        weights_bytes=weights,
        cell_bytes=sum(_cell_bytes(header, first + i, window) for i, window in enumerate(windowed)),
        masks=len(set(windowed[1:])) or 1,  # a kind that only the first layer has is free again after it
        row_floats=max(_row_floats(header, tensors) for tensors in layers),
        n_embd=_number(header, ".embedding_length"),
        layers=last - first,
        vocabulary=head.shape[-1] if head and last == header.layers else 0,
    )


def estimate(header: Header, first: int, last: int, sizes: Sizes) -> Fit:
    """The memory that layers `first` to `last` (exclusive) will take as a stage. Raises as `stage_shape`."""
    return stage_shape(header, first, last).fit(sizes)


def _whole_steps(context: int) -> int:
    return -(-context // CELLS_STEP) * CELLS_STEP


def _cell_bytes(header: Header, layer: int, windowed: bool) -> int:
    """The KV cache of one token in one layer (llama_hparams::n_embd_k_gqa and n_embd_v_gqa)."""
    heads = _number(header, ".attention.head_count", layer)
    groups = _number(header, ".attention.head_count_kv", layer, heads)
    usual = _number(header, ".embedding_length") // max(heads, 1)
    key = _number(header, ".attention.key_length", default=usual)
    value = _number(header, ".attention.value_length", default=usual)
    if windowed:
        key = _number(header, ".attention.key_length_swa", default=key)
        value = _number(header, ".attention.value_length_swa", default=value)
    if header.get(".attention.key_length_mla"):
        value = 0  # multi-head latent attention: V is a part of K
    return groups * (key + value) * KV_NUMBER_BYTES


def _number(header: Header, key: str, layer: int = 0, default: int | None = None) -> int:
    """A size in the metadata; of a layer where it goes by layer.

    Raises:
        BadModelFile: it is not there, or no size.
    """
    value = header.get(key, default)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    if type(value) is not int or value < 0:
        raise BadModelFile(f"{header.path}: {header.architecture}{key} is no size: {CONVERT_AGAIN}.")
    return value


def _row_floats(header: Header, tensors: Mapping[str, Piece]) -> int:
    """Floats that the buffers of one layer hold for each row at their peak."""
    embd = _number(header, ".embedding_length")
    queries = _width_in(tensors, "attn_output")
    options = [
        _attention(header, tensors, queries),
        _dense(tensors, embd + queries),
        _experts(header, tensors, embd + queries),
    ]
    return 3 * embd + queries + max(options)


def _attention(header: Header, tensors: Mapping[str, Piece], queries: int) -> int:
    if "attn_k_b" in tensors:  # multi-head latent attention: queries in the width of the cache, three times
        wide = _number(header, ".attention.head_count") * _number(header, ".attention.key_length")
        return 3 * wide - _number(header, ".embedding_length") - queries
    if "attn_qkv" in tensors:
        return queries + _width_out(tensors, "attn_qkv")
    return queries + _width_out(tensors, "attn_k")


def _dense(tensors: Mapping[str, Piece], hole: int) -> int:
    """A feed-forward part: in place without a gate, else gate, up and their product.

    Where the gate fits the `hole` that attention leaves, about half of it falls in there.
    """
    width = _width_in(tensors, "ffn_down")
    if "ffn_gate" not in tensors and _width_out(tensors, "ffn_up") == width:
        return width
    return width * 5 // 2 if width <= hole else 3 * width


def _experts(header: Header, tensors: Mapping[str, Piece], hole: int) -> int:
    """A mixture of experts: the chosen ones' gate, up and product, and their results.

    The results fit where gate and up were, unless the experts are narrow; those may fit the `hole` that
    attention leaves, which a shared expert keeps in use.
    """
    if "ffn_down_exps" not in tensors:
        return 0
    used = _number(header, ".expert_used_count")
    width, embd = tensors["ffn_down_exps"].shape[:2]
    shared = _width_in(tensors, "ffn_down_shexp")
    inner, results = 3 * used * width, used * embd
    fits = 2 * width >= embd or (inner <= hole and not shared)
    return max(max(inner, results) if fits else inner + results, 3 * shared)


def _width_in(tensors: Mapping[str, Piece], name: str) -> int:
    return tensors[name].shape[0] if name in tensors else 0


def _width_out(tensors: Mapping[str, Piece], name: str) -> int:
    return tensors[name].shape[1] if name in tensors else 0


@dataclass(frozen=True)
class Verdict:
    """Whether a model fits. `have_bytes` is what may be used of the memory given; `advice` is a sentence."""

    fits: bool
    need_bytes: int
    have_bytes: int
    stages: tuple[Fit, ...]
    longest_context: int  # per sequence: what fits, at most what the model was made for; 0 if nothing does
    advice: str


@dataclass(frozen=True)
class _Context:
    """A configuration in numbers."""

    context: int
    sequences: int
    batch_rows: int


def verdict(header: Header, sizes: Sizes, memory_bytes: int, stages: int = 1) -> Verdict:
    """Whether a model in so many stages fits `memory_bytes` of one machine.

    Raises:
        BadRequest, UnsupportedModel: it cannot be cut so.
    """
    shapes = _shapes(header, stages)
    fits = tuple(shape.fit(sizes) for shape in shapes)
    need, have = sum(fit.total_bytes for fit in fits), int(memory_bytes * USABLE)
    own = _number(header, ".context_length", default=STEPS_MAX * CELLS_STEP)
    longest = min(own, _longest_context(shapes, sizes, have))
    return Verdict(need <= have, need, have, fits, longest, _advice(need, have, longest, sizes))


def sized_context(
    header: Header, memory_bytes: int, *, sequences: int, batch_rows: int, limit: int, stages: int = 1
) -> int:
    """The longest context per sequence that fits: at most `limit` and what the model was made for.

    Raises:
        DoesNotFit: not even CONTEXT_MIN tokens do; says what to do.
        BadRequest, UnsupportedModel: it cannot be cut so.
    """
    own = _number(header, ".context_length", default=limit)
    shortest = min(CONTEXT_MIN, limit, own)
    found = verdict(header, _Context(shortest, sequences, batch_rows), memory_bytes, stages)
    if not found.fits:
        raise DoesNotFit(f"{header.path.name} does not fit. {found.advice}")
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
