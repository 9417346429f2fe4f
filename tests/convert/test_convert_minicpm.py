"""MiniCPM4 as llama.cpp stores it becomes a file for our engine: scales, and LongRoPE's first factors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from cordee.convert.convert import convert
from cordee.errors import BadModelFile
from ternary_models import FAMILIES, Weights, assert_computes
from ternary_sources import write_source

KEYS = {
    "minicpm.embedding_scale": 12.0,
    "minicpm.residual_scale": 0.7,
    "minicpm.logit_scale": 2.0,
    "minicpm.rope.scaling.type": "longrope",
    "minicpm.rope.scaling.original_context_length": 256,
}


def test_scales_and_factors_are_kept(tmp_path: Path) -> None:
    weights = Weights(replace(FAMILIES["minicpm"], rope="interleaved", layers=2, planes=2), 3)
    short = weights.arrays.pop("rope_freqs.weight")
    beside = {"rope_factors_short.weight": short, "rope_factors_long.weight": 2 * short}
    weights.arrays |= beside
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.F16, keys=KEYS)
    without = {key: value for key, value in KEYS.items() if "logit" not in key}
    write_source(tmp_path / "old.gguf", weights, GGMLQuantizationType.F16, keys=without)
    with pytest.raises(BadModelFile, match="logit_scale"):
        convert(tmp_path / "old.gguf", tmp_path / "ours.gguf")
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert (model.context, model.divisors, model.embedding_scale) == (256, True, 12.0)
    assert np.float32(model.residual_scale) == np.float32(0.7)
    for name in beside:
        del weights.arrays[name]
    weights.arrays["rope_freqs.weight"] = short
    weights.arrays["output_norm.weight"] /= 2  # the head's scale
    assert_computes(tmp_path / "ours.gguf", weights)
