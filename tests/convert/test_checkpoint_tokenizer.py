"""The tokenizer of a checkpoint means the same in GGUF: token by token, and in libllama's use of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_files import config_of, tensors_of, write_safetensors
from cordee.convert.convert import convert
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import Header, read_header
from native_tokenizer import CONTROL, USER_DEFINED
from ternary_models import FAMILIES, Weights
from tokenizer_references import (
    SPECIALS,
    USER,
    pieces_reference,
    trained_bytes,
    trained_pieces,
    training_texts,
)

TEXTS = (*training_texts()[::40], "  two spaces, a tab\tand\n\nlines  ", "l'été à 1234 m", "é" * 40, " ")
SMALL = {"layers": 1, "n_embd": 32, "n_ff": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, "rope": "neox"}


def converted(folder: Path, n_vocab: int, **config: object) -> Path:
    """The file converted from a tiny checkpoint in `folder`, which has a tokenizer already."""
    weights = Weights(replace(FAMILIES["llama"], n_vocab=n_vocab, **SMALL), 1)
    write_safetensors(folder / "model.safetensors", tensors_of(weights, "divided"))
    config = config_of(weights.model, "divided") | config
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, folder / "ours.gguf")
    return folder / "ours.gguf"


def write_pieces(folder: Path) -> int:
    """Write tokenizer.model and its added tokens; gives the number of tokens."""
    _, processor = trained_pieces("bpe")
    (folder / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    first = processor.get_piece_size()
    added = {
        str(first + place): {"content": text, "special": text in SPECIALS}
        for place, text in enumerate([*SPECIALS, *USER])
    }
    added["1"] = {"content": "<s>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return first + len(SPECIALS) + len(USER)


def keys(header: Header, *names: str) -> list[list]:
    return [header.get(f"tokenizer.ggml.{name}") for name in names]


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    source, _ = trained_pieces("bpe")
    count = write_pieces(tmp_path)
    path = converted(tmp_path, count + 3)
    tokens, scores, types = keys(read_header(path), "tokens", "scores", "token_type")
    assert [token.encode() for token in tokens[:count]] == source.tokens
    assert types[:count] == source.types
    plain = count - len(SPECIALS) - len(USER)
    assert scores[:plain] == pytest.approx(source.scores[:plain], rel=1e-6)
    assert tokens[count:] == [f"[PAD{number}]" for number in range(count, count + 3)]
    vocabulary, reference = Vocabulary(path), pieces_reference(source)
    for text in TEXTS:
        assert vocabulary.tokenize(text, add_bos=False) == reference.encode(text).ids
    vocabulary.close()


@pytest.mark.parametrize("pre", ("llama-bpe", "gpt-2", "smollm"))
def test_byte_level_bpe(pre: str, tmp_path: Path) -> None:
    source, reference = trained_bytes(pre)
    reference.save(str(tmp_path / "tokenizer.json"))
    end = reference.token_to_id("<|endoftext|>")
    path = converted(tmp_path, len(source.tokens), eos_token_id=end)
    tokens, types, merges = keys(read_header(path), "tokens", "token_type", "merges")
    assert [token.encode() for token in tokens] == source.tokens
    assert types == source.types
    assert [merge.encode() for merge in merges] == source.merges
    vocabulary = Vocabulary(path)
    for text in (*TEXTS, *SPECIALS, *USER):
        assert vocabulary.tokenize(text, add_bos=False) == reference.encode(text).ids
    vocabulary.close()


def test_merges_of_a_sentencepiece_model_become_scores(tmp_path: Path) -> None:
    source, _ = trained_pieces("bpe")
    reference = pieces_reference(source)
    reference.save(str(tmp_path / "tokenizer.json"))
    path = converted(tmp_path, len(source.tokens))
    tokens, types = keys(read_header(path), "tokens", "token_type")
    assert [token.encode() for token in tokens] == source.tokens
    added = [kind for kind in types if kind in (CONTROL, USER_DEFINED)]
    assert added.count(USER_DEFINED) == len(USER)
    vocabulary = Vocabulary(path)
    for text in TEXTS:
        assert vocabulary.tokenize(text, add_bos=False) == reference.encode(text).ids
    vocabulary.close()


@pytest.mark.parametrize(
    ("described", "kind", "message"),
    [
        (None, BadModelFile, "has no tokenizer"),
        ({"model": {"type": "Unigram", "vocab": []}}, UnsupportedModel, "not a BPE"),
        ({"model": {"type": "BPE", "vocab": {}}}, BadModelFile, "is not a tokenizer"),
        ({"model": "BPE"}, UnsupportedModel, "not a BPE"),
        ("pieces", BadModelFile, "not a SentencePiece model"),
    ],
)
def test_what_is_not_a_tokenizer_is_named(
    described: object, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    if described == "pieces":
        (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    elif described:
        (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(kind, match=message):
        converted(tmp_path, 64)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    source, reference = trained_bytes("gpt-2")
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadModelFile, match="in a vocabulary of"):
        converted(tmp_path, len(source.tokens) - 1)
