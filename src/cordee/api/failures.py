"""Errors as HTTP clients see them: OpenAI's error body, a status, and when to try again."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cordee.errors import BadRequest, CordeeError, ModelNotFound, Overloaded, RateLimited

# In this time a full queue moves on, a lost stage is replaced, and most models are loaded.
RETRY_AFTER_SECONDS = 5
# What some statuses come with (RFC 9110).
HEADERS = {503: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
# Responses' names for fields of chat completions, by which the rooms below know them.
RESPONSES_NAMES = {"response_format": "text.format"}
# Anthropic's names for errors, by status.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
MESSAGE_CHARS_MAX = 1000  # some messages quote the request


class RequestTooLarge(BadRequest):
    """The request's body is larger than this server reads."""

    http_status = 413
    code = "request_too_large"


class WrongContentType(BadRequest):
    """The request's body is not declared as plain JSON."""

    http_status = 415
    code = "unsupported_media_type"


class RequestTimeout(BadRequest):
    """The request's body did not arrive in time."""

    http_status = 408
    code = "request_timeout"


class ForbiddenOrigin(BadRequest):
    """The request comes from a page of another site, or is for a host name that is not this machine's."""

    http_status = 403
    code = "forbidden_origin"


class AdminKeyNeeded(BadRequest):
    """The key may ask, but not change what is served here; one made with `--admin` may."""

    http_status = 403
    code = "admin_key_needed"


class ModelLoading(CordeeError):
    """The model is still being loaded; try again later."""

    exit_code = 9
    http_status = 503
    code = "model_loading"


class NoSuchPath(BadRequest):
    """There is no such path."""

    http_status = 404
    code = "not_found"


class WrongMethod(BadRequest):
    """The path is for another method."""

    http_status = 405
    code = "method_not_allowed"


class NotOffered(CordeeError):
    """This server deliberately does not do this; the message says why, and what does."""

    exit_code = 2
    http_status = 501
    code = "not_offered"


class ClientGone(Exception):
    """The client closed the connection: no answer can be sent."""


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    known = error if isinstance(error, CordeeError) else CordeeError()
    kind = "invalid_request_error" if known.http_status < 500 else "server_error"
    param = "model" if isinstance(error, ModelNotFound | ModelLoading) else getattr(error, "param", None)
    return {"error": {"message": error_text(error), "type": kind, "param": param, "code": known.code}}


def error_text(error: Exception) -> str:
    """What a client is told. Anything but a `CordeeError` is a bug, whose text is not shown."""
    if not isinstance(error, CordeeError):
        return "the server failed at this request; its log says why"
    message = error.message
    return message if len(message) <= MESSAGE_CHARS_MAX else message[:MESSAGE_CHARS_MAX] + "…"


def ollama_error(error: Exception) -> dict[str, Any]:
    """Ollama's error, which is a text: its clients show an object as `[object Object]`."""
    return {"error": error_text(error)}


def responses_error(error: Exception) -> dict[str, Any]:
    """OpenAI's error object, where fields have the names of Responses."""
    body = error_body(error)
    body["error"]["param"] = RESPONSES_NAMES.get(body["error"]["param"], body["error"]["param"])
    return body


def anthropic_error(error: Exception) -> dict[str, Any]:
    """Anthropic's error object."""
    status = error.http_status if isinstance(error, CordeeError) else 500
    kind = "invalid_request_error" if status < 500 else "api_error"
    if isinstance(error, Overloaded | ModelLoading):
        kind = "overloaded_error"
    kind = ANTHROPIC_TYPES.get(status, kind)
    return {"type": "error", "error": {"type": kind, "message": error_text(error)}}


# Error bodies of APIs other than OpenAI's, by the beginning of their paths.
BODIES: Mapping[str, Callable[[Exception], dict[str, Any]]] = {
    "/api/": ollama_error,
    "/v1/messages": anthropic_error,
    "/v1/responses": responses_error,
}


def error_response(error: Exception, path: str) -> Response:
    """The response to a request for `path` that failed before its answer began, as that path's API has it."""
    status = error.http_status if isinstance(error, CordeeError) else 500
    body_of = next((body for prefix, body in BODIES.items() if path.startswith(prefix)), error_body)
    headers = HEADERS.get(status)
    if isinstance(error, RateLimited):
        headers = {"Retry-After": str(math.ceil(error.wait_seconds))}
    return json_response(body_of(error), status, headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def on_failure(request: Request, error: Exception) -> Response:
    """Starlette's handler of every error but its own."""
    return error_response(error, request.url.path)


async def on_client_gone(_: Request, __: Exception) -> Response:
    """Never read: the server drops what is sent to a closed connection."""
    return Response(status_code=499)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own errors: no such path, or not with this method."""
    assert isinstance(error, HTTPException), "it is registered for these"
    method, path = request.method, request.url.path
    if error.status_code == 405:
        known = WrongMethod(f"{path} is not for {method}; docs/api.md lists the endpoints")
    else:
        known = NoSuchPath(f"there is no {path} here; docs/api.md lists the endpoints")
    response = error_response(known, path)
    response.headers.update(error.headers or {})
    return response
