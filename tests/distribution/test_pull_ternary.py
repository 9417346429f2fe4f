"""Ternary models from a folder, a GGUF file or the hub become the ternary engine's own files."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from checkpoint_files import assert_same, checkpoint_weights, write_checkpoint
from cordee.cli.main import cordee
from cordee.distribution.pull import hub_files, pull
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, ModelNotFound, StorageFailed, UnsupportedModel
from cordee.models.gguf import BitnetType, BlockType, engine_of, read_header
from cordee.models.shape import model_shape
from cordee.models.store import Store, StoredModel
from fake_hub import FakeHub
from ternary_sources import grouped_weights, weights_of, write_grouped, write_source
from tiny import make_tiny
from tokenizer_references import trained_bytes


@pytest.fixture
def told() -> list[str]:
    """What `pull` reports."""
    return []


def engine(model: StoredModel) -> str:
    return engine_of(read_header(model.path))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_becomes_a_model_whose_words_are_the_checkpoints(
    home: Path, tmp_path: Path, told: list[str]
) -> None:
    weights = checkpoint_weights("llama")
    folder = write_checkpoint(tmp_path / "My Model", weights, "divided", shards=2)
    model = pull(str(folder), report=told.append)
    assert (model.name, engine(model), model.source) == ("My-Model", "ternary", str(folder))
    assert_same(model.path, weights)
    assert told == ["Converting My Model for the ternary engine; no weight is changed"]
    vocabulary, (_, reference) = Vocabulary(model.path), trained_bytes("llama-bpe")
    for text in ("Three climbers, 1234 m of rope; l'été", "\n\n  if x:\n\treturn 'ça'  ", "<|im_start|>"):
        assert vocabulary.tokenize(text, add_bos=False) == reference.encode(text).ids
    vocabulary.close()
    assert not list((home / "models" / "incoming").iterdir())


@pytest.mark.parametrize("kind", (BlockType.Q2_0, BlockType.PQ2_0), ids=("Q2_0", "PQ2_0"))
def test_a_bonsai_becomes_ours_or_stays_what_libllama_runs(
    kind: BlockType, home: Path, tmp_path: Path, told: list[str]
) -> None:
    weights = grouped_weights(kind)
    write_grouped(tmp_path / "model.gguf", weights, kind)
    assert engine(pull(str(tmp_path / "model.gguf"), report=told.append)) == "ternary"
    weights.arrays["blk.1.attn_k.weight"][3, 5] = 2  # a fourth value
    write_grouped(tmp_path / "four.gguf", weights, kind)
    if kind is BlockType.Q2_0:
        assert engine(pull(str(tmp_path / "four.gguf"), report=told.append)) == "llama"
        assert "attn_k.weight is not ternary" in told[-1]
    else:
        with pytest.raises(UnsupportedModel, match=r"attn_k\.weight is not ternary"):
            pull(str(tmp_path / "four.gguf"), report=told.append)


@pytest.mark.parametrize("kind", (GGMLQuantizationType.TQ2_0, BitnetType.I2_S))
def test_a_ternary_gguf_file_becomes_ours(
    kind: GGMLQuantizationType, home: Path, tmp_path: Path, told: list[str]
) -> None:
    write_source(tmp_path / "model.gguf", weights_of("llama"), kind)
    assert engine(pull(str(tmp_path / "model.gguf"), report=told.append)) == "ternary"
    assert len(told) == 1


def test_what_only_bitnet_cpp_reads_is_not_planned_or_deployed_as_it_is(tmp_path: Path) -> None:
    write_source(tmp_path / "model.gguf", weights_of("llama"), BitnetType.I2_S)
    with pytest.raises(UnsupportedModel, match=r"model\.gguf is in bitnet\.cpp's I2_S.*`cordee pull`"):
        model_shape(read_header(tmp_path / "model.gguf"), "digest")


def test_a_way_to_split_text_that_must_be_named(home: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hub", checkpoint_weights("llama"), "divided")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    (folder / "tokenizer.json").write_text(json.dumps(described))
    result = CliRunner().invoke(cordee, ["pull", str(folder)])
    assert (result.exit_code, "--pre" in result.stderr) == (UnsupportedModel.exit_code, True)
    result = CliRunner().invoke(cordee, ["pull", str(folder), "--pre", "falcon3", "--name", "mine"])
    assert result.exit_code == 0, result.stderr
    assert read_header(Store().get("mine").path).get("tokenizer.ggml.pre") == "falcon3"


def test_what_only_libllama_runs_stays_as_it_is(home: Path, tmp_path: Path, told: list[str]) -> None:
    path = make_tiny("qwen3", tmp_path / "m.gguf", quantization=GGMLQuantizationType.Q8_0)
    assert engine(pull(str(path), report=told.append)) == "llama"
    assert told == []
    write_source(path, weights_of("llama"), GGMLQuantizationType.TQ1_0, architecture="qwen3")
    assert engine(pull(str(path), report=told.append)) == "llama"
    assert "m.gguf is of architecture qwen3" in told[1]
    write_source(path, weights_of("llama"), BitnetType.I2_S, architecture="qwen3")
    with pytest.raises(UnsupportedModel, match="architecture qwen3"):
        pull(str(path))


def test_a_checkpoint_on_the_hub(home: Path, tmp_path: Path, told: list[str], monkeypatch) -> None:
    weights = checkpoint_weights("bitnet")
    files = files_of(write_checkpoint(tmp_path / "hub", weights, "multiplied", shards=2))
    hub = FakeHub({"o/tiny-b1.58": files | {"notes.json": b"[]", "model.onnx": b"x"}})
    hub.use(monkeypatch, tmp_path)
    try:
        model = pull("o/tiny-b1.58", report=told.append)
        assert (model.name, model.source, engine(model)) == ("tiny-b1.58", "o/tiny-b1.58", "ternary")
        assert_same(model.path, weights)
        assert read_header(model.path).get("general.name") == "tiny-b1.58"
        assert [line.split()[0] for line in told] == ["Fetching", "Fetching", "Converting"]
        assert hub.strange == []
        assert not list((home / "downloads").iterdir())
        with pytest.raises(ModelNotFound, match=r"`cordee pull o/tiny-b1\.58` makes a file"):
            hub_files("o/tiny-b1.58")  # to be deployed: only a file can be cut
        hub.promised["tokenizer.json"] = "0" * 40
        with pytest.raises(StorageFailed, match=r"tokenizer\.json came with other content"):
            pull("o/tiny-b1.58")
    finally:
        hub.close()


def test_nothing_large_is_fetched_of_a_checkpoint_that_is_not_ternary(
    home: Path, tmp_path: Path, monkeypatch
) -> None:
    plain = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
    files = {"config.json": plain, "model.safetensors": b"x" * 100_000}
    hub = FakeHub({"o/m": files})
    hub.use(monkeypatch, tmp_path)
    try:
        with pytest.raises(ModelNotFound, match="no checkpoint whose"):
            pull("o/m")
        assert hub.sent <= len(plain)
        files["config.json"] = b"{"
        with pytest.raises(BadModelFile, match="is not JSON"):
            pull("o/m")
        files["config.json"] = b'{"quantization_config": {"quant_method": "gptq"}}'
        with pytest.raises(UnsupportedModel, match="quantized by gptq"):
            pull("o/m")
    finally:
        hub.close()
    assert Store().list() == []
