"""No JSON schema ends the process: how deep one goes is bounded before llguidance goes down it by calls."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gbnf import BYTES

from cordee.generation.request import Grammar
from cordee.grammar.grammar import SCHEMA_DEPTH_MAX, check
from cordee.grammar.schema_depth import depth_bound
from small_stack import outcome

STEPS: dict[str, Callable[[str], dict]] = {
    "references": lambda ref: {"$ref": ref},
    "properties": lambda ref: {"type": "object", "properties": {"x": {"$ref": ref}}},
    "alternatives": lambda ref: {"anyOf": [{"type": "integer"}, {"$ref": ref}]},
    "all of": lambda ref: {"allOf": [{"type": "object"}, {"properties": {"y": {"$ref": ref}}}]},
    "items": lambda ref: {"type": "array", "items": {"$ref": ref}},
}


def chain(step: Callable[[str], dict], count: int) -> dict[str, Any]:
    links = {f"d{number}": step(f"#/$defs/d{number + 1}") for number in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": {"type": "string"}}}


def checked(schema: Mapping[str, Any]) -> str:
    """What becomes of a schema in a thread with a small stack: why it is refused, or 'taken'."""
    return outcome(lambda: check(Grammar("json_schema", json.dumps(schema)), BYTES), 2 << 20)


@pytest.mark.parametrize("kind", STEPS)
def test_a_chain_of_definitions_is_taken_or_refused(kind: str) -> None:
    assert "nested too deeply" in checked(chain(STEPS[kind], 1200))
    count = 20
    while depth_bound(chain(STEPS[kind], count + 1)) <= SCHEMA_DEPTH_MAX:
        count += 1
    assert checked(chain(STEPS[kind], count)) == "taken"


def test_a_chain_that_is_hidden_from_the_root_is_refused_too() -> None:
    """In a part with an `$id` of its own pointers begin at that part; elsewhere `$anchor` gives names."""
    hidden = chain(STEPS["properties"], 900) | {"$id": "http://example.com/hidden"}
    decoys = {f"d{number}": {"type": "string"} for number in range(901)}
    assert checked({"$ref": "http://example.com/hidden", "$defs": decoys | {"h": hidden}}) != "taken"
    anchored = {f"d{n}": {"$anchor": f"a{n}", "items": {"$ref": f"#a{n + 1}"}} for n in range(900)}
    assert checked({"$ref": "#a0", "$defs": anchored}) != "taken"


def test_large_schemas_of_the_usual_kind_are_taken() -> None:
    fields = {f"f{number}": {"$ref": f"#/$defs/t{number % 9}"} for number in range(60)}
    one = {"type": "object", "properties": {"id": {"type": "string"}}}
    types = {f"t{number}": one for number in range(9)}
    parts = {"name": {"$ref": "#/$defs/t1"}, "children": {"items": {"$ref": "#"}}}
    tree = {"type": "object", "properties": parts}
    assert checked({"type": "object", "properties": fields, "$defs": types}) == "taken"
    assert checked(tree | {"$defs": types}) == "taken"


NAMES = ("a", "b", "c", "d")


def schemas(later: bool) -> st.SearchStrategy[dict]:
    """Schemas with definitions; `later`: each refers only to later ones, so there is no loop."""

    def definition(place: int) -> st.SearchStrategy[Any]:
        names = NAMES[place + 1 :] if later else NAMES
        leaves = st.just({"type": "string"})
        if names:
            leaves |= st.sampled_from(names).map(lambda name: {"$ref": f"#/$defs/{name}"})
        return st.recursive(
            leaves,
            lambda inner: (
                st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
                | inner.map(lambda each: {"items": each})
            ),
            max_leaves=4,
        )

    defs = st.tuples(*map(definition, range(len(NAMES))))

    def schema(root: Any, found: tuple) -> dict:
        return {"items": root, "$defs": dict(zip(NAMES, found, strict=True))}

    return st.builds(schema, definition(-1), defs)


def longest(schema: dict, part: Any, seen: frozenset[str] = frozenset()) -> int:
    """The longest way down from a part that follows no reference twice."""
    if not isinstance(part, dict | list):
        return 0
    inner = list(part.values()) if isinstance(part, dict) else part
    found = 1 + max((longest(schema, each, seen) for each in inner), default=0)
    reference = part.get("$ref") if isinstance(part, dict) else None
    if reference is not None and reference not in seen:
        target = schema["$defs"][reference.rpartition("/")[2]]
        found = max(found, 1 + longest(schema, target, seen | {reference}))
    return found


@given(st.booleans().flatmap(schemas))
def test_no_way_down_is_longer_than_the_bound(schema: dict) -> None:
    assert longest(schema, schema) <= depth_bound(schema)
