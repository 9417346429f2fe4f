"""The tokenizer of a checkpoint of the hub as GGUF's keys: byte-level BPE, or SentencePiece's BPE.

`tokenizer.model` is SentencePiece's own file. `tokenizer.json` is of the `tokenizers` package: byte-level BPE
as it is, or SentencePiece's BPE as merges, in the order of the scores that they were made from. GGUF only
names the way in which byte-level BPE splits text; the name is found by splitting one text in all known ways.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, pre_tokenizers

from cordee.convert import ends
from cordee.convert.safetensors import is_array, is_object, read_json
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.metadata import FETCH_AGAIN

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What ways of splitting text treat differently: contractions, runs of digits, marks and white space, scripts.
PROBE = (
    "I've SAID it's 1 22 333 4444 55555, you'LL see: x=3.14e-10;  #!?...((]]\n\n\n  if a_b:\n\t\treturn  'x'"
    "\r\n \t \n été Straße Москва ひらがな漢字 ١٢٣ ½²  🚀~~ --== a1b22c333 don’t O'Neil's\u00a0\u3000end   "
)
# A piece that no merge leads to is never looked up: any score does.
SCORE_UNREACHED = -1e6
SPACE = "▁"


def add_tokenizer(writer: GGUFWriter, folder: Path, n_vocab: int, pre: str | None = None) -> None:
    """Add the keys of the tokenizer in a checkpoint's folder.

    `pre` is the pre-tokenizer's name in GGUF, for byte-level BPE that splits text in a way unknown here.

    Raises:
        BadModelFile: there is no tokenizer, or it is damaged.
        UnsupportedModel: it is of another kind.
    """
    pieces, described = folder / "tokenizer.model", folder / "tokenizer.json"
    if pieces.is_file():
        tokens, merges = _add_pieces(writer, pieces, n_vocab)
    elif described.is_file():
        tokens, merges = _add_described(writer, described, n_vocab, pre)
    else:
        raise BadModelFile(f"{folder} has no tokenizer.json and no tokenizer.model: {FETCH_AGAIN}.")
    try:
        special = SpecialVocab(folder, load_merges=merges, n_vocab=n_vocab)
        for key in ends.KEYS:
            special.special_token_ids.pop(key, None)
        special.add_to_gguf(writer, quiet=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadModelFile(
            f"{folder}: its special tokens cannot be read ({error}): {FETCH_AGAIN}."
        ) from error
    ends.add(writer, ends.of_checkpoint(folder, tokens.texts, tokens.kinds))


class _Tokens:
    """Text and kind of each token; ids without a text are unused tokens."""

    def __init__(self, source: Path, n_vocab: int) -> None:
        self._source = source
        self.texts = [f"[PAD{token}]" for token in range(n_vocab)]
        self.kinds = [TokenType.UNUSED] * n_vocab
        self.scores = [SCORE_UNREACHED] * n_vocab

    def put(self, token: int, text: str, kind: TokenType, score: float = SCORE_UNREACHED) -> None:
        """Set a token. Both come from outside: raises BadModelFile if it is not a token of the vocabulary."""
        if type(token) is not int or not 0 <= token < len(self.texts) or type(text) is not str:
            raise BadModelFile(
                f"{self._source}: {text!r} has the number {token} in a vocabulary of {len(self.texts)}: "
                f"{FETCH_AGAIN}."
            )
        self.texts[token], self.kinds[token], self.scores[token] = text, kind, score

    def put_added(self, added: dict[int, tuple[str, bool]]) -> None:
        """Set added tokens: their texts, and whether they are control tokens."""
        for token, (text, special) in added.items():
            self.put(token, text, TokenType.CONTROL if special else TokenType.USER_DEFINED)

    def write(self, writer: GGUFWriter, model: str, pre: str) -> None:
        """Add them to a file."""
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(self.texts)
        if model == "llama":
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)


def _add_pieces(writer: GGUFWriter, path: Path, n_vocab: int) -> tuple[_Tokens, bool]:
    """Add a SentencePiece model and its added tokens; the tokens, and whether to add merges too: no."""
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BadModelFile(f"{path} is not a SentencePiece model ({error}): {FETCH_AGAIN}.") from error
    tokens, count = _Tokens(path, n_vocab), processor.get_piece_size()
    for token in range(count):
        kind = (
            TokenType.UNKNOWN
            if processor.is_unknown(token)
            else TokenType.CONTROL
            if processor.is_control(token)
            else TokenType.BYTE
            if processor.is_byte(token)
            else TokenType.NORMAL
        )
        tokens.put(token, processor.id_to_piece(token), kind, processor.get_score(token))
    settings = path.with_name("tokenizer_config.json")
    described = read_json(settings) if settings.is_file() else {}
    added = _added(described.get("added_tokens_decoder"), path)
    tokens.put_added({token: entry for token, entry in added.items() if token >= count})
    tokens.write(writer, "llama", "default")
    writer.add_add_space_prefix(described.get("add_prefix_space") is not False)
    return tokens, False


def _add_described(writer: GGUFWriter, path: Path, n_vocab: int, pre: str | None) -> tuple[_Tokens, bool]:
    """Add a tokenizer.json; the tokens, and whether to add its merges too."""
    described = read_json(path)
    model = described.get("model")
    if not is_object(model) or model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{path} is not a BPE tokenizer, the only kind that the ternary engine has.")
    tokenizer = _tokenizer(path)
    is_pieces = bool(model.get("byte_fallback"))
    tokens = _Tokens(path, n_vocab)
    scores = _scores(model.get("merges"), path) if is_pieces else {}
    for text, token in _vocabulary(model, path).items():
        tokens.put(
            token,
            text,
            _kind(text, model) if is_pieces else TokenType.NORMAL,
            scores.get(text, SCORE_UNREACHED),
        )
    tokens.put_added(_added(described.get("added_tokens"), path))
    if is_pieces:
        tokens.write(writer, "llama", "default")
        writer.add_add_space_prefix(_split(tokenizer, "a")[0].startswith(SPACE))
    else:
        tokens.write(writer, "gpt2", pre or _pre_tokenizer(tokenizer, path))
    return tokens, not is_pieces


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no other class
        raise BadModelFile(f"{path} is not a tokenizer ({error}): {FETCH_AGAIN}.") from error


def _vocabulary(model: dict[str, Any], path: Path) -> dict[str, int]:
    found = model.get("vocab")
    if not is_object(found):
        raise BadModelFile(f"{path} has no vocabulary: {FETCH_AGAIN}.")
    return found


def _kind(text: str, model: dict[str, Any]) -> TokenType:
    """The kind of a piece, by its text."""
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def _scores(merges: Any, path: Path) -> dict[str, float]:
    """Scores by piece: the piece that is merged first has the best one."""
    scores: dict[str, float] = {}
    try:
        for merge in merges:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -float(len(scores)))
    except (TypeError, ValueError) as error:
        raise BadModelFile(f"{path} has an invalid merge ({error}): {FETCH_AGAIN}.") from error
    return scores


def _added(entries: Any, path: Path) -> dict[int, tuple[str, bool]]:
    """Added tokens as either of the hub's files lists them: id -> (text, whether special)."""
    try:
        by_id: dict[Any, Any] = {e["id"]: e for e in entries} if is_array(entries) else entries or {}
        return {int(token): (entry["content"], bool(entry["special"])) for token, entry in by_id.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadModelFile(f"{path}: an added token is invalid ({error}): {FETCH_AGAIN}.") from error


def _split(tokenizer: Tokenizer, text: str) -> list[str]:
    """The pieces into which a tokenizer splits a text before any merge."""
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return (
        [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if tokenizer.pre_tokenizer
        else [text]
    )


@cache
def _known_splits() -> dict[str, list[str]]:
    """The ways to split text that the ternary engine has: their names in GGUF, and the pieces of PROBE."""
    level = pre_tokenizers.ByteLevel
    known = {
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            level(add_prefix_space=False, use_regex=False),
        ],
        "gpt-2": [level(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)],
    }
    return {
        name: [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(PROBE)]
        for name, steps in known.items()
    }


def _pre_tokenizer(tokenizer: Tokenizer, path: Path) -> str:
    found = _split(tokenizer, PROBE)
    for name, pieces in _known_splits().items():
        if pieces == found:
            return name
    raise UnsupportedModel(
        f"{path} splits text in none of the known ways ({', '.join(_known_splits())}): if GGUF has a name "
        "for its way, give it with --pre."
    )
