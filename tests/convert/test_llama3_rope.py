"""Llama 3's divisors of RoPE's angles are those of the formula, and a checkpoint's configuration is read."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cordee.compress.source import Source
from cordee.convert.llama3_rope import llama3_divisors
from cordee.errors import BadModelFile, UnsupportedModel
from ordinary_models import make_checkpoint

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def plain(dimension: int, head_dim: int, base: float) -> float:
    """One divisor, case by case as the reference code has it."""
    wavelength = 2 * math.pi * base ** (2 * dimension / head_dim)
    if wavelength < 8192 / 4:
        return 1.0
    if wavelength > 8192 / 1:
        return 8.0
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return 1 / ((1 - smooth) / 8 + smooth)


def test_divisors_are_those_of_the_reference() -> None:
    found = llama3_divisors(LLAMA31, 128, 500_000.0, "m")
    assert found == pytest.approx([plain(dimension, 128, 500_000.0) for dimension in range(64)], rel=1e-6)
    assert found[0] == 1 and found[-1] == 8 and np.unique(found).size > 5


def test_a_checkpoint_s_configuration_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())

    def opened(scaling: dict[str, object]) -> Source:
        (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        return Source(folder, "m", "int8")

    source = opened(LLAMA31)
    wanted = llama3_divisors(LLAMA31, source.model.head_dim, source.model.rope_base, "m")
    assert np.array_equal(source.divisors(), wanted)
    for key in ("factor", "high_freq_factor"):
        with pytest.raises(BadModelFile, match=f"has {key} None"):
            opened({name: value for name, value in LLAMA31.items() if name != key})
    with pytest.raises(BadModelFile, match="low_freq_factor"):
        opened(LLAMA31 | {"low_freq_factor": 4.0})
    with pytest.raises(UnsupportedModel, match="of type dynamic"):
        opened({"rope_type": "dynamic", "factor": 2.0})
