"""The student: a llama-shaped model whose matrices are ternary in inference and float32 in training.

BitNet b1.58's recipe: a matrix is scale * t with t in {-1, 0, 1} and scale the mean magnitude; a row of
activations is rounded to 8 bits by its largest magnitude; gradients pass both roundings as if they were not
there (straight-through). The embedding, which is also the head, is ternary too. Squared ReLU, and norms
before the output and down projections, so that every matrix gets normalised rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.layers import Rope, rms_norm

LEVELS = 127  # of an 8-bit activation, either side of 0
SMALLEST = 1e-5  # magnitudes below count as this, as in the engine


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a model. `weights` counts those of the matrices, a tied head once."""

    dim: int
    hidden: int
    layers: int
    heads: int
    vocab: int
    context: int = 512

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def weights(self) -> int:
        return self.dim * (self.vocab + self.layers * (4 * self.dim + 3 * self.hidden))


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as -1, 0, 1 (same shape and type) and its scale, the mean magnitude."""
    scale = weight.abs().mean().clamp(min=SMALLEST)
    return (weight / scale).round().clamp(-1, 1), scale


class _TernaryLinear(torch.autograd.Function):
    """y = quantized(x) @ (scale * ternary)^T, both roundings straight-through.

    Integers to 127 and ternaries are exact in bfloat16, so `kind` costs precision only in the result.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
        t, scale = ternary(weight)
        largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
        q = (x * (LEVELS / largest)).round().to(kind)
        t = t.to(kind)
        step = largest * (1 / LEVELS)
        ctx.save_for_backward(q, step, t, scale)
        return F.linear(q, t).float() * (step * scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        q, step, t, scale = ctx.saved_tensors
        rows = q.flatten(0, -2)
        for_weight = (gradient * step).to(q.dtype).flatten(0, -2).T @ rows
        return (gradient * scale).to(q.dtype).matmul(t).float(), for_weight.float(), None


def ternary_linear(x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    """(..., cols) rows through a (rows, cols) matrix, both rounded; `kind` is the type of the product."""
    return _TernaryLinear.apply(x, weight, kind)


class Layer(nn.Module):
    """Attention and feed-forward; names are GGUF's."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.shape = shape
        dim, hidden = shape.dim, shape.hidden
        sizes = {
            "attn_q": (dim, dim),
            "attn_k": (dim, dim),
            "attn_v": (dim, dim),
            "attn_output": (dim, dim),
            "ffn_gate": (hidden, dim),
            "ffn_up": (hidden, dim),
            "ffn_down": (dim, hidden),
        }
        self.matrices = nn.ParameterDict({name: _matrix(*size) for name, size in sizes.items()})
        lengths = {"attn_norm": dim, "attn_sub_norm": dim, "ffn_norm": dim, "ffn_sub_norm": hidden}
        self.norms = nn.ParameterDict({name: nn.Parameter(torch.ones(n)) for name, n in lengths.items()})

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], kind: torch.dtype) -> Tensor:
        """(batch, length, dim) -> the same."""
        normal = rms_norm(x) * self.norms["attn_norm"]
        q, k, v = (self._times(normal, f"attn_{name}", kind) for name in "qkv")
        q, k, v = (part.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = Rope.turn(q, angles), Rope.turn(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self._times(rms_norm(mixed) * self.norms["attn_sub_norm"], "attn_output", kind)
        normal = rms_norm(x) * self.norms["ffn_norm"]
        gated = F.relu(self._times(normal, "ffn_gate", kind)).square() * self._times(normal, "ffn_up", kind)
        return x + self._times(rms_norm(gated) * self.norms["ffn_sub_norm"], "ffn_down", kind)

    def _times(self, rows: Tensor, name: str, kind: torch.dtype) -> Tensor:
        return ternary_linear(rows, self.matrices[name], kind)


class Student(nn.Module):
    """The whole model. `kind` is the type of the matrix products: bfloat16 may be faster."""

    def __init__(self, shape: StudentShape, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.kind = shape, kind
        self.embedding = _matrix(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.output_norm = nn.Parameter(torch.ones(shape.dim))
        self._rope = Rope(shape.head_dim, shape.context)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) ids -> (batch, length, vocab) logits, float32."""
        t, scale = ternary(self.embedding)
        straight = self.embedding + (t * scale - self.embedding).detach()
        x = F.embedding(tokens, straight)
        angles = self._rope.at(0, tokens.shape[1])
        for layer in self.layers:
            x = layer(x, angles, self.kind)
        return ternary_linear(rms_norm(x) * self.output_norm, self.embedding, self.kind)


def _matrix(rows: int, cols: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, cols) * cols**-0.5)
