"""The roster: which model architectures may be cut, and what a cut must take into account.

Its data is in architectures.toml beside this file.
"""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal

import msgspec


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known about an architecture; the fields are explained at the top of architectures.toml."""

    name: str
    certified: bool = False
    sliding_window_period: int = 0
    dense_first: bool = False
    embedding_scale: Literal["none", "sqrt_n_embd", "metadata"] = "none"
    cut_step: int = 1
    minimum_layers: int = 1
    dense_tensors: tuple[str, ...] = ()
    must_be_set: tuple[str, ...] = ()
    must_be_zero: tuple[str, ...] = ()
    whole_layer_counts: tuple[int, ...] = ()
    encoder: bool = False
    refusal: str = ""

    def obstacle(self, layers: int) -> str | None:
        """Why a model of this architecture with this number of layers cannot be cut; None if it can."""
        if self.refusal and (not self.whole_layer_counts or layers in self.whole_layer_counts):
            return self.refusal
        return None


@cache
def roster() -> dict[str, Architecture]:
    """All known architectures by name."""
    table = tomllib.loads((files("cordee.models") / "architectures.toml").read_text())
    return {name: msgspec.convert({"name": name, **fields}, Architecture) for name, fields in table.items()}


def is_encoder(name: str) -> bool:
    """Whether models of that architecture give vectors and write nothing."""
    return name in roster() and roster()[name].encoder


def architecture(name: str) -> Architecture | None:
    """The roster's entry of an architecture, or None if nothing is known about it."""
    return roster().get(name)
