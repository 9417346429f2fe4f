"""The rotated basis that a model may be compressed in: outliers of inputs are spread over many of them.

What enters a matrix is multiplied by random signs and, block by block, by a Walsh-Hadamard matrix; the engine
does it in front of the matrix (native/FORMAT.md, "The rotation"). Here weights and statistics are brought to
that basis, by the same function of the engine.
"""

from dataclasses import dataclass

import numpy as np

from cordee.convert.ternary_file import TernaryModel
from cordee.engine.ternary import turn

BLOCK_MIN, BLOCK_MAX = 16, 1024  # as the engine takes them, and as published models have them
SIGNS_SEED = 1  # the same for every model: signs are stored in the file all the same
# The input of each matrix, by the name that its rotation has in the file.
INPUTS = {
    "attn_q": "attn",
    "attn_k": "attn",
    "attn_v": "attn",
    "attn_output": "attn_output",
    "ffn_gate": "ffn",
    "ffn_up": "ffn",
    "ffn_down": "ffn_down",
}
ROTATED = ("attn", "attn_output", "ffn", "ffn_down")


@dataclass(frozen=True)
class Basis:
    """A rotated basis for inputs as wide as `signs`."""

    signs: np.ndarray
    block: int

    def into(self, rows: np.ndarray) -> np.ndarray:
        """(n, width) rows of inputs, or of a matrix, in this basis."""
        return turn(rows, self.signs, self.block)

    def out_of(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `into`."""
        return turn(rows, self.signs, self.block, back=True)

    def statistics(self, hessian: np.ndarray) -> np.ndarray:
        """H of inputs in this basis."""
        return np.ascontiguousarray(self.into(self.into(hessian).T).T)


def block_of(model: TernaryModel) -> int:
    """The largest block that fits all inputs of the model's matrices; 0 if none does."""
    widths = (model.n_embd, model.heads * model.head_dim, model.n_ff)
    block = min(min(width & -width for width in widths), BLOCK_MAX)
    return block if block >= BLOCK_MIN else 0


def signs_of(length: int) -> np.ndarray:
    """(length,) float32 of 1 and -1."""
    return np.random.default_rng((SIGNS_SEED, length)).choice(np.array([-1, 1], dtype=np.float32), length)
