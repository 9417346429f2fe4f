"""OpenAI's endpoints over model services: HTTP requests in, `replies` out."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api.answers import Job
from cordee.api.core import AnswerOptions, ApiCore
from cordee.api.failures import json_response
from cordee.api.options import answer_options, is_given, limit, schema_grammar
from cordee.api.prompts import chat_turn, completion_prompts
from cordee.api.replies import ChatReply, CompletionReply, Reply
from cordee.api.schemas import (
    LEGACY_MAX_TOKENS,
    ChatRequest,
    Common,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    StreamOptions,
    refuse,
)
from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.serving.interface import ModelService


class OpenAI:
    """The handlers."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._completion = msgspec.json.Decoder(CompletionRequest)

    async def models(self, _: HttpRequest) -> Response:
        """`GET /v1/models`"""
        return json_response({"object": "list", "data": [_model(*each) for each in sorted(self._models())]})

    async def model(self, request: HttpRequest) -> Response:
        """`GET /v1/models/{id}`"""
        name = request.path_params["name"]
        added = dict(self._models()).get(name) or self._core.service(name).model.added
        return json_response(_model(name, added))

    def _models(self) -> Iterator[tuple[str, str]]:
        """Names of models, and when each was added."""
        for model in self._core.embedders.models():
            yield model.name, model.added
        for name, service in self._core.services.items():
            yield name, service.model.added

    async def chat_completions(self, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._chat)
        service = core.asked(request, body.model)
        _check(body)
        top_logprobs = _top_logprobs(body)
        max_tokens = limit(body.max_completion_tokens, "max_completion_tokens") or _max_tokens(body)
        options = _options(service, body, max_tokens, top_logprobs)
        constraint = _grammar(request, body)
        job = await core.chat(service, chat_turn(body), options, constraint=constraint)
        return await self._answer(request, body, job, ChatReply, logprobs=top_logprobs is not None)

    async def completions(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._completion)
        service = core.asked(request, body.model)
        _check(body)
        max_tokens = _max_tokens(body) if _limits(body) else LEGACY_MAX_TOKENS
        options = _options(service, body, max_tokens, body.logprobs, _grammar(request, body))
        prompts = await core.in_thread(completion_prompts, service, body)
        job = core.completion(service, prompts, options)
        return await self._answer(request, body, job, CompletionReply, logprobs=body.logprobs is not None)

    async def _answer(
        self, request: HttpRequest, body: Common, job: Job, reply_of: type[Reply], *, logprobs: bool
    ) -> Response:
        wanted = body.stream_options or StreamOptions()
        reply = reply_of(
            job,
            logprobs=logprobs,
            usage_event=bool(wanted.include_usage),
            usage_always=bool(wanted.continuous_usage_stats),
        )
        if body.stream:
            return self._core.stream(job, reply)
        return json_response(reply.whole(await self._core.whole(request, job)))


def _check(body: Common) -> None:
    refuse(body)
    if body.stream_options is not None and not body.stream:
        raise BadRequest(
            "stream_options is for streams: set stream to true, or leave it out", "stream_options"
        )


def _max_tokens(body: Common) -> int | None:
    tokens = limit(body.max_tokens, "max_tokens")
    return limit(body.n_predict, "n_predict") if body.max_tokens is None else tokens


def _limits(body: Common) -> bool:
    return body.max_tokens is not None or body.n_predict is not None


def _options(
    service: ModelService,
    body: Common,
    max_tokens: int | None,
    top_logprobs: int | None,
    grammar: Grammar | None = None,
) -> AnswerOptions:
    return answer_options(
        body,
        service.vocabulary,
        max_tokens,
        grammar=grammar,
        logit_bias=body.logit_bias,
        top_logprobs=top_logprobs,
        n=body.n or 1,
    )


def _top_logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return body.top_logprobs or 0


def _grammar(request: HttpRequest, body: Common) -> Grammar | None:
    """What the client binds the text to; one thing at most."""
    found = _response_format(request, body) if isinstance(body, ChatRequest) else {}
    if is_given(body.json_schema):
        found["json_schema"] = schema_grammar(request, body.json_schema, "json_schema")
    if body.grammar is not None:
        found["grammar"] = Grammar("gbnf", body.grammar)
    if len(found) > 1:
        raise BadRequest(f"{' and '.join(found)} cannot both bind the answer: leave one out", list(found)[-1])
    return next(iter(found.values()), None)


def _response_format(request: HttpRequest, body: ChatRequest) -> dict[str, Grammar]:
    wanted, name = body.response_format, "response_format"
    if isinstance(wanted, JsonSchemaFormat):
        given = wanted.json_schema
        return {name: schema_grammar(request, given.schema, name, strict=bool(given.strict))}
    if not isinstance(wanted, JsonObjectFormat):
        return {}
    if is_given(wanted.schema):
        return {name: schema_grammar(request, wanted.schema, name)}
    return {name: Grammar("json_object")}


def _model(name: str, added: str) -> dict[str, Any]:
    created = int(datetime.fromisoformat(added).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "cordee"}
