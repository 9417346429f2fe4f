"""GPTQ through one decoder layer: each matrix is fitted to the inputs that it will really have.

Two streams of hidden rows pass the layer side by side: through the original weights, and through those that
are compressed already. A matrix is first moved to the one that turns *our* inputs into the original's outputs
(least squares, so that it makes good what the matrices before it lost; those that add to the hidden rows also
make good what is missing there), then rounded under the statistics of our inputs (gptq.py).

Matrices are loaded when they are needed and dropped behind that, so that memory holds those of one input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cordee.compress.decoder import Decoder, DecoderLayer
from cordee.compress.gptq import WIDE_COLUMNS, damp
from cordee.compress.trits import TernaryMatrix

THEIRS, OURS = 0, 1  # the two streams
# Part of the mean of H's diagonal by which the least-squares matrix is drawn to the original one: less
# follows the calibration text too closely, more leaves errors of earlier matrices as they are.
DRAW = 0.1

# (name, weights (rows, cols), damped H) -> planes
Fit = Callable[[str, np.ndarray, np.ndarray], TernaryMatrix]


@dataclass(frozen=True)
class LayerWeights:
    """Where a layer's weights come from: `matrix(name)` reads one, float32; `vectors` are its norms."""

    matrix: Callable[[str], np.ndarray]
    vectors: dict[str, np.ndarray]


class _Statistics:
    """What is known of the inputs of some matrices: H, and how the original's inputs go with ours."""

    def __init__(self, width: int, missing: int) -> None:
        self._rows = 0
        self._hessian = np.zeros((width, width), dtype=np.float32)
        self._cross = np.zeros((width, width), dtype=np.float32)
        self._missing = np.zeros((missing, width), dtype=np.float32)

    def add(self, theirs: np.ndarray, ours: np.ndarray, missing: np.ndarray | None = None) -> None:
        """Rows of both streams, and what is missing in the hidden rows that the matrices add to."""
        theirs, ours = theirs.reshape(-1, theirs.shape[-1]), ours.reshape(-1, ours.shape[-1])
        self._rows += len(ours)
        self._hessian += ours.T @ ours
        self._cross += theirs.T @ ours
        if missing is not None:
            self._missing += missing.reshape(len(ours), -1).T @ ours

    def moved(self, matrices: list[np.ndarray]) -> list[np.ndarray]:
        """The matrices that best turn our inputs into the original's outputs."""
        kind = np.float64 if len(self._hessian) <= WIDE_COLUMNS else np.float32
        hessian, rows = self._hessian.astype(kind), np.float32(max(self._rows, 1))
        hessian /= rows
        draw = np.float32(DRAW * max(float(np.trace(hessian)) / len(hessian), 1e-12))
        np.einsum("ii->i", hessian)[:] += draw
        wanted = [weights @ self._cross / rows + draw * weights for weights in matrices]
        if len(self._missing):
            wanted = [each + self._missing / rows for each in wanted]
        return [np.linalg.solve(hessian, each.T.astype(kind)).T.astype(np.float32) for each in wanted]

    def hessian(self) -> np.ndarray:
        """Damped H; the statistics are used up."""
        hessian, self._hessian = self._hessian, np.zeros((0, 0), dtype=np.float32)
        self._cross = self._missing = self._hessian
        hessian /= np.float32(max(self._rows, 1))
        damp(hessian)
        return hessian


class LayerCompressor:
    """One layer. `hidden` and `following`, (2, windows, length, n_embd), are the rows in front of it and
    those behind it (written); `inner`, (2, windows, length, q_dim), is room to work in. `windows_at_once`
    bounds what is computed at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: LayerWeights,
        fit: Fit,
        *,
        hidden: np.ndarray,
        following: np.ndarray,
        inner: np.ndarray,
        windows_at_once: int,
    ) -> None:
        self._decoder, self._weights, self._fit = decoder, weights, fit
        self._hidden, self._following, self._inner = hidden, following, inner
        self._at_once = windows_at_once
        self._found: dict[str, TernaryMatrix] = {}

    def run(self) -> dict[str, TernaryMatrix]:
        """All matrices by name; `following` holds the rows behind the layer."""
        self._attention()
        self._output()
        self._feed_forward()
        self._down()
        return self._found

    def _attention(self) -> None:
        names = ("attn_q", "attn_k", "attn_v")
        theirs = self._original(names)
        statistics = _Statistics(self._hidden.shape[-1], 0)
        for part in self._parts():
            statistics.add(*(self._decoder.attention_input(theirs, self._hidden[s, part]) for s in (0, 1)))
        self._fit_all(names, statistics, theirs)
        layers = (theirs, self._compressed(names))
        for part in self._parts():
            for stream, layer in enumerate(layers):
                normal = self._decoder.attention_input(layer, self._hidden[stream, part])
                self._inner[stream, part] = self._decoder.output_input(layer, normal)

    def _output(self) -> None:
        names = ("attn_output",)
        theirs = self._original(names)
        statistics = _Statistics(self._inner.shape[-1], self._hidden.shape[-1])
        for part in self._parts():
            statistics.add(
                self._inner[THEIRS, part],
                self._inner[OURS, part],
                self._hidden[THEIRS, part] - self._hidden[OURS, part],
            )
        self._fit_all(names, statistics, theirs)
        for stream, layer in enumerate((theirs, self._compressed(names))):
            matrix = layer.matrices["attn_output"]
            for part in self._parts():
                self._following[stream, part] = (
                    self._hidden[stream, part] + self._inner[stream, part] @ matrix.T
                )

    def _feed_forward(self) -> None:
        names = ("ffn_gate", "ffn_up")
        theirs = self._original(names)
        statistics = _Statistics(self._following.shape[-1], 0)
        for part in self._parts():
            statistics.add(
                *(self._decoder.feed_forward_input(theirs, self._following[s, part]) for s in (0, 1))
            )
        self._fit_all(names, statistics, theirs)

    def _down(self) -> None:
        names = ("ffn_gate", "ffn_up")
        layers = (self._original(names), self._compressed(names))
        theirs = self._original(("ffn_down",))
        statistics = _Statistics(theirs.matrices["ffn_down"].shape[1], self._following.shape[-1])
        for part in self._parts():
            missing = self._following[THEIRS, part] - self._following[OURS, part]
            theirs_in, ours_in = (self._down_input(layers, stream, part) for stream in (THEIRS, OURS))
            statistics.add(theirs_in, ours_in, missing)
        del layers  # while the widest matrix is fitted, memory holds nothing else
        self._fit_all(("ffn_down",), statistics, theirs)
        layers = (self._original(names), self._compressed(names))
        ours = self._compressed(("ffn_down",))
        for stream, down in enumerate((theirs, ours)):
            for part in self._parts():
                added = self._down_input(layers, stream, part) @ down.matrices["ffn_down"].T
                self._following[stream, part] += added

    def _down_input(self, layers: tuple[DecoderLayer, DecoderLayer], stream: int, part: slice) -> np.ndarray:
        normal = self._decoder.feed_forward_input(layers[stream], self._following[stream, part])
        return self._decoder.down_input(layers[stream], normal)

    def _fit_all(self, names: tuple[str, ...], statistics: _Statistics, theirs: DecoderLayer) -> None:
        moved = statistics.moved([theirs.matrices[name] for name in names])
        hessian = statistics.hessian()
        for name, weights in zip(names, moved, strict=True):
            self._found[name] = self._fit(name, weights, hessian)

    def _original(self, names: tuple[str, ...]) -> DecoderLayer:
        return DecoderLayer({name: self._weights.matrix(name) for name in names}, self._weights.vectors)

    def _compressed(self, names: tuple[str, ...]) -> DecoderLayer:
        return DecoderLayer({name: self._found[name].dense() for name in names}, self._weights.vectors)

    def _parts(self) -> Iterator[slice]:
        windows = self._hidden.shape[1]
        return (slice(first, first + self._at_once) for first in range(0, windows, self._at_once))
