"""What teacher and student share: RMS norm and RoPE (on neighbouring pairs)."""

import torch
from torch import Tensor

EPSILON = 1e-5
ROPE_BASE = 10000.0


def rms_norm(x: Tensor) -> Tensor:
    """Rows scaled to root mean square 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


class Rope:
    """Cosines and sines of positions 0 to context - 1."""

    def __init__(self, head_dim: int, context: int, base: float = ROPE_BASE) -> None:
        frequencies = base ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(context).float(), frequencies)
        self._cos, self._sin = angles.cos(), angles.sin()

    def at(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self._cos[first:last], self._sin[first:last]

    @staticmethod
    def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(batch, heads, length, head_dim): element 2i with element 2i + 1."""
        cos, sin = angles
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
