"""The ternary engine against transformers' own BitNet and Llama code: the same random weights, in float32.

The modules of BitNet's quantisation (AutoBitLinear) take the places of the layers' matrices. Skipped where
torch and transformers are not installed: they are no dependency of the tests.
"""

from pathlib import Path

import numpy as np
import pytest

from cordee.convert.ternary_file import LAYOUTS, rounded
from cordee.engine.stage import Batch, StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from ternary_models import FAMILIES, Weights, make_ternary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitnet = pytest.importorskip("transformers.integrations.bitnet")
torch._dynamo.config.disable = True  # AutoBitLinear asks for a compiler that would take longer than the test

PLACES = {
    "self_attn": {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"},
    "mlp": {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"},
}
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
CONFIG = StageConfig(context=320, sequences=1, batch_rows=320, threads=1)


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a matrix for RoPE on neighbouring pairs, reordered for RoPE on halves."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


def module(weights: Weights, layer: int, name: str) -> torch.nn.Linear:
    """A layer's matrix: ternary weights with their scale, or plain floats where activations stay floats."""
    rows = weights.arrays[f"blk.{layer}.{name}.weight"].astype(np.float32)
    scale = weights.scales(f"blk.{layer}.{name}.weight")
    is_quantised = weights.model.planes == 1
    if not is_quantised:
        rows = weights.dense(layer, name)
    if name in ("attn_q", "attn_k") and weights.model.rope == "interleaved":
        rows = halves(rows, weights.model.head_dim)
    kind = bitnet.AutoBitLinear if is_quantised else torch.nn.Linear
    made = kind(rows.shape[1], rows.shape[0], bias=False)
    made.weight.data = torch.from_numpy(np.ascontiguousarray(rows))
    if is_quantised:
        made.weight_scale.data = torch.from_numpy(scale)
    return made


def reference(weights: Weights) -> torch.nn.Module:
    """The model of transformers with these weights; its head as the file stores it."""
    model = weights.model
    numbers = {
        "hidden_size": model.n_embd,
        "intermediate_size": model.n_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.n_vocab,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "hidden_act": model.activation,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if model.sub_norms:
        made = transformers.BitNetForCausalLM(transformers.BitNetConfig(**numbers))
    else:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers))
    made = made.float().eval()
    for index, layer in enumerate(made.model.layers):
        for place, names in PLACES.items():
            for ours, theirs in names.items():
                setattr(layer.get_submodule(place), theirs, module(weights, index, ours))
        for name in model.norms():
            norm = layer.get_submodule(NORMS[name])
            norm.weight.data = torch.from_numpy(weights.arrays[f"blk.{index}.{name}.weight"])
    stored, scales = rounded(weights.arrays["output.weight"], LAYOUTS[model.head])
    made.model.norm.weight.data = torch.from_numpy(weights.arrays["output_norm.weight"])
    made.model.embed_tokens.weight.data = torch.from_numpy(weights.arrays["token_embd.weight"])
    made.lm_head.weight.data = torch.from_numpy((stored * scales[:, None]).astype(np.float32))
    return made


@torch.no_grad()
def run(made: torch.nn.Module, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The hidden rows before the first layer and after each, and the logits."""
    rows = [made.model.embed_tokens(torch.from_numpy(tokens)[None])]
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, out: rows.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in made.model.layers
    ]
    logits = made(torch.from_numpy(tokens)[None]).logits
    for hook in hooks:
        hook.remove()
    return [each.reshape(len(tokens), -1).numpy() for each in rows], logits[0].numpy()


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Each layer from the reference's own input, compared with the most that it adds.

    The cache is f16 here: where activations stay floats that is the only difference. Elsewhere some
    activations round to another int8.
    """
    weights = make_ternary(family, tmp_path / "model.gguf")
    header = read_header(tmp_path / "model.gguf")
    tokens = np.random.default_rng(5).integers(3, 320, 90)
    rows, _ = run(reference(weights), tokens)
    assert len(rows) == weights.model.layers + 1
    for index in range(weights.model.layers):
        slice_path = cut(header, index, index + 1, tmp_path / "layer.gguf").path
        stage = TernaryStage(slice_path, CONFIG, is_last=False)
        found, expected = stage.decode(batch_of_one(rows[index])), rows[index + 1]
        stage.close()
        errors = np.abs(found - expected).max(axis=1) / np.abs(expected - rows[index]).max()
        assert errors.max() < (0.001 if weights.model.planes == 3 else 0.05), f"layer {index}"
        assert np.median(errors) < (0.0003 if weights.model.planes == 3 else 0.02), f"layer {index}"


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Logits, and greedy tokens over 256 steps.

    With int8 activations a token may differ where the reference's two best candidates are closer than 0.15 of
    its logits' spread; without, none does.
    """
    weights = make_ternary(family, tmp_path / "model.gguf")
    is_exact = weights.model.planes == 3
    stage = TernaryStage(tmp_path / "model.gguf", CONFIG)
    start = np.random.default_rng(6).integers(3, 320, 20).tolist()
    tokens = [int(stage.decode(batch_of_one(start))[0].argmax())]
    while len(tokens) < 256:
        tokens.append(int(stage.decode(batch_of_one(tokens[-1:], len(start) + len(tokens) - 1))[0].argmax()))
    stage.trim(0, 0)
    whole = batch_of_one(start + tokens[:-1])
    logits = stage.decode(
        Batch(whole.inputs, whole.positions, whole.sequences, np.ones(len(whole), dtype=bool))
    )
    stage.close()
    _, expected = run(reference(weights), whole.inputs.astype(np.int64))
    spread = expected.std()
    assert np.median(np.abs(logits - expected)) < (1e-3 if is_exact else 0.03) * spread
    expected = expected[len(start) - 1 :]
    best = np.sort(expected, axis=1)
    decided = best[:, -1] - best[:, -2] > (0 if is_exact else 0.15 * spread)
    assert len(set(tokens)) > 20 and decided.mean() > 0.5
    assert (expected.argmax(axis=1) == tokens)[decided].all()
