"""The C tokenizer gives the tokens and texts that the `tokenizers` package gives, for every family.

One million characters of mixed text each. SentencePiece vocabularies are also held to SentencePiece itself.
"""

import codecs
import ctypes
import os
import random
import struct
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Reference
from tokenizers import pre_tokenizers as splits

from native_tokenizer import (
    BYTE,
    CONTROL_FLAG,
    NORMAL,
    UNKNOWN,
    Source,
    Tokenizer,
    compile_c,
    load,
    sources,
    words,
)
from tokenizer_references import FAMILIES, SPECIALS, SPLITS, USER, pieces_reference, starter, trained_pieces
from tokenizer_texts import LOOKALIKES, damaged, documents

CHARACTERS = 1_000_000
CONTROL_CHARACTERS = 100_000
SEED = 20_000
CLASSES = {r"\p{L}": 1, r"\p{N}": 2, r"\s": 3}  # enum character_class


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The tokenizer as a shared library."""
    return load(
        compile_c(["-O2", "-shared", "-fPIC", *sources()], tmp_path_factory.mktemp("c") / "tokenizer.so")
    )


def spared(family: str, texts: list[str]) -> list[str]:
    """Texts without what the unigram model of `tokenizers` takes for more than text.

    It reads "</s>" as the control token even if it was told not to, and "<0x41>" as the byte's token.
    SentencePiece does neither.
    """
    if family != "t5":
        return texts
    return [text.replace("<0x", "<0_").replace("s>", "s)").replace("<unk>", "<unk)") for text in texts]


def compare(tokenizer: Tokenizer, reference: Reference, texts: list[str], flags: int = 0) -> None:
    """Hold tokens and their text to the reference, both ways."""
    reference.encode_special_tokens = not flags
    for text in texts:
        tokens = tokenizer.encode(text, flags)
        expected = reference.encode(text, add_special_tokens=False).ids
        if tokens != expected:
            at = next(i for i, pair in enumerate(zip(tokens, expected, strict=False)) if len(set(pair)) > 1)
            pytest.fail(
                f"token {at} of {text[:200]!a}: {tokens[at : at + 9]}, expected {expected[at : at + 9]}"
            )
        spelt = tokenizer.decode(tokens, flags, ctypes.c_bool(True))
        assert spelt.decode("utf-8", "replace") == reference.decode(tokens, skip_special_tokens=not flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_tokenizers_package(library: ctypes.CDLL, family: str) -> None:
    source, reference = FAMILIES[family]()
    tokenizer = Tokenizer(library, source)
    texts = documents(SEED, CHARACTERS)
    assert sum(map(len, texts)) >= CHARACTERS
    compare(tokenizer, reference, spared(family, texts))
    compare(tokenizer, reference, spared(family, documents(SEED + 1, CONTROL_CHARACTERS)), CONTROL_FLAG)


@pytest.mark.slow
def test_tokens_of_the_starter_model(library: ctypes.CDLL, starter_path: Path) -> None:
    source, reference = starter(starter_path)
    compare(Tokenizer(library, source), reference, documents(SEED, CHARACTERS))


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_sentencepiece_agrees_with_itself(library: ctypes.CDLL, byte_fallback: bool) -> None:
    source, processor = trained_pieces("bpe", byte_fallback)
    tokenizer = Tokenizer(library, without_extras(source))
    for text in documents(SEED, CHARACTERS):
        assert tokenizer.encode(text) == processor.encode(text)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_characters_without_bytes_are_unknown_once(library: ctypes.CDLL, model: str) -> None:
    source, _ = trained_pieces(model, byte_fallback=False)
    tokenizer, reference = Tokenizer(library, source), pieces_reference(source)
    reference.encode_special_tokens = True
    assert tokenizer.encode("a鿿鿾b").count(source.unknown) == 1
    for text in spared(source.model, documents(SEED, CONTROL_CHARACTERS)):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_pieces_that_go_on_after_a_space_are_found(library: ctypes.CDLL) -> None:
    source, _ = trained_pieces("bpe")
    names = [token.decode() for token in source.tokens]
    extra = [piece for piece in ("e▁t", "s▁", "▁d", "d▁d", "▁a▁") if piece not in names]
    spanning = without_extras(source)
    spanning.tokens += [piece.encode() for piece in extra]
    spanning.scores += [-0.5 - i for i in range(len(extra))]
    spanning.types += [NORMAL] * len(extra)
    padded = Source(
        "llama",
        [*spanning.tokens, *(text.encode() for text in [*SPECIALS, *USER])],
        scores=spanning.scores,
        types=spanning.types,
        unknown=source.unknown,
        bos=source.bos,
        eos=source.eos,
    )
    tokenizer, reference = Tokenizer(library, spanning), pieces_reference(padded)
    reference.encode_special_tokens = True
    texts = [text for text in documents(SEED, CONTROL_CHARACTERS) if not any(each in text for each in USER)]
    taken = 0
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokens == reference.encode(text, add_special_tokens=False).ids
        taken += sum(token >= len(spanning.tokens) - len(extra) for token in tokens)
    assert taken > 50


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "falcon3", "falcon-h1", "falcon_e", "olmo"])
def test_names_of_one_pre_tokenizer_mean_the_same(library: ctypes.CDLL, pre: str) -> None:
    source, _ = FAMILIES["gpt-2" if pre == "olmo" else "llama-bpe"]()
    first, second = Tokenizer(library, source), Tokenizer(library, Source(**{**vars(source), "pre": pre}))
    for text in documents(SEED, CONTROL_CHARACTERS // 10):
        assert first.encode(text) == second.encode(text)


@pytest.mark.parametrize("pattern", CLASSES)
def test_unicode_is_that_of_the_tokenizers_package(library: ctypes.CDLL, pattern: str) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    split = splits.Split(Regex(pattern), "removed")
    class_of, expected = library.character_class_of, CLASSES[pattern]
    for start in range(0, len(characters), 4096):
        block = characters[start : start + 4096]
        others = {character for piece, _ in split.pre_tokenize_str("".join(block)) for character in piece}
        told = {character for character in block if class_of(ord(character)) != expected}
        assert told == others


SPLIT_NAMES = {"llama-bpe": "word_of_llama3", "gpt-2": "word_of_gpt2", "smollm": "word_of_smollm"}
STAND_IN = "\ufffd"


@pytest.mark.parametrize("pre", SPLITS)
def test_a_byte_that_is_no_utf8_splits_as_the_replacement_character(library: ctypes.CDLL, pre: str) -> None:
    codecs.register_error("each-byte", lambda error: (STAND_IN * (error.end - error.start), error.end))
    rng = random.Random(SEED)
    split = splits.Sequence(list(SPLITS[pre])[:-1]) if pre == "llama-bpe" else SPLITS[pre]
    for text in documents(SEED, CHARACTERS // 5):
        data = damaged(rng, text).replace(STAND_IN.encode(), b"???")
        shown = data.decode("utf-8", "each-byte")
        expected = [word_bytes(shown[a:b]) for _, (a, b) in split.pre_tokenize_str(shown)]
        assert [len(word) for word in words(library, SPLIT_NAMES[pre], data)] == expected


def word_bytes(shown: str) -> int:
    """The bytes of a word in which every byte that is no UTF-8 is shown as the stand-in."""
    return sum(1 if character == STAND_IN else len(character.encode()) for character in shown)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_users_wrote_never_becomes_a_control_token(library: ctypes.CDLL, family: str) -> None:
    source, _ = FAMILIES[family]()
    tokenizer = Tokenizer(library, source)
    rng = random.Random(SEED)
    controls = {i for i in range(len(source.tokens)) if tokenizer.is_control(i) and i != source.unknown}
    assert len(controls) >= len(SPECIALS)
    for _ in range(300):
        text = "".join(rng.choices([*LOOKALIKES.split(), *SPECIALS, "x", " "], k=20))
        assert not controls.intersection(tokenizer.encode(text))
        assert any(name in text for name in SPECIALS) == bool(
            controls.intersection(tokenizer.encode(text, CONTROL_FLAG)) - {source.bos, source.eos}
        )


def without_extras(source: Source) -> Source:
    """The vocabulary as SentencePiece knows it: without the special tokens that were appended."""
    count = len(source.tokens) - len(SPECIALS) - len(USER)
    return Source(
        source.model,
        source.tokens[:count],
        scores=source.scores[:count],
        types=source.types[:count],
        bos=source.bos,
        eos=source.eos,
        unknown=source.unknown,
    )


def stories(path: Path) -> Source:
    """The tokenizer file of llama2.c: the longest length, then score, length and bytes of each piece."""
    data, at, tokens, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].replace(b" ", "▁".encode()))
        scores.append(score)
        at += 8 + length
    types = [UNKNOWN, 3, 3, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    tokens[:3] = [b"<unk>", b"<s>", b"</s>"]
    return Source("llama", tokens, scores=scores, types=types, bos=1, eos=2, unknown=0)


def test_the_stories_tokenizer(library: ctypes.CDLL) -> None:
    path = os.environ.get("CORDEE_TEST_STORIES_TOKENIZER")
    if not path:
        pytest.skip("CORDEE_TEST_STORIES_TOKENIZER names no file (llama2.c's tok512.bin)")
    source = stories(Path(path))
    padded = Source(
        **{**vars(source), "tokens": [*source.tokens, *(name.encode() for name in [*SPECIALS, *USER])]}
    )
    tokenizer, reference = Tokenizer(library, source), pieces_reference(padded)
    texts = [text for text in documents(SEED, CHARACTERS) if not any(each in text for each in USER)]
    compare(tokenizer, reference, texts)
    assert tokenizer.text(tokenizer.encode("Once upon a time, Tim")) == b"Once upon a time, Tim"
