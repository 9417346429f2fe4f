"""Ternary matrices that can be trained: floats behind the codes, and scales.

The value of a matrix is the nearest sum of its planes to the floats; its gradient passes to the floats as if
nothing were rounded (a straight-through estimator, Bengio et al. 2013), and to the scales as it is.
"""

from collections.abc import Mapping

import numpy as np

from cordee.compress.trits import nearest, rounded_scales

# How far floats may go beyond the largest value: farther away they would take long to come back.
REACH = np.float32(1.5)
# Where floats begin, of half a step from the border to the next code: as near as they can be to what the
# matrix was before, without another code.
BORDER = np.float32(0.98)

BETAS, EPSILON = (0.9, 0.95), 1e-12


class Adam:
    """Kingma & Ba (2015), for one array, whose steps are about `rate` times `size` (of its elements)."""

    def __init__(self, array: np.ndarray, size: "np.ndarray | np.floating") -> None:
        self.array, self._size = array, size
        self._mean, self._square = np.zeros_like(array), np.zeros_like(array)
        self._steps = 0

    def step(self, gradient: np.ndarray, rate: float) -> None:
        """Move against a gradient."""
        self._steps += 1
        first, second = BETAS
        self._mean += (1 - first) * (gradient - self._mean)
        self._square += (1 - second) * (np.square(gradient) - self._square)
        mean, square = self._mean / (1 - first**self._steps), self._square / (1 - second**self._steps)
        self.array -= np.float32(rate) * self._size * mean / (np.sqrt(square) + np.float32(EPSILON))

    def state(self) -> dict[str, np.ndarray]:
        """The array and what is known of its gradients."""
        return {
            "array": self.array,
            "mean": self._mean,
            "square": self._square,
            "steps": np.array(self._steps),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state."""
        for own, name in ((self.array, "array"), (self._mean, "mean"), (self._square, "square")):
            own[...] = state[name]
        self._steps = int(state["steps"])


class LatentMatrix:
    """A matrix in training.

    `codes` is (planes, rows, cols) int8, `scales` (planes, rows, spans) float32, each for `span` columns;
    `original` (rows, cols) is the matrix before it was ternary.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray, span: int, original: np.ndarray) -> None:
        self._planes, self._rows, self._cols = codes.shape
        self.span, self._spans = span, scales.shape[2]
        self._scales = scales.reshape(self._planes, -1).astype(np.float32)  # a copy
        floats = self._spread(original)
        values = np.einsum("prc,pr->rc", self._spread_planes(codes), self._scales)
        half = self._scales.min(axis=0)[:, None] / 2 * BORDER
        self._floats = np.clip(floats, values - half, values + half)
        size = self._scales.min(axis=0)[:, None]
        self._moved = (Adam(self._floats, size), Adam(self._scales, self._scales.copy()))
        self._codes = np.empty(0, dtype=np.int8)

    def value(self) -> np.ndarray:
        """(rows, cols) float32: the matrix as it is now."""
        self._codes, values = nearest(self._floats, self._scales)
        return self._gathered(values)

    def step(self, gradient: np.ndarray, rate: float, scale_rate: float) -> None:
        """Move against the gradient (rows, cols) of the value that was asked for last."""
        spread = self._spread(gradient)
        self._moved[0].step(spread, rate)
        self._moved[1].step(np.einsum("prc,rc->pr", self._codes.astype(np.float32), spread), scale_rate)
        np.abs(self._scales, out=self._scales)
        most = self._scales.sum(axis=0)[:, None] * REACH
        np.clip(self._floats, -most, most, out=self._floats)

    def rounded(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales) as they were given, with scales that a file can hold."""
        scales = rounded_scales(self._scales)
        codes, _ = nearest(self._floats, scales)
        shaped = codes.reshape(self._planes, self._rows, -1)[:, :, : self._cols]
        return np.ascontiguousarray(shaped), scales.reshape(self._planes, self._rows, self._spans)

    def state(self) -> dict[str, np.ndarray]:
        """All that a run which goes on needs."""
        parts = zip(("floats", "scales"), self._moved, strict=True)
        return {f"{name}.{key}": value for name, part in parts for key, value in part.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state."""
        for name, part in zip(("floats", "scales"), self._moved, strict=True):
            part.restore({key: state[f"{name}.{key}"] for key in part.state()})

    def _spread(self, matrix: np.ndarray) -> np.ndarray:
        """(rows, cols) -> (rows * spans, span), the last span of a row filled up with zeros."""
        wide = np.zeros((self._rows, self._spans * self.span), dtype=np.float32)
        wide[:, : self._cols] = matrix
        return wide.reshape(-1, self.span)

    def _spread_planes(self, codes: np.ndarray) -> np.ndarray:
        return np.stack([self._spread(plane) for plane in codes])

    def _gathered(self, spread: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(spread.reshape(self._rows, -1)[:, : self._cols])
