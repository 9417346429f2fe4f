"""The figures of a model card: a model file compared with its teacher, on text that it has not seen."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cordee.engine.stage import Batch, StageConfig
from cordee.engine.ternary import TernaryStage
from training.corpus import Lesson
from training.train import SMALLEST, divergence


@dataclass(frozen=True)
class Figures:
    """Means over the tokens of a teacher's text. Perplexities are of the next token.

    For the teacher, a token that the lesson does not list gets an equal share of the remaining probability.
    """

    tokens: int
    kl_nats: float
    same_top1: float
    perplexity: float
    teacher_perplexity: float


def figures(model: Path, lesson: Lesson, temperature: float) -> Figures:
    """Compare a model file, at the temperature of its recipe, with its teacher; on the ternary engine."""
    context = lesson.tokens.shape[1]
    stage = TernaryStage(model, StageConfig(context=context, sequences=1, batch_rows=context))
    try:
        found = [
            _of_window(logits_of(stage, row) / temperature, lesson.rows(number))
            for number, row in enumerate(lesson.tokens)
        ]
    finally:
        stage.close()
    kl, same, loss, teacher_loss = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return Figures(lesson.tokens.numel(), kl, same, math.exp(loss), math.exp(teacher_loss))


def logits_of(stage: TernaryStage, window: Tensor) -> Tensor:
    """(n,) ids -> (n, vocab)."""
    stage.clear()
    count = len(window)
    places = np.arange(count, dtype=np.int32)
    inputs = window.numpy().astype(np.int32)
    return torch.from_numpy(stage.decode(Batch(inputs, places, np.zeros_like(places), np.ones(count, bool))))


def _of_window(logits: Tensor, lesson: Lesson) -> tuple[float, float, float, float]:
    """KL, same top 1, and the cross-entropies of student and teacher."""
    ids, odds, tokens = lesson.ids.long(), lesson.odds.float(), lesson.tokens.long()
    same = (logits.argmax(-1) == ids[:, 0]).float().mean()
    following = tokens[1:, None]
    ours = -torch.log_softmax(logits[:-1], -1).gather(1, following).mean()
    listed = (odds[:-1] * (ids[:-1] == following)).sum(-1)
    share = (1 - odds[:-1].sum(-1)).clamp(min=0) / max(logits.shape[1] - ids.shape[1], 1)
    theirs = -torch.where(listed > 0, listed, share).clamp(min=SMALLEST).log().mean()
    return divergence(logits, ids, odds).item(), same.item(), ours.item(), theirs.item()
