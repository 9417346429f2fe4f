"""What MiniCPM has beside a llama block: scales of embedding, residual and head, and LongRoPE's factors.

Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
2024, section 3.1. The keys of GGUF are llama.cpp's (src/models/minicpm.cpp and granite.cpp). The scale of the
head is put into the norm before it: the logits are proportional to that.

LongRoPE (Ding et al., 2024) has two lists of divisors of the rotary angles, for texts up to the original
context and for longer ones. Our files have the first list, and that context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cordee.convert.safetensors import is_array, is_object
from cordee.convert.ternary_file import TernaryModel
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import UPDATE, Header
from cordee.models.metadata import CONVERT_AGAIN, FETCH_AGAIN

SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
# Larger scales would be damage.
SCALE_LIMIT = 1e6


@dataclass(frozen=True)
class Minicpm:
    """`head_scale` divides the logits; `divisors` (head_dim / 2,) float32 of the rotary angles, if any."""

    head_scale: np.float32
    divisors: np.ndarray | None = None


def minicpm_of(model: TernaryModel, header: Header) -> tuple[Minicpm, TernaryModel]:
    """The scales of a GGUF; its divisors are tensors, which the source reads.

    Raises:
        BadModelFile: a scale is missing or impossible.
        UnsupportedModel: RoPE is stretched in a way that is unknown here.
    """
    scales = [header.number(key) for key in (".embedding_scale", ".residual_scale", ".logit_scale")]
    if header.text(".rope.scaling.type", "none") == "longrope":
        factors = [header.number(f".rope.scaling.{key}", 1.0) for key in ("factor", "attn_factor")]
        original = header.count(".rope.scaling.original_context_length")
        if any(factor not in (0, 1) for factor in factors) or not original:
            raise UnsupportedModel(
                f"{header.name} stretches LongRoPE by {factors}, which is unknown here: {UPDATE}."
            )
        model = replace(model, context=min(model.context, original), divisors=True)
    return _scaled(model, scales, header.name, CONVERT_AGAIN)


def minicpm_of_config(
    model: TernaryModel, config: Mapping[str, object], title: str
) -> tuple[Minicpm, TernaryModel]:
    """The same from a config.json of the hub. Raises as `minicpm_of`."""
    embedding, depth, base = (config.get(key) for key in ("scale_emb", "scale_depth", "dim_model_base"))
    numbers = [value for value in (embedding, depth, base) if isinstance(value, int | float) and value > 0]
    if len(numbers) != 3:
        raise BadModelFile(
            f"{title}: config.json lacks scale_emb, scale_depth or dim_model_base: {FETCH_AGAIN}."
        )
    scales = [numbers[0], numbers[1] / model.layers**0.5, model.n_embd / numbers[2]]
    parameters = config.get("rope_scaling")
    if not is_object(parameters) or "longrope" not in (parameters.get("rope_type"), parameters.get("type")):
        return _scaled(model, scales, title, FETCH_AGAIN)
    short, original = parameters.get("short_factor"), parameters.get("original_max_position_embeddings")
    if not is_array(short) or type(original) is not int or original < 1:
        raise BadModelFile(f"{title}: config.json has no factors of LongRoPE: {FETCH_AGAIN}.")
    divisors = np.array(short, dtype=np.float32)
    if divisors.shape != (model.head_dim // 2,) or not (divisors > 0).all():
        raise BadModelFile(
            f"{title}: config.json has other factors of LongRoPE than its heads: {FETCH_AGAIN}."
        )
    model = replace(model, context=min(model.context, original), divisors=True)
    return _scaled(model, scales, title, FETCH_AGAIN, divisors)


def _scaled(
    model: TernaryModel, scales: Sequence[float], title: str, remedy: str, divisors: np.ndarray | None = None
) -> tuple[Minicpm, TernaryModel]:
    if not all(0 < scale < SCALE_LIMIT for scale in scales):
        raise BadModelFile(f"{title} has scales that no model has ({scales}): {remedy}.")
    embedding, residual, head = (np.float32(scale) for scale in scales)
    model = replace(model, embedding_scale=float(embedding), residual_scale=float(residual))
    return Minicpm(head, divisors), model
