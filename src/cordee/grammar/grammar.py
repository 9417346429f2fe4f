"""Grammars that constrain the text, by llguidance: JSON schema, GBNF, Lark or regex become a token mask.

GBNF is translated to Lark first (gbnf.py, gbnf_lark.py).

Whether a grammar may be used at all is tried in a child process first (worker/grammar_trials.py).

llguidance compiles it and walks it token by token. Its tokenizer (a trie of the whole vocabulary) takes a
second to build for a large one, so there is one per vocabulary, built when the first grammar is asked for.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from cordee.errors import BadRequest, UnsupportedModel
from cordee.generation.request import Grammar
from cordee.grammar import gbnf, gbnf_lark
from cordee.grammar.json_keys import QuotedTokens, WrittenKeys
from cordee.grammar.schema_depth import depth_bound
from cordee.grammar.thinking_budget import ThinkingBudget

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # pyright: ignore[reportPrivateUsage] - not exported

TEXT_CHARS_MAX = 256 << 10  # OpenAI's schemas end at 120,000 characters of names
# Levels of a JSON schema, through its references: llguidance goes down them by calls, each of up to 4 kB, and
# a thread may have as little as 2 MB.
SCHEMA_DEPTH_MAX = 400
GBNF_CHARS_MAX = 32 << 10  # 32 k take half a second to translate, if they are made for it
# What one grammar may cost, in llguidance's units. The costliest found within these limits, (a{1000}){1000},
# takes 0.2 s and 34 MB before it is refused; with llguidance's own limits 1.1 s and 170 MB.
LIMITS = LLParserLimits(
    max_items_in_row=20_000,  # an object of 3,000 optional properties needs 12,000
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,  # 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
# On one line, with one space behind separators, as models have learnt to write it, or none: where more white
# space may stand, a small model writes it again and again.
JSON_OPTIONS: "JsonCompileOptions" = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
}
# Of a core, for one token: the largest grammars of use take 50 ms, and thrice that on an old machine. All
# streams of a worker wait meanwhile.
STEP_SECONDS = 0.5
MESSAGE_CHARS_MAX = 300  # of llguidance's reasons, some of which quote the grammar

# Each kind's name in messages, and the request's parameter (OpenAI's where it has one) that asks for it.
NAMES = {
    "json_object": ("JSON mode", "response_format"),
    "json_schema": ("JSON schema", "response_format"),
    "gbnf": ("GBNF grammar", "grammar"),
    "lark": ("Lark grammar", "grammar"),
    "regex": ("regular expression", "grammar"),
    "tools": ("schemas of tools", "tools"),
    "thinking": ("JSON schema", "response_format"),
}
JSON_KINDS = ("json_object", "json_schema")  # whose whole text is one JSON value
SPECIAL = b"\xff"  # llguidance's mark of a token that no text tokenizes to


class TokenSource(Protocol):
    """What a grammar needs of a vocabulary; `engine.vocabulary.Vocabulary` is one."""

    size: int
    bos: int | None
    end_of_generation: frozenset[int]

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...
    def is_control(self, token: int) -> bool: ...


class GrammarTokenizer:
    """llguidance's view of one vocabulary, built at first use. It keeps the vocabulary alive."""

    def __init__(self, vocabulary: TokenSource) -> None:
        self.size = vocabulary.size
        self.end_of_generation = tuple(sorted(vocabulary.end_of_generation))
        self._vocabulary = vocabulary

    @cached_property
    def native(self) -> LLTokenizer:
        """The native tokenizer.

        Raises:
            UnsupportedModel: the vocabulary has no end-of-generation token, so no grammar could end.
        """
        if not self.end_of_generation:
            raise UnsupportedModel(
                "this model has no end-of-generation token: it cannot be bound to a grammar"
            )
        wrapper = TokenizerWrapper(_Tokens(self._vocabulary, self.end_of_generation[0]))
        return LLTokenizer(wrapper, n_vocab=self.size, eos_token=list(self.end_of_generation))

    def full_piece(self, token: int) -> bytes:
        """A token's bytes, also of a control token."""
        return self._vocabulary.piece(token, special=True)

    @cached_property
    def quoted(self) -> QuotedTokens:
        """The tokens that may complete a key of JSON."""
        return QuotedTokens(self.piece(token) for token in range(self.size))

    def piece(self, token: int) -> bytes:
        """A token's bytes as they stand in a text; none of one that ends it or is for control."""
        vocabulary = self._vocabulary
        no_text = token in vocabulary.end_of_generation or vocabulary.is_control(token)
        return b"" if no_text else vocabulary.piece(token)

    def token_id(self, written: str) -> int | None:
        """The token that a GBNF grammar writes as `<text>` or `<[id]>`; None if there is no such token."""
        if written.startswith("<["):
            number = int(written[2:-2])
            return number if number < self.size else None
        tokens = self._vocabulary.tokenize(written, special=True, add_bos=False)
        return tokens[0] if len(tokens) == 1 else None


class _Tokens:
    """The vocabulary as llguidance's `TokenizerWrapper` takes it."""

    def __init__(self, vocabulary: TokenSource, eos: int) -> None:
        self.eos_token_id = eos
        self.bos_token_id = vocabulary.bos
        self.special_token_ids: list[int] = []
        self.tokens = [_bytes(vocabulary, token) for token in range(vocabulary.size)]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes) -> list[int]:
        return self._vocabulary.tokenize(text.decode("utf-8", "replace"), special=False, add_bos=False)


def _bytes(vocabulary: TokenSource, token: int) -> bytes:
    """A token's bytes, marked where it is a control token or ends generation."""
    piece = vocabulary.piece(token, special=True)
    marked = token in vocabulary.end_of_generation or vocabulary.is_control(token)
    return SPECIAL + piece if marked else piece


def check_text(grammar: Grammar) -> None:
    """Refuse a grammar that is longer than any that is compiled, or is no text.

    Raises:
        BadRequest: with the reason.
    """
    limit = GBNF_CHARS_MAX if grammar.kind == "gbnf" else TEXT_CHARS_MAX
    if len(grammar.text) > limit:
        raise refusal(grammar.kind, f"it has {len(grammar.text)} characters; at most {limit} are accepted")
    if any("\ud800" <= character <= "\udfff" for character in grammar.text):
        raise refusal(grammar.kind, "it has half of a surrogate pair, which is not valid Unicode")


def check(grammar: Grammar, tokenizer: GrammarTokenizer) -> "GrammarState":
    """Refuse a grammar that cannot be compiled for this vocabulary, or that no text can satisfy.

    The state is that after some first token. There is no bound on the time that it takes.

    Raises:
        BadRequest: with the reason.
        UnsupportedModel: no grammar can bind this model.
    """
    state = GrammarState(grammar, tokenizer)
    state.accept(int(state.allowed().argmax()))  # some costs only show in the first step
    return state


class GrammarState:
    """The state of one stream in its grammar, after the tokens already generated.

    Raises:
        BadRequest: the grammar is bad, or the tokens do not follow it.
        UnsupportedModel: no grammar can bind this model.
    """

    def __init__(self, grammar: Grammar, tokenizer: GrammarTokenizer, generated: Sequence[int] = ()) -> None:
        self.kind = grammar.kind
        self._size = tokenizer.size
        self._budget = _budget(grammar)
        self._mask = np.zeros((tokenizer.size + 31) // 32, dtype=np.int32)
        native = tokenizer.native
        for form in _compiled(grammar, tokenizer):
            self._matcher = LLMatcher(native, form, log_level=0, limits=LIMITS)
            if not self._matcher.is_error():
                break
        self._fail_if_broken()
        self._tokenizer = tokenizer
        self._keys = WrittenKeys(tokenizer.quoted) if grammar.kind in JSON_KINDS else None
        for token in generated:
            self.accept(token)

    def copy(self) -> "GrammarState":
        """Another state, the same as this one now; it costs little."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        other._mask = self._mask.copy()
        other._budget = copy.copy(self._budget)
        other._keys = None if self._keys is None else self._keys.copy()
        return other

    def allowed(self) -> np.ndarray:
        """A (n_vocab,) bool array of the tokens that may come next; after a complete text, only end tokens.

        Raises:
            BadRequest: nothing may come next, or the grammar passed its limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._fail_if_broken()
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._size, bitorder="little")
        allowed = bits.view(bool)
        forced = None if self._budget is None else self._budget.forced
        if forced is not None and allowed[forced]:
            allowed[:] = False
            allowed[forced] = True
        elif self._keys is not None and (again := self._keys.repeats(allowed)):
            fresh = allowed.copy()
            fresh[again] = False
            allowed = fresh if fresh.any() else allowed  # a schema may allow no other
        return allowed

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            BadRequest: the token does not follow the grammar, or the grammar passed its limits.
        """
        self._matcher.consume_token(token)
        self._fail_if_broken()
        if self._budget is not None:
            self._budget.accept(self._tokenizer.full_piece(token))
        if self._keys is not None:
            self._keys.push(self._tokenizer.piece(token))

    def forced(self) -> list[int]:
        """Tokens of the bytes that must come next, as the tokenizer would cut them; the model may cut them
        in another way. None where nothing is sure."""
        return self._matcher.compute_ff_tokens()

    def _fail_if_broken(self) -> None:
        if not self._matcher.is_error():
            return
        reason = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())
        if reason.startswith("NoExtension"):
            reason = "no text can satisfy it"
        elif self.kind == "gbnf":  # the reason is about the translation, which is valid
            reason = f"it is too complex: use fewer and shorter repetitions and optional parts ({reason})"
        raise refusal(self.kind, reason)


def _compiled(grammar: Grammar, tokenizer: GrammarTokenizer) -> Iterator[str]:
    """llguidance's form of a grammar, or two of which the second is for when the first is too complex.

    Only the matcher checks its rules.
    """
    check_text(grammar)
    try:
        yield from _FORMS[grammar.kind](grammar.text, tokenizer)
    except RecursionError:
        raise refusal(grammar.kind, "it is nested too deeply") from None
    except ValueError as error:
        raise refusal(grammar.kind, str(error)) from error


def _checked(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    if depth_bound(cast("dict[str, Any]", schema)) > SCHEMA_DEPTH_MAX:
        raise ValueError("it is nested too deeply: let fewer definitions refer to one another")
    return cast("dict[str, Any]", schema)


def _answer(text: str) -> Iterator[str]:
    """A Lark grammar with JSON schemas beside it. Where it cannot be compiled, it is tried without the
    schemas that their writer would rather have unbound than refused."""
    parts = json.loads(text)
    schemas = {name: _checked(schema) for name, schema in parts["schemas"].items()}
    loose = set(parts["loose"])
    unbound = {name: {key: schemas[name][key] for key in ("type",) if key in schemas[name]} for name in loose}
    for bound in (schemas, schemas | unbound) if loose else (schemas,):
        lark = {"name": "answer", "lark_grammar": parts["lark"]}
        beside = [
            {"name": name, "json_schema": schema | {"x-guidance": JSON_OPTIONS | {"lenient": name in loose}}}
            for name, schema in bound.items()
        ]
        yield json.dumps({"grammars": [lark, *beside]}, ensure_ascii=False)


def _budget(grammar: Grammar) -> ThinkingBudget | None:
    if grammar.kind not in ("tools", "thinking"):
        return None
    budget = json.loads(grammar.text).get("budget")
    return None if budget is None else ThinkingBudget.read(budget)


def _json_schema(text: str) -> str:
    _checked(json.loads(text))
    return LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)


def _gbnf(text: str, tokenizer: GrammarTokenizer) -> Iterator[str]:
    rules = gbnf.parse(text, tokenizer.token_id)
    return map(LLMatcher.grammar_from_lark, gbnf_lark.to_lark(rules, tokenizer.end_of_generation))


_FORMS: dict[str, Callable[[str, GrammarTokenizer], Iterable[str]]] = {
    "json_object": lambda _, __: [_json_schema('{"type": "object"}')],
    "json_schema": lambda text, _: [_json_schema(text)],
    "gbnf": _gbnf,
    "lark": lambda text, _: [LLMatcher.grammar_from_lark(text)],
    "regex": lambda text, _: [LLMatcher.grammar_from_regex(text)],
    "tools": lambda text, _: _answer(text),
    "thinking": lambda text, _: _answer(text),
}


def refusal(kind: str, reason: str) -> BadRequest:
    """Why a grammar of a kind cannot be used."""
    name, param = NAMES[kind]
    return BadRequest(f"the {name} cannot be used: {reason[:MESSAGE_CHARS_MAX]}", param)
