"""Teachers: llama-shaped models of full precision, without gradients, sampled in batches with a KV cache.

A teacher may be *cut* to a subset of its vocabulary: its head then has only those rows, so it writes no other
tokens, and a student can use the same tokens without a large head. Prompts may still use the whole
vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.layers import ROPE_BASE, Rope, rms_norm

# A teacher's weights, by GGUF's names; each has a first dimension for the layer.
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")
EMBEDDING, OUTPUT_NORM = "token_embd", "output_norm"
ENDED_SHARE = (
    0.2  # of the computed rows; when this share has ended they are dropped, which copies the other caches
)


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a teacher."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope_base: float = ROPE_BASE

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


# Changes logits (batch, vocab) before sampling, given the ids (batch, n) that each row has written.
Shaping = Callable[[Tensor, Tensor], Tensor]


class Teacher:
    """`weights` are of one type, in which products are computed; norms and the residual stream are float32.

    `kept` (n,) are the ids of the whole vocabulary that it writes with; its own ids are positions in it.
    """

    def __init__(self, shape: TeacherShape, weights: dict[str, Tensor], kept: Tensor | None = None) -> None:
        self.shape, self.weights = shape, weights
        self.kept = torch.arange(shape.vocab) if kept is None else kept
        self._head = weights[EMBEDDING][self.kept]
        self._rope = Rope(shape.head_dim, shape.context, shape.rope_base)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, length) own ids -> (batch, length, vocab) float32."""
        return self._logits(self._layers(self.kept[tokens], None))

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, length: int, shaping: Shaping, end: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Continue (batch, n) prompts, ids of the whole vocabulary, by up to `length` own ids.

        Returns the ids (batch, length) and the probabilities (batch, length, vocab) that each was drawn from.
        What follows an `end` is `end`, and its probabilities mean nothing.
        """
        batch, given = prompts.shape
        cache = _Cache.of(self.shape, batch, given + length, self._head.dtype)
        written = torch.full((batch, length), 0 if end is None else end)
        odds = torch.zeros(batch, length, len(self.kept))
        going = torch.arange(batch)  # rows that are computed
        ids = prompts
        for place in range(length):
            x = self._layers(ids, cache)
            chances = torch.softmax(shaping(self._logits(x[:, -1]), written[going, :place]), -1)
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            if end is not None and place:
                drawn = torch.where(written[going, place - 1] == end, end, drawn)
            odds[going, place], written[going, place] = chances, drawn
            unended = (drawn != end).nonzero()[:, 0] if end is not None else going
            if not len(unended):
                break
            if len(unended) < (1 - ENDED_SHARE) * len(going):
                going, drawn, cache = going[unended], drawn[unended], cache.rows(unended)
            ids = self.kept[drawn[:, None]]
        return written, odds

    def _layers(self, ids: Tensor, cache: "_Cache | None") -> Tensor:
        """(batch, n) ids of the whole vocabulary -> (batch, n, dim) rows; n is 1 if the cache has any."""
        x = self.weights[EMBEDDING][ids].float()
        first = cache.length if cache else 0
        angles = self._rope.at(first, first + ids.shape[1])
        for layer in range(self.shape.layers):
            q, k, v = self._qkv(x, layer, angles)
            if cache:
                cache.add(layer, k, v)
            mixed = _attend_one(q, *cache.layer(layer)) if first else _attend(q, k, v)
            x = self._rest(x, mixed, layer)
        if cache:
            cache.length += ids.shape[1]
        return x

    def _qkv(self, x: Tensor, layer: int, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
        normal = self._normal(x, "attn_norm", layer)
        q, k, v = (
            self._times(normal, f"attn_{name}", layer)
            .unflatten(-1, (-1, self.shape.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        return [part.to(self._head.dtype) for part in (Rope.turn(q, angles), Rope.turn(k, angles), v)]

    def _rest(self, x: Tensor, mixed: Tensor, layer: int) -> Tensor:
        x = x + self._times(mixed.transpose(1, 2).flatten(2), "attn_output", layer)
        normal = self._normal(x, "ffn_norm", layer)
        gated = F.silu(self._times(normal, "ffn_gate", layer)) * self._times(normal, "ffn_up", layer)
        return x + self._times(gated.to(self._head.dtype), "ffn_down", layer)

    def _logits(self, x: Tensor) -> Tensor:
        normal = rms_norm(x) * self.weights[OUTPUT_NORM].float()
        return F.linear(normal.to(self._head.dtype), self._head).float()

    def _normal(self, x: Tensor, name: str, layer: int) -> Tensor:
        return (rms_norm(x) * self.weights[name][layer].float()).to(self._head.dtype)

    def _times(self, rows: Tensor, name: str, layer: int) -> Tensor:
        return F.linear(rows, self.weights[name][layer]).float()


@dataclass
class _Cache:
    """Keys and values of the first `length` positions.

    (layers, batch, kv_heads, head_dim, positions) keys, for fast products of one query with all of them, and
    (layers, batch, kv_heads, positions, head_dim) values.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def of(cls, shape: TeacherShape, batch: int, positions: int, kind: torch.dtype) -> "_Cache":
        size = (shape.layers, batch, shape.kv_heads)
        keys = torch.empty(*size, shape.head_dim, positions, dtype=kind)
        return cls(keys, torch.empty(*size, positions, shape.head_dim, dtype=kind))

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append a position; the caller increases `length` when all layers have theirs."""
        new = slice(self.length, self.length + k.shape[2])
        self.keys[layer, ..., new], self.values[layer, :, :, new] = k.transpose(-1, -2), v

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values up to and including the position that was appended last."""
        return self.keys[layer, ..., : self.length + 1], self.values[layer, :, :, : self.length + 1]

    def rows(self, chosen: Tensor) -> "_Cache":
        """A copy for some rows of the batch."""
        layers, _, kv_heads, head_dim, positions = self.keys.shape
        held = self.length
        keys = self.keys.new_empty(layers, len(chosen), kv_heads, head_dim, positions)
        values = self.values.new_empty(layers, len(chosen), kv_heads, positions, head_dim)
        keys[..., :held] = self.keys[:, chosen, :, :, :held]
        values[..., :held, :] = self.values[:, chosen, :, :held]
        return _Cache(keys, values, held)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, n, head_dim) queries of (batch, kv_heads, n, head_dim) keys and values, causally."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query per head, (batch, heads, 1, head_dim), over all that a `_Cache` holds of a layer.

    Heads that share keys are computed as rows of one head, so that nothing is copied. Twice as fast as
    torch's attention for a single row.
    """
    batch, heads, _, head_dim = q.shape
    rows = q.reshape(batch, keys.shape[1], -1, head_dim)
    shares = torch.softmax(torch.matmul(rows, keys).float() * head_dim**-0.5, -1)
    return torch.matmul(shares.to(values.dtype), values).reshape(batch, heads, 1, head_dim)
