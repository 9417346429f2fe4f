"""YaRN, by which Ternary-Bonsai and others stretch their context: divisors of RoPE's angles, and one factor.

Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, section 3; the keys
and defaults are those of llama.cpp (ggml/src/ggml-cpu/ops.cpp, rope_yarn). Dimension i turns by
position * base^(-i / half) / divisor. Fast dimensions have the divisor 1, slow ones the whole factor, and
those between them a mixture. Queries and keys also grow by one factor, which their norms can take on.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Any, Literal

import msgspec
import numpy as np

from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import UPDATE, Header
from cordee.models.metadata import CONVERT_AGAIN, FETCH_AGAIN

# Rotations over the original context from which on a dimension is fast, and up to which it is slow.
BETA_FAST, BETA_SLOW = 32.0, 1.0
PREFIX = ".rope.scaling."
KNOWN = (
    "type",
    "factor",
    "original_context_length",
    "attn_factor",
    "finetuned",
    "yarn_beta_fast",
    "yarn_beta_slow",
)


@dataclass(frozen=True)
class Yarn:
    """`divisors` (head_dim / 2,) float32 of the angles; `factor` multiplies queries and keys."""

    divisors: np.ndarray
    factor: np.float32


def yarn_of(header: Header, head_dim: int, base: float) -> Yarn | None:
    """How a model stretches its context by YaRN; None if it does not.

    Raises:
        UnsupportedModel: a setting is unknown here.
        BadModelFile: a number is impossible.
    """
    if header.text(f"{PREFIX}type", "none") != "yarn":
        return None
    for key in header.metadata:
        if key.startswith(header.key(PREFIX)) and key.removeprefix(header.key(PREFIX)) not in KNOWN:
            raise UnsupportedModel(f"{header.name} has {key}, which this program does not know: {UPDATE}.")
    stretch = header.number(f"{PREFIX}factor")
    original = header.count(f"{PREFIX}original_context_length")
    fast = header.number(f"{PREFIX}yarn_beta_fast", BETA_FAST)
    slow = header.number(f"{PREFIX}yarn_beta_slow", BETA_SLOW)
    if not (1 <= stretch <= 1 << 20 and original > 0 and 0 < slow < fast and base > 1):
        raise BadModelFile(f"{header.name} stretches RoPE by numbers that no model has: {CONVERT_AGAIN}.")

    factor = header.number(f"{PREFIX}attn_factor", 1.0) * usual_factor(stretch)
    return Yarn(divisors_of(head_dim, base, stretch, original, fast, slow), np.float32(factor))


def yarn_of_config(parameters: dict[str, Any], head_dim: int, base: float, title: str) -> Yarn:
    """The same from the `rope_scaling` of a config.json on the hub. Raises as `yarn_of`."""
    try:
        found = msgspec.convert(parameters, _Parameters)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(
            f"{title} stretches RoPE in a way that is unknown here ({error}): {UPDATE}."
        ) from error
    original = found.original_max_position_embeddings
    if not (1 <= found.factor <= 1 << 20 and original > 0 and 0 < found.beta_slow < found.beta_fast):
        raise BadModelFile(f"{title} stretches RoPE by numbers that no model has: {FETCH_AGAIN}.")
    factor = usual_factor(found.factor) if found.attention_factor is None else found.attention_factor
    divisors = divisors_of(head_dim, base, found.factor, original, found.beta_fast, found.beta_slow)
    return Yarn(divisors, np.float32(factor))


class _Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    factor: float
    original_max_position_embeddings: int
    rope_type: Literal["yarn"] = "yarn"
    type: Literal["yarn"] = "yarn"
    rope_theta: float | None = None
    attention_factor: float | None = None
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW


def usual_factor(stretch: float) -> float:
    """By which queries and keys grow; section 3.4 of the paper."""
    return 1 + 0.1 * log(stretch)


def divisors_of(
    head_dim: int, base: float, stretch: float, original: int, fast: float, slow: float
) -> np.ndarray:
    """(head_dim / 2,) float32."""

    def dimension(rotations: float) -> float:
        return head_dim * log(original / (rotations * 2 * pi)) / (2 * log(base))

    low, high = max(0, floor(dimension(fast))), min(head_dim - 1, ceil(dimension(slow)))
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(0.001, high - low), 0, 1)
    return (1 / (ramp / stretch + 1 - ramp)).astype(np.float32)
