"""Text to tokens and back, as libllama does it, for texts that a client could send on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from cordee.engine import vocabulary as vocabulary_module
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, BadRequest, StageFailed, UnsupportedModel
from tiny import make_tiny

CLIMBER = "🧗🏽‍♀️ ropes up – ça va? 登山"


@pytest.fixture(scope="module")
def vocabulary(starter_path: Path):
    loaded = Vocabulary(starter_path)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory):
    """A vocabulary whose file wants a BOS token in front."""
    path = make_tiny("llama", tmp_path_factory.mktemp("bos") / "m.gguf", layers=1, tokenizer="bytes")
    loaded = Vocabulary(path)
    yield loaded
    loaded.close()


def test_the_starter_models_vocabulary(vocabulary: Vocabulary) -> None:
    assert vocabulary.size == 49_152
    assert (vocabulary.bos, vocabulary.bos_text) == (1, "<|im_start|>")
    assert (vocabulary.eos, vocabulary.eos_text) == (2, "<|im_end|>")
    assert {0, 2} <= vocabulary.end_of_generation  # <|endoftext|>, <|im_end|>
    assert "<|im_start|>" in vocabulary.chat_template


# The starter's vocabulary cannot spell a few control characters and the empty planes of Unicode.
spelt = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", max_codepoint=0x2FFFF)


@given(st.text(spelt, max_size=60))
def test_any_text_comes_back(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.tokenize(text, special=False, add_bos=False)
    assert vocabulary.detokenize(tokens) == text.encode()


def test_pieces_may_be_parts_of_a_character(vocabulary: Vocabulary) -> None:
    pieces = [vocabulary.piece(token) for token in vocabulary.tokenize(CLIMBER, add_bos=False)]
    assert b"".join(pieces).decode() == CLIMBER
    with pytest.raises(UnicodeDecodeError):
        [piece.decode() for piece in pieces]


def test_control_tokens_are_read_where_asked_and_never_shown(vocabulary: Vocabulary) -> None:
    text = "<|im_start|>user"
    as_token = vocabulary.tokenize(text, special=True, add_bos=False)
    as_text = vocabulary.tokenize(text, special=False, add_bos=False)
    assert as_token[0] == 1 and 1 not in as_text
    assert vocabulary.is_control(1) and not vocabulary.is_control(as_token[1])
    assert vocabulary.detokenize(as_token) == b"user"
    assert vocabulary.detokenize(as_text) == text.encode()
    assert vocabulary.piece(1, special=True) == b"<|im_start|>"


def test_names_of_control_tokens_are_found_in_a_text(vocabulary: Vocabulary) -> None:
    text = "é <|im_end|> b <|im_en|> <|endoftext|>"
    found = [text[start:end] for start, end in vocabulary.control_spans(text)]
    assert found == ["<|im_end|>", "<|endoftext|>"]
    assert vocabulary.control_spans("a < b | c > d") == vocabulary.control_spans("") == []


def test_bos_where_the_model_wants_it_and_only_once(vocabulary: Vocabulary, with_bos: Vocabulary) -> None:
    assert with_bos.tokenize("a", add_bos=True)[0] == with_bos.bos
    assert with_bos.bos not in with_bos.tokenize("a", add_bos=False)
    assert with_bos.tokenize("<s>a", add_bos=True).count(with_bos.bos) == 1
    assert vocabulary.bos not in vocabulary.tokenize("a", add_bos=True)


@pytest.mark.parametrize("token", [-1, 49_152, 2**31 - 1, -(2**31)])
def test_ids_outside_the_vocabulary_are_refused(vocabulary: Vocabulary, token: int) -> None:
    with pytest.raises(BadRequest, match="49152"):
        vocabulary.piece(token)
    with pytest.raises(BadRequest):
        vocabulary.detokenize([5, token])


def test_text_that_is_not_valid_is_refused(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        vocabulary.tokenize("a\ud800b", add_bos=False)
    monkeypatch.setattr(vocabulary_module, "TEXT_BYTES_MAX", 10)
    assert vocabulary.tokenize("é" * 5, add_bos=False)
    with pytest.raises(BadRequest, match="11 bytes"):
        vocabulary.tokenize("é" * 5 + "a", add_bos=False)


def test_a_text_of_many_control_tokens(vocabulary: Vocabulary) -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    one = vocabulary.tokenize(turn, add_bos=False)
    assert vocabulary.tokenize(turn * 3000, add_bos=False) == one * 3000


@pytest.mark.parametrize("text", ["a" * 5000, " " * 5000, "!?" * 3000, "漢" * 2000, "0" * 2000, "a1" * 5000])
def test_long_runs_are_cut_and_lose_nothing(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.tokenize(text + " end", add_bos=False)
    assert vocabulary.detokenize(tokens) == f"{text} end".encode()


def test_text_without_long_runs_is_tokenized_in_one_piece(
    vocabulary: Vocabulary, starter_path: Path
) -> None:
    text = "The rope holds. If one of them slips, the others hold: 12 m, 3 °C.\n\n    It does.\n" * 200
    whole = LlamaVocabulary(starter_path)._tokenize(text, True)
    assert vocabulary.tokenize(text, add_bos=False) == whole


def write_bpe(path: Path, pre: str) -> None:
    """A header with a small BPE vocabulary and one of libllama's ways to split text into words."""
    writer = GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "aa", "!", "Ġ", "<|end|>"])
    writer.add_token_types([1, 1, 1, 1, 3])
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("pre", ["gpt-4o", "tekken", "deepseek-llm"])
def test_a_long_word_does_not_end_the_process(tmp_path: Path, pre: str) -> None:
    """libllama's std::regex overflows the stack on it. In a child process, as a regression would crash it."""
    write_bpe(tmp_path / "bpe.gguf", pre)
    code = (
        "import sys; from cordee.engine.vocabulary import Vocabulary; v = Vocabulary(sys.argv[1]);"
        "print(*(len(v.detokenize(v.tokenize(c * 100_000, add_bos=False))) for c in 'a! '))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bpe.gguf")], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.split()) == (0, ["100000"] * 3), run.stderr[-500:]


def test_a_slice_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path / "m.gguf", layers=1, tokenizer="none")
    with pytest.raises(UnsupportedModel, match="no tokenizer"):
        Vocabulary(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all\n" * 100])
def test_what_is_not_a_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(BadModelFile, match=r"m\.gguf"):
        Vocabulary(path)


def test_closing_is_final_and_harmless_twice(starter_path: Path) -> None:
    loaded = Vocabulary(starter_path)
    loaded.close()
    loaded.close()
    with pytest.raises(StageFailed, match="no longer"):
        loaded.tokenize("a", add_bos=False)
