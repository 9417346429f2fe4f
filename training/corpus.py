"""A corpus that a teacher writes: windows of tokens, and for each token what the teacher would write next.

A shard is an .npy of records, one per window: `tokens` (window,) uint16, `ids` and `odds` (window, likeliest)
uint16 and float16: the likeliest next tokens, best first, and their probabilities. It depends on (teacher,
recipe, seed, number) alone and is written completely or not at all, so generation resumes by skipping the
shards that are there. Shards are memory-mapped: processes share them, and they need not fit into memory.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cordee.files import atomic_file


@dataclass(frozen=True)
class Lesson:
    """Tokens (batch, window); the likeliest next ones (batch, window, likeliest) with their probabilities."""

    tokens: Tensor
    ids: Tensor
    odds: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: slice) -> "Lesson":
        """Some windows of these."""
        return Lesson(self.tokens[chosen], self.ids[chosen], self.odds[chosen])

    @classmethod
    def of(cls, records: np.ndarray) -> "Lesson":
        return cls(*(torch.from_numpy(np.ascontiguousarray(records[name])) for name in records.dtype.names))

    def records(self) -> np.ndarray:
        """The records of a shard."""
        columns = {name: tensor.numpy() for name, tensor in vars(self).items()}
        found = np.empty(len(self), [(name, a.dtype, a.shape[1:]) for name, a in columns.items()])
        for name, column in columns.items():
            found[name] = column
        return found


# Writes the shard that a generator determines, with as many windows as it likes.
Writer = Callable[[torch.Generator], Lesson]


def likeliest(odds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(..., vocab) probabilities -> the ids and probabilities (..., count) of the best, best first."""
    best = odds.topk(count, dim=-1)
    return best.indices.to(torch.uint16), best.values.half()


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:04}.npy"


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npy"))


def write_corpus(
    writer: Writer, folder: Path, *, shards: Iterable[int], seed: int, wrote: Callable[[], None] | None = None
) -> None:
    """Write the missing ones of these shards to the folder. `wrote()` is called after each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in shards:
        path = shard_path(folder, number)
        if not path.exists():
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            records = writer(generator).records()
            with atomic_file(path) as file:
                np.save(file, records)
        if wrote:
            wrote()


class Corpus:
    """All shards of a folder, read in an order that depends on the seed alone.

    Raises:
        FileNotFoundError: the folder has no shard.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in shards_in(folder)]
        if not self._shards:
            raise FileNotFoundError(f"{folder} holds no shards: run the corpus verb first")
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._seed = seed

    def __len__(self) -> int:
        return int(self._ends[-1])

    def lesson(self, windows: Iterable[int]) -> Lesson:
        """Windows by their numbers, 0 to len - 1."""
        chosen = np.fromiter(windows, np.int64)
        shards = np.searchsorted(self._ends, chosen, side="right")
        places = chosen - self._ends[shards]  # from a shard's end
        return Lesson.of(
            np.stack([self._shards[shard][at] for shard, at in zip(shards, places, strict=True)])
        )

    def batch(self, step: int, size: int) -> Lesson:
        """`size` windows of a step: each pass over the corpus has an order of its own."""
        count = len(self)
        at = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {i // count for i in at}}
        return self.lesson(orders[i // count][i % count] for i in at)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))
