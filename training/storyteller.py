"""stories260K as a teacher: it writes one story after the other, without a prompt."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from training.corpus import Corpus, Lesson, likeliest
from training.llama2c import BOS, Piece, read_model, story_texts
from training.teacher import Shaping

WINDOWS = 256  # in a shard: enough rows for efficient products, and a KV cache of some 100 MB at most
LOGITS_WINDOWS = 16  # at a time, when the teacher reads again what it wrote
# Half of the shards are sampled from its own distribution, half at temperatures at which stories are read.
TEMPERATURES = (1.0, 0.7)


def at_temperature(temperature: float) -> Shaping:
    return lambda logits, written: logits / temperature


class Storyteller:
    """A `Writer` whose lessons are the teacher's distribution at temperature 1, at whatever it sampled."""

    def __init__(self, model: Path, window: int, likeliest: int) -> None:
        self.teacher = read_model(model)
        self._window, self._likeliest = window, likeliest

    def __call__(self, generator: torch.Generator) -> Lesson:
        temperature = TEMPERATURES[int(torch.randint(len(TEMPERATURES), (), generator=generator))]
        begins = torch.full((WINDOWS, 1), BOS)
        written, _ = self.teacher.sample(
            begins, self._window - 1, at_temperature(temperature), None, generator
        )
        tokens = torch.cat([begins, written], 1)
        best = [self._best(rows) for rows in tokens.split(LOGITS_WINDOWS)]
        ids, odds = (torch.cat(parts) for parts in zip(*best, strict=True))
        return Lesson(tokens.to(torch.uint16), ids, odds)

    def _best(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return likeliest(torch.softmax(self.teacher.logits(rows), -1), self._likeliest)


def count_tokens(corpus: Corpus, pieces: list[Piece], tokenize: Callable[[str], list[int]]) -> Counter[int]:
    """How often the stories of this teacher use each token of another tokenizer."""
    counts: Counter[int] = Counter()
    for number in range(len(corpus)):
        [window] = corpus.lesson([number]).tokens.numpy()
        for story in story_texts(pieces, window):
            counts.update(tokenize(story))
    return counts
