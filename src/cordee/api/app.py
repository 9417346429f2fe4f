"""The HTTP application: its endpoints, which requests are let in, and how many at once."""

import ipaddress
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cordee.api.core import ApiCore
from cordee.api.embeddings import Embeddings
from cordee.api.failures import (
    ClientGone,
    ForbiddenOrigin,
    error_response,
    json_response,
    on_client_gone,
    on_failure,
    on_http_exception,
)
from cordee.api.ignored import NamesIgnored
from cordee.api.keys import LocalKey
from cordee.api.ollama import Ollama
from cordee.api.openai import OpenAI
from cordee.api.stream import Timing
from cordee.errors import CordeeError, Overloaded
from cordee.serving.embedders import Embedders
from cordee.serving.interface import ModelService

REQUESTS_MAX = 2048  # at once; each costs a task, a connection and its body, beside its place in a queue
RERANK_PATHS = ("/v1/rerank", "/v1/reranking", "/rerank")  # Jina and vLLM, llama.cpp, Cohere's oldest
HEADER_CHARS_MAX = 100  # of a header that a message quotes


def local_now() -> datetime:
    """The time for chat templates and replies."""
    return datetime.now().astimezone()


def create_app(
    services: Mapping[str, ModelService],
    *,
    embedders: Embedders,
    expected: Collection[str] = (),
    key: LocalKey | None = None,
    refusal: Callable[[str], CordeeError | None] = lambda _: None,
    clock: Callable[[], datetime] = local_now,
    timing: Timing = Timing(),  # noqa: B008  frozen
) -> Starlette:
    """The application over running services, by the model's name.

    `services` may be filled after the server has started: a model of `expected` that is not in it yet is
    loading, and its requests are told to try again. `embedders` are closed with the application. `refusal`
    says why a model cannot be used here, if that is so. Only this machine may send requests; with a `key`,
    only who knows it.
    """
    core = ApiCore(services, embedders, expected, refusal, clock, timing)
    openai, embeddings, ollama = OpenAI(core), Embeddings(core), Ollama(core)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        core.close()
        await embedders.close()

    async def health(_: Request) -> Response:
        return health_response(services, expected)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", openai.models),
            Route("/v1/models/{name:path}", openai.model),
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/completions", openai.completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
            *(Route(path, embeddings.rerank, methods=["POST"]) for path in RERANK_PATHS),
            *ollama.routes(),
        ],
        lifespan=lifespan,
        middleware=[Middleware(Guard, key=key), Middleware(NamesIgnored)],
        exception_handlers={
            HTTPException: on_http_exception,
            CordeeError: on_failure,
            ClientGone: on_client_gone,
            Exception: on_failure,
        },
    )


def health_response(services: Mapping[str, ModelService], expected: Collection[str]) -> Response:
    """200 while some model can answer and none is still being loaded, else 503; with each one's state.

    A model of the cluster that was not asked for yet is idle, which counts as ready.
    """
    states = dict.fromkeys(expected, "loading") | {name: each.health for name, each in services.items()}
    if not states or "loading" in states.values():
        status = "loading"
    else:
        good = any(state in ("ready", "idle") for state in states.values())
        status = "ok" if good else "recovering"
    return json_response({"status": status, "models": states}, 200 if status == "ok" else 503)


class Guard:
    """Lets in requests from this machine to a name of this machine, with the key if there is one, and bounds
    how many there are at once.

    A page of another site can make a browser send requests here: to this server's address, which the Origin
    header shows, or to a name of its own that it makes point here (DNS rebinding), which the Host header
    shows.
    """

    def __init__(self, app: ASGIApp, key: LocalKey | None = None) -> None:
        self._app = app
        self._key = key
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            _check_headers(headers)
            if self._key is not None:
                self._key.check(headers.get("authorization"))
            if self._open >= REQUESTS_MAX:
                raise Overloaded(f"{REQUESTS_MAX} requests are being answered; try again in a moment")
        except CordeeError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


def _check_headers(headers: Headers) -> None:
    for host in headers.getlist("host") or [""]:
        if not _is_loopback(f"//{host}"):
            raise ForbiddenOrigin(
                f"the host {host[:HEADER_CHARS_MAX]!r} is not this machine: use http://127.0.0.1 or http://localhost"
            )
    for origin in headers.getlist("origin"):
        if not _is_loopback(origin):
            raise ForbiddenOrigin(f"pages of {origin[:HEADER_CHARS_MAX]} may not use this server")


def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
