"""Which tokens end an answer: what the files of a model say, proven by the tokens' names.

A number alone proves nothing: it may be left from another vocabulary. And where GGUF states no end, libllama
takes token 11 of byte-level BPE for it, which is the comma in the vocabularies of GPT-2 and Llama 3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from cordee.convert.safetensors import is_array, is_object, read_json
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import FETCH_AGAIN, Header

# What ends a turn of a chat, and what ends a text, in widespread vocabularies. libllama takes each of them as
# an end wherever it is a token (src/llama-vocab.cpp, special_eog_ids).
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
KEYS = ("eos", "eot", "eom")  # tokenizer.ggml.KEY_token_id; libllama ends an answer at each of them
# What libllama assumes where a file states no end, by tokenizer.ggml.model.
ASSUMED = {"gpt2": 11, "llama": 2}
REMEDY = 'correct it there, or name the token in tokenizer_config.json ("eos_token")'


def of_checkpoint(folder: Path, texts: Sequence[str], kinds: Sequence[int]) -> list[int]:
    """The tokens that end an answer, the most important one first; `texts` and `kinds` are by token.

    The name in tokenizer_config.json counts first, then the numbers, or lists of them, in
    generation_config.json and config.json. Numbers of plain text are left out, as long as one end is left.

    Raises:
        BadModelFile: no file states an end that is one.
        UnsupportedModel: there are more than a GGUF can state.
    """
    stated: dict[int, str] = {}  # token -> the file that states it
    name = _name(_read(folder / "tokenizer_config.json").get("eos_token"))
    if name is not None and name in texts:
        stated[texts.index(name)] = "tokenizer_config.json"
    for file in ("generation_config.json", "config.json"):
        for token in _numbers(_read(folder / file).get("eos_token_id"), folder / file):
            if token >= len(texts):
                raise BadModelFile(
                    f"{folder / file}: eos_token_id {token} is beyond the vocabulary of {len(texts)} tokens: "
                    f"{FETCH_AGAIN}."
                )
            stated.setdefault(token, file)
    proven = [token for token in stated if _is_end(texts[token], kinds[token])]
    if not proven and stated:
        [(token, file), *_] = stated.items()
        raise BadModelFile(
            f"{folder / file} says that token {token} ends an answer, which is the plain text "
            f"{texts[token]!r}: {REMEDY}."
        )
    return _ordered(proven or [named(texts, kinds, str(folder))], texts, folder)


def named(texts: Sequence[str], kinds: Sequence[int], where: str) -> int:
    """The end of a vocabulary for which no file states one, by its name.

    Raises:
        BadModelFile: it has none of the widespread names.
    """
    for name in (*TURN_ENDS, *TEXT_ENDS):
        if name in texts and _is_end(name, kinds[texts.index(name)]):
            return texts.index(name)
    raise BadModelFile(f"{where} states nowhere which token ends an answer: {REMEDY}.")


def of_gguf(header: Header) -> int | None:
    """The end to be written instead of what a GGUF states or libllama assumes, if that is plain text.

    Raises:
        BadModelFile: no other token of the vocabulary is known as an end.
    """
    texts, kinds = (header.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assumed = ASSUMED.get(str(header.get("tokenizer.ggml.model")))
    stated = header.get("tokenizer.ggml.eos_token_id", assumed)
    if not is_array(texts) or not is_array(kinds) or len(texts) != len(kinds) or type(stated) is not int:
        return None
    if 0 <= stated < len(texts) and _is_end(texts[stated], kinds[stated]):
        return None
    return named(texts, kinds, str(header.path))


def add(writer: GGUFWriter, ends: Sequence[int]) -> None:
    """Write the ends."""
    for key, token in zip(KEYS, ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)


def _is_end(text: str, kind: int) -> bool:
    """Whether a token may end an answer: no text that users read is written with it."""
    return kind in (TokenType.CONTROL, TokenType.USER_DEFINED) or text in (*TURN_ENDS, *TEXT_ENDS)


def _ordered(ends: list[int], texts: Sequence[str], folder: Path) -> list[int]:
    """The first end, then those of turns; those that need no key, since libllama knows their names, last."""
    first, *rest = ends
    known = (*TURN_ENDS, *TEXT_ENDS)
    rest.sort(key=lambda token: (texts[token] in known, texts[token] not in TURN_ENDS))
    unknown = [token for token in rest if texts[token] not in known]
    if len(unknown) >= len(KEYS):
        names = ", ".join(texts[token] for token in ends)
        raise UnsupportedModel(
            f"{folder} states {len(ends)} tokens that end an answer ({names}); GGUF has keys for {len(KEYS)}."
        )
    return [first, *rest]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _name(entry: object) -> str | None:
    """A token's text, as a string or as an object around it."""
    text = entry.get("content") if is_object(entry) else entry
    return text if isinstance(text, str) else None


def _numbers(entry: object, path: Path) -> list[int]:
    numbers: list[object] = list(entry) if is_array(entry) else [] if entry is None else [entry]
    found = [number for number in numbers if type(number) is int and number >= 0]
    if len(found) != len(numbers):
        raise BadModelFile(
            f"{path}: eos_token_id is {entry!r}, not a token or a list of tokens: {FETCH_AGAIN}."
        )
    return found
