"""Damaged model files: tests/native/model_fuzz.c, with the address and undefined-behaviour sanitizers."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from cordee.convert.pentium2 import write_pentium2
from ternary_models import FAMILIES, Weights, make_ternary

ROOT = Path(__file__).resolve().parents[2]
READER = (
    *("base/error.c", "base/gguf.c", "engine/embedding.c", "engine/load.c", "engine/matrix.c"),
    *("engine/settings.c", "pentium2/lookup.c"),
)
FILES = (*FAMILIES, "pentium2")
# Widths are multiples of the rotation's block; layers as many as say whether they have a window.
SPECIAL = {
    "bonsai-rotated": {"rotation_block": 16},
    "maple": {"windowed": (True,)},
    "maple-grouped": {"windowed": (True,)},
}
# Between them they have every type that embeddings come in.
EMBEDDINGS = {
    "bitnet": GGMLQuantizationType.BF16,
    "bitnet-silu": GGMLQuantizationType.F16,
    "llama": GGMLQuantizationType.Q8_0,
    "trilm": GGMLQuantizationType.F32,
    "maple": GGMLQuantizationType.F16,
    "minicpm": GGMLQuantizationType.F16,
}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fuzz") / "fuzz"
    checks = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    folders = [f"-I{ROOT / 'native' / name}" for name in ("include", "src")]
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *folders)
    sources = [str(ROOT / "native" / "src" / name) for name in READER] + [
        str(ROOT / "tests" / "native" / "model_fuzz.c")
    ]
    command = [os.environ.get("CC", "cc"), *checks, *flags, *sources, "-o", str(output), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def throw(fuzzer: Path, folder: Path, kind: str, rounds: int, seed: int) -> None:
    """A tiny file of that kind, damaged so many times."""
    small = {"layers": 1, "n_embd": 32, "n_ff": 48, "n_vocab": 64, "heads": 2, "kv_heads": 1}
    if kind == "pentium2":
        weights = Weights(replace(FAMILIES["bitnet"], **small), 1)
        for name in ("token_embd.weight", "output.weight"):  # ternary there, too
            weights.arrays[name] = np.sign(weights.arrays[name])
        write_pentium2(folder / "model.gguf", weights.model, weights)
    else:
        changes = small | ({"embedding": EMBEDDINGS[kind]} if kind in EMBEDDINGS else {})
        make_ternary(kind, folder / "model.gguf", **changes | SPECIAL.get(kind, {}))
    done = subprocess.run(
        [fuzzer, folder / "model.gguf", str(rounds), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{kind}, seed {seed}: {done.stderr}"


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_model_file_does_no_harm(fuzzer: Path, tmp_path: Path, kind: str) -> None:
    throw(fuzzer, tmp_path, kind, rounds=3000, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", FILES)
def test_many_damaged_model_files_do_no_harm(fuzzer: Path, tmp_path: Path, kind: str) -> None:
    for seed in range(2, 6):
        throw(fuzzer, tmp_path, kind, rounds=200_000, seed=seed)
