"""The HTTP application: its endpoints, and what stands before them."""

from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cordee.api.authenticator import Authenticator
from cordee.api.core import ApiCore
from cordee.api.embeddings import Embeddings
from cordee.api.failures import (
    HEADERS,
    ClientGone,
    json_response,
    on_client_gone,
    on_failure,
    on_http_exception,
)
from cordee.api.guard import AUTHORITY_PATH, Cors, Guard, KeyGuard
from cordee.api.ignored import NamesIgnored
from cordee.api.listing import states
from cordee.api.metrics import CONTENT_TYPE
from cordee.api.openai import OpenAI
from cordee.api.stream import Timing
from cordee.api.usage import usage_response
from cordee.console.console import Console
from cordee.endpoints.anthropic import Anthropic
from cordee.endpoints.ollama import Ollama
from cordee.endpoints.openapi import described
from cordee.endpoints.responses import Responses
from cordee.endpoints.tokens import TokenEndpoints
from cordee.errors import CordeeError
from cordee.serving.embedders import Embedders
from cordee.serving.interface import ModelService
from cordee.serving.samples import Sample
from cordee.web.pages import Pages
from cordee.web.session_cookie import is_public, token_of

RERANK_PATHS = ("/v1/rerank", "/v1/reranking", "/rerank")  # Jina and vLLM, llama.cpp, Cohere's oldest


def local_now() -> datetime:
    """The time for chat templates and replies."""
    return datetime.now().astimezone()


def create_app(
    services: Mapping[str, ModelService],
    *,
    embedders: Embedders,
    expected: Collection[str] = (),
    authenticator: Authenticator | None = None,
    origins: Collection[str] = (),
    authority: bytes = b"",
    refusal: Callable[[str], CordeeError | None] = lambda _: None,
    clock: Callable[[], datetime] = local_now,
    timing: Timing = Timing(),  # noqa: B008  frozen
    samples: Callable[[], Iterable[Sample]] = tuple,
    others: Callable[[], list[dict[str, str]]] = list,
    console: Console | None = None,
) -> Starlette:
    """The application over running services, by the model's name.

    `services` may be filled after the server has started: a model of `expected` that is not in it yet is
    loading, and its requests are told to try again. `embedders` are closed with the application. `refusal`
    says why a model cannot be used here, if that is so. Who may ask is the `authenticator`'s affair and that
    of the listener (guard.Access); `origins` are pages that may, beside those of this machine. `authority` is
    the certificate (PEM) that clients of other machines have to trust, if there is one. `samples` are numbers
    for the metrics, beside those of the requests themselves. `others` tells where else the page is; `console`
    is closed with the application.
    """
    authenticator = authenticator or Authenticator()
    core = ApiCore(services, embedders, expected, refusal, clock, timing)
    core.metrics.samples.append(samples)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        core.close()
        await embedders.close()
        if console is not None:
            await console.close()

    return Starlette(
        routes=[
            *Pages(authenticator, others).routes(),
            *_with_description(
                [*_state_routes(core), *_access_routes(authenticator, authority), *_routes(core)]
            ),
            *(console.routes() if console else []),
        ],
        lifespan=lifespan,
        middleware=[
            Middleware(Guard, origins=origins),
            Middleware(Cors, origins=origins),
            Middleware(KeyGuard, authenticator=authenticator, is_public=is_public, token_of=token_of),
            Middleware(NamesIgnored),
        ],
        exception_handlers={
            HTTPException: on_http_exception,
            CordeeError: on_failure,
            ClientGone: on_client_gone,
            Exception: on_failure,
        },
    )


def _with_description(routes: list[Route]) -> list[Route]:
    """These routes, and one that describes them."""

    async def openapi(_: Request) -> Response:
        return Response(described(routes), media_type="application/json")

    routes.append(Route("/openapi.json", openapi))
    return routes


def _state_routes(core: ApiCore) -> list[Route]:
    """How this server is."""

    async def ready(_: Request) -> Response:
        return health_response(core.services, core.expected)

    async def metrics(_: Request) -> Response:
        return Response(core.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        Route("/live", _live),
        Route("/ready", ready),
        Route("/health", ready),
        Route("/metrics", metrics),
    ]


def _routes(core: ApiCore) -> list[Route]:
    """What models are asked by."""
    openai, tokens, embeddings = OpenAI(core), TokenEndpoints(core), Embeddings(core)
    responses, anthropic = Responses(core), Anthropic(core)
    asked = {
        "/v1/chat/completions": openai.chat_completions,
        "/v1/completions": openai.completions,
        "/v1/fim/completions": openai.fim_completions,
        "/infill": openai.infill,
        "/v1/responses": responses.create,
        "/v1/messages": anthropic.messages,
        "/v1/messages/count_tokens": anthropic.count_tokens,
        "/v1/embeddings": embeddings.embeddings,
        **dict.fromkeys(RERANK_PATHS, embeddings.rerank),
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
        "/apply-template": tokens.apply_template,
    }
    return [
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/tokenizer_info", tokens.tokenizer_info),
        *(Route(path, handler, methods=["POST"]) for path, handler in asked.items()),
        *Ollama(core).routes(),
    ]


async def _live(_: Request) -> Response:
    return json_response({"status": "ok"})


def _access_routes(authenticator: Authenticator, authority: bytes) -> list[Route]:
    """What is about access itself: who used what, and the certificate that clients have to trust."""

    async def usage(_: Request) -> Response:
        return usage_response(authenticator.ledger)

    async def show_authority(_: Request) -> Response:
        return Response(authority, media_type="application/x-pem-file")

    return [Route("/v1/usage", usage), *([Route(AUTHORITY_PATH, show_authority)] if authority else [])]


def health_response(services: Mapping[str, ModelService], expected: Collection[str]) -> Response:
    """200 while some model can answer and none is still being loaded, else 503; with each one's state.

    A model of the cluster that was not asked for yet is idle, which counts as ready.
    """
    found = states(services, expected)
    if not found or "loading" in found.values():
        status = "loading"
    else:
        good = any(state in ("ready", "idle") for state in found.values())
        status = "ok" if good else "recovering"
    code = 200 if status == "ok" else 503
    return json_response({"status": status, "models": found}, code, HEADERS.get(code))
