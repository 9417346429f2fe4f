"""Ternary models in llama.cpp's formats become files for the ternary engine, and lose nothing on the way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from cordee.cli.main import cordee
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import UnsupportedModel
from cordee.models.convert import convert
from cordee.models.gguf import read_header
from cordee.models.ternary import LAYOUTS, unpack
from ternary_models import FAMILIES, Reference, Weights
from tiny import add_byte_tokenizer

CHANGES = {"n_embd": 256, "n_ff": 512, "heads": 8, "kv_heads": 8, "head_dim": 32, "layers": 2}


def write_source(path: Path, weights: Weights, kind: GGMLQuantizationType, *, spoil: str = "") -> None:
    """The model as llama.cpp stores it; `spoil` names a matrix that gets a second magnitude."""
    model = weights.model
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.rope_base)
    add_byte_tokenizer(writer)
    for name, array in weights.arrays.items():
        if "blk" in name and array.ndim == 2:
            _, layer, matrix, _ = name.split(".")
            # llama.cpp keeps scales in f16: what can be stored there comes out again.
            scales = weights.scales(name)
            scales[:] = scales.astype(np.float16)
            dense = weights.dense(int(layer), matrix).astype(np.float32)
            if name == spoil:
                dense[7, 9] = dense.max() * 0.5
            writer.add_tensor(name, quantize(dense, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_of(family: str) -> Weights:
    return Weights(replace(FAMILIES[family], **CHANGES), 3)


@pytest.mark.parametrize("kind", ("TQ1_0", "TQ2_0", "F16", "F32"))
@pytest.mark.parametrize("layout", ("trit2", "trit5"))
def test_no_weight_is_lost(kind: str, layout: str, tmp_path: Path) -> None:
    weights = weights_of("llama")
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType[kind])
    source = read_header(tmp_path / "source.gguf")
    model = convert(source, tmp_path / "ours.gguf", layout=layout)
    ours = read_header(tmp_path / "ours.gguf")

    def payload(name: str) -> np.ndarray:
        tensor = ours.tensor(name)
        return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)

    for layer in range(model.layers):
        for matrix, (rows, cols) in model.matrices().items():
            name = f"blk.{layer}.{matrix}.weight"
            original = source.tensor(name)
            stored = np.fromfile(original.path, np.uint8, original.nbytes, offset=original.offset)
            expected = dequantize(stored.reshape(rows, -1), original.type)
            shaped = payload(name).reshape(LAYOUTS[layout].shape(rows, cols))
            [scale] = payload(name.replace("weight", "scale")).view(np.float32)
            assert (unpack(shaped, LAYOUTS[layout], rows, cols) * scale == expected).all()
            assert len(np.unique(expected)) == 3
    assert ours.get("tokenizer.ggml.tokens") == source.get("tokenizer.ggml.tokens")
    assert ours.get("tokenizer.chat_template") == source.get("tokenizer.chat_template")


@pytest.mark.parametrize("family", ("llama", "bitnet-silu"))
def test_a_converted_model_computes_what_the_source_means(family: str, tmp_path: Path) -> None:
    weights = weights_of(family)
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.TQ2_0)
    convert(read_header(tmp_path / "source.gguf"), tmp_path / "ours.gguf")
    stage = TernaryStage(
        tmp_path / "ours.gguf", StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
    )
    tokens = np.arange(10, 50)
    logits = stage.decode(batch_of_one(tokens))[0]
    stage.close()
    expected = Reference(weights).logits(tokens)[-1]
    assert np.abs(logits - expected).max() < 0.2 * expected.std()
    assert logits.argmax() == expected.argmax()


def test_what_is_not_ternary_is_refused_by_name(starter_path: Path, tmp_path: Path) -> None:
    weights = weights_of("llama")
    name = "blk.1.ffn_up.weight"
    write_source(tmp_path / "source.gguf", weights, GGMLQuantizationType.F32, spoil=name)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_up\.weight is not ternary: row 7"):
        convert(read_header(tmp_path / "source.gguf"), tmp_path / "ours.gguf")
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.weight is not ternary"):
        convert(read_header(starter_path), tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()


def test_the_verb_says_what_it_wrote(tmp_path: Path) -> None:
    write_source(tmp_path / "source.gguf", weights_of("llama"), GGMLQuantizationType.TQ1_0)
    arguments = [
        "convert",
        str(tmp_path / "source.gguf"),
        "-o",
        str(tmp_path / "ours.gguf"),
        "--layout",
        "trit5",
    ]
    result = CliRunner().invoke(cordee, arguments)
    assert result.exit_code == 0, result.output
    assert "ours.gguf  llama, 2 layers" in result.stdout
    assert read_header(tmp_path / "ours.gguf").get("cordee.ternary.layout") == "trit5"
