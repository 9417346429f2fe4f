"""A decoder layer in numpy, part by part: what enters each matrix, and what leaves the layer.

The formulas are those of native/src/engine/forward.c (RMS norm, rotary embedding, grouped attention, gated
feed-forward), in float32 over whole windows: there is no cache.
"""

from dataclasses import dataclass

import numpy as np

from cordee.convert.ternary_file import TernaryModel

# The matrices of a layer in the order in which rows pass them; those of one tuple share their input.
SHARED_INPUTS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a layer by name, float32: matrices (rows, cols), and vectors (norms, biases)."""

    matrices: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]


def rotary_tables(
    model: TernaryModel, length: int, divisors: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(length, head_dim / 2) cosines and sines of the rotary embedding; `divisors` as for `Decoder`."""
    frequencies = model.rope_base ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
    angles = np.outer(np.arange(length), frequencies if divisors is None else frequencies / divisors)
    return np.cos(angles).astype("f4"), np.sin(angles).astype("f4")


class Decoder:
    """The layers of one model. Rows are (windows, length, width) float32; each begins at position 0."""

    def __init__(self, model: TernaryModel, length: int, divisors: np.ndarray | None = None) -> None:
        """`length` is the longest window's; `divisors` (head_dim / 2,) divide the rotary frequencies."""
        self._model = model
        self._cos, self._sin = rotary_tables(model, length, divisors)

    def attention_input(self, layer: DecoderLayer, hidden: np.ndarray) -> np.ndarray:
        """What enters queries, keys and values."""
        return self.norm(hidden, layer.vectors["attn_norm"])

    def output_input(self, layer: DecoderLayer, normal: np.ndarray) -> np.ndarray:
        """What enters attn_output, of what entered queries, keys and values."""
        q, k, v = (self._heads(layer, f"attn_{name}", normal) for name in "qkv")
        attended = np.empty_like(q)
        for window in range(len(q)):
            self._attend(q[window], k[window], v[window], attended[window])
        rows = attended.swapaxes(1, 2).reshape(*normal.shape[:2], -1)
        return self._sub_norm(layer, "attn_sub_norm", rows)

    def feed_forward_input(self, layer: DecoderLayer, hidden: np.ndarray) -> np.ndarray:
        """What enters gate and up."""
        return self.norm(hidden, layer.vectors["ffn_norm"])

    def down_input(self, layer: DecoderLayer, normal: np.ndarray) -> np.ndarray:
        """What enters ffn_down, of what entered gate and up."""
        gate, up = (normal @ layer.matrices[name].T for name in ("ffn_gate", "ffn_up"))
        if self._model.activation == "relu2":
            np.square(np.maximum(gate, 0, out=gate), out=gate)
        else:
            gate /= 1 + np.exp(-gate)
        gate *= up
        return self._sub_norm(layer, "ffn_sub_norm", gate)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """RMS norm over the last axis."""
        mean = np.square(x).mean(axis=-1, keepdims=True)
        return x * (weight / np.sqrt(mean + np.float32(self._model.epsilon)))

    def _sub_norm(self, layer: DecoderLayer, name: str, x: np.ndarray) -> np.ndarray:
        return self.norm(x, layer.vectors[name]) if name in layer.vectors else x

    def _heads(self, layer: DecoderLayer, name: str, normal: np.ndarray) -> np.ndarray:
        """(windows, heads, length, head_dim) of queries, keys or values, turned where they are."""
        rows = normal @ layer.matrices[name].T
        if f"{name}.bias" in layer.vectors:
            rows += layer.vectors[f"{name}.bias"]
        heads = rows.reshape(*rows.shape[:2], -1, self._model.head_dim)
        if f"{name}_norm" in layer.vectors:
            heads = self.norm(heads, layer.vectors[f"{name}_norm"])
        heads = heads.swapaxes(1, 2)
        return heads if name == "attn_v" else self._turned(heads)

    def _turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding, of pairs of halves or of neighbours."""
        cos, sin = self._cos[: x.shape[2]], self._sin[: x.shape[2]]
        turned = np.empty_like(x)
        half = x.shape[3] // 2
        if self._model.rope == "neox":
            first, second = slice(None, half), slice(half, None)
        else:
            first, second = slice(0, None, 2), slice(1, None, 2)
        a, b = x[..., first], x[..., second]
        turned[..., first] = a * cos - b * sin
        turned[..., second] = a * sin + b * cos
        return turned

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        """Causal attention of one window: (heads, length, head_dim), (kv_heads, length, head_dim) twice."""
        shared = len(q) // len(k)
        future = np.triu(np.ones((q.shape[1], q.shape[1]), dtype=bool), 1)
        for head in range(len(q)):
            scores = q[head] @ k[head // shared].T
            scores *= np.float32(self._model.head_dim**-0.5)
            scores[future] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            np.matmul(scores, v[head // shared], out=out[head])
