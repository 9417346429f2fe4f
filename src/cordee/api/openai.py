"""OpenAI's endpoints over model services: HTTP requests in, `replies` out."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api.answers import Job
from cordee.api.core import AnswerOptions, ApiCore, random_seed
from cordee.api.failures import json_response
from cordee.api.prompts import chat_turn, completion_prompts
from cordee.api.replies import ChatReply, CompletionReply, Reply
from cordee.api.schemas import (
    LEGACY_MAX_TOKENS,
    ChatRequest,
    Common,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    refuse,
)
from cordee.errors import BadRequest
from cordee.generation.request import Grammar, SamplingParams

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)


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
        service = core.service(body.model)
        _check(body)
        top_logprobs = _top_logprobs(body)
        options = _options(body, top_logprobs, body.max_completion_tokens or body.max_tokens)
        job = await core.chat(service, chat_turn(body), options, constraint=_grammar(body))
        return await self._answer(request, body, job, ChatReply, logprobs=top_logprobs is not None)

    async def completions(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._completion)
        service = core.service(body.model)
        _check(body)
        options = _options(body, body.logprobs, body.max_tokens or LEGACY_MAX_TOKENS, _grammar(body))
        prompts = await core.in_thread(completion_prompts, service, body)
        job = core.completion(service, prompts, options)
        return await self._answer(request, body, job, CompletionReply, logprobs=body.logprobs is not None)

    async def _answer(
        self, request: HttpRequest, body: Common, job: Job, reply_of: type[Reply], *, logprobs: bool
    ) -> Response:
        usage_event = bool(body.stream_options and body.stream_options.include_usage)
        reply = reply_of(job, logprobs=logprobs, usage_event=usage_event)
        if body.stream:
            return self._core.stream(job, reply)
        return json_response(reply.whole(await self._core.whole(request, job)))


def _check(body: Common) -> None:
    refuse(body)
    if body.stream_options is not None and not body.stream:
        raise BadRequest(
            "stream_options is for streams: set stream to true, or leave it out", "stream_options"
        )


def _options(
    body: Common, top_logprobs: int | None, max_tokens: int | None, grammar: Grammar | None = None
) -> AnswerOptions:
    """How tokens are chosen. What a client leaves out, or sends as null, keeps OpenAI's default."""
    given = {name: getattr(body, name) for name in SAMPLING if getattr(body, name) is not None}
    sampling = SamplingParams(
        **given,
        seed=random_seed() if body.seed is None else body.seed,
        logit_bias=_logit_bias(body.logit_bias or {}),
        grammar=grammar,
        top_logprobs=top_logprobs,
    )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return AnswerOptions(sampling=sampling, max_tokens=max_tokens, stop=stop, n=body.n or 1)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise BadRequest("logit_bias must have token ids for keys, as strings", "logit_bias") from None


def _top_logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return body.top_logprobs or 0


def _grammar(body: Common) -> Grammar | None:
    wanted = body.response_format if isinstance(body, ChatRequest) else None
    constraint = None
    if isinstance(wanted, JsonObjectFormat):
        constraint = Grammar("json_object")
    elif isinstance(wanted, JsonSchemaFormat):
        constraint = Grammar("json_schema", bytes(wanted.json_schema.schema).decode())
    if body.grammar is None:
        return constraint
    if constraint is not None:
        raise BadRequest("grammar and response_format cannot both bind the answer: leave one out", "grammar")
    return Grammar("gbnf", body.grammar)


def _model(name: str, added: str) -> dict[str, Any]:
    created = int(datetime.fromisoformat(added).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "cordee"}
