"""The tokenizer of a checkpoint of the hub as GGUF's keys: byte-level BPE, or SentencePiece's BPE.

`tokenizer.model` is SentencePiece's own file. `tokenizer.json` is of the `tokenizers` package: byte-level BPE
as it stands, or SentencePiece's BPE as merges, whose order is that of the scores it was made of. How
byte-level BPE splits text GGUF says by name only; the name is found by splitting one text in all known ways.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, pre_tokenizers

from cordee.convert.safetensors import read_json
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import FETCH_AGAIN

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Whatever ways of splitting text tell apart: contractions, runs of digits, marks and white space, scripts.
PROBE = (
    "I've SAID it's 1 22 333 4444 55555, you'LL see: x=3.14e-10;  #!?...((]]\n\n\n  if a_b:\n\t\treturn  'x'"
    "\r\n \t \n été Straße Москва ひらがな漢字 ١٢٣ ½²  🚀~~ --== a1b22c333 don’t O'Neil's\u00a0\u3000end   "
)
# A piece that no merge leads to is never looked for: any score does.
SCORE_UNREACHED = -1e6
SPACE = "▁"


def add_tokenizer(writer: GGUFWriter, folder: Path, n_vocab: int, pre: str | None = None) -> None:
    """Add the keys of the tokenizer in a checkpoint's folder. `pre` is the pre-tokenizer's name in GGUF, for
    byte-level BPE that splits text in a way that is not known here.

    Raises:
        BadModelFile: there is none, or it is damaged.
        UnsupportedModel: it is of another kind.
    """
    pieces, described = folder / "tokenizer.model", folder / "tokenizer.json"
    if pieces.is_file():
        merges = _add_pieces(writer, pieces, n_vocab)
    elif described.is_file():
        merges = _add_described(writer, described, n_vocab, pre)
    else:
        raise BadModelFile(f"{folder} has no tokenizer.json and no tokenizer.model: {FETCH_AGAIN}.")
    try:
        SpecialVocab(folder, load_merges=merges, n_vocab=n_vocab).add_to_gguf(writer, quiet=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadModelFile(
            f"{folder}: its special tokens cannot be read ({error}): {FETCH_AGAIN}."
        ) from error


class _Tokens:
    """Text and kind of each token; ids that nothing names are unused."""

    def __init__(self, source: Path, n_vocab: int) -> None:
        self._source = source
        self.texts = [f"[PAD{token}]" for token in range(n_vocab)]
        self.kinds = [TokenType.UNUSED] * n_vocab
        self.scores = [SCORE_UNREACHED] * n_vocab

    def put(self, token: int, text: str, kind: TokenType, score: float = SCORE_UNREACHED) -> None:
        """Say what a token is."""
        if type(token) is not int or not 0 <= token < len(self.texts) or not isinstance(text, str):
            raise BadModelFile(
                f"{self._source}: {text!r} has the number {token} in a vocabulary of {len(self.texts)}: "
                f"{FETCH_AGAIN}."
            )
        self.texts[token], self.kinds[token], self.scores[token] = text, kind, score

    def put_added(self, added: dict[int, tuple[str, bool]]) -> None:
        """Say which tokens were added by hand: their texts, and whether they are control tokens."""
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


def _add_pieces(writer: GGUFWriter, path: Path, n_vocab: int) -> bool:
    """A SentencePiece model, and what was added to it. No merges go along."""
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BadModelFile(f"{path} is no SentencePiece model ({error}): {FETCH_AGAIN}.") from error
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
    return False


def _add_described(writer: GGUFWriter, path: Path, n_vocab: int, pre: str | None) -> bool:
    """A tokenizer.json; whether its merges go along."""
    described = read_json(path)
    model = described.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{path} is no BPE tokenizer, which alone the ternary engine has.")
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
    listed = described.get("added_tokens") or []
    tokens.put_added(_added({entry.get("id"): entry for entry in listed}, path))
    if is_pieces:
        tokens.write(writer, "llama", "default")
        writer.add_add_space_prefix(_split(tokenizer, "a")[0].startswith(SPACE))
    else:
        tokens.write(writer, "gpt2", pre or _pre_tokenizer(tokenizer, path))
    return not is_pieces


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no other
        raise BadModelFile(f"{path} is no tokenizer ({error}): {FETCH_AGAIN}.") from error


def _vocabulary(model: dict[str, Any], path: Path) -> dict[str, int]:
    found = model.get("vocab")
    if not isinstance(found, dict):
        raise BadModelFile(f"{path} has no vocabulary: {FETCH_AGAIN}.")
    return found


def _kind(text: str, model: dict[str, Any]) -> TokenType:
    """What a piece is by its look."""
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def _scores(merges: Any, path: Path) -> dict[str, float]:
    """The piece that is merged first has the best score."""
    scores: dict[str, float] = {}
    try:
        for merge in merges:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -float(len(scores)))
    except (TypeError, ValueError) as error:
        raise BadModelFile(f"{path} has a merge that is none ({error}): {FETCH_AGAIN}.") from error
    return scores


def _added(entries: Any, path: Path) -> dict[int, tuple[str, bool]]:
    """Tokens that were added by hand, of either of the hub's files: number -> (text, whether special)."""
    try:
        return {
            int(token): (entry["content"], bool(entry["special"])) for token, entry in (entries or {}).items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadModelFile(f"{path}: an added token is none ({error}): {FETCH_AGAIN}.") from error


def _split(tokenizer: Tokenizer, text: str) -> list[str]:
    """A text as a tokenizer splits it before any merge."""
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return (
        [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if tokenizer.pre_tokenizer
        else [text]
    )


@cache
def _known_splits() -> dict[str, list[str]]:
    """GGUF's names of the ways to split text that the ternary engine knows, and what they make of PROBE."""
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
        f"{path} splits text in none of the known ways, which are {', '.join(_known_splits())}: if GGUF has "
        "a name for its way, give that with --pre."
    )
