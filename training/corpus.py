"""A corpus that a teacher writes: windows of tokens, and behind each token what the teacher would write next.

A shard is an .npz of `tokens` (windows, window) uint16, `ids` and `odds` (windows, window, likeliest) uint16
and float16: the likeliest next tokens, best first, and their probabilities. It depends on (teacher, recipe,
seed, number) alone and is written whole or not at all, so generation resumes by leaving out what is there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cordee.files import atomic_file

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Lesson:
    """Tokens (batch, window); the likeliest next ones (batch, window, likeliest) with their probabilities."""

    tokens: Tensor
    ids: Tensor
    odds: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: Tensor | slice) -> "Lesson":
        """Some windows of these."""
        return Lesson(self.tokens[chosen], self.ids[chosen], self.odds[chosen])


# Writes the shard that a generator decides, in so many windows as it likes.
Writer = Callable[[torch.Generator], Lesson]


def likeliest(odds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(..., vocab) probabilities -> the ids and probabilities (..., count) of the best, best first."""
    best = odds.topk(count, dim=-1)
    return best.indices.to(torch.uint16), best.values.half()


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:04}.npz"


def write_corpus(
    writer: Writer, folder: Path, *, shards: int, seed: int, progress: Progress | None = None
) -> None:
    """Bring the folder to so many shards. `progress(shards_done, shards)` is called after each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = shard_path(folder, number)
        if not path.exists():
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            lesson = writer(generator)
            arrays = {name: tensor.numpy() for name, tensor in vars(lesson).items()}
            with atomic_file(path) as file:
                np.savez(file, **arrays)
        if progress:
            progress(number + 1, shards)


class Corpus:
    """All shards of a folder, read in an order that depends on the seed alone.

    Raises:
        FileNotFoundError: the folder has no shard.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        shards = [np.load(path) for path in sorted(folder.glob("shard-*.npz"))]
        if not shards:
            raise FileNotFoundError(f"{folder} holds no shards: run the corpus verb first")
        names = ("tokens", "ids", "odds")
        arrays = (np.concatenate([shard[name] for shard in shards]) for name in names)
        self.lesson = Lesson(*map(torch.from_numpy, arrays))
        self._seed = seed

    def batch(self, step: int, size: int) -> Lesson:
        """`size` windows of a step: each pass over the corpus has an order of its own."""
        count = len(self.lesson)
        at = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {i // count for i in at}}
        return self.lesson.rows(torch.tensor([orders[i // count][i % count] for i in at]))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.lesson))
