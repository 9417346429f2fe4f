"""`GET /openapi.json`: the description of this API (OpenAPI 3.1), made from the schemas that requests are
decoded by, the shapes of replies, and the table of routes."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, cast, get_args

import msgspec
from starlette.routing import Route

import cordee
from cordee.api.failures import BODIES, HEADERS, anthropic_error, error_body, ollama_error
from cordee.api.schemas import Shape, policies
from cordee.endpoints.agent_reply_shapes import MessagesErrorReply, OllamaError
from cordee.endpoints.operations import ALWAYS, JSON, NDJSON, OPERATIONS, WITH_BODY, Operation
from cordee.endpoints.reply_shapes import ErrorReply, Health
from cordee.endpoints.responses_schemas import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from cordee.generation.sampling import RANGES

Json = dict[str, Any]

PLACES = "#/components/schemas/{name}"
# Objects that are decoded by a schema of their own, after the body: by the class and field that hold them.
INNER: Mapping[tuple[type, str], tuple[type, ...]] = {
    (ResponsesRequest, "input"): (MessageItem, FunctionCallItem, FunctionCallOutputItem, ReasoningItem),
}
ABOUT = (
    "The API of one Cordée server: OpenAI's, Anthropic's and Ollama's, and some of llama.cpp's. Fields that "
    "are not listed are ignored, and named in the header `x-cordee-ignored`."
)
# Shapes of errors by what makes them, if it is not OpenAI's.
ERRORS: Mapping[Callable[[Exception], Json], Any] = {
    anthropic_error: MessagesErrorReply,
    ollama_error: OllamaError,
}
PATTERN_ENDS = re.compile(r"\\A(.*)\\Z", re.DOTALL)  # Python's marks of the two ends; JSON Schema has ^ and $
PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def described(routes: Iterable[Route]) -> bytes:
    """The description of these routes, as JSON.

    Raises:
        KeyError: the table lacks one of them.
    """
    return _document(tuple(sorted(_operations(routes))))


def _operations(routes: Iterable[Route]) -> Iterable[tuple[str, str]]:
    for route in routes:
        path = PARAMETER.sub(r"{\1}", route.path)
        for method in (route.methods or set()) - {"HEAD"}:
            yield method, path


@cache
def _document(found: tuple[tuple[str, str], ...]) -> bytes:
    operations = {key: OPERATIONS[key] for key in found}
    schemas, components = _schemas(operations.values())
    paths: dict[str, Json] = {}
    for (method, path), operation in operations.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, schemas)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "Cordée", "version": cordee.__version__, "description": ABOUT},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"key": []}],
        "components": {"schemas": components, "securitySchemes": keys},
    }
    return msgspec.json.encode(document)


def _schemas(operations: Iterable[Operation]) -> tuple[Mapping[Any, Json], Json]:
    """The schema of each type of these operations, and the components that they refer to."""
    inner = [each for kinds in INNER.values() for each in kinds]
    types: list[Any] = [ErrorReply, MessagesErrorReply, OllamaError, *inner]
    for each in operations:
        types += [each.body, None if isinstance(each.reply, str) else each.reply]
        types += [each.stream[1]] if each.stream else []
    types = [each for each in types if each is not None]
    made, components = msgspec.json.schema_components(types, ref_template=PLACES)
    schemas = dict(zip(types, made, strict=True))
    for kind in _shapes(types):
        if kind.__name__ in components:
            _complete(components[kind.__name__], kind, schemas)
    return schemas, cast("Json", _portable(components))


def _shapes(types: Iterable[Any]) -> set[type[Shape]]:
    """All objects of requests, those within others, too."""
    found: set[type[Shape]] = set()
    waiting = list(types)
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, Shape) and kind not in found:
            found.add(kind)
            waiting += [field.type for field in msgspec.structs.fields(kind)]
    return found


def _complete(component: Json, kind: type[Shape], schemas: Mapping[Any, Json]) -> None:
    """Say of an object of a request what msgspec's schema cannot know: which fields have no effect or are
    refused, and the ranges of samplers."""
    for name, meta in policies(kind).items():
        extra = meta.extra or {}
        field: Json = component["properties"][name]
        if "refused" in extra:
            harmless = list(extra["harmless"])
            component["properties"][name] = {"enum": harmless, "description": f"refused: {extra['refused']}"}
        elif reason := extra.get("ignored") or extra.get("unoffered"):
            component["properties"][name] = {"description": f"no effect: {reason}"}
        elif name in RANGES and meta.ge is None:
            _limit(field, *RANGES[name])
        if inner := INNER.get((kind, name)):
            items = {"anyOf": [schemas[each] for each in inner]}
            for choice in field.get("anyOf", ()):
                if choice.get("type") == "array":
                    choice["items"] = items


def _limit(field: Json, low: float, high: float) -> None:
    for choice in field.get("anyOf", [field]):
        if choice.get("type") in ("integer", "number"):
            choice |= {"minimum": low, "maximum": high}


def _portable(value: Any) -> Any:
    """A schema with the patterns of JSON Schema (ECMA-262) in place of Python's."""
    if isinstance(value, list):
        return [_portable(each) for each in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    read = {key: _portable(each) for key, each in cast("Json", value).items()}
    if isinstance(pattern := read.get("pattern"), str):
        read["pattern"] = PATTERN_ENDS.sub(r"^\1$", pattern)
    return read


def _operation(path: str, operation: Operation, schemas: Mapping[Any, Json]) -> Json:
    made: Json = {"summary": operation.summary, "responses": _responses(path, operation, schemas)}
    if operation.body is not None:
        content = {JSON: {"schema": schemas[operation.body]}}
        made["requestBody"] = {"required": True, "content": content}
    if names := PARAMETER.findall(path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return made


def _responses(path: str, operation: Operation, schemas: Mapping[Any, Json]) -> Json:
    responses: Json = {}
    if operation.reply is not None:
        good: Json = {"description": operation.summary, "content": _content(operation, schemas)}
        if operation.body is not None:
            names = {"description": "fields without effect", "schema": {"type": "string"}}
            good["headers"] = {"x-cordee-ignored": names}
        responses["200"] = good
    statuses = {*ALWAYS, *operation.statuses, *(WITH_BODY if operation.body else ())}
    for status in sorted(statuses):
        error = schemas[_error(path)]
        if status == 503 and operation.reply is Health:
            error = {"anyOf": [schemas[Health], error]}
        failed: Json = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": error}}}
        if status in HEADERS:
            failed["headers"] = {name: {"schema": {"type": "string"}} for name in HEADERS[status]}
        responses[str(status)] = failed
    return responses


def _content(operation: Operation, schemas: Mapping[Any, Json]) -> Json:
    if isinstance(operation.reply, str):
        return {operation.reply: {"schema": {"type": "string"}}}
    content: Json = {JSON: {"schema": schemas[operation.reply]}}
    if operation.stream is not None:
        media_type, event = operation.stream
        each = "a JSON object on each line" if media_type == NDJSON else "server-sent events"
        # OpenAPI 3.1 has no word for what a stream is made of.
        content[media_type] = {"schema": {"type": "string", "description": each}, "x-item": schemas[event]}
    return content


def _error(path: str) -> Any:
    """The shape of a path's errors (failures.py)."""
    made = next((body for prefix, body in BODIES.items() if path.startswith(prefix)), error_body)
    return ERRORS.get(made, ErrorReply)
