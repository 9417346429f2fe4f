"""Grammars that bind the text, by llguidance: JSON schema, GBNF, Lark or regex become a mask over the tokens.

llguidance compiles the grammar once per stream and walks it token by token. Its tokenizer (a trie of the
whole vocabulary) takes a second to build for a large one, so there is one per vocabulary, built when the
first grammar is asked for.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from cordee.errors import BadRequest, UnsupportedModel
from cordee.generation.request import Grammar

TEXT_CHARS_MAX = 128 << 10  # OpenAI's schemas end at 120,000 characters of names
# Bounds of what one grammar may cost, in llguidance's units; its documentation gives their speed.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms of building
    step_lexer_fuel=200_000,  # 15 ms a token
    step_max_items=50_000,  # 3 ms a token
    max_lexer_states=50_000,  # 100 MB
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Free whitespace lets a small model write blank lines for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,40}"}

PARAMS = {"json_object": "response_format", "json_schema": "response_format"}  # others: 'grammar'
SPECIAL = b"\xff"  # llguidance's mark of a token that no text gives


class TokenSource(Protocol):
    """What a grammar must know of a vocabulary; `engine.vocabulary.Vocabulary` is one."""

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


class _Tokens:
    """The vocabulary in the shape that llguidance's `TokenizerWrapper` asks for."""

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


def compile_grammar(grammar: Grammar) -> str:
    """Give llguidance's form of a grammar.

    Raises:
        BadRequest: the text is too long or is none of its kind; rules are only checked by `check`.
    """
    param = PARAMS.get(grammar.kind, "grammar")
    if len(grammar.text) > TEXT_CHARS_MAX:
        raise BadRequest(
            f"the grammar has {len(grammar.text)} characters; at most {TEXT_CHARS_MAX} are accepted", param
        )
    try:
        return _FORMS[grammar.kind](grammar.text)
    except RecursionError:
        raise BadRequest("the grammar is nested too deeply", param) from None
    except Exception as error:  # the GBNF reader raises its own class, the JSON reader ValueError
        raise BadRequest(f"the {grammar.kind} cannot be read: {error}", param) from None


def _json_schema(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    return LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)


_FORMS = {
    "json_object": lambda _: _json_schema('{"type": "object"}'),
    "json_schema": _json_schema,
    "gbnf": lambda text: LLMatcher.grammar_from_lark(gbnf_to_lark(text)),
    "lark": LLMatcher.grammar_from_lark,
    "regex": LLMatcher.grammar_from_regex,
}


def check(grammar: Grammar, tokenizer: GrammarTokenizer) -> None:
    """Refuse a grammar that cannot be compiled for this vocabulary within the limits.

    Raises:
        BadRequest: with llguidance's reason.
        UnsupportedModel: no grammar can bind this model.
    """
    native = tokenizer.native
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        compile_grammar(grammar), native, limits=LIMITS
    )
    if failed:
        raise BadRequest(
            f"the {grammar.kind} cannot be used: {messages[0]}", PARAMS.get(grammar.kind, "grammar")
        )


class GrammarState:
    """Where one stream stands in its grammar, after the tokens already generated.

    Raises:
        BadRequest: the grammar is bad, or the tokens do not follow it.
    """

    def __init__(self, grammar: Grammar, tokenizer: GrammarTokenizer, generated: Sequence[int] = ()) -> None:
        self._kind = grammar.kind
        self._matcher = LLMatcher(tokenizer.native, compile_grammar(grammar), log_level=0, limits=LIMITS)
        self._mask = np.zeros((tokenizer.size + 31) // 32, dtype=np.int32)
        self._size = tokenizer.size
        self._fail_if_broken()
        for token in generated:
            self.accept(token)

    def allowed(self) -> np.ndarray:
        """Give a (n_vocab,) bool array of the tokens that may come next; complete texts leave only the end.

        Raises:
            BadRequest: the grammar passed its limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._fail_if_broken()
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._size, bitorder="little")
        return bits.view(bool)

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            BadRequest: the token does not follow the grammar, or the grammar passed its limits.
        """
        self._matcher.consume_token(token)
        self._fail_if_broken()

    def _fail_if_broken(self) -> None:
        if self._matcher.is_error():
            raise BadRequest(
                f"the {self._kind} cannot be followed: {self._matcher.get_error()}",
                PARAMS.get(self._kind, "grammar"),
            )
