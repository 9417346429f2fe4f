"""How Llama 3.1 and its successors stretch their context: divisors of RoPE's angles by their wavelength.

The formula is that of Meta's reference code (`apply_scaling` of llama-models) and of llama.cpp's converter,
which writes the divisors into its files as the tensor rope_freqs.weight: dimensions that turn fast stay as
they are, slow ones are divided by the whole factor, and between both lies a mixture.
"""

from collections.abc import Mapping

import numpy as np

from cordee.errors import BadModelFile
from cordee.models.metadata import FETCH_AGAIN

FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FACTOR_LIMIT = 1e9  # larger numbers would be damage


def llama3_divisors(parameters: Mapping[str, object], head_dim: int, base: float, title: str) -> np.ndarray:
    """(head_dim / 2,) float32, from the `rope_scaling` of a config.json on the hub.

    Raises:
        BadModelFile: a number is missing or impossible; names it.
    """
    numbers: list[float] = []
    for key in FACTORS:
        value = parameters.get(key)
        if not isinstance(value, int | float) or not 0 < value < FACTOR_LIMIT:
            raise BadModelFile(f"{title}: config.json has {key} {value} for RoPE: {FETCH_AGAIN}.")
        numbers.append(float(value))
    factor, low, high, original = numbers
    if low >= high:
        raise BadModelFile(
            f"{title}: config.json has low_freq_factor {low}, not below {high}: {FETCH_AGAIN}."
        )
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # the part that stays as it is
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)
