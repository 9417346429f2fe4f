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
_QWEN3 = replace(
    _BASE,
    architecture="qwen3",
    n_embd=160,
    n_ff=336,
    heads=4,
    kv_heads=2,
    head_dim=48,
    rope="neox",
    rope_base=1_000_000.0,
    epsilon=1e-6,
    head_norms=True,
    scale_columns=128,
    embedding="codes",
    head="trit2",
    head_planes=1,
)
# Qwen3 with scales of spans: embedding and head in codes, tied or not, in both layouts.
GROUPED = {
    "bonsai": _QWEN3,
    "bonsai-tied": replace(_QWEN3, layout="trit5", head="trit5", tied=True, scale_columns=64),
    "bonsai-256": replace(
        _QWEN3,
        n_ff=528,
        layout="trit5",
        head="int8",
        embedding=GGMLQuantizationType.F16,
        planes=2,
        scale_columns=256,
    ),
    # In a rotated basis, as Bonsai 2 is.
    "bonsai-rotated": replace(
        _QWEN3,
        head="trit5",
        planes=3,
        head_planes=2,
        head_dim=64,
        n_ff=320,
        rotation_block=32,
        rotated=("attn", "attn_output", "ffn", "ffn_down", "head", "embedding"),
    ),
}
# Maple: a mixture of experts with windows, rotation of half a head in the layers that have one, limits of the
# gate.
_MAPLE = replace(
    _BASE,
    architecture="maple",
    n_ff=48,
    heads=4,
    kv_heads=2,
    head_dim=32,
    rope="neox",
    head_norms=True,
    planes=2,
    layout="trit5",
    experts=12,
    experts_used=3,
    window=24,
    windowed=(True, True, True, False),
    rope_dims=16,
    rope_layers="windowed",
    gate_limit=0.9,
)
MIXTURES = {
    "maple": _MAPLE,
    # With scales of spans, rows that fill no group, and a window in each layer.
    "maple-grouped": replace(
        _MAPLE,
        n_embd=144,
        n_ff=72,
        experts=5,
        experts_used=2,
        windowed=(True,) * 4,
        layout="trit2",
        planes=1,
        scale_columns=64,
        embedding="codes",
        head="trit2",
        head_planes=1,
    ),
}
FAMILIES |= GROUPED | MIXTURES
# MiniCPM4: scales of what enters and of what blocks add, divisors of the rotary angles.
FAMILIES["minicpm"] = replace(
    _BASE, architecture="minicpm", rope="neox", embedding_scale=12.0, residual_scale=0.7, divisors=True
)


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
                spans = -(-cols // model.scale_columns) if model.scale_columns else 0
                around = 1 + 0.2 * draw.random((rows, spans) if spans else scales)
                own = (around * np.sqrt(1.5 / cols)).astype("f2" if spans else "f4")
                self._scales[full.replace("weight", "scale")] = own.astype("f4")
            for name, shape in model.routers().items():
                router = draw.standard_normal(shape) * 2 / np.sqrt(shape[1])
                self.arrays[f"blk.{layer}.{name}.weight"] = router.astype("f4")
            for name, length in model.norms().items():
                self.arrays[f"blk.{layer}.{name}.weight"] = (1 + 0.1 * draw.standard_normal(length)).astype(
                    "f4"
                )
        self.arrays["output_norm.weight"] = (1 + 0.1 * draw.standard_normal(model.n_embd)).astype("f4")
        if model.divisors:
            self.arrays["rope_freqs.weight"] = (1 + 3 * draw.random(model.head_dim // 2)).astype("f4")
        for name, length in model.rotations().items():
            self.arrays[name] = draw.choice(np.array([-1, 1], dtype="f4"), length)
        # Small beside what layers add, so that every layer matters for the token.
        size = 0.05 if model.tied else 0.3  # else a tied head would choose what came in
        self._draw_table(draw, "token_embd", size, model.embedding == "codes")
        self._draw_table(draw, "output", 1.0, LAYOUTS[model.head].ternary)
        if model.tied:
            self.arrays["output.weight"] = self.arrays["token_embd.weight"]
            self._scales["output.scale"] = self._scales["token_embd.scale"]

    def _draw_table(self, draw: np.random.Generator, name: str, size: float, codes: bool) -> None:
        shape = self.model.n_vocab, self.model.n_embd
        if not codes:
            self.arrays[f"{name}.weight"] = (size * draw.standard_normal(shape)).astype("f4")
            return
        self.arrays[f"{name}.weight"] = draw.integers(-1, 2, shape).astype(np.int8)
        spans = -(-shape[1] // self.model.scale_columns)
        around = size * (1 + 0.2 * draw.random((shape[0], spans)))
        self._scales[f"{name}.scale"] = around.astype("f2").astype("f4")

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        return self.arrays[name][first:last]

    def scales(self, name: str) -> np.ndarray:
        return self._scales[name.replace("weight", "scale")]

    def vector(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def dense(self, layer: int, name: str) -> np.ndarray:
        """A layer's matrix as floats, scales included."""
        return self.floats(f"blk.{layer}.{name}.weight")

    def floats(self, name: str) -> np.ndarray:
        """A matrix as floats, scales included."""
        weights, scales = self.arrays[name], self._scales.get(name.replace("weight", "scale"))
        if scales is None:
            return weights
        if scales.ndim == 2:
            return weights * np.repeat(scales, self.model.scale_columns, axis=1)[:, : weights.shape[1]]
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
        rows = self.weights.floats("token_embd.weight")[tokens]
        if self.weights.model.embedding == GGMLQuantizationType.F16:
            rows = half(rows)
        rows = self._turn(rows, "embedding", back=True)
        return rows * np.float32(self.weights.model.embedding_scale or 1)

    def layer(self, index: int, hidden: np.ndarray) -> np.ndarray:
        """A whole sequence through one layer."""
        model, arrays = self.weights.model, self.weights.arrays

        def norm(name: str, x: np.ndarray) -> np.ndarray:
            weight = arrays.get(f"blk.{index}.{name}.weight")
            return x if weight is None else self._norm(x, weight)

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            turned = {"attn_output": "attn_output", "ffn_down": "ffn_down"}.get(name, name.partition("_")[0])
            return self._linear(self._turn(x, turned), self.weights.dense(index, name), model.planes)

        x = norm("attn_norm", hidden)
        q, k, v = (
            linear(f"attn_{name}", x).reshape(len(x), -1, model.head_dim).transpose(1, 0, 2) for name in "qkv"
        )
        if model.head_norms:
            q, k = norm("attn_q_norm", q), norm("attn_k_norm", k)
        windowed = bool(model.window) and model.windowed[index]
        if model.rope_layers == "all" or windowed:
            q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(half(t), model.heads // model.kv_heads, axis=0) for t in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(model.head_dim))
        apart = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
        scores[:, (apart < 0) | (apart >= (model.window if windowed else len(x)))] = -np.inf
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        attended = (shares / shares.sum(axis=2, keepdims=True)) @ v
        attended = attended.transpose(1, 0, 2).reshape(len(x), -1)
        residual = np.float32(model.residual_scale or 1)
        hidden = hidden + residual * linear("attn_output", norm("attn_sub_norm", attended))
        x = norm("ffn_norm", hidden)
        if model.experts:
            return hidden + residual * self._mixture(index, x)
        gated = self._gated(linear("ffn_gate", x), linear("ffn_up", x))
        return hidden + residual * linear("ffn_down", norm("ffn_sub_norm", gated))

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Rows -> logits, with the head's weights as they are stored."""
        model, x = self.weights.model, self._norm(hidden, self.weights.arrays["output_norm.weight"])
        if LAYOUTS[model.head].ternary:
            dense = self.weights.floats("output.weight")
            return self._linear(self._turn(x, "head"), dense, model.head_planes)
        stored, scales = rounded(self.weights.arrays["output.weight"], LAYOUTS[model.head])
        return self._turn(x, "head") @ (stored * scales[:, None]).T

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) tokens -> (n, n_vocab)."""
        hidden = self.embed(tokens)
        for index in range(self.weights.model.layers):
            hidden = self.layer(index, hidden)
        return self.head(hidden)

    def _gated(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        model = self.weights.model
        if model.gate_limit:
            gate, up = np.minimum(gate, model.gate_limit), np.clip(up, -model.gate_limit, model.gate_limit)
        return (np.maximum(gate, 0) ** 2 if model.activation == "relu2" else gate / (1 + np.exp(-gate))) * up

    def _mixture(self, index: int, x: np.ndarray) -> np.ndarray:
        """Each row through the experts that score best for it; softmax over all, then over those alone."""
        model = self.weights.model
        names = [f"ffn_{name}_exps" for name in ("gate", "up", "down")]
        gate, up, down = (np.split(self.weights.dense(index, name), model.experts) for name in names)
        scores = x.astype(np.float64) @ self.weights.arrays[f"blk.{index}.ffn_gate_inp.weight"].T
        everywhere = np.exp(scores - scores.max(axis=1, keepdims=True))
        everywhere /= everywhere.sum(axis=1, keepdims=True)
        out = np.zeros_like(x)
        for row, shares in enumerate(everywhere):
            chosen = np.argsort(-shares)[: model.experts_used]
            for expert in chosen:
                one = x[row : row + 1]
                inner = self._gated(*(self._linear(one, m[expert], model.planes) for m in (gate, up)))
                result = self._linear(inner, down[expert], model.planes)[0]
                out[row] += result * np.float32(shares[expert] / shares[chosen].sum())
        return out

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (
            x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.float32(self.weights.model.epsilon)) * weight
        )

    def _linear(self, x: np.ndarray, dense: np.ndarray, planes: int) -> np.ndarray:
        if planes < 3:  # integers with one scale per token, as b1.58 says, or per span
            columns = self.weights.model.scale_columns or x.shape[1]
            parts = np.split(x, range(columns, x.shape[1], columns), axis=1)
            x = np.concatenate([_rounded_activations(part, planes) for part in parts], axis=1)
        return (x.astype(np.float64) @ dense.T).astype(np.float32)

    def _turn(self, x: np.ndarray, name: str, *, back: bool = False) -> np.ndarray:
        """Into the rotated basis: y = H (s x), with H from its definition; or back, s (H x)."""
        model = self.weights.model
        if name not in model.rotated:
            return x
        signs, numbers = self.weights.arrays[f"rotation_{name}.signs"], np.arange(model.rotation_block)
        ones = np.vectorize(int.bit_count)(np.bitwise_and.outer(numbers, numbers).astype(object))
        matrix = (1 - 2 * (ones.astype(int) % 2)) / np.sqrt(model.rotation_block)
        blocks = (x if back else x * signs).reshape(len(x), -1, model.rotation_block).astype(np.float64)
        turned = (blocks @ matrix).reshape(x.shape)
        return (turned * signs if back else turned).astype(np.float32)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        model = self.weights.model
        if model.rope_dims:
            turned, kept = x[..., : model.rope_dims], x[..., model.rope_dims :]
            return np.concatenate([self._rotate_all(turned), kept], axis=2)
        return self._rotate_all(x)

    def _rotate_all(self, x: np.ndarray) -> np.ndarray:
        model, dims = self.weights.model, x.shape[2]
        frequencies = model.rope_base ** (-np.arange(0, dims, 2) / dims)
        angles = np.outer(
            np.arange(x.shape[1]), frequencies / self.weights.arrays.get("rope_freqs.weight", 1)
        )
        turn = np.exp(1j * angles)
        if model.rope == "neox":
            a, b = np.split(x, 2, axis=2)
            turned = (a + 1j * b) * turn
            return np.concatenate([turned.real, turned.imag], axis=2).astype(np.float32)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=3).reshape(x.shape).astype(np.float32)


def _rounded_activations(x: np.ndarray, planes: int) -> np.ndarray:
    most = 127 if planes == 1 else 127 * 128 + 63
    scale = most / np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    return np.clip(np.rint(x * scale), -most - 1, most) / scale


def half(x: np.ndarray) -> np.ndarray:
    """Rounded as in the cache."""
    return x.astype(np.float16).astype(np.float32)
