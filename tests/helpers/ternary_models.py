"""Tiny ternary models of every family, and what they should compute: numpy, straight from the definitions.

The reference shares nothing with the engine but the sizes of the model: matrices are plain arrays, sums are
numpy's, attention is over whole sequences. It rounds where the definitions round (activations to int8 where
b1.58 says so, the head's and the cache's stored precision) and is float32 elsewhere.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from cordee.convert.ternary_file import LAYOUTS, TernaryModel, rounded, write
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage

_BASE = TernaryModel(
    architecture="llama",
    layers=4,
    n_embd=128,
    n_ff=208,
    n_vocab=320,
    heads=8,
    kv_heads=8,
    head_dim=16,
    context=512,
    rope_base=10_000.0,
    embedding=GGMLQuantizationType.F32,
    head="int8",
)
FAMILIES = {
    # BitNet b1.58 2B 4T: sub-norms, squared ReLU, RoPE on halves, grouped queries.
    "bitnet": replace(
        _BASE, architecture="bitnet", kv_heads=2, activation="relu2", rope="neox", sub_norms=True
    ),
    # bitnet_b1_58-large and -3B: sub-norms with SiLU; a head size that fills no vector.
    "bitnet-silu": replace(
        _BASE,
        architecture="bitnet",
        n_embd=100,
        heads=5,
        kv_heads=5,
        head_dim=20,
        rope="neox",
        sub_norms=True,
    ),
    # Llama3-8B-1.58, Falcon-E: a llama block, RoPE on pairs, five weights in a byte.
    "llama": replace(_BASE, kv_heads=4, layout="trit5", rope_base=500_000.0),
    # TriLM: activations are not quantized, matrices have several scales.
    "trilm": replace(_BASE, planes=3),
}


class Weights:
    """Seeded random weights of a model: a `cordee.convert.ternary_file.WeightSource`."""

    def __init__(self, model: TernaryModel, seed: int, scales: int = 1) -> None:
        self.model = model
        draw = np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}
        self._scales: dict[str, np.ndarray] = {}
        for layer in range(model.layers):
            for name, (rows, cols) in model.matrices().items():
                full = f"blk.{layer}.{name}.weight"
                self.arrays[full] = draw.integers(-1, 2, (rows, cols)).astype(np.int8)
                around = 1 + 0.2 * draw.random(scales)
                self._scales[full.replace("weight", "scale")] = (around * np.sqrt(1.5 / cols)).astype("f4")
            for name, length in model.norms().items():
                self.arrays[f"blk.{layer}.{name}.weight"] = (1 + 0.1 * draw.standard_normal(length)).astype(
                    "f4"
                )
        self.arrays["output_norm.weight"] = (1 + 0.1 * draw.standard_normal(model.n_embd)).astype("f4")
        # Small beside what layers add, so that every layer matters for the token.
        embedding = 0.3 * draw.standard_normal((model.n_vocab, model.n_embd))
        self.arrays["token_embd.weight"] = embedding.astype("f4")
        self.arrays["output.weight"] = draw.standard_normal(embedding.shape).astype("f4")

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        return self.arrays[name][first:last]

    def scales(self, name: str) -> np.ndarray:
        return self._scales[name.replace("weight", "scale")]

    def vector(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def dense(self, layer: int, name: str) -> np.ndarray:
        """A layer's matrix as floats, scales included."""
        weights = self.arrays[f"blk.{layer}.{name}.weight"]
        scales = self._scales[f"blk.{layer}.{name}.scale"]
        return weights * np.repeat(scales, len(weights) // len(scales))[:, None]


def make_ternary(family: str, path: Path, *, seed: int = 1, **changes: object) -> Weights:
    """Write a tiny model of the family; give its weights."""
    weights = Weights(replace(FAMILIES[family], **changes), seed, scales=2 if family == "trilm" else 1)
    write(path, weights.model, weights)
    return weights


def assert_computes(path: Path, weights: Weights) -> None:
    """A file's logits are those of the weights, except for the rounding of head and cache."""
    stage = TernaryStage(path, StageConfig(context=64, sequences=1, batch_rows=64, threads=1))
    tokens = np.arange(10, 50)
    logits = stage.decode(batch_of_one(tokens))[0]
    stage.close()
    expected = Reference(weights).logits(tokens)[-1]
    assert np.abs(logits - expected).max() < 0.2 * expected.std()
    assert logits.argmax() == expected.argmax()


@dataclass(frozen=True)
class Reference:
    """What a model computes for one sequence."""

    weights: Weights

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) tokens -> (n, n_embd) rows."""
        return self.weights.arrays["token_embd.weight"][tokens]

    def layer(self, index: int, hidden: np.ndarray) -> np.ndarray:
        """A whole sequence through one layer."""
        model, arrays = self.weights.model, self.weights.arrays

        def norm(name: str, x: np.ndarray) -> np.ndarray:
            weight = arrays.get(f"blk.{index}.{name}.weight")
            return x if weight is None else self._norm(x, weight)

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            return self._linear(x, self.weights.dense(index, name))

        x = norm("attn_norm", hidden)
        q, k, v = (
            linear(f"attn_{name}", x).reshape(len(x), -1, model.head_dim).transpose(1, 0, 2) for name in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(half(t), model.heads // model.kv_heads, axis=0) for t in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(model.head_dim))
        scores[:, np.triu(np.ones((len(x), len(x)), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        attended = (shares / shares.sum(axis=2, keepdims=True)) @ v
        attended = attended.transpose(1, 0, 2).reshape(len(x), -1)
        hidden = hidden + linear("attn_output", norm("attn_sub_norm", attended))
        x = norm("ffn_norm", hidden)
        gate, up = linear("ffn_gate", x), linear("ffn_up", x)
        gate = np.maximum(gate, 0) ** 2 if model.activation == "relu2" else gate / (1 + np.exp(-gate))
        return hidden + linear("ffn_down", norm("ffn_sub_norm", gate * up))

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Rows -> logits, with the head's weights as they are stored."""
        stored, scales = rounded(self.weights.arrays["output.weight"], LAYOUTS[self.weights.model.head])
        return self._norm(hidden, self.weights.arrays["output_norm.weight"]) @ (stored * scales[:, None]).T

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) tokens -> (n, n_vocab)."""
        hidden = self.embed(tokens)
        for index in range(self.weights.model.layers):
            hidden = self.layer(index, hidden)
        return self.head(hidden)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (
            x / np.sqrt((x**2).mean(axis=1, keepdims=True) + np.float32(self.weights.model.epsilon)) * weight
        )

    def _linear(self, x: np.ndarray, dense: np.ndarray) -> np.ndarray:
        if self.weights.model.planes == 1:  # b1.58: int8 with one scale per token
            scale = 127 / np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
            x = np.clip(np.rint(x * scale), -128, 127) / scale
        return (x.astype(np.float64) @ dense.T).astype(np.float32)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        model = self.weights.model
        angles = np.outer(
            np.arange(x.shape[1]), model.rope_base ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
        )
        turn = np.exp(1j * angles)
        if model.rope == "neox":
            a, b = np.split(x, 2, axis=2)
            turned = (a + 1j * b) * turn
            return np.concatenate([turned.real, turned.imag], axis=2).astype(np.float32)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=3).reshape(x.shape).astype(np.float32)


def half(x: np.ndarray) -> np.ndarray:
    """Rounded as in the cache."""
    return x.astype(np.float16).astype(np.float32)
