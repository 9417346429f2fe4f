"""Training block by block: each decoder layer learns to give what the original's layer gives.

Two streams of rows pass, as in compress/layerwise.py: the original's, and those that come through the layers
that are trained already. A layer is trained on our rows towards the original's, so that it makes good what
the layers before it lost. An eighth of the windows is not trained on: if a layer does not come nearer to the
original on these, it stays as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cordee.compress.trits import TernaryMatrix
from cordee.distill.gradients import Arrays, Layer
from cordee.distill.latent import Adam, LatentMatrix

HELD_OUT = 8  # one window of so many
# Steps of floats, of scales and of norms, in parts of their size; they fall to nothing over the training.
RATE, SCALE_RATE, NORM_RATE = 0.03, 0.003, 0.005


@dataclass
class LatentLayer:
    """A layer in training. `latent` matrices change; `fixed` ones do not; all norms change."""

    latent: dict[str, LatentMatrix]
    fixed: Arrays
    vectors: Arrays

    def matrices(self) -> Arrays:
        """As they are now, float32."""
        return self.fixed | {name: matrix.value() for name, matrix in self.latent.items()}

    def rounded(self) -> dict[str, TernaryMatrix]:
        """Those that changed, as a file holds them."""
        return {name: TernaryMatrix(*matrix.rounded(), matrix.span) for name, matrix in self.latent.items()}


@dataclass(frozen=True)
class Trained:
    """What came of a layer: its ternary matrices and norms, and the errors on the held-out windows."""

    matrices: dict[str, TernaryMatrix]
    vectors: Arrays
    error_before: float
    error_after: float


def trained(
    layer: Layer,
    block: LatentLayer,
    before: dict[str, TernaryMatrix],
    rows: tuple[np.ndarray, np.ndarray],
    *,
    steps: int,
    windows: int,
    seed: int,
) -> Trained:
    """Train a block and return the better of what it was, `before`, and what it became.

    `rows` are ours in front of the layer and the original's behind it, (windows, length, width). Each of
    `steps` reads so many `windows`, drawn by `seed`.
    """
    ours, theirs = rows
    learnt, held = held_out(len(ours))
    untrained = {name: vector.copy() for name, vector in block.vectors.items()}
    dense = block.fixed | {name: matrix.dense() for name, matrix in before.items()}
    first = error(layer, dense, untrained, ours[held], theirs[held])
    norms = {name: Adam(vector, np.abs(vector).mean()) for name, vector in block.vectors.items()}
    draw = np.random.default_rng(seed)
    for step in range(steps):
        chosen = np.sort(draw.choice(learnt, min(windows, len(learnt)), replace=False))
        falling = 0.5 + 0.5 * float(np.cos(np.pi * step / steps))
        _step(layer, block, norms, ours[chosen], theirs[chosen], falling)
    after = block.rounded()
    dense = block.fixed | {name: matrix.dense() for name, matrix in after.items()}
    last = error(layer, dense, block.vectors, ours[held], theirs[held])
    if last < first:
        return Trained(after, block.vectors, first, last)
    return Trained(before, untrained, first, first)


def held_out(windows: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows that are trained on, and those that are not (of very few: all of them)."""
    held = np.arange(HELD_OUT - 1, windows, HELD_OUT)
    learnt = np.setdiff1d(np.arange(windows), held)
    return learnt, held if len(held) else learnt


def error(layer: Layer, matrices: Arrays, vectors: Arrays, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean over rows of the squared distance to the original's, relative to their square."""
    total = 0.0
    for window, wanted in zip(ours, theirs, strict=True):
        found, _ = layer.forward(matrices, vectors, window[None])
        total += float((np.square(found[0] - wanted).sum(axis=-1) / _power(wanted)).mean())
    return total / len(ours)


def through(layer: Layer, matrices: Arrays, vectors: Arrays, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows behind a layer, window by window."""
    return (layer.forward(matrices, vectors, window[None])[0][0] for window in rows)


def _step(
    layer: Layer,
    block: LatentLayer,
    norms: dict[str, Adam],
    ours: np.ndarray,
    theirs: np.ndarray,
    falling: float,
) -> None:
    matrices = block.matrices()
    found, trace = layer.forward(matrices, block.vectors, ours)
    missing = found - theirs
    d = missing * (2 / (_power(theirs)[..., None] * np.float32(missing.shape[0] * missing.shape[1])))
    gradients = layer.backward(matrices, block.vectors, trace, d)
    for name, matrix in block.latent.items():
        matrix.step(gradients.matrices[name], RATE * falling, SCALE_RATE * falling)
    for name, norm in norms.items():
        norm.step(gradients.vectors[name], NORM_RATE * falling)


def _power(rows: np.ndarray) -> np.ndarray:
    return np.square(rows).sum(axis=-1)
