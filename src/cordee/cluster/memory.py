"""The memory of a stage: one formula for a file's slice (models/fit.py) and for a shape heard from a node.

What its amounts are, and where they come from (llama.cpp, read and measured at the build that
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

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

from cordee.cluster.facts import ModelShape

# libllama rounds each sequence's cells up to a multiple of this.
CELLS_STEP = 256
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
# Rows of a micro-batch: enough to use the processor fully, little enough not to block it.
BATCH_ROWS = 512
# Rows whose logits a last stage gives at a time, if not one for each sequence: a prompt that is scored wants
# those of all its rows, and so many at a time use the processor nearly as well as hundreds. Until then
# libllama keeps room for one row of each sequence; no estimate counts the rest (16 MB for 256,000 tokens).
OUTPUT_ROWS = 16
# Tables that are kept, one for each model and size: far more than a cluster serves. Each has at most 0.5 MB.
TABLES_KEPT = 32
STAGES_KEPT = 4096  # whose memory is: each look at everything asks for that of all that runs
# Into so many pieces a model is cut at most. The models that people run have up to 126 layers; one that is
# said to have more is cut at every second of them, or third.
PIECES_MAX = 128


class Sizes(Protocol):
    """What of a stage's configuration decides its size; `StageConfig` is one."""

    @property
    def context(self) -> int: ...

    @property
    def sequences(self) -> int: ...

    @property
    def batch_rows(self) -> int: ...


def output_rows(sizes: Sizes) -> int:
    """The most rows whose logits a last stage gives in one call."""
    return min(max(sizes.sequences, OUTPUT_ROWS), sizes.batch_rows)


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
        cells = -(-sizes.context // CELLS_STEP) * CELLS_STEP
        rows = min(sizes.batch_rows, sizes.context * sizes.sequences)
        outputs = min(sizes.sequences, rows) * self.vocabulary * FLOAT_BYTES
        mask_bytes = self.masks * cells * MASK_NUMBER_BYTES
        computed = min(output_rows(sizes), rows) * self.vocabulary * FLOAT_BYTES
        peak_bytes = max(self.row_floats * FLOAT_BYTES * rows, computed)
        return Fit(
            weights_bytes=self.weights_bytes,
            kv_bytes=self.cell_bytes * cells * sizes.sequences,
            scratch_bytes=rows * (mask_bytes + ROW_INDEX_BYTES) + peak_bytes + outputs,
            runtime_bytes=PROCESS_BYTES
            + ROW_COPIES * rows * self.n_embd * FLOAT_BYTES
            + LAYER_BYTES * self.layers
            + TOKEN_BYTES * self.vocabulary,
        )


def stage_of(shape: ModelShape, first: int, last: int) -> StageShape:
    """What layers `first` to `last` (exclusive) of a model are as a stage."""
    layers = slice(first, last)
    # A kind of mask that only the first layer has is free again after it.
    kinds = len(set(shape.windowed[first + 1 : last]))
    return _stage(shape, first, last, sum(shape.layer_bytes[layers]), sum(shape.cell_bytes[layers]), kinds)


def _stage(
    shape: ModelShape, first: int, last: int, layer_bytes: int, cell_bytes: int, kinds: int
) -> StageShape:
    """The same, where the sums over its layers are known, and how many kinds of masks they have."""
    has_head = last == shape.layers
    if (first, last) == (0, shape.layers):
        beside = shape.whole_extra_bytes
    else:
        beside = shape.last_extra_bytes if has_head else shape.extra_bytes
    return StageShape(
        weights_bytes=layer_bytes + beside,
        cell_bytes=cell_bytes,
        masks=kinds or 1,
        row_floats=max(shape.row_floats[first:last]),
        n_embd=shape.n_embd,
        layers=last - first,
        vocabulary=shape.n_vocab if has_head else 0,
    )


class Demand(NamedTuple):
    """What is asked of a model: `context` tokens for each of `sequences` answers at the same time."""

    context: int
    sequences: int

    @property
    def batch_rows(self) -> int:
        """Rows of a micro-batch, as machine/sizing.py sizes services."""
        return max(BATCH_ROWS, self.sequences)


@lru_cache(maxsize=STAGES_KEPT)
def needed_bytes(shape: ModelShape, demand: Demand, first: int, last: int) -> int:
    """The memory of a stage; the first of several also has the embedding, which its host reads."""
    return _needed_bytes(shape, demand, first, last, stage_of(shape, first, last))


def _needed_bytes(shape: ModelShape, demand: Demand, first: int, last: int, stage: StageShape) -> int:
    scheduler_host = shape.embedding_bytes if first == 0 and last < shape.layers else 0
    return stage.fit(demand).total_bytes + scheduler_host


def edges_of(shape: ModelShape) -> tuple[int, ...]:
    """The layers between which a placement may cut a model, 0 and the last edge among them."""
    if not shape.cuttable:
        return (0, shape.layers)
    pieces = -(-shape.layers // shape.cut_step)
    return (*range(0, shape.layers, shape.cut_step * -(-pieces // PIECES_MAX)), shape.layers)


@lru_cache(maxsize=TABLES_KEPT)
def needs(shape: ModelShape, demand: Demand) -> tuple[tuple[int, ...], ...]:
    """`needs[i][j]` are the `needed_bytes` of the stage between these two of `edges_of`; 0: not allowed."""
    edges = edges_of(shape)
    weights, cells, windowed = (
        [0, *accumulate(items)] for items in (shape.layer_bytes, shape.cell_bytes, shape.windowed)
    )
    table: list[tuple[int, ...]] = []
    for first in edges:
        row: list[int] = []
        for last in edges:
            if not shape.allows(first, last):
                row.append(0)
                continue
            inner = windowed[last] - windowed[first + 1]  # of the layers behind the first
            kinds = (inner > 0) + (inner < last - first - 1)
            sums = (weights[last] - weights[first], cells[last] - cells[first], kinds)
            row.append(_needed_bytes(shape, demand, first, last, _stage(shape, first, last, *sums)))
        table.append(tuple(row))
    return tuple(table)
