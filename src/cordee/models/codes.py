"""Rows of an embedding that is stored in the ternary engine's codes (native/FORMAT.md), as floats.

They have the bits of the engine's own look-up (native/src/engine/embedding.c): a pipeline's first stage gets
rows.
"""

from collections.abc import Callable

import numpy as np

from cordee.errors import BadModelFile
from cordee.models.gguf import Header
from cordee.models.metadata import CONVERT_AGAIN
from cordee.models.slices import EMBEDDING, EMBEDDING_SCALE, EMBEDDING_SIGNS

# By the head's layout, which an embedding in codes shares: how many blocks of 16 rows are in a group.
BLOCKS = {"trit2": 4, "trit5": 5}
BLOCK_ROWS, QUAD_BYTES = 16, 64
_LIFTS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)  # a digit of base 3 over the byte's top

# From the name of a tensor to its bytes.
Bytes = Callable[[str], np.ndarray]


def has_codes(header: Header) -> bool:
    """Whether the embedding is in codes."""
    tensor = header.tensor(EMBEDDING)
    return (
        tensor is not None
        and len(tensor.shape) == 3
        and header.text("cordee.ternary.head", "") in BLOCKS
        and header.tensor(EMBEDDING_SCALE) is not None
    )


class CodedRows:
    """The rows of an embedding in codes; `read` gives a tensor's bytes, mapped or in memory."""

    def __init__(self, header: Header, read: Bytes) -> None:
        """Raises BadModelFile if the tensors do not have the sizes that the settings say."""
        self.n_embd = header.count(".embedding_length")
        self.n_vocab = header.count(".vocab_size")
        self._layout = header.text("cordee.ternary.head")
        self._group_rows = BLOCKS[self._layout] * BLOCK_ROWS
        self._columns = header.count("cordee.ternary.scale_columns", 0)
        groups, quads = -(-self.n_vocab // self._group_rows), -(-self.n_embd // 16) * 4
        spans = -(-self.n_embd // self._columns) if self._columns else 0
        codes, scales = read(EMBEDDING), read(EMBEDDING_SCALE)
        sound = codes.size == groups * quads * QUAD_BYTES
        if spans:
            sound &= scales.size == groups * spans * self._group_rows * 2
        else:
            sound &= 0 < scales.size // 4 <= self.n_vocab and self.n_vocab % (scales.size // 4) == 0
        if not sound:
            raise BadModelFile(f"{header.name}: its embedding has not the size it states: {CONVERT_AGAIN}.")
        self._codes = codes.reshape(groups, quads, BLOCK_ROWS, 4)
        self._scales = scales.view("<f2").reshape(groups, spans, -1) if spans else scales.view("<f4")
        self._signs: np.ndarray | None = None
        self._block = header.count("cordee.ternary.rotation_block", 0)
        if "embedding," in header.text("cordee.ternary.rotated", ""):
            self._signs = read(EMBEDDING_SIGNS).view("<f4")
            block = self._block
            if block < 2 or block & (block - 1) or self.n_embd % block or len(self._signs) != self.n_embd:
                raise BadModelFile(f"{header.name}: its rotation is impossible: {CONVERT_AGAIN}.")

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) token ids -> (n, n_embd) float32."""
        group, within = np.divmod(ids, self._group_rows)
        block, row = np.divmod(within, BLOCK_ROWS)
        stored = self._codes[group, :, row].reshape(len(ids), -1)[:, : self.n_embd]
        if self._layout == "trit2":
            codes = stored >> (2 * block)[:, None].astype(np.uint8) & 3
        else:
            lifted = stored * _LIFTS[block][:, None]
            codes = (lifted.astype(np.uint16) * 3 >> 8).astype(np.uint8)
        weights = codes.astype(np.float32) - 1
        if self._columns:
            scales = self._scales[group, :, within].astype(np.float32)
            rows = weights * np.repeat(scales, self._columns, axis=1)[:, : self.n_embd]
        else:
            rows = weights * self._scales[ids // (self.n_vocab // len(self._scales))][:, None]
        return rows if self._signs is None else turned_back(rows, self._signs, self._block)


def turned_back(rows: np.ndarray, signs: np.ndarray, block: int) -> np.ndarray:
    """(n, width) rows out of a rotated basis, in the order of the engine's sums (floats.inc, turn_back)."""
    return transformed(rows, block) * signs * (np.float32(1) / np.sqrt(np.float32(block)))


def transformed(rows: np.ndarray, block: int) -> np.ndarray:
    """(n, width) rows times the Walsh-Hadamard matrix in Sylvester's order, by blocks, not normalised."""
    apart = 1
    while apart < block:
        pairs = rows.reshape(len(rows), -1, 2, apart)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        rows = np.stack([left + right, left - right], axis=2).reshape(len(rows), -1)
        apart *= 2
    return rows
