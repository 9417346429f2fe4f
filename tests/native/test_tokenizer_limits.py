"""The C tokenizer at its edges: round trips, streams, refusals, memory that does not suffice, damage."""

import ctypes
import itertools
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from native_tokenizer import (
    BAD_FILE,
    CONTROL,
    CONTROL_FLAG,
    ENDS_FLAG,
    NATIVE,
    NO_ROOM,
    NORMAL,
    REFUSED,
    UNSUPPORTED,
    USER_DEFINED,
    Refusal,
    Source,
    Tokenizer,
    case,
    compile_c,
    load,
    sources,
)
from tokenizer_references import FAMILIES, SPECIALS
from tokenizer_texts import damaged, documents

ALPHABET = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
BYTES_FAMILIES = ("llama-bpe", "gpt-2", "smollm")
TEXT_BYTES_MAX = 16 << 20
PIECE_BYTES_MAX = 1024


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The tokenizer as a shared library."""
    return load(
        compile_c(["-O2", "-shared", "-fPIC", *sources()], tmp_path_factory.mktemp("c") / "tokenizer.so")
    )


@pytest.fixture(scope="session")
def tokenizers(library: ctypes.CDLL) -> dict[str, Tokenizer]:
    """One of each family."""
    return {family: Tokenizer(library, make()[0]) for family, make in FAMILIES.items()}


def small(**changes: object) -> Source:
    """A byte-level vocabulary of one's own."""
    tokens = [*(character.encode() for character in ALPHABET), b"ab", b"abc", b"<s>", b"</s>"]
    types = [NORMAL] * (len(tokens) - 2) + [CONTROL] * 2
    source = Source("gpt2", tokens, "gpt-2", types=types, merges=[b"a b", b"ab c"])
    return replace(source, bos=len(tokens) - 2, eos=len(tokens) - 1, **changes)


def pieces(**changes: object) -> Source:
    """A SentencePiece vocabulary of one's own."""
    tokens = [b"<unk>", "▁".encode(), b"a", b"b", b"ab", b"<user>"]
    types = [2, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED]
    return replace(
        Source("llama", tokens, scores=[0.0, -1, -2, -3, -4, 0], types=types, unknown=0), **changes
    )


@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode)), st.sampled_from(BYTES_FAMILIES)
)
def test_any_bytes_come_back(tokenizers: dict[str, Tokenizer], data: bytes, family: str) -> None:
    for flags in (0, CONTROL_FLAG):
        assert tokenizers[family].decode(tokenizers[family].encode(data, flags), flags) == data


@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode)), st.sampled_from(["llama", "t5"])
)
def test_any_bytes_come_back_from_sentencepiece(
    tokenizers: dict[str, Tokenizer], data: bytes, family: str
) -> None:
    """All but its mark for a space, which comes back as one."""
    assert tokenizers[family].text(tokenizers[family].encode(data)) == data.replace("▁".encode(), b" ")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_of_tokens_spells_what_all_of_them_spell(
    tokenizers: dict[str, Tokenizer], family: str
) -> None:
    rng = random.Random(1)
    for text in documents(2, 30_000):
        tokens = tokenizers[family].encode(damaged(rng, text), ENDS_FLAG)
        start = ctypes.c_bool(True)
        stream = [tokenizers[family].decode([token], at_start=start) for token in tokens]
        assert b"".join(stream) == tokenizers[family].text(tokens)


def test_only_the_space_that_was_put_in_front_is_left_out(library: ctypes.CDLL) -> None:
    tokenizer = Tokenizer(library, pieces())
    a, space = 2, 1
    assert tokenizer.encode("a") == [space, a] and tokenizer.encode("") == []
    assert tokenizer.encode(" a") == [space, space, a] and tokenizer.text([space, space, a]) == b" a"
    assert tokenizer.decode([space, a]) == b" a"
    assert tokenizer.encode("a<user>b") == [space, a, 5, space, 3]
    assert Tokenizer(library, pieces(add_space_prefix=0)).encode("a<user>b") == [a, 5, 3]
    assert Tokenizer(library, pieces(add_space_prefix=0)).text([space, a]) == b" a"


def test_of_equal_scores_the_leftmost_merges_first(library: ctypes.CDLL) -> None:
    source = pieces(scores=[0.0, -1, -2, -3, -0.0, 0.0], add_space_prefix=0)
    source = replace(source, tokens=[*source.tokens[:5], b"ba"], types=[2, *[NORMAL] * 5])
    tokenizer = Tokenizer(library, source)
    assert tokenizer.encode("aba") == [4, 2] and tokenizer.encode("bab") == [5, 3]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (small(), "a"),
        (small(add_bos=1), "<s>a"),
        (small(add_bos=1, add_eos=1), "<s>a</s>"),
        (small(pre="llama-bpe"), "<s>a"),
        (small(pre="llama-bpe", add_bos=0, add_eos=1), "a</s>"),
        (replace(small(add_bos=1), bos=10_000), "a"),
        (pieces(bos=5, eos=5), "<user> a"),
        (pieces(bos=5, eos=5, add_bos=0, add_eos=1), " a<user>"),
        (pieces(model="t5", bos=5, eos=5), " a"),
    ],
)
def test_ends_come_where_the_file_asks_for_them(library: ctypes.CDLL, source: Source, expected: str) -> None:
    tokenizer = Tokenizer(library, source)
    assert tokenizer.decode(tokenizer.encode("a", ENDS_FLAG), CONTROL_FLAG) == expected.encode()
    assert expected.replace("<s>", "").replace("</s>", "").replace("<user>", "").encode() == tokenizer.decode(
        tokenizer.encode("a")
    )


def test_special_tokens_have_names(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama-bpe"]
    for name in SPECIALS:
        token = tokenizer.named(name)
        assert tokenizer.encode(name, CONTROL_FLAG) == [token] and tokenizer.is_control(token)
        assert tokenizer.decode([token]) == b"" and tokenizer.decode([token], CONTROL_FLAG) == name.encode()
    for name in ("", "the", "<|im_start", "<|im_start|>>"):
        assert tokenizer.named(name) == -1
    assert not tokenizer.is_control(-1) and not tokenizer.is_control(1 << 30)


def test_the_longest_special_token_is_read(library: ctypes.CDLL) -> None:
    source = small()
    names = [b"<x>", b"<x>y", b"<x>yz!"]
    source = replace(source, tokens=source.tokens + names, types=source.types + [USER_DEFINED] * 3)
    tokenizer = Tokenizer(library, source)
    first = len(source.tokens) - 3
    for text, token in (("<x>yz!", first + 2), ("<x>yz", first + 1), ("<x><x>y", first)):
        assert (
            tokenizer.encode(text)[0] == token and tokenizer.decode(tokenizer.encode(text)) == text.encode()
        )


def test_what_a_vocabulary_cannot_spell_is_left_out(library: ctypes.CDLL) -> None:
    tokenizer = Tokenizer(library, small())
    assert tokenizer.decode(tokenizer.encode("aéb\x00!")) == b"ab!"
    assert tokenizer.encode("aébc") == tokenizer.encode("abc") and len(tokenizer.encode("abc")) == 1


def test_of_two_tokens_with_one_spelling_the_later_one_is_taken(library: ctypes.CDLL) -> None:
    source = small()
    source = replace(source, tokens=[*source.tokens, b"ab"], types=[*source.types, NORMAL])
    assert Tokenizer(library, source).encode("ab") == [len(source.tokens) - 1]


def test_no_merge_makes_a_special_token(library: ctypes.CDLL) -> None:
    source = small(merges=[b"a b", b"c ab", b"cab d", b"ab c"])
    source = replace(source, tokens=[b"cab" if token == b"<s>" else token for token in source.tokens])
    tokenizer = Tokenizer(library, source)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("cabdabc")] == [b"c", b"ab", b"d", b"abc"]
    assert tokenizer.encode("cabdabc", CONTROL_FLAG)[0] == tokenizer.named("cab") == source.bos


WRONG = {
    "no model": (small(model=""), UNSUPPORTED, "model"),
    "another model": (small(model="bert"), UNSUPPORTED, "model"),
    "another split": (small(pre="gpt-4o"), UNSUPPORTED, "pre-tokenizer"),
    "no split": (small(pre=None), UNSUPPORTED, "pre-tokenizer"),
    "a normaliser": (pieces(normalises=True), UNSUPPORTED, "normaliser"),
    "no scores": (pieces(scores=None), BAD_FILE, "scores"),
    "a score that is none": (pieces(scores=[0.0, -1, float("nan"), -3, -4, 0]), BAD_FILE, "token 2"),
    "no tokens": (small(tokens=[], types=[]), BAD_FILE, "tokens"),
    "a long token": (small(tokens=[b"a" * (PIECE_BYTES_MAX + 1)] * 5), BAD_FILE, "token 0"),
    "a merge of one": (small(merges=[b"a b", b"ab"]), BAD_FILE, "merge 1"),
    "a merge of nothing": (small(merges=[b""]), BAD_FILE, "merge 0"),
    "a merge of strangers": (small(merges=[b"a b", b"a d"]), BAD_FILE, "merge 1"),
    "an endless merge": (small(merges=[b"a" * 5000 + b" " + b"b" * 5000]), BAD_FILE, "merge 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_unsound_vocabularies_are_refused_with_a_reason(library: ctypes.CDLL, what: str) -> None:
    source, status, reason = WRONG[what]
    with pytest.raises(Refusal) as refusal:
        Tokenizer(library, source)
    assert refusal.value.status == status and reason in refusal.value.text


def test_tokens_as_long_as_allowed(library: ctypes.CDLL) -> None:
    source = small()
    half = b"a" * (PIECE_BYTES_MAX // 2)
    runs = [b"a" * 2**i for i in range(1, 11)]
    doubling = [run + b" " + run for run in [b"a", *runs[:-1]]]
    source = replace(
        source, tokens=source.tokens + runs, types=source.types + [NORMAL] * len(runs), merges=doubling
    )
    tokenizer = Tokenizer(library, source)
    assert tokenizer.encode(half + half) == [len(source.tokens) - 1]
    assert tokenizer.decode(tokenizer.encode(half * 7)) == half * 7


def test_colliding_tokens_are_refused_in_time(library: ctypes.CDLL) -> None:
    """Strings chosen to have one hash make a vocabulary refused; they do not make it slow."""
    source = pieces()
    strangers = colliding(3000)
    source = replace(
        source,
        tokens=source.tokens + strangers,
        scores=source.scores + [-9.0] * len(strangers),
        types=source.types + [NORMAL] * len(strangers),
    )
    with pytest.raises(Refusal) as refusal:
        Tokenizer(library, source)
    assert refusal.value.status == BAD_FILE and "collide" in refusal.value.text


def colliding(count: int) -> list[bytes]:
    """Different strings of one FNV-1a hash: of pairs that collide, either one, again and again."""
    rng = np.random.default_rng(1)
    state, pairs = 0x811C9DC5, []
    while 2 ** len(pairs) < count:
        tails = rng.integers(33, 127, (1 << 19, 6), dtype=np.uint32)
        hashes = np.full(len(tails), state, np.uint32)
        for column in tails.T:
            hashes = (hashes ^ column) * np.uint32(0x01000193)
        order = np.argsort(hashes, kind="stable")
        for a, b in itertools.pairwise(order[np.isin(hashes[order], duplicated(hashes[order]))]):
            if hashes[a] == hashes[b] and (tails[a] != tails[b]).any():
                pairs.append((bytes(tails[a].tolist()), bytes(tails[b].tolist())))
                state = hashes[a]
                break
    return [b"".join(choice) for choice in itertools.islice(itertools.product(*pairs), count)]


def duplicated(ordered: np.ndarray) -> np.ndarray:
    """The values that come twice in a sorted array."""
    return ordered[1:][ordered[1:] == ordered[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_output_is_written_beyond_its_end(tokenizers: dict[str, Tokenizer], family: str) -> None:
    library, it = tokenizers[family].library, tokenizers[family]._it
    text = "L'été 2024 漢 🧗 <think>".encode()
    expected = it and tokenizers[family].encode(text)
    scratch_bytes = library.tokenizer_scratch_bytes(it, len(text))
    scratch = (ctypes.c_uint64 * (scratch_bytes // 8 + 1))()
    count = ctypes.c_size_t()
    for capacity in range(len(expected) + 2):
        tokens = (ctypes.c_int32 * (len(expected) + 2))(*[-7] * (len(expected) + 2))
        status = library.tokenizer_encode(
            it, text, len(text), 0, scratch, scratch_bytes, tokens, capacity, ctypes.byref(count)
        )
        assert (status == NO_ROOM) == (capacity < len(expected)) and count.value == len(expected)
        assert list(tokens) == (expected[:capacity] + [-7] * len(tokens))[: len(tokens)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_for_the_longest_word_is_enough(tokenizers: dict[str, Tokenizer], family: str) -> None:
    tokenizer = tokenizers[family]
    text = " climbing" * 1000
    needed = tokenizer.library.tokenizer_scratch_bytes(tokenizer._it, 20)
    assert tokenizer.encode(text, scratch_bytes=needed) == tokenizer.encode(text)
    with pytest.raises(Refusal) as refusal:
        tokenizer.encode("climbing" * 1000, scratch_bytes=needed)
    assert refusal.value.status == NO_ROOM


def test_texts_and_ids_out_of_bounds_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gpt-2"]
    with pytest.raises(Refusal) as refusal:
        tokenizer.encode(b"a" * (TEXT_BYTES_MAX + 1))
    assert refusal.value.status == REFUSED
    for token in (-1, tokenizer.ends[0], 2**31 - 1):
        with pytest.raises(Refusal) as refusal:
            tokenizer.decode([0, token])
        assert refusal.value.status == REFUSED


def test_a_vocabulary_takes_no_more_memory_than_it_asked_for(library: ctypes.CDLL) -> None:
    source = small()
    built = Tokenizer(library, source)
    memory = (ctypes.c_uint8 * (built.nbytes + 64)).from_buffer(bytearray(b"\xaa" * (built.nbytes + 64)))
    it = ctypes.c_void_p()
    for nbytes, status in ((built.nbytes - 1, NO_ROOM), (built.nbytes, 0)):
        made = library.tokenizer_make(memory, nbytes, ctypes.byref(built._source), ctypes.byref(it), None)
        assert made == status
    assert bytes(memory)[built.nbytes :] == b"\xaa" * 64


@pytest.fixture(scope="session")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/tokenizer_fuzz.c with the address and undefined-behaviour sanitizers."""
    checks = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    harness = NATIVE.parent / "tests" / "native" / "tokenizer_fuzz.c"
    return compile_c([*checks, *sources(), str(harness)], tmp_path_factory.mktemp("fuzz") / "fuzz")


def mixed_text() -> bytes:
    """Some of everything."""
    return "".join(text[:300] for text in documents(3, 60_000)).encode()[:6000]


def run_fuzzer(fuzzer: Path, folder: Path, source: Source, text: bytes, rounds: int, seed: int) -> None:
    (folder / "case").write_bytes(case(source, text))
    done = subprocess.run(
        [fuzzer, folder / "case", str(rounds), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_does_no_harm(fuzzer: Path, tmp_path: Path, family: str) -> None:
    run_fuzzer(fuzzer, tmp_path, FAMILIES[family]()[0], mixed_text(), rounds=200, seed=1)


def test_a_word_that_fills_the_queue_has_room(fuzzer: Path, tmp_path: Path) -> None:
    """Each merge makes two more pairs that could merge: half as many again as the word has bytes."""
    tokens = [character.encode() for character in sorted(ByteLevel.alphabet())]
    merges = [b"a b", b"b a", b"ab ab", b"ab a"]
    source = Source("gpt2", [*tokens, b"ab", b"ba", b"abab", b"aba"], "gpt-2", merges=merges)
    run_fuzzer(fuzzer, tmp_path, source, b"ab" * 500, rounds=400, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_much_damage_does_no_harm(fuzzer: Path, tmp_path: Path, family: str) -> None:
    for seed in range(2, 6):
        run_fuzzer(fuzzer, tmp_path, FAMILIES[family]()[0], mixed_text(), rounds=1500, seed=seed)
