"""Schemas as clients send them become schemas that bind: what is lost is named, and no more is lost."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from test_gbnf import BYTES

from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.grammar.grammar import GrammarState, check
from cordee.grammar.json_schema import (
    ABOUT_PROPERTIES,
    FORMATS,
    LISTS,
    NAMED,
    SINGLE,
    UNBOUND,
    loosened,
)


def grammar(schema: Mapping[str, Any], strict: bool = False) -> Grammar:
    return Grammar("json_schema", json.dumps(loosened(schema, strict=strict)[0]))


def takes(schema: Mapping[str, Any], text: str) -> bool:
    """Whether an answer may be this text, to its end."""
    state = GrammarState(grammar(schema), BYTES)
    try:
        for byte in text.encode():
            state.accept(byte)
        return bool(state.allowed()[list(BYTES.end_of_generation)].any())
    except BadRequest:
        return False


def objects(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}

KEYWORDS = sorted({*UNBOUND, *SINGLE, *LISTS, *NAMED, *ABOUT_PROPERTIES, "type", "format", "pattern", "$ref"})

# What cannot be bound: the schema, what it takes all the same, and what it still does not take.
LOOSE = {
    "uniqueItems": ({"type": "array", "items": INTEGER, "uniqueItems": True}, "[1,1]", '["a"]'),
    "propertyNames": (
        {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": INTEGER},
        '{"b":1}',
        '{"b":"c"}',
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a": INTEGER, "b$": STRING}, "additionalProperties": False},
        '{"ab":1}',
        '{"ab":true}',
    ),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[2]", "{}"),
    "not": ({"type": "string", "not": {"const": "a"}}, '"a"', "1"),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 6}}, "7", '"a"'),
    "dependentRequired": (objects(a=INTEGER) | {"dependentRequired": {"a": ["b"]}}, '{"a":1}', "{}"),
    "unevaluatedProperties": (objects(a=INTEGER) | {"unevaluatedProperties": False}, '{"a":1}', '{"b":1}'),
    "oneOf": ({"oneOf": [INTEGER, {"type": "number"}]}, "1", '"a"'),
    "pattern": ({"type": "string", "pattern": "^(?=a).*$"}, '"b"', "1"),
    "required": ({"type": "object", "properties": {"a": INTEGER}, "required": True}, "{}", '{"b":1}'),
    "$ref": ({"type": "integer", "$ref": "https://example.com/schema.json"}, "1", '"a"'),
    "minProperties": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}, "minProperties": 2},
        '{"a":1}',
        '{"d":1}',
    ),
}


@pytest.mark.parametrize("keyword", LOOSE)
def test_what_cannot_be_bound_is_loosened_and_named(keyword: str) -> None:
    schema, taken, not_taken = LOOSE[keyword]
    for sent in (schema, objects(inner=schema), {"type": "array", "items": {"anyOf": [schema]}}):
        before = json.dumps(sent)
        assert keyword in loosened(sent)[1]
        assert json.dumps(sent) == before, "the client's own schema stays as it is"
        check(grammar(sent), BYTES)
        with pytest.raises(BadRequest):
            check(Grammar("json_schema", before), BYTES)
    assert takes(schema, taken) and not takes(schema, not_taken)


@pytest.mark.parametrize("keyword", LOOSE)
def test_who_is_strict_is_refused_instead(keyword: str) -> None:
    schema, _, _ = LOOSE[keyword]
    assert loosened(schema, strict=True)[1] == ()
    with pytest.raises(BadRequest, match="JSON schema"):
        check(grammar(schema, strict=True), BYTES)


ANNOTATED = [
    *(
        {"type": "string", "format": each}
        for each in ("path", "password", "binary", "byte", "base64", "uri-reference")
    ),
    {"type": "integer", "format": "int64"},
    {"format": ["date"]},
    {"type": "array", "items": INTEGER, "uniqueItems": False},
    {"type": "object", "propertyNames": STRING, "additionalProperties": INTEGER},
    {"type": "string", "deprecated": True, "title": "x", "x-order": 3, "nullable": True},
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("schema", ANNOTATED)
def test_what_binds_nothing_is_no_loss(schema: dict[str, Any], strict: bool) -> None:
    if strict and {"uniqueItems", "propertyNames"} & set(schema):
        pytest.skip("they bind, if only in theory")
    assert loosened(schema, strict=strict)[1] == ()
    check(grammar(schema, strict), BYTES)


@pytest.mark.parametrize("known", sorted(FORMATS))
def test_known_formats_bind(known: str) -> None:
    assert loosened({"type": "string", "format": known})[0]["format"] == known
    check(grammar({"type": "string", "format": known}), BYTES)


def test_properties_make_an_object_and_no_others_are_invented() -> None:
    schema = {"properties": {"ok": {"type": "boolean"}, "n": INTEGER}, "required": ["ok", "n", "why"]}
    assert takes(schema, '{"ok":true,"n":1,"why":"so"}')
    assert not takes(schema, '"text"')
    assert not takes(schema, '{"ok":true,"n":1,"why":1,"ok":true}'), "a key twice"
    assert not takes(schema, '{"ok":true,"n":1,"why":1,"more":1}')
    assert takes(schema | {"additionalProperties": True}, '{"ok":true,"n":1,"why":1,"more":1}')
    assert not takes(schema | {"additionalProperties": True}, '{"ok":true,"n":1,"why":1,"n":1}')


def test_joined_objects_stay_open_for_each_other() -> None:
    joined = {"allOf": [objects(a=INTEGER), objects(b=INTEGER)]}
    assert takes(joined, '{"a":1,"b":2}')
    base = objects(kind=STRING) | {"anyOf": [objects(a=INTEGER), objects(b=INTEGER)]}
    assert takes(base, '{"kind":"x","b":2}')


def test_json_is_compact() -> None:
    schema = objects(ok={"type": "boolean"}, n=INTEGER, list={"type": "array", "items": INTEGER})
    assert takes(schema, '{"ok":true,"n":12,"list":[1,2]}')
    assert takes(schema, '{"ok": true, "n": 12, "list": [1, 2]}')
    for loose in ('{ "ok"', '{"ok" :', '{"ok":  ', '{"ok":true ,', '{"ok":true,\n', "\n{"):
        state = GrammarState(grammar(schema), BYTES)
        with pytest.raises(BadRequest):
            [state.accept(byte) for byte in loose.encode()]


class Rope(BaseModel):
    kind: Literal["rope"]
    metres: int


class Bolt(BaseModel):
    kind: Literal["bolt"]
    steel: bool


class Rack(BaseModel):
    """What pydantic makes of sets, tuples, dicts with keys of a kind, and unions with a discriminator."""

    tags: set[str]
    pair: tuple[int, str]
    counts: dict[Annotated[str, Field(pattern="^[a-z]+$")], int]
    gear: list[Annotated[Rope | Bolt, Field(discriminator="kind")]]
    note: str | None = None


def test_pydantic_s_schemas_are_taken() -> None:
    schema = Rack.model_json_schema()
    assert loosened(schema)[1] == ("uniqueItems",)
    rack = '{"tags":["a"],"pair":[1,"x"],"counts":{"b":1},"gear":[{"kind":"bolt","steel":true}],"note":null}'
    assert takes(schema, rack) and Rack.model_validate_json(rack)
    assert not takes(schema, rack.replace("bolt", "rope"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), JSON, max_size=5), st.booleans())
def test_whatever_a_schema_holds_it_is_read_or_refused(schema: dict[str, Any], strict: bool) -> None:
    bindable, names = loosened(schema, strict=strict)
    assert loosened(bindable, strict=strict) == (bindable, ()), "all of it was done at once"
    assert not (strict and names)
    try:
        check(Grammar("json_schema", json.dumps(bindable)), BYTES)
    except BadRequest as refused:
        assert "Unimplemented" not in refused.message or strict


def test_a_schema_that_is_nested_deeply_costs_no_stack() -> None:
    deep: dict[str, Any] = INTEGER
    for _ in range(20_000):
        deep = {"items": deep, "uniqueItems": True}
    assert loosened(deep)[1] == ("uniqueItems",)
