"""What of a request had no effect: the reply's header names it, and the log does, once for each name.

Never a value: it may be private. Names are a client's, too, so they are bounded and plain.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cordee.api.schemas import HARMLESS_BYTES_MAX, Shape, policies

HEADER = "x-cordee-ignored"
KEY = "cordee.ignored"  # of the names, in a request's scope
NAMES_MAX = 24  # of one request: proxies take headers of some kilobytes
NAME_CHARS_MAX = 80
OBJECTS_MAX = 10_000  # of a body that are looked at; a conversation has some hundreds
LOGGED_MAX = 200  # names that the log has, each once
UNSAFE = re.compile(r"[^\w.\-$]", re.ASCII)

log = logging.getLogger(__name__)
_logged: set[str] = set()


def note(request: Request, *names: str) -> None:
    """Note that these parts of a request have no effect."""
    held: dict[str, None] = request.scope.setdefault(KEY, {})
    for name in names:
        name = UNSAFE.sub("?", name[:NAME_CHARS_MAX]) or "?"  # no header may end in an empty name
        if len(held) < NAMES_MAX:
            held[name] = None
        if name not in _logged and len(_logged) < LOGGED_MAX:
            _logged.add(name)
            log.info("%s: %s has no effect here; docs/api.md lists what has", request.url.path, name)


class NamesIgnored:
    """Adds the header to replies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: dict[str, None] = scope.setdefault(KEY, {})

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and names:
                MutableHeaders(scope=message)[HEADER] = ", ".join(names)
            await send(message)

        await self._app(scope, receive, named)


def unknown_fields(body: bytes | bytearray, kind: type[Shape]) -> list[str]:
    """The fields of a valid body that its schema does not have or that are not offered, at every level.

    `messages.mood` is one of some message; places in lists are left out.
    """
    found: dict[str, None] = {}
    pending: list[tuple[msgspec.Raw, Any, str]] = [(msgspec.Raw(body), kind, "")]
    for _ in range(OBJECTS_MAX):
        if not pending or len(found) >= NAMES_MAX:
            break
        raw, hint, path = pending.pop()
        first = bytes(memoryview(raw)[:1])
        if first == b"[":
            items = msgspec.json.decode(raw, type=list[msgspec.Raw])
            inner = [each for each in _within(hint) if get_origin(each) is list]
            pending += [(item, get_args(inner[0])[0], path) for item in reversed(items) if inner]
        elif first == b"{":
            given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            shape = _shape(hint, given)
            if shape is not None:
                found |= dict.fromkeys(f"{path}{name}" for name in _without_effect(shape, given))
                hints = _inner(shape)
                pending += [(given[name], hints[name], f"{path}{name}.") for name in hints if name in given]
    return list(found)


def _without_effect(shape: type[Shape], given: Mapping[str, msgspec.Raw]) -> Iterator[str]:
    known, tag = policies(shape), shape.__struct_config__.tag_field
    for name, raw in given.items():
        if name == tag:
            continue
        if name not in known:
            yield name
            continue
        extra = known[name].extra or {}
        value = memoryview(raw)
        if "unoffered" in extra and (
            len(value) > HARMLESS_BYTES_MAX or msgspec.json.decode(raw) not in extra["harmless"]
        ):
            yield name


def _shape(hint: Any, given: Mapping[str, msgspec.Raw]) -> type[Shape] | None:
    """Which object this is; where it may be one of several, its tag says so."""
    shapes = [each for each in _within(hint) if isinstance(each, type) and issubclass(each, Shape)]
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    for each in shapes:
        config = each.__struct_config__
        tag = given.get(config.tag_field or "")
        if tag is not None and msgspec.json.decode(tag) == config.tag:
            return each
    return None


@cache
def _inner(shape: type[Shape]) -> Mapping[str, Any]:
    """The fields of an object that hold objects with a schema, or lists of such."""
    hints = get_type_hints(shape, include_extras=True)
    return {name: hint for name, hint in hints.items() if name in policies(shape) and _holds_shapes(hint)}


def _holds_shapes(hint: Any) -> bool:
    return any(
        (get_origin(each) is list and _holds_shapes(get_args(each)[0]))
        or (isinstance(each, type) and issubclass(each, Shape))
        for each in _within(hint)
    )


def _within(hint: Any) -> Iterator[Any]:
    """The alternatives of a type, without annotations."""
    origin = get_origin(hint)
    if origin is Annotated:
        yield from _within(get_args(hint)[0])
    elif origin in (Union, UnionType):
        for each in get_args(hint):
            yield from _within(each)
    else:
        yield hint
