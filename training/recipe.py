"""A recipe: everything that decides what a training run does, as a TOML file in recipes/."""

from pathlib import Path
from typing import Literal

import msgspec

from training.student import StudentShape

RECIPES = Path(__file__).parent / "recipes"


class Optimiser(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Muon for the matrices of layers, AdamW for embedding and norms. Each of `steps` has `batch` windows.

    The rate rises over `warmup` steps, stays, and falls to 0 over the last `decay` of all steps.
    """

    steps: int
    batch: int
    matrix_rate: float
    rate: float
    warmup: int
    decay: float

    def factor(self, step: int) -> float:
        """The factor of the rates at a step."""
        falling = self.steps * self.decay
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / falling)

    @property
    def decays_at(self) -> int:
        """The first step at which the rate falls. Up to there a run can still be made longer."""
        return int(self.steps * (1 - self.decay))


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model. `seed` determines the first weights, the corpus and the order in which it is read.

    `teacher` is the writer of the corpus: "storyteller" (storyteller.py) or "chat" (chat.py). `likeliest` is
    how many of its next tokens a lesson has. Sampling the model at `temperature` gives the distribution that
    it has learnt: a chat model's lessons are sharper than its own distribution, so its student is made for
    sampling at 0.7, as `cordee-tiny` does.
    """

    name: str
    title: str
    teacher: Literal["storyteller", "chat"]
    seed: int
    window: int
    likeliest: int
    shards: int
    temperature: float
    shape: StudentShape
    optimiser: Optimiser


def recipe(name: str) -> Recipe:
    """The recipe of that name, or in that file.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    return msgspec.toml.decode(path.read_bytes(), type=Recipe)
