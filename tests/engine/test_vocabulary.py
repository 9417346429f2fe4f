"""Text to tokens and back, as libllama does it, for texts that a client could send on purpose."""

import contextlib
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from cordee.engine import child as child_module
from cordee.engine import vocabulary as vocabulary_module
from cordee.engine import vocabulary_messages
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, BadRequest, CordeeError, StageFailed, UnsupportedModel
from model_files import Field, Original
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
    monkeypatch.setattr(vocabulary_messages, "TEXT_BYTES_MAX", 10)
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


def test_text_without_long_runs_is_tokenized_in_one_piece(vocabulary: Vocabulary, starter_path: Path) -> None:
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


# --- vocabularies that end libllama -----------------------------------------------------------------

TEXT, NUMBER, LIST = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.ARRAY


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    path = tmp_path_factory.mktemp("original") / "m.gguf"
    return Original(make_tiny("llama", path, layers=1, tokenizer="bytes"))


def make_equal(texts: list[str]) -> None:
    texts[300] = texts[301]


def make_empty(texts: list[str]) -> None:
    texts[:] = [""] * len(texts)


def name_one_otherwise(texts: list[str]) -> None:
    texts[texts.index("<0x01>")] = "no byte"


@pytest.fixture
def rare(original: Original, tmp_path: Path):
    """A vocabulary that takes ordinary text, and ends libllama at a control character."""
    path = original.write(tmp_path / "rare.gguf", original.with_tokens(name_one_otherwise))
    loaded = Vocabulary(path, "rare")
    yield loaded
    loaded.close()


@pytest.mark.parametrize("change", [make_equal, make_empty, "without bytes"])
def test_a_vocabulary_that_ends_libllama_is_refused_by_the_models_name(
    original: Original, tmp_path: Path, change: Any
) -> None:
    changes = original.without_bytes() if change == "without bytes" else original.with_tokens(change)
    path = original.write(tmp_path / "sha256-0123", changes)
    with pytest.raises(BadModelFile, match=r"^my-model: .*\((llama-vocab|what\(\)).*\): fetch") as caught:
        Vocabulary(path, "my-model")
    assert "sha256" not in caught.value.message
    assert (caught.value.exit_code, caught.value.http_status) == (4, 422)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"general.architecture": Field(TEXT, "llama9"), "llama9.block_count": Field(NUMBER, 1)},
            "unknown model architecture: 'llama9'",
        ),
        (
            {
                "tokenizer.ggml.model": Field(TEXT, "gpt2"),
                "tokenizer.ggml.pre": Field(TEXT, "of-tomorrow"),
                "tokenizer.ggml.merges": Field(LIST, ["e t"], TEXT),
            },
            "unknown pre-tokenizer type: 'of-tomorrow'",
        ),
        ({"tokenizer.ggml.model": Field(TEXT, "of-tomorrow")}, "unknown tokenizer: 'of-tomorrow'"),
    ],
)
def test_a_file_newer_than_libllama_is_not_called_damaged(
    original: Original, tmp_path: Path, changes: dict[str, Field], reason: str
) -> None:
    path = original.write(tmp_path / "new.gguf", changes)
    with pytest.raises(UnsupportedModel, match=r"^my-model .*update cordee") as caught:
        Vocabulary(path, "my-model")
    assert reason in caught.value.message
    assert caught.value.exit_code == 5


def test_a_text_that_ends_libllama_is_refused_and_the_next_one_is_taken(rare: Vocabulary) -> None:
    sound = rare.tokenize("été", add_bos=False)
    for _ in range(2):
        with pytest.raises(BadModelFile, match=r"^rare: libllama cannot tokenize this text"):
            rare.tokenize("a\x01b", add_bos=False)
        assert rare.tokenize("été", add_bos=False) == sound


def test_texts_that_end_libllama_again_and_again_are_refused_for_a_while(
    rare: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(vocabulary_module.CRASHES_MAX):
        with pytest.raises(BadModelFile, match="this text"):
            rare.tokenize("\x01", add_bos=False)
    with pytest.raises(BadModelFile, match=r"ended 5 times"):
        rare.tokenize("a", add_bos=False)
    assert rare.detokenize([5, 6]) == b"\x02\x03"  # what was begun goes on
    monkeypatch.setattr(vocabulary_module, "CRASH_SECONDS", 0.0)
    assert rare.tokenize("a", add_bos=False)


def child_of(loaded: Vocabulary) -> psutil.Process:
    return psutil.Process(loaded._child._process.pid)


def test_a_child_that_was_killed_or_hangs_costs_one_text(
    starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Vocabulary(starter_path, "starter")
    tokens = loaded.tokenize(CLIMBER, add_bos=False)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        before = child_of(loaded)
        before.send_signal(number)
        monkeypatch.setattr(vocabulary_module, "REQUEST_SECONDS", 0.2)
        with pytest.raises(StageFailed, match=r"starter: .* try again"):
            loaded.tokenize(CLIMBER, add_bos=False)
        monkeypatch.undo()
        assert not before.is_running()
        assert loaded.tokenize(CLIMBER, add_bos=False) == tokens
    loaded.close()


def test_a_child_with_nothing_to_do_ends_and_the_next_text_starts_one(
    starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_module, "FRESH_SECONDS", 0.1)
    loaded = Vocabulary(starter_path)
    before = child_of(loaded)
    assert before.wait(60) is not None or not before.is_running()
    assert loaded.tokenize("Hello", add_bos=False) == [19556]
    assert child_of(loaded).pid != before.pid
    loaded.close()


def test_many_open_vocabularies_have_few_processes(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "CHILDREN_MAX", 2)
    path = original.write(tmp_path / "m.gguf", {})
    opened = [Vocabulary(path, f"m{number}") for number in range(4)]
    tokens = [each.tokenize("Hello", add_bos=False) for each in (*opened, *reversed(opened))]
    assert all(each == tokens[0] for each in tokens)
    assert sum(not each._child.ended for each in opened) == 2
    for each in opened:
        each.close()


def test_threads_share_a_vocabulary(vocabulary: Vocabulary) -> None:
    texts = [f"{CLIMBER} {number} <|im_end|>" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: vocabulary.tokenize(text, add_bos=False), texts))
    assert [vocabulary.detokenize(tokens).decode() for tokens in found] == [
        text.removesuffix("<|im_end|>") for text in texts
    ]


def test_a_vocabulary_that_nobody_closed_leaves_no_process(starter_path: Path) -> None:
    loaded = Vocabulary(starter_path)
    child = child_of(loaded)
    del loaded
    assert not child.is_running()


def test_the_child_runs_no_code_of_the_current_folder(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "array", "socket", "msgspec", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder')\n")
    monkeypatch.chdir(tmp_path)
    Vocabulary(starter_path).close()


def mangle(original: Original, folder: Path, seeds: range) -> Counter[str]:
    """Open a vocabulary changed by each seed, and ask it; how each was refused, or `taken`."""
    found: Counter[str] = Counter()
    for seed in seeds:
        path = original.write(folder / "sha256-mangled", original.mangled(seed))
        try:
            loaded = Vocabulary(path, "mangled")
        except CordeeError as error:
            assert "mangled" in error.message and "sha256" not in error.message, (seed, error.message)
            found[type(error).__name__] += 1
            continue
        text = "".join(map(chr, (*range(1, 0x800), 0x6F22, 0xFFFD, 0x1F9D7))) + CLIMBER + "<|im_end|>" * 3
        for special in (True, False):
            with contextlib.suppress(BadModelFile):
                loaded.detokenize(loaded.tokenize(text, special=special, add_bos=True))
        for token in range(loaded.size):
            loaded.piece(token, special=True)
        loaded.close()
        found["taken"] += 1
    return found


def test_mangled_vocabularies_end_no_process_but_the_child(original: Original, tmp_path: Path) -> None:
    found = mangle(original, tmp_path, range(25))
    assert found["taken"] and found["BadModelFile"]


@pytest.mark.long
def test_many_mangled_vocabularies(original: Original, tmp_path: Path) -> None:
    found = mangle(original, tmp_path, range(25, 1500))
    assert {"taken", "BadModelFile", "UnsupportedModel"} == set(found)


def test_closing_is_final_and_harmless_twice(starter_path: Path) -> None:
    loaded = Vocabulary(starter_path)
    loaded.close()
    loaded.close()
    with pytest.raises(StageFailed, match="no longer"):
        loaded.tokenize("a", add_bos=False)
