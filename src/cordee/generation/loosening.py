"""JSON schemas as clients write them, made such that llguidance can bind text to them.

Generators of schemas (pydantic, zod, MCP servers) write keywords that no grammar can hold a text to, such as
`uniqueItems`, and annotations of their own. The latter are left out; the former too, and named, unless the
client insists (`strict`): then llguidance refuses them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, cast


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What llguidance binds: its parser/src/json/schema.rs, IMPLEMENTED.
BOUND = _words(
    "anyOf oneOf allOf $ref const enum type items additionalItems prefixItems minItems maxItems properties "
    "additionalProperties patternProperties required minProperties maxProperties minLength maxLength "
    "pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"
)
# What it reads beside: definitions, and where references point to.
READ = _words("$anchor $defs definitions $schema $id id")
# Assertions of JSON Schema 2020-12 and older that it does not know.
UNBOUND = _words(
    "uniqueItems propertyNames contains minContains maxContains not if then else dependentRequired "
    "dependentSchemas dependencies unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef"
)
FORMATS = _words("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown")
# Regular expressions of ECMA 262 that no finite automaton has: looking around, and references back.
_NOT_REGULAR = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9]|\\k<")

_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")

Schema = dict[str, Any]


def loosened(schema: Schema, *, strict: bool = False) -> tuple[Schema, frozenset[str]]:
    """A schema that can be bound, as far as can be told by looking at it, and the keywords left out for that.

    `properties` without a `type` mean an object.
    """
    whole = dict(schema)
    ignored: set[str] = set()
    open_schemas = [whole]
    while open_schemas:
        here = open_schemas.pop()
        ignored.update(_prune(here, strict=strict))
        open_schemas.extend(_children(here))
    return whole, frozenset(ignored)


def loosened_text(schema: str) -> tuple[str, frozenset[str]]:
    """As `loosened`, for JSON text; what is no object is given back as it is."""
    try:
        read = json.loads(schema)
    except (ValueError, RecursionError):
        return schema, frozenset()
    if not isinstance(read, dict):
        return schema, frozenset()
    whole, ignored = loosened(cast("Schema", read))
    return json.dumps(whole, ensure_ascii=False), ignored


def _prune(schema: Schema, *, strict: bool) -> Iterator[str]:
    """Take out of one schema, not of those in it, what cannot be bound; the names of what had a meaning."""
    for key in list(schema):
        if key in UNBOUND:
            if not strict:
                del schema[key]
                yield key
        elif key not in BOUND and key not in READ:
            del schema[key]  # an annotation
    if "format" in schema and schema["format"] not in FORMATS:
        del schema["format"]
        yield "format"
    for key, is_bound in (("pattern", _is_regular), ("$ref", _is_local)):
        if key in schema and not strict and not is_bound(schema[key]):
            del schema[key]
            yield key
    if "properties" in schema and not {"type", "anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
        schema["type"] = "object"


def _is_regular(pattern: Any) -> bool:
    return isinstance(pattern, str) and not _NOT_REGULAR.search(pattern)


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith("#")


def _children(schema: Schema) -> Iterator[Schema]:
    """The schemas in one, copied so that they can be changed."""
    for key in _OF_SCHEMAS:
        if isinstance(named := schema.get(key), dict):
            schema[key] = copied = dict(cast("Schema", named))
            yield from _copied(copied, list(copied))
    for key in _LISTS:
        if isinstance(several := schema.get(key), list):
            schema[key] = copies = list(cast("list[Any]", several))
            yield from _copied(copies, range(len(copies)))
    yield from _copied(schema, [key for key in _SINGLE if key in schema])


def _copied(holder: Any, places: Any) -> Iterator[Schema]:
    for place in places:
        if isinstance(holder[place], dict):
            holder[place] = copy = dict(cast("Schema", holder[place]))
            yield copy
