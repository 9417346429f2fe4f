"""A converted model ends its answers at all tokens that its checkpoint names for that, and at no others."""

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGUFWriter, TokenType
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint_tokenizer import converted

from checkpoint_files import checkpoint_weights, write_checkpoint
from cordee.cli.main import cordee as program
from cordee.convert import ends
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import read_header
from tokenizer_references import SPECIALS, USER, trained_bytes

SOURCE, REFERENCE = trained_bytes("llama-bpe")
COUNT = len(SOURCE.tokens)
COMMA = REFERENCE.token_to_id(",")
FILES = ("generation_config.json", "config.json")


def number(text: str) -> int:
    return REFERENCE.token_to_id(text)


def ends_of(folder: Path, config: object, generation: object = None, name: object = None) -> set[str]:
    """Where the converted model ends its answers, as libllama reads the file."""
    REFERENCE.save(str(folder / "tokenizer.json"))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if name is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    vocabulary = Vocabulary(converted(folder, COUNT, eos_token_id=config))
    found = {vocabulary.piece(token, special=True).decode() for token in vocabulary.end_of_generation}
    vocabulary.close()
    return found


# libllama takes these two for ends wherever they are tokens.
KNOWN = {"<|endoftext|>", "<|im_end|>"}


def test_the_comma_is_what_libllama_takes_for_the_end_where_none_is_stated() -> None:
    """Guards the tests below: without a key, they would see it."""
    assert ends.ASSUMED["gpt2"] == COMMA


@pytest.mark.parametrize(
    ("config", "generation", "name", "expected"),
    [
        ([number("<|im_|>"), number("<|endoftext|>")], None, None, {"<|im_|>"}),
        ([number("<|im_|>")], [number("<|im_end|>"), number("<think>")], None, {"<|im_|>", "<think>"}),
        (number("<|im_|>"), None, "<|im_start|>", {"<|im_|>", "<|im_start|>"}),
        (None, None, {"content": "<|im_|>"}, {"<|im_|>"}),
        (None, [number("<|im_|>"), COMMA], None, {"<|im_|>"}),
        (COMMA, None, "<|im_|>", {"<|im_|>"}),  # left from another vocabulary, and the name is right
        (None, None, None, set()),
    ],
)
def test_all_ends_are_kept_and_nothing_else_is_one(
    config: object, generation: object, name: object, expected: set[str], tmp_path: Path
) -> None:
    assert ends_of(tmp_path, config, generation, name) == expected | KNOWN


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (COMMA, r"config\.json says that token 11 ends an answer, which is the plain text ','"),
        ([COMMA, 5], "token 11"),
        (COUNT + 7, f"eos_token_id {COUNT + 7} is beyond the vocabulary of {COUNT}"),
        ("2", "eos_token_id is '2', not a token"),
        ([True], "not a token or a list of tokens"),
        (-1, "-1"),
    ],
)
def test_a_number_that_is_no_end_is_refused_with_its_text(
    config: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadModelFile, match=message):
        ends_of(tmp_path, config)


def test_convert_names_the_ends(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hub", checkpoint_weights("llama"), "divided")
    done = CliRunner().invoke(program, ["convert", str(folder), "-o", str(tmp_path / "ours.gguf")])
    assert done.exit_code == 0, done.output
    assert "Answers end with <|endoftext|>, <|im_end|>.\n" in done.output


def vocabulary(*names: str) -> tuple[list[str], list[int]]:
    """Plain tokens, then control tokens of these names."""
    plain = ["a", "b", ",", "."]
    return [*plain, *names], [TokenType.NORMAL] * len(plain) + [TokenType.CONTROL] * len(names)


def test_a_vocabulary_without_any_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="states nowhere which token ends an answer"):
        ends.of_checkpoint(tmp_path, *vocabulary("<a>"))


def test_more_ends_than_gguf_has_keys_for_are_refused(tmp_path: Path) -> None:
    texts, kinds = vocabulary(*(f"<end {each}>" for each in range(5)))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4, 5, 6, 7]}))
    with pytest.raises(UnsupportedModel, match="4 tokens that end an answer"):
        ends.of_checkpoint(tmp_path, texts, kinds)


@given(
    st.lists(st.sampled_from([*ends.TURN_ENDS, *ends.TEXT_ENDS]), unique=True),
    st.lists(st.sampled_from(["<a>", "<b>"]), unique=True),
    st.lists(st.sampled_from([0, 2]), unique=True),
    st.randoms(use_true_random=False),
)
def test_of_all_that_is_stated_the_ends_have_keys_or_known_names(known, others, plain, random) -> None:
    """Stated in any order, in either file, with numbers of plain text among them."""
    texts, kinds = vocabulary(*ends.TURN_ENDS, *ends.TEXT_ENDS, "<a>", "<b>")
    wanted = {texts.index(name) for name in (*known, *others)}
    stated = [*wanted, *plain]
    random.shuffle(stated)
    cut = random.randint(0, len(stated))
    found = _found(texts, kinds, stated[:cut], stated[cut:])
    if not wanted:
        assert found in ("refused", [texts.index(ends.TURN_ENDS[0])])
        return
    assert set(found) == wanted
    without_key = {texts[token] for token in found[len(ends.KEYS) :]}
    assert without_key <= {*ends.TURN_ENDS, *ends.TEXT_ENDS}


def _found(texts: list[str], kinds: list[int], *stated: list[int]) -> list[int] | str:
    with tempfile.TemporaryDirectory() as folder:
        for file, tokens in zip(FILES, stated, strict=True):
            Path(folder, file).write_text(json.dumps({"eos_token_id": tokens}))
        try:
            return ends.of_checkpoint(Path(folder), texts, kinds)
        except BadModelFile:
            return "refused"


@pytest.mark.parametrize(
    ("names", "stated", "expected"),
    [
        (("<|im_end|>",), None, 13),  # nothing is stated: libllama would take the comma
        (("<|im_end|>",), 11, 13),
        (("<|im_end|>", "<x>"), 14, None),  # what is stated is an end
        (("<x>",), 11, BadModelFile),
    ],
)
def test_the_end_of_a_gguf_is_proven_by_name_too(
    names: tuple[str, ...], stated: int | None, expected: object, tmp_path: Path
) -> None:
    texts = [chr(33 + place) for place in range(13)]
    writer = GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*texts, *names])
    writer.add_token_types([TokenType.NORMAL] * len(texts) + [TokenType.CONTROL] * len(names))
    if stated is not None:
        writer.add_eos_token_id(stated)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "source.gguf")
    if expected is BadModelFile:
        with pytest.raises(BadModelFile, match="states nowhere which token ends"):
            ends.of_gguf(header)
    else:
        assert ends.of_gguf(header) == expected


def test_the_names_are_libllama_s(tmp_path: Path) -> None:
    """Each of those that get no key is an end for libllama by its name alone."""
    assert {*SPECIALS, *USER} & {*ends.TURN_ENDS, *ends.TEXT_ENDS} == KNOWN
    names = (*ends.TURN_ENDS, *ends.TEXT_ENDS)
    texts = ["<unk>", "<s>", *(f"<0x{value:02X}>" for value in range(256)), *names]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL] + [TokenType.BYTE] * 256 + [TokenType.CONTROL] * len(names)
    writer = GGUFWriter(tmp_path / "names.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_scores([-1.0] * len(texts))
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = Vocabulary(tmp_path / "names.gguf")
    found = {read.piece(token, special=True).decode() for token in read.end_of_generation}
    read.close()
    assert set(names) - found == set()
