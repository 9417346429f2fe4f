"""Teachers: llama-shaped models of full precision, without gradients, sampled in batches with a KV cache.

A teacher may be *cut* to a part of its vocabulary: its head then has those rows alone, so it writes with
nothing else, and a student can share its tokens without carrying a large head. Prompts may still come from
the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.layers import ROPE_BASE, Rope, rms_norm

# Of a teacher's weights, by GGUF's names; each has a first dimension for the layer.
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")
EMBEDDING, OUTPUT_NORM = "token_embd", "output_norm"


@dataclass(frozen=True)
class TeacherShape:
    """Numbers of a teacher."""

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


# What is done to logits (batch, vocab) before a draw, given the ids (batch, n) that each row has written.
Shaping = Callable[[Tensor, Tensor], Tensor]


class Teacher:
    """`weights` are of one type, in which products are computed; norms and what layers add up are float32.

    `kept` (n,) are the ids, of the whole vocabulary, that it writes with; its own ids are places in it.
    """

    def __init__(self, shape: TeacherShape, weights: dict[str, Tensor], kept: Tensor | None = None) -> None:
        self.shape, self.weights = shape, weights
        self.kept = torch.arange(shape.vocab) if kept is None else kept
        self._head = weights[EMBEDDING][self.kept]
        self._rope = Rope(shape.head_dim, shape.context, shape.rope_base)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, length) own ids -> (batch, length, vocab) float32."""
        return self._logits(self._layers(self.kept[tokens], 0, None))

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, length: int, shaping: Shaping, end: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Continue (batch, n) prompts, ids of the whole vocabulary, by up to `length` own ids.

        Returns the ids (batch, length) and the probabilities (batch, length, vocab) that each was drawn from.
        What follows an `end` is `end`.
        """
        batch, given = prompts.shape
        shape = self.shape
        size = (shape.layers, batch, shape.kv_heads, given + length, shape.head_dim)
        cache = torch.empty(2, *size, dtype=self._head.dtype)
        written = torch.full((batch, length), 0 if end is None else end)
        odds = torch.zeros(batch, length, len(self.kept))
        ended = torch.zeros(batch, dtype=torch.bool)
        rows, at = prompts, 0
        for place in range(length):
            x = self._layers(rows, at, cache)
            at += rows.shape[1]
            odds[:, place] = torch.softmax(shaping(self._logits(x[:, -1]), written[:, :place]), -1)
            drawn = torch.multinomial(odds[:, place], 1, generator=generator)[:, 0]
            written[:, place] = drawn if end is None else torch.where(ended, end, drawn)
            if end is not None:
                ended |= drawn == end
                if ended.all():
                    break
            rows = self.kept[written[:, place : place + 1]]
        return written, odds

    def _layers(self, ids: Tensor, at: int, cache: Tensor | None) -> Tensor:
        """(batch, n) ids of the whole vocabulary, the first at position `at` -> (batch, n, dim) rows."""
        x = self.weights[EMBEDDING][ids].float()
        end = at + ids.shape[1]
        for layer in range(self.shape.layers):
            q, k, v = self._qkv(x, layer, self._rope.at(at, end))
            if cache is not None:
                cache[0, layer, :, :, at:end], cache[1, layer, :, :, at:end] = k, v
                k, v = cache[:, layer, :, :, :end]
            x = self._rest(x, _attend(q, k, v), layer)
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


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, n, head_dim) queries of the last n of (batch, kv_heads, length, head_dim) keys, values.

    Heads that share keys go in as if they were more rows of one: nothing is copied.
    """
    batch, heads, n, head_dim = q.shape
    times, length = heads // k.shape[1], k.shape[2]
    seen = None if n == 1 else torch.ones(n, length, dtype=torch.bool).tril(length - n).repeat(times, 1)
    rows = q.reshape(batch, k.shape[1], times * n, head_dim)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=seen).reshape(batch, heads, n, head_dim)
