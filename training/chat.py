"""A chat model as a teacher: asked for stories on many subjects, it writes with a cut vocabulary.

All questions have the same number of tokens, so they are computed in batches. What a student learns is the
stories, one after the other with an end token (id 0) before each; it sees no question. A story that has grown
too long ends with its last whole sentence, if it has one.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from cordee.engine.vocabulary import Vocabulary
from training.corpus import Lesson, likeliest
from training.cut import Cut
from training.teacher import EMBEDDING, MATRICES, NORMS, OUTPUT_NORM, Teacher, TeacherShape

END = 0
STORIES = 128  # written at a time: with fewer, reading the weights takes longer than computing with them
STORY_TOKENS = 256  # after its given beginning
MIN_P = 0.1
REPEAT_PENALTY = 1.08  # without one this teacher says everything three times
TEMPERATURE = 0.5

ABOUT = Path(__file__).with_name("about.toml")
SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"')


def shape_story(logits: Tensor, written: Tensor) -> Tensor:
    """Logits (batch, vocab) after penalty, temperature, min-p; `written` (batch, n) is the text so far."""
    values = logits.gather(1, written)
    lower = torch.where(values > 0, values / REPEAT_PENALTY, values * REPEAT_PENALTY)
    logits = logits.scatter(1, written, lower) / TEMPERATURE
    least = logits.amax(-1, keepdim=True) + float(np.log(MIN_P))
    return logits.masked_fill(logits < least, -torch.inf)


@dataclass(frozen=True)
class Questions:
    """All questions, as tokens (n, length) of the whole vocabulary, and the beginning (m,) of each answer."""

    tokens: Tensor
    begin: Tensor

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Questions":
        """All pairs of those words in about.toml that are one token: all questions are equally long."""
        about = tomllib.loads(ABOUT.read_text(encoding="utf-8"))
        words = {
            kind: [word for word in about[kind] if len(vocabulary.tokenize(f" {word}", add_bos=False)) == 1]
            for kind in ("who", "what")
        }
        asked = [
            vocabulary.tokenize(about["question"].format(who=who, what=what), add_bos=False)
            for who in words["who"]
            for what in words["what"]
        ]
        return cls(torch.tensor(asked), torch.tensor(vocabulary.tokenize(about["begin"], add_bos=False)))


class Chat:
    """A `Writer` whose lessons are the distributions that the teacher drew from.

    The given beginning, and an inserted END, have probability 1. A batch takes 6 GB at its peak: the KV cache
    of all its stories, the probabilities at each of their tokens.
    """

    def __init__(self, model: Path, cut: Cut, window: int, likeliest: int) -> None:
        self.teacher = read_model(model, cut)
        questions = Questions.of(Vocabulary(model))
        self._prompts = torch.cat([questions.tokens, questions.begin.expand(len(questions.tokens), -1)], 1)
        self._begin = torch.tensor([cut.kept.index(token) for token in questions.begin.tolist()])
        self._stops = torch.tensor([text.endswith(SENTENCE_ENDS) for text in cut.tokens])
        self._window, self._likeliest = window, likeliest

    def __call__(self, generator: torch.Generator) -> Lesson:
        chosen = torch.randint(len(self._prompts), (STORIES,), generator=generator)
        written, odds = self.teacher.sample(self._prompts[chosen], STORY_TOKENS, shape_story, END, generator)
        end_with_a_sentence(written, odds, self._stops)
        best = likeliest(odds, self._likeliest)
        certain = likeliest(F.one_hot(self._begin, odds.shape[-1]).float(), self._likeliest)
        lessons = (torch.cat([a.expand(STORIES, -1, -1), b], 1) for a, b in zip(certain, best, strict=True))
        return packed(torch.cat([self._begin.expand(STORIES, -1), written], 1), *lessons, self._window)


def end_with_a_sentence(written: Tensor, odds: Tensor, stops: Tensor) -> None:
    """In a story (n, length) without END, put one with probability 1 after the last token that `stops`."""
    for story, chances in zip(written, odds, strict=True):
        sentences = stops[story[:-1]].nonzero()
        if END in story or not len(sentences):
            continue
        after = int(sentences[-1]) + 1
        story[after:], chances[after], chances[after, END] = END, 0, 1


def packed(written: Tensor, ids: Tensor, odds: Tensor, window: int) -> Lesson:
    """Stories (n, length), with END after each that is not cut off, as the full windows of one stream."""
    inputs, rows = [], []
    for number, story in enumerate(written):
        ends = (story == END).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(story)
        inputs.append(torch.cat([torch.tensor([END]), story[: length - 1]]))
        rows.append(torch.arange(length) + number * len(story))
    count = sum(map(len, inputs)) // window * window
    places = torch.cat(rows)[:count]
    tokens = torch.cat(inputs)[:count].to(torch.uint16).view(-1, window)
    best = (column.flatten(0, 1)[places].view(-1, window, column.shape[-1]) for column in (ids, odds))
    return Lesson(tokens, *best)


def read_model(path: Path, cut: Cut, kind: torch.dtype = torch.bfloat16) -> Teacher:
    """A GGUF file of the architecture `llama`, its head the embedding, as a teacher with a cut vocabulary.

    Raises:
        ValueError: the file is of another kind.
    """
    reader = GGUFReader(path)

    def number(key: str) -> float:
        return reader.fields[f"llama.{key}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if reader.fields["general.architecture"].contents() != "llama" or "output.weight" in tensors:
        raise ValueError(
            f"{path} cannot teach: its architecture is not llama, or its head is not its embedding"
        )

    def floats(name: str) -> Tensor:
        tensor = tensors[f"{name}.weight"]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32)).to(kind)

    shape = TeacherShape(
        dim=number("embedding_length"),
        hidden=number("feed_forward_length"),
        layers=number("block_count"),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        vocab=number("vocab_size"),
        context=number("context_length"),
        rope_base=number("rope.freq_base"),
    )
    weights = {name: floats(name) for name in (EMBEDDING, OUTPUT_NORM)}
    for name in MATRICES + NORMS:
        weights[name] = torch.stack([floats(f"blk.{layer}.{name}") for layer in range(shape.layers)])
    return Teacher(shape, weights, torch.tensor(cut.kept))
