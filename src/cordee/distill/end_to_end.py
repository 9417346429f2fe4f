"""Training end to end: all layers at once learn the original's probabilities.

It begins where training block by block ended, and wants all layers' floats in memory. What the original says
comes from its rows behind the last layer, which are kept from there, so that its weights are not needed. The
loss is the Kullback-Leibler divergence from its probabilities to ours, as `cordee eval --against` has it. Of
each layer only the rows in front of it are kept for the backward pass, which computes the rest again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cordee.distill.blocks import LatentLayer, held_out
from cordee.distill.gradients import Layer
from cordee.distill.latent import Adam

# As in blocks.py, but smaller: nothing was computed by mistake any more.
RATE, SCALE_RATE, NORM_RATE = 0.02, 0.002, 0.001
STEP_WINDOWS = 4


@dataclass(frozen=True)
class Head:
    """From rows behind the last layer to logits. `matrix` is (vocabulary, width); the norm is not trained."""

    norm: np.ndarray
    matrix: np.ndarray
    epsilon: float

    def odds(self, rows: np.ndarray) -> np.ndarray:
        """(length, vocabulary) probabilities of (length, width) rows."""
        logits = self._unit(rows) * self.norm @ self.matrix.T
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits

    def back(self, rows: np.ndarray, d: np.ndarray) -> np.ndarray:
        """The gradient by rows, of one by logits."""
        inverse, unit = self._inverse(rows), self._unit(rows)
        d = d @ self.matrix * self.norm
        return inverse * (d - unit * (d * unit).mean(axis=-1, keepdims=True))

    def _inverse(self, rows: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(self.epsilon))

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        return rows * self._inverse(rows)


class EndToEnd:
    """All layers of a model in training.

    `rows` are those in front of the first layer and the original's behind the last, both (windows, length,
    width).
    """

    def __init__(
        self,
        layer: Layer,
        layers: list[LatentLayer],
        head: Head,
        rows: tuple[np.ndarray, np.ndarray],
        *,
        steps: int,
        seed: int,
    ) -> None:
        self._layer, self.layers, self._head = layer, layers, head
        self._first, self._last = rows
        self._learnt, self._held = held_out(len(self._first))
        self._steps, self._seed, self.step = steps, seed, 0
        self._norms = [
            {name: Adam(vector, np.abs(vector).mean()) for name, vector in each.vectors.items()}
            for each in layers
        ]

    def train_step(self) -> None:
        """One step on windows drawn by the seed and the step's number."""
        draw = np.random.default_rng((self._seed, self.step))
        count = min(STEP_WINDOWS, len(self._learnt))
        chosen = np.sort(draw.choice(self._learnt, count, replace=False))
        falling = 0.5 + 0.5 * float(np.cos(np.pi * self.step / self._steps))
        fronts = self._forward(self._first[chosen])
        d = self._loss_gradient(fronts.pop(), chosen)
        for number in reversed(range(len(self.layers))):
            each = self.layers[number]
            matrices = each.matrices()
            _, trace = self._layer.forward(matrices, each.vectors, fronts.pop())
            found = self._layer.backward(matrices, each.vectors, trace, d)
            d = found.x
            for name, matrix in each.latent.items():
                matrix.step(found.matrices[name], RATE * falling, SCALE_RATE * falling)
            for name, norm in self._norms[number].items():
                norm.step(found.vectors[name], NORM_RATE * falling)
        self.step += 1

    def divergence(self) -> float:
        """The mean divergence over tokens of the held-out windows, in nats."""
        total = 0.0
        for place in self._held:
            rows = self._forward(self._first[[place]])[-1][0]
            theirs, ours = self._head.odds(self._last[place]), self._head.odds(rows)
            tiny = np.float32(1e-30)
            total += float((theirs * (np.log(theirs + tiny) - np.log(ours + tiny))).sum(axis=1).mean())
        return total / len(self._held)

    def state(self) -> dict[str, np.ndarray]:
        """All that a run which goes on needs."""
        found = {"step": np.array(self.step)}
        for number, each in enumerate(self.layers):
            for name, matrix in each.latent.items():
                found |= {f"{number}.{name}.{key}": value for key, value in matrix.state().items()}
            for name, norm in self._norms[number].items():
                found |= {f"{number}.{name}.{key}": value for key, value in norm.state().items()}
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state."""
        self.step = int(state["step"])
        for number, each in enumerate(self.layers):
            for name, part in (*each.latent.items(), *self._norms[number].items()):
                prefix = f"{number}.{name}."
                part.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _forward(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows in front of each layer, and those behind the last."""
        found = [rows]
        for each in self.layers:
            rows, _ = self._layer.forward(each.matrices(), each.vectors, rows)
            found.append(rows)
        return found

    def _loss_gradient(self, rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Of the divergence, by the rows behind the last layer; a window at a time, since logits are wide."""
        d, tokens = np.empty_like(rows), np.float32(rows.shape[0] * rows.shape[1])
        for place, window in enumerate(chosen):
            missing = self._head.odds(rows[place]) - self._head.odds(self._last[window])
            d[place] = self._head.back(rows[place], missing / tokens)
        return d
