"""Rows looked up in the model file equal what the model itself would use."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.models.embedding import Embedding
from cordee.models.gguf import read_header
from cordee.models.slices import _chunks, plan_embedding
from ternary_models import make_ternary
from tiny import make_tiny

TOKENS = [0, 319, 7, 7, 128]


def weights(path) -> np.ndarray:
    """The whole embedding, decoded by the gguf package's own reader."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", [None, *map(GGMLQuantizationType, (1, 2, 3, 6, 7, 8, 30))])
def test_rows_are_the_decoded_weights(tmp_path, kind):
    path = make_tiny("llama", tmp_path / "tiny.gguf", quantization=kind)
    rows = Embedding(read_header(path)).rows(TOKENS)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, weights(path)[TOKENS])


@pytest.mark.parametrize(
    ("name", "scale"), [("gemma3", np.sqrt(np.float32(128))), ("granite", np.float32(12)), ("qwen3", 1)]
)
def test_rows_are_scaled_where_the_architecture_says_so(tmp_path, name, scale):
    path = make_tiny(name, tmp_path / "tiny.gguf")
    rows = Embedding(read_header(path)).rows(np.array(TOKENS, np.int32))
    np.testing.assert_array_equal(rows, weights(path)[TOKENS] * np.float32(scale))


@pytest.mark.parametrize("family", ["bonsai", "bonsai-rotated", "maple", "minicpm"])
def test_the_embedding_by_itself_gives_the_rows_of_the_whole_model(tmp_path, family):
    """It is what a node has that runs the first of several stages: codes need their scales, too."""
    make_ternary(family, tmp_path / "model.gguf")
    header = read_header(tmp_path / "model.gguf")
    (tmp_path / "alone.gguf").write_bytes(b"".join(_chunks(plan_embedding(header))))
    alone = Embedding(read_header(tmp_path / "alone.gguf")).rows(TOKENS)
    assert alone.tobytes() == Embedding(header).rows(TOKENS).tobytes()
    assert np.ptp(alone) > 0


def test_no_tokens_give_no_rows(tmp_path):
    embedding = Embedding(read_header(make_tiny("llama", tmp_path / "tiny.gguf")))
    assert embedding.rows([]).shape == (0, 128)
    assert (embedding.n_vocab, embedding.n_embd) == (320, 128)


@pytest.mark.parametrize("token", [-1, 320, 2**40])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, token):
    embedding = Embedding(read_header(make_tiny("llama", tmp_path / "tiny.gguf")))
    with pytest.raises(BadRequest, match="0 to 319"):
        embedding.rows([1, token])


def test_a_model_without_an_embedding_or_with_one_nobody_can_decode(tmp_path):
    writer = GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadModelFile, match="token_embd"):
        Embedding(read_header(tmp_path / "bare.gguf"))
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    kind = GGMLQuantizationType.Q8_K  # only ever used between two multiplications
    writer.add_tensor("token_embd.weight", np.zeros((2, 292), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="Q8_K"):
        Embedding(read_header(tmp_path / "odd.gguf"))
