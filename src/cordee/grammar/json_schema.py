"""JSON schemas as people and libraries write them, made into such as a grammar can bind (grammar.py).

What llguidance cannot bind it refuses, and most of it does not matter: a format that nobody checks, a set
that comes as a list. So a schema is loosened first, and the client told the keywords that are not obeyed.
The keywords that it binds: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, TypeGuard

# The formats that are bound; any other is an annotation (JSON Schema 2020-12, validation, section 7.2.1).
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Keywords that no grammar here binds, with the values that ask for nothing.
UNBOUND: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "contains": (True, {}),
    "minContains": (),
    "maxContains": (),
    "not": (False,),
    "if": (),
    "then": (),
    "else": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
# Keywords that bind nothing, but that llguidance takes for some that do.
ANNOTATIONS = frozenset(("deprecated", "contentSchema", "$vocabulary", "$dynamicAnchor", "$recursiveAnchor"))
# Look-arounds, references to groups, and word boundaries are beyond regular expressions.
IRREGULAR = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9bBkK])")

# Where schemas stand within a schema: alone, in a list, or by name.
SINGLE = ("items", "additionalItems", "additionalProperties")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
COMBINING = ("allOf", "anyOf", "oneOf", "$ref")
ABOUT_PROPERTIES = ("properties", "patternProperties", "additionalProperties", "required")

Holder = MutableMapping[Any, Any] | MutableSequence[Any]


def loosened(schema: Mapping[str, Any], *, strict: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A schema that can be bound, and the keywords of the given one that it does not obey, each once.

    With `strict` nothing is taken away that binds: what cannot be bound stays, and is refused where the
    grammar is compiled. In both cases unknown formats go; what has `properties` is an object; and an object
    that says nothing of other properties has none, as OpenAI and llama.cpp take it, so that a small model
    does not invent some without end. Objects stay open where schemas are joined: one may hold what the other
    allows.
    """
    names: dict[str, None] = {}
    closes = not any(map(_joins, _every(schema)))
    found: list[Any] = [schema]
    pending: list[tuple[Holder, Any]] = [(found, 0)]
    while pending:  # not by calls: a schema may be nested deeper than Python's stack
        holder, key = pending.pop()
        if not _is_object(holder[key]):
            continue
        kept = _shallow(holder[key])
        if not strict:
            _drop_unbound(kept, names)
        _settle(kept, closes)
        if not strict:
            _loosen_counts(kept, names)
        holder[key] = kept
        pending += _inner(kept)
    return found[0], tuple(names)


def _shallow(node: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose inner schemas can be replaced."""
    kept = dict(node)
    for key in (*LISTS, *NAMED):
        if _is_object(kept.get(key)) and key in NAMED:
            kept[key] = dict(kept[key])
        elif isinstance(kept.get(key), list):
            kept[key] = list(kept[key])
    return kept


def _inner(node: Mapping[str, Any]) -> Iterator[tuple[Holder, Any]]:
    """The places of the schemas within a schema, each as what holds it and its key there."""
    for key in SINGLE:
        if _is_object(node.get(key)):
            yield node, key  # pyright: ignore[reportReturnType] - a dict of `_shallow`, or only read
    for key in LISTS:
        if isinstance(held := node.get(key), list):
            yield from ((held, place) for place in range(len(held)))  # pyright: ignore[reportUnknownArgumentType]
    for key in NAMED:
        if _is_object(held := node.get(key)):
            yield from ((held, name) for name in held)


def _every(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas within it."""
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if _is_object(node):
            yield node
            pending += (holder[key] for holder, key in _inner(node))


def _joins(node: Mapping[str, Any]) -> bool:
    """Whether several schemas speak of the properties of one object."""
    combining = [key for key in COMBINING if key in node]
    all_of = node.get("allOf")
    several = isinstance(all_of, list) and len(all_of) > 1  # pyright: ignore[reportUnknownArgumentType]
    return several or len(combining) > 1 or (bool(combining) and any(key in node for key in ABOUT_PROPERTIES))


def _settle(node: dict[str, Any], closes: bool) -> None:
    """What means the same, or less, in words that llguidance takes."""
    for key in ANNOTATIONS & node.keys():
        del node[key]
    if "format" in node and node["format"] not in FORMATS:
        del node["format"]
    if (
        "discriminator" in node and "anyOf" not in node and "oneOf" in node
    ):  # OpenAPI's: the branches exclude one another
        _rename(node, "oneOf", "anyOf")
    properties = node.get("properties")
    if not _is_object(properties):
        return
    node.setdefault("type", "object")
    is_open = any(
        key in node for key in ("additionalProperties", "patternProperties", "unevaluatedProperties")
    )
    if closes and not is_open:
        for name in _required(node):
            properties.setdefault(name, True)
        node["additionalProperties"] = False


def _drop_unbound(node: dict[str, Any], names: dict[str, None]) -> None:
    """Take away what cannot be bound, and note its name."""
    for key, harmless in UNBOUND.items():
        if key in node and node.pop(key) not in harmless:
            names[key] = None
    if "oneOf" in node and "anyOf" not in node and "discriminator" not in node:
        _rename(node, "oneOf", "anyOf")
        names["oneOf"] = None
    pattern, reference = node.get("pattern"), node.get("$ref")
    if isinstance(pattern, str) and IRREGULAR.search(pattern):
        del node["pattern"]
        names["pattern"] = None
    if isinstance(reference, str) and "://" in reference:  # nothing is fetched
        del node["$ref"]
        names["$ref"] = None
    if "required" in node and not isinstance(node["required"], list):  # draft 3 had it within the property
        del node["required"]
        names["required"] = None
    patterns = node.get("patternProperties")
    if _is_object(patterns) and (len(patterns) > 1 or any(map(IRREGULAR.search, patterns))):
        # They must not overlap, which takes long to find out: any name may have any of their values.
        del node["patternProperties"]
        others = node.get("additionalProperties", True)
        if others is not True:
            node["additionalProperties"] = {"anyOf": [*patterns.values(), others]}
        names["patternProperties"] = None


def _loosen_counts(node: dict[str, Any], names: dict[str, None]) -> None:
    """Take numbers of properties away where some of these are optional: then only "at least one more" and "at
    most one more" can be bound, in an object that is closed."""
    properties, required = node.get("properties"), _required(node)
    if not _is_object(properties) or not properties.keys() - set(required):
        return
    least, most = node.get("minProperties", 0), node.get("maxProperties")
    if not isinstance(least, int) or not isinstance(most, int | None):
        return
    is_closed = node.get("additionalProperties") is False and "patternProperties" not in node
    more = (max(0, least - len(required)), None if most is None else max(0, most - len(required)))
    if more == (0, None) or (is_closed and more in ((1, None), (0, 1), (1, 1))):
        return
    for key in ("minProperties", "maxProperties"):
        if key in node:
            del node[key]
            names[key] = None


def _required(node: Mapping[str, Any]) -> list[str]:
    names = node.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []  # pyright: ignore[reportUnknownVariableType]


def _rename(node: dict[str, Any], old: str, new: str) -> None:
    """Rename a keyword in its place: their order decides about that of the properties."""
    renamed = {new if key == old else key: value for key, value in node.items()}
    node.clear()
    node.update(renamed)


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
