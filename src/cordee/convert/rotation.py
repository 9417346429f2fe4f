"""The rotated basis of Bonsai 2 and its kin (`prism.hadamard.*` of a GGUF file), in this house's terms.

Weights were multiplied beforehand by signs and a block-wise Walsh-Hadamard matrix (native/FORMAT.md, "The
rotation"). Whoever ignores that gets fluent nonsense, so whatever is not known here is refused by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cordee.convert.ternary_file import EMBEDDING, HEAD
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import PRISM, UPDATE, Header
from cordee.models.metadata import CONVERT_AGAIN, Array, Scalar

# What there is of each key, or None where any value may be.
KNOWN: Mapping[str, tuple[object, ...] | None] = {
    "version": (1,),
    "block_size": None,
    "transform": ("normalized-sylvester-walsh-hadamard",),
    "axis": ("input-last-dimension",),
    "sign_mode": ("identity", "explicit"),
    "sign_widths": None,
    "sign_values": None,
    "weight_names": None,
    "inverse_weight_names": None,
    "gdn_v_grouped": (False,),
}
REQUIRED = ("version", "block_size", "transform", "axis", "sign_mode", "weight_names")
# The matrices that share what is rotated for them.
SHARING = {
    "attn": ("attn_q", "attn_k", "attn_v"),
    "attn_output": ("attn_output",),
    "ffn": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}
BLOCK_LEAST, BLOCK_LIMIT = 16, 32_768  # native/src/base/limits.h


@dataclass(frozen=True)
class Rotation:
    """What is rotated, of `ternary_file.ROTATED`; signs by width."""

    block: int
    rotated: tuple[str, ...]
    signs: Mapping[int, np.ndarray] | None

    def vector(self, name: str, width: int) -> np.ndarray:
        """(width,) float32 signs, all 1 where the file has none.

        Raises:
            BadModelFile: the file has some, but none of that width, or blocks do not fill it.
        """
        signs = np.ones(width, dtype=np.float32) if self.signs is None else self.signs.get(width)
        if signs is None or width % self.block:
            raise BadModelFile(
                f"{name} rotates rows of {width} in blocks of {self.block}, for which it has no signs: "
                f"{CONVERT_AGAIN}."
            )
        return signs


def rotation_of(header: Header) -> Rotation | None:
    """The rotation of a model's file; None if it has none.

    Raises:
        UnsupportedModel: a key, a version, a mode or a matrix is unknown here.
        BadModelFile: a key is missing, or the signs do not fit.
    """
    prefix = f"{PRISM}hadamard."
    found = {key: value for key, value in header.metadata.items() if key.startswith(PRISM)}
    if not found:
        return None
    for key, value in found.items():
        short = key.removeprefix(prefix)
        if short not in KNOWN:
            raise UnsupportedModel(f"{header.name} has {key}, which this program does not know: {UPDATE}.")
        allowed = KNOWN[short]
        if allowed is not None and value not in allowed:
            raise UnsupportedModel(
                f"{header.name}: {key} is {value!r}; {', '.join(map(repr, allowed))} is known: {UPDATE}."
            )
    for short in REQUIRED:
        if prefix + short not in found:
            raise BadModelFile(f"{header.name} has no {prefix}{short}: {CONVERT_AGAIN}.")
    block = header.count(f"{prefix}block_size")
    if not BLOCK_LEAST <= block <= BLOCK_LIMIT or block & (block - 1):
        raise UnsupportedModel(
            f"{header.name} rotates blocks of {block}, not of 2^n, {BLOCK_LEAST} to {BLOCK_LIMIT}: {UPDATE}."
        )
    is_explicit = header.text(f"{prefix}sign_mode") == "explicit"
    signs = _signs(header, prefix) if is_explicit else None
    rotated = _rotated(header, set(map(str, _items(header, f"{prefix}weight_names"))))
    inverse = set(map(str, _items(header, f"{prefix}inverse_weight_names")))
    if inverse - {EMBEDDING}:
        raise UnsupportedModel(f"{header.name} rotates back behind {min(inverse - {EMBEDDING})}: {UPDATE}.")
    return Rotation(block, (*rotated, *(("embedding",) if inverse else ())), signs)


def _rotated(header: Header, names: set[str]) -> list[str]:
    """Which inputs are rotated: each in all layers, or in none."""
    rotated: list[str] = []
    for group, matrices in SHARING.items():
        own = {f"blk.{layer}.{name}.weight" for layer in range(header.layers) for name in matrices}
        lacking = own - names if own & names else set[str]()
        if lacking:
            raise UnsupportedModel(
                f"{header.name} rotates some matrices of {group}, but not {min(lacking)}: no engine here can."
            )
        if own & names:
            rotated.append(group)
        names = names - own
    if HEAD in names:
        rotated.append("head")
    if names - {HEAD}:
        raise UnsupportedModel(
            f"{header.name} rotates for {min(names - {HEAD})}, which is unknown here: {UPDATE}."
        )
    return rotated


def _signs(header: Header, prefix: str) -> dict[int, np.ndarray]:
    widths, values = (np.array(_items(header, f"{prefix}sign_{name}")) for name in ("widths", "values"))
    numbers = widths.dtype.kind == values.dtype.kind == "i"
    if not numbers or widths.min() < 1 or widths.sum() != len(values) or (np.abs(values) != 1).any():
        raise BadModelFile(
            f"{header.name}: {prefix}sign_values are not 1 and -1 of those widths: {CONVERT_AGAIN}."
        )
    parts = np.split(values.astype(np.float32), np.cumsum(widths)[:-1])
    return dict(zip(widths.tolist(), parts, strict=True))


def _items(header: Header, key: str) -> list[Scalar]:
    value = header.metadata.get(key)
    if value is None:
        return []
    if not isinstance(value, Array):
        header.refuse(key, value, "a list")
    return value.values()
