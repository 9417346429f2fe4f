"""The layout `pentium2` of native/FORMAT.md: five weights a byte, in the order in which sums are looked up.

Embedding and head have this layout, too: the head is most of a small model's multiplications. So their rows
must be ternary already, each with a scale of its own, which only training achieves.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from cordee.convert.scales import found_scales
from cordee.convert.ternary_file import (
    EMBEDDING,
    HEAD,
    OutputTensor,
    TernaryModel,
    WeightSource,
    output_tensor,
    strips,
    tensors_in_order,
    vector_tensor,
    write,
)
from cordee.errors import UnsupportedModel

LAYOUT = "pentium2"
WEIGHTS = 5  # in a byte, which is a group
TILE = 20  # groups whose tables are in use at a time
WORD = 4  # groups in a word, the unit in which a row is read
# A code is the sum of (weight + 1) times these. 28 and not 27, because tables consist of whole vectors.
PLACES = np.array([1, 3, 9, 28, 84], dtype=np.uint8)
REMEDY = " For a Pentium II the embedding and the head must be ternary, too."


def row_bytes(cols: int) -> int:
    """Bytes of a row of `cols` weights."""
    return -(-cols // (WEIGHTS * WORD)) * WORD


def pack_rows(weights: np.ndarray) -> np.ndarray:
    """(rows, cols) int8 of -1, 0, 1 -> (rows, row_bytes) uint8, still row by row."""
    rows, cols = weights.shape
    digits = np.ones((rows, row_bytes(cols) * WEIGHTS), dtype=np.uint8)
    digits[:, :cols] = (weights + 1).astype(np.uint8)
    return digits.reshape(rows, -1, WEIGHTS) @ PLACES


def tiles(packed: np.ndarray) -> Iterator[np.ndarray]:
    """(rows, row_bytes) -> the payload's tiles in order: (rows, groups of the tile) each."""
    for first in range(0, packed.shape[1], TILE):
        yield packed[:, first : first + TILE]


def unpack(payload: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """A payload's bytes, in whatever shape -> (rows, cols) int8."""
    groups, flat = row_bytes(cols), payload.reshape(-1)
    ends = [min(first + TILE, groups) * rows for first in range(0, groups, TILE)]
    packed = np.concatenate([tile.reshape(rows, -1) for tile in np.split(flat, ends[:-1])], axis=1)
    low, high = packed % 28, packed // 28
    digits = np.stack([low % 3, low // 3 % 3, low // 9, high % 3, high // 3], axis=2)
    return (digits.reshape(rows, -1)[:, :cols].astype(np.int8)) - np.int8(1)


def write_pentium2(
    path: Path,
    model: TernaryModel,
    source: WeightSource,
    *,
    describe: Callable[[GGUFWriter], None] | None = None,
) -> None:
    """Write a model file in this layout, as `cordee.convert.ternary_file.write` does.

    Memory holds one matrix at a time.

    Raises:
        UnsupportedModel: embedding or head are not ternary, or activations are not rounded to bytes.
        StorageFailed: no room on disk.
    """
    if model.planes != 1:
        raise UnsupportedModel(
            "The model's activations are not rounded to 8 bits, which the layout of a Pentium II needs."
        )
    model = replace(model, layout=LAYOUT, head=LAYOUT, planes=1, head_planes=1)
    write(path, model, source, describe=describe, tensors=list(_tensors(model, source)))


def _tensors(model: TernaryModel, source: WeightSource) -> Iterator[OutputTensor]:
    embedding = _table(EMBEDDING, model, source)
    head = () if _tied(model, source) else _table(HEAD, model, source)
    payload = partial(_payload, source)
    return tensors_in_order(model, source, embedding=embedding, payload=payload, head=head)


def _payload(source: WeightSource, name: str, rows: int, cols: int) -> OutputTensor:
    """A matrix; of embedding and head, which sources give as floats, the signs."""

    def arrays() -> Iterator[np.ndarray]:
        weights = (np.sign(source.rows(name, first, last)).astype(np.int8) for first, last in strips(rows))
        yield from tiles(np.concatenate([pack_rows(strip) for strip in weights]))

    shape = (rows, row_bytes(cols))
    return output_tensor(name, shape, GGMLQuantizationType.I8, shape[0] * shape[1], arrays())


def _table(name: str, model: TernaryModel, source: WeightSource) -> Iterator[OutputTensor]:
    """Embedding or head."""
    scales = found_scales(name, model.n_vocab, partial(source.rows, name), REMEDY)
    yield vector_tensor(name.replace("weight", "scale"), len(scales), lambda: scales)
    yield _payload(source, name, model.n_vocab, model.n_embd)


def _tied(model: TernaryModel, source: WeightSource) -> bool:
    return all(
        np.array_equal(source.rows(EMBEDDING, first, last), source.rows(HEAD, first, last))
        for first, last in strips(model.n_vocab)
    )
