"""Checkpoints that the transformers library itself made, and what it computes with them: the definition.

Heavy, so optional: skipped without the packages transformers, accelerate and torch.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import vocabulary_size, write_tokenizer
from cordee.convert.convert import convert
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage

pytestmark = pytest.mark.long
torch = pytest.importorskip("torch", reason="the reference is not installed")
transformers = pytest.importorskip("transformers", reason="the reference is not installed")
pytest.importorskip("accelerate", reason="the reference is not installed")

CLASSES = {"bitnet": "BitNet", "llama": "Llama"}
TOKENS = np.arange(10, 50)
# Of the logits' spread: how far an activation on the edge of a rounding to int8 may move them.
TOLERANCE = 0.1


def tiny(family: str) -> "torch.nn.Module":
    """A model of random weights."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        vocab_size=vocabulary_size(),
        hidden_size=128,
        intermediate_size=208,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=family == "bitnet",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(7)
    return getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).float()


def save(model: "torch.nn.Module", folder: Path, form: str) -> None:
    """Write the checkpoint as transformers does: masters, or packed by its own function."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.bitnet import pack_weights

    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if form == "divided" else "autobitlinear",
        "quantization_mode": "online" if form == "masters" else "offline",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    if form == "masters":
        return
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        mean = tensors[name].abs().mean().clamp(min=1e-5)
        tensors[name] = pack_weights((tensors[name] / mean).round().clamp(-1, 1))
        stated = 1 / mean if form == "divided" else mean
        tensors[name.replace("weight", "weight_scale")] = stated.reshape(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("form", ("masters", "multiplied", "divided"))
@pytest.mark.parametrize("family", CLASSES)
def test_logits_are_those_of_the_library(family: str, form: str, tmp_path: Path) -> None:
    save(tiny(family), tmp_path / "hub", form)
    convert(tmp_path / "hub", tmp_path / "ours.gguf")
    stage = TernaryStage(
        tmp_path / "ours.gguf", StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
    )
    logits = np.concatenate(
        [stage.decode(batch_of_one([token], place)) for place, token in enumerate(TOKENS)]
    )
    stage.close()
    torch.compiler.set_stance("force_eager")  # to compile takes longer than all the rest
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hub", dtype=torch.float32, device_map="cpu"
    )
    with torch.no_grad():
        expected = loaded(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    spread = expected.std(axis=1)
    errors = np.abs(logits - expected).mean(axis=1) / spread
    assert np.median(errors) < TOLERANCE
    decided = np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)[:, 0] > 4 * TOLERANCE * spread
    assert decided.any()
    assert (logits.argmax(axis=1) == expected.argmax(axis=1))[decided].all()
