"""A decoder layer and its gradients, in numpy: what training a ternary model needs of a framework.

The forward formulas are those of compress/decoder.py; rows are (windows, length, width) float32. A backward
pass computes again what it does not keep (probabilities of attention), so that memory stays at a few times
the rows that pass the layer.
"""

from dataclasses import dataclass

import numpy as np

from cordee.compress.decoder import rotary_tables
from cordee.convert.ternary_file import TernaryModel

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """What a forward pass leaves for the backward pass."""

    x: np.ndarray  # in front of the layer
    attention_input: np.ndarray
    heads: (
        Arrays  # rows of queries, keys, values before norm and rotation: (windows, length, heads, head_dim)
    )
    attended: np.ndarray  # (windows, length, heads * head_dim), before its norm
    output_input: np.ndarray
    y: np.ndarray  # between attention and feed-forward
    feed_forward_input: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    product: np.ndarray  # of both, before its norm
    down_input: np.ndarray


@dataclass(frozen=True)
class Gradients:
    """Of a loss, by the rows in front of the layer, its matrices and its norms."""

    x: np.ndarray
    matrices: Arrays
    vectors: Arrays


class Layer:
    """The function of one decoder layer of a model. Windows begin at position 0."""

    def __init__(self, model: TernaryModel, length: int, divisors: np.ndarray | None = None) -> None:
        """As `cordee.compress.decoder.Decoder`."""
        self._model = model
        self._cos, self._sin = (table[None, :, None] for table in rotary_tables(model, length, divisors))

    def forward(self, matrices: Arrays, vectors: Arrays, x: np.ndarray) -> tuple[np.ndarray, Trace]:
        """The rows behind the layer."""
        attention_input = self._norm(x, vectors["attn_norm"])
        heads = {name: self._split(attention_input @ matrices[f"attn_{name}"].T) for name in "qkv"}
        q, k, v = (self._placed(vectors, name, heads[name]) for name in "qkv")
        attended = self._attended(q, k, v)
        output_input = self._optional_norm(vectors, "attn_sub_norm", attended)
        y = x + output_input @ matrices["attn_output"].T
        feed_forward_input = self._norm(y, vectors["ffn_norm"])
        gate, up = (feed_forward_input @ matrices[name].T for name in ("ffn_gate", "ffn_up"))
        product = self._activated(gate) * up
        down_input = self._optional_norm(vectors, "ffn_sub_norm", product)
        trace = Trace(
            x,
            attention_input,
            heads,
            attended,
            output_input,
            y,
            feed_forward_input,
            gate,
            up,
            product,
            down_input,
        )
        return y + down_input @ matrices["ffn_down"].T, trace

    def backward(self, matrices: Arrays, vectors: Arrays, trace: Trace, d: np.ndarray) -> Gradients:
        """The gradients of a loss whose gradient by the rows behind the layer is `d`."""
        found = Gradients(np.empty(0), {}, {})
        d_y = d + self._feed_forward_back(matrices, vectors, trace, d, found)
        return Gradients(
            d_y + self._attention_back(matrices, vectors, trace, d_y, found), found.matrices, found.vectors
        )

    def _feed_forward_back(
        self, matrices: Arrays, vectors: Arrays, trace: Trace, d: np.ndarray, found: Gradients
    ) -> np.ndarray:
        found.matrices["ffn_down"] = _outer(d, trace.down_input)
        d = d @ matrices["ffn_down"]
        d = self._optional_norm_back(vectors, "ffn_sub_norm", trace.product, d, found)
        d_up, d_gate = d * self._activated(trace.gate), d * trace.up * self._slope(trace.gate)
        found.matrices["ffn_up"] = _outer(d_up, trace.feed_forward_input)
        found.matrices["ffn_gate"] = _outer(d_gate, trace.feed_forward_input)
        d = d_up @ matrices["ffn_up"] + d_gate @ matrices["ffn_gate"]
        return self._norm_back(vectors, "ffn_norm", trace.y, d, found)

    def _attention_back(
        self, matrices: Arrays, vectors: Arrays, trace: Trace, d: np.ndarray, found: Gradients
    ) -> np.ndarray:
        found.matrices["attn_output"] = _outer(d, trace.output_input)
        d = d @ matrices["attn_output"]
        d = self._optional_norm_back(vectors, "attn_sub_norm", trace.attended, d, found)
        q, k, v = (self._placed(vectors, name, trace.heads[name]) for name in "qkv")
        parts = self._attended_back(q, k, v, self._split(d))
        total = np.zeros_like(trace.attention_input)
        for name, part in zip("qkv", parts, strict=True):
            rows = self._placed_back(vectors, name, trace.heads[name], part, found)
            flat = rows.reshape(*rows.shape[:2], -1)
            found.matrices[f"attn_{name}"] = _outer(flat, trace.attention_input)
            total += flat @ matrices[f"attn_{name}"]
        return self._norm_back(vectors, "attn_norm", trace.x, total, found)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x * self._inverse(x) * weight

    def _inverse(self, x: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(self._model.epsilon))

    def _norm_back(
        self, vectors: Arrays, name: str, x: np.ndarray, d: np.ndarray, found: Gradients
    ) -> np.ndarray:
        inverse = self._inverse(x)
        unit = x * inverse
        found.vectors[name] = (d * unit).reshape(-1, x.shape[-1]).sum(axis=0)
        d = d * vectors[name]
        return inverse * (d - unit * (d * unit).mean(axis=-1, keepdims=True))

    def _optional_norm(self, vectors: Arrays, name: str, x: np.ndarray) -> np.ndarray:
        return self._norm(x, vectors[name]) if name in vectors else x

    def _optional_norm_back(
        self, vectors: Arrays, name: str, x: np.ndarray, d: np.ndarray, found: Gradients
    ) -> np.ndarray:
        return self._norm_back(vectors, name, x, d, found) if name in vectors else d

    def _activated(self, gate: np.ndarray) -> np.ndarray:
        if self._model.activation == "relu2":
            return np.square(np.maximum(gate, 0))
        return gate * _logistic(gate)

    def _slope(self, gate: np.ndarray) -> np.ndarray:
        if self._model.activation == "relu2":
            return 2 * np.maximum(gate, 0)
        chance = _logistic(gate)
        return chance * (1 + gate * (1 - chance))

    def _split(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(*rows.shape[:2], -1, self._model.head_dim)

    def _placed(self, vectors: Arrays, name: str, heads: np.ndarray) -> np.ndarray:
        """Queries and keys with their norm, turned where they are; values as they are."""
        heads = self._optional_norm(vectors, f"attn_{name}_norm", heads)
        return heads if name == "v" else self._turned(heads, self._sin)

    def _placed_back(
        self, vectors: Arrays, name: str, heads: np.ndarray, d: np.ndarray, found: Gradients
    ) -> np.ndarray:
        d = d if name == "v" else self._turned(d, -self._sin)
        return self._optional_norm_back(vectors, f"attn_{name}_norm", heads, d, found)

    def _turned(self, x: np.ndarray, sin: np.ndarray) -> np.ndarray:
        cos, sin = self._cos[:, : x.shape[1]], sin[:, : x.shape[1]]
        half = x.shape[-1] // 2
        if self._model.rope == "neox":
            first, second = slice(None, half), slice(half, None)
        else:
            first, second = slice(0, None, 2), slice(1, None, 2)
        turned, a, b = np.empty_like(x), x[..., first], x[..., second]
        turned[..., first] = a * cos - b * sin
        turned[..., second] = a * sin + b * cos
        return turned

    def _attended(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        shared, out = q.shape[2] // k.shape[2], np.empty_like(q)
        for window in range(len(q)):
            for head in range(q.shape[2]):
                odds = self._odds(q[window, :, head], k[window, :, head // shared])
                out[window, :, head] = odds @ v[window, :, head // shared]
        return out.reshape(*out.shape[:2], -1)

    def _attended_back(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, d: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shared, scale = q.shape[2] // k.shape[2], np.float32(self._model.head_dim**-0.5)
        d_q, d_k, d_v = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        for window in range(len(q)):
            for head in range(q.shape[2]):
                own = (window, slice(None), head)
                both = (window, slice(None), head // shared)
                odds = self._odds(q[own], k[both])
                d_v[both] += odds.T @ d[own]
                d_odds = d[own] @ v[both].T
                d_scores = odds * (d_odds - (d_odds * odds).sum(axis=1, keepdims=True)) * scale
                d_q[own] = d_scores @ k[both]
                d_k[both] += d_scores.T @ q[own]
        return d_q, d_k, d_v

    def _odds(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """(length, length) probabilities of causal attention."""
        scores = q @ k.T * np.float32(self._model.head_dim**-0.5)
        scores[np.triu_indices(len(q), 1)] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        return scores


def _logistic(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _outer(d: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """(rows, cols) gradient of a matrix of which `inputs` (…, cols) made rows with gradient `d` (…, rows)."""
    return d.reshape(-1, d.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1])
