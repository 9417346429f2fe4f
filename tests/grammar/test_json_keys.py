"""A key comes once in an object, however tokens cut the text; nothing else is ruled out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gbnf import BYTES, END, Bytes

from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.grammar.grammar import GrammarState, GrammarTokenizer
from cordee.grammar.json_keys import QuotedTokens, WrittenKeys

PIECES = [bytes([byte]) for byte in range(256)] + [
    b'a"', b'"a":', b'{"', b'","', b'":1,"', b',"a"', b'b":', b'"b"', b'\\"', b'":{"a":', b'}}', b'"],"a":',
]  # fmt: skip
TOKENS = QuotedTokens(PIECES)
ALL = np.ones(len(PIECES), dtype=bool)


def has_repeats(text: bytes) -> bool:
    """Whether a whole JSON text has a key twice, by Python's own parser."""
    found = []

    def object_of(pairs: list) -> dict:
        names = [name for name, _ in pairs]
        found.append(len(set(names)) < len(names))
        return dict(pairs)

    json.loads(text, object_pairs_hook=object_of)
    return any(found)


NAMES = st.text(alphabet='ab"\\é,{', max_size=3)
VALUES = st.recursive(
    st.integers(0, 9) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(NAMES, inner), max_size=4).map(tuple),
    max_leaves=10,
)


def written(value: object) -> str:
    """JSON text; a tuple is an object, whose keys may repeat."""
    if isinstance(value, tuple):
        return "{" + ",".join(f"{json.dumps(name)}: {written(inner)}" for name, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@given(VALUES, st.randoms(use_true_random=False))
def test_a_text_is_ruled_out_where_a_key_repeats_and_nowhere_else(value, random) -> None:
    text, keys, at, ruled_out = written(value).encode(), WrittenKeys(TOKENS), 0, False
    while at < len(text):
        fitting = [token for token, piece in enumerate(PIECES) if text.startswith(piece, at)]
        token = random.choice(fitting)
        ruled_out = ruled_out or token in keys.repeats(ALL)
        keys.push(PIECES[token])
        at += len(PIECES[token])
    assert ruled_out == has_repeats(text)


def test_only_allowed_tokens_are_looked_at() -> None:
    keys = WrittenKeys(TOKENS)
    keys.push(b'{"a":1')
    assert [PIECES[token] for token in keys.repeats(ALL)] == [b',"a"']
    assert keys.repeats(np.zeros(len(PIECES), dtype=bool)) == []


@pytest.mark.parametrize("grammar", [Grammar("json_object"), Grammar("json_schema", '{"type": "object"}')])
def test_a_grammar_allows_a_key_once(grammar: Grammar) -> None:
    state = GrammarState(grammar, BYTES, list(b'{"a":{"a":1},"b":["a"],"a'))
    assert not state.allowed()[ord('"')] and state.allowed()[ord("b")]
    other = state.copy()
    for byte in b'b":1,"c":2,"c':
        other.accept(byte)
    assert not other.allowed()[ord('"')]
    state.accept(ord("c"))
    assert state.allowed()[ord('"')], "a copy goes its own way"
    for byte in b'":1}':
        state.accept(byte)
    assert list(np.flatnonzero(state.allowed())) == [END]


def test_a_schema_that_allows_no_other_key_is_obeyed() -> None:
    schema = {
        "type": "object",
        "patternProperties": {"^a$": {}},
        "additionalProperties": False,
        "minProperties": 2,
    }
    state = GrammarState(Grammar("json_schema", json.dumps(schema)), BYTES, list(b'{"a":1,"a'))
    assert list(np.flatnonzero(state.allowed())) == [ord('"')]


def test_other_grammars_may_repeat_what_looks_like_a_key() -> None:
    state = GrammarState(Grammar("regex", r'(\{"a":1,"a":2\})'), BYTES)
    for byte in b'{"a":1,"a":2}':
        state.accept(byte)


def test_control_tokens_are_no_text() -> None:
    tokenizer = GrammarTokenizer(Bytes())
    assert tokenizer.piece(END) == b"" and tokenizer.piece(ord("x")) == b"x"
    with pytest.raises(BadRequest):
        GrammarState(Grammar("json_object"), tokenizer, [END])
