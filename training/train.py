"""The training loop: a student learns its teacher's distribution, token by token.

A step is a function of (recipe, corpus, step number) and of the state in the checkpoint, so a run that was
stopped (Ctrl-C, SIGTERM, a crash of the machine) resumes from its last checkpoint. The checkpoint before the
rate begins to fall is kept: from it the same run can be made longer.

Several processes share a step by sharing its windows; each computes with one thread, since threads that meet
at a barrier after every operation stall on a machine that is busy with other work.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from cordee.files import atomic_file
from training.corpus import Corpus
from training.recipe import Recipe
from training.student import Student

CHECKPOINT, BEFORE_DECAY, LOG = "checkpoint.pt", "before-decay.pt", "log.jsonl"
CHECKPOINT_STEPS = 50  # a killed run loses at most a minute or two of work
GRADIENT_NORM = 1.0
SMALLEST = 1e-6  # probabilities below count as this in logarithms


@dataclass(frozen=True)
class Report:
    """The state of a run: the mean loss (nats per token) since the last report, and its cost so far."""

    step: int
    steps: int
    loss: float
    cpu_seconds: float


def divergence(logits: Tensor, ids: Tensor, odds: Tensor) -> Tensor:
    """Mean KL(teacher || student) over tokens, in nats: from the student's logits (..., vocab) and the
    teacher's distribution in a `Lesson`. All tokens that it does not list count as one."""
    picked = F.log_softmax(logits, -1).gather(-1, ids)
    rest, ours = (1 - each.sum(-1) for each in (odds, picked.exp()))
    listed = (odds * (odds.clamp(min=SMALLEST).log() - picked)).sum(-1)
    rest = rest.clamp(min=0)
    return (listed + rest * (rest.clamp(min=SMALLEST).log() - ours.clamp(min=SMALLEST).log())).mean()


class Run:
    """A student, its optimisers and their step; `folder` holds the checkpoints.

    `kind` is the type of matrix products. `compiled` has torch compile the step: it takes a minute and a C++
    compiler, and makes it a third faster. This is process `rank` of `size`; if there are several, torch's
    process group is set up already.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, *, kind: torch.dtype, compiled: bool, rank: int = 0, size: int = 1
    ) -> None:
        self.recipe, self.folder, self.rank, self.size = recipe, folder, rank, size
        torch.manual_seed(recipe.seed)
        self.student = Student(recipe.shape, kind)
        self.optimisers = _optimisers(self.student, recipe)
        self.step, self.cpu_seconds = 0, 0.0
        self._loss = torch.compile(self._loss_of) if compiled else self._loss_of
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).exists():
            self._load(folder / CHECKPOINT)

    def train(self, corpus: Corpus, report: Callable[[Report], None]) -> None:
        """Run to the recipe's last step, or until SIGINT or SIGTERM; then write the checkpoint."""
        with _asked_to_stop() as asked:
            while self.step < self.recipe.optimiser.steps and not asked:
                told = self._stretch(corpus, asked)
                if self.rank == 0:
                    self._save(CHECKPOINT)
                    report(told)

    def _stretch(self, corpus: Corpus, asked: list[int]) -> Report:
        """The steps up to the next checkpoint."""
        rules, losses, started = self.recipe.optimiser, [], time.process_time()
        end = min(rules.steps, self.step - self.step % CHECKPOINT_STEPS + CHECKPOINT_STEPS)
        while self.step < end and not asked:
            if self.step == rules.decays_at and self.rank == 0:
                self._save(BEFORE_DECAY)
            lesson = corpus.batch(self.step, rules.batch).rows(slice(self.rank, None, self.size))
            loss = self._loss(lesson.tokens.long(), lesson.ids.long(), lesson.odds.float())
            for optimiser, _ in self.optimisers:
                optimiser.zero_grad()
            loss.backward()
            losses.append(self._meet(loss.item(), asked))
            self._move()
            self.step += 1
        self.cpu_seconds += (time.process_time() - started) * self.size
        return Report(self.step, rules.steps, sum(losses) / max(len(losses), 1), self.cpu_seconds)

    def _loss_of(self, tokens: Tensor, ids: Tensor, odds: Tensor) -> Tensor:
        return divergence(self.student(tokens), ids, odds)

    def _meet(self, loss: float, asked: list[int]) -> float:
        """Average gradients and loss over all processes; all stop if one is asked to."""
        if self.size == 1:
            return loss
        gradients = [weight.grad for weight in self.student.parameters()]
        told = torch.tensor([loss, len(asked)])
        flat = torch.cat([told, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        told, *means = (flat / self.size).split([2, *(gradient.numel() for gradient in gradients)])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        if told[1] > 0 and not asked:
            asked.append(signal.SIGTERM)
        return told[0].item()

    def _move(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), GRADIENT_NORM)
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * self.recipe.optimiser.factor(self.step)
            optimiser.step()

    def _save(self, name: str) -> None:
        state = {
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "student": self.student.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
        }
        with atomic_file(self.folder / name) as file:
            torch.save(state, file)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self.student.load_state_dict(state["student"])
        for (optimiser, _), kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)


def log_to(path: Path, report: Report) -> None:
    """Append a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(report)) + "\n")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Inside the block, a list that gets the number of each signal that asks to stop."""
    asked: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _optimisers(student: Student, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimisers at full rate. No weight decay: only a weight's ratio to the mean magnitude matters."""
    matrices = [weight for layer in student.layers for weight in layer.matrices.values()]
    ours = {id(weight) for weight in matrices}
    others = [weight for weight in student.parameters() if id(weight) not in ours]
    rules = recipe.optimiser
    muon = torch.optim.Muon(matrices, lr=rules.matrix_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=rules.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [(muon, rules.matrix_rate), (adam, rules.rate)]
