"""Tiny models of ordinary weights, as a GGUF and as a checkpoint of the hub, for compression."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from checkpoint_files import bf16, config_of, hub_name, vocabulary_size, write_safetensors, write_tokenizer
from cordee.convert.ternary_file import TernaryModel
from ternary_models import FAMILIES
from tiny import make_tiny

# Words of the tiny vocabulary's letters, in no order that a random model could know.
WORDS = ("one", "two", "rope", "ridge", "snow", "a", "the", "climbs", "rests", "holds", "of", "and")


def prose(words: int, seed: int = 0) -> str:
    """A text of that many words."""
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, words)) + "."


def make_ordinary(path: Path, architecture: str = "llama", **changes: object) -> Path:
    """A GGUF of two layers of that architecture."""
    make_tiny(architecture, path, tokenizer="bytes", **({"layers": 2} | changes))
    return path


def checkpoint_tensors(model: TernaryModel, seed: int = 1) -> dict[str, tuple[str, np.ndarray]]:
    """Random weights by their names on the hub, in bfloat16."""
    draw = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (model.n_vocab, model.n_embd),
        "output.weight": (model.n_vocab, model.n_embd),
    }
    for layer in range(model.layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in model.matrices().items()}
    tensors = {
        hub_name(name): ("BF16", bf16((draw.standard_normal(shape) / np.sqrt(shape[1])).astype("<f4")))
        for name, shape in shapes.items()
    }
    norms = ["output_norm.weight"]
    norms += [f"blk.{layer}.{name}.weight" for layer in range(model.layers) for name in model.norms()]
    one = bf16(np.ones(model.n_embd, "<f4"))
    return tensors | {hub_name(name): ("BF16", one) for name in norms}


def make_checkpoint(folder: Path, *, shards: int = 2, **replaced: tuple[str, np.ndarray] | None) -> Path:
    """A checkpoint of the hub; `replaced` gives tensors by their hub's names, or leaves them out (None)."""
    model = replace(FAMILIES["llama"], layers=2, n_vocab=vocabulary_size(), rope="neox")
    tensors = {n: t for n, t in (checkpoint_tensors(model) | replaced).items() if t is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model, "floats")))
    write_tokenizer(folder)
    placed = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_safetensors(folder / name, part)
        placed |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
