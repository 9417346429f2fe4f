"""OpenAI's endpoints over model services: HTTP requests in, `replies` out."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from msgspec import structs
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import ignored
from cordee.api.answers import Job
from cordee.api.core import AnswerOptions, ApiCore
from cordee.api.failures import json_response
from cordee.api.infill import ANSWER_SHARE, InfillReply, infill_prompt, suffix_prompt
from cordee.api.listing import coming_model, described, embedding_model, listed
from cordee.api.logprobs import Echo
from cordee.api.options import answer_options, is_given, limit, schema_grammar
from cordee.api.prompts import GivenPrompt, completion_prompts, split_prompts
from cordee.api.replies import ChatReply, CompletionReply, Reply
from cordee.api.schemas import (
    LEGACY_MAX_TOKENS,
    ChatRequest,
    Common,
    CompletionRequest,
    FimRequest,
    InfillRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Prediction,
    StreamOptions,
    refuse,
)
from cordee.api.turns import chat_turn, unknown_tools
from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.serving.interface import ModelService


class OpenAI:
    """The handlers."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._completion = msgspec.json.Decoder(CompletionRequest)
        self._fim = msgspec.json.Decoder(FimRequest)
        self._infill = msgspec.json.Decoder(InfillRequest)

    async def models(self, _: HttpRequest) -> Response:
        """`GET /v1/models`"""
        core = self._core
        data = listed(core.services, await core.embedding_models(), core.expected, core.now)
        return json_response({"object": "list", "data": data})

    async def model(self, request: HttpRequest) -> Response:
        """`GET /v1/models/{id}`"""
        name, core = request.path_params["name"], self._core
        if name in core.expected and name not in core.services:
            return json_response(coming_model(name, core.now))
        for model in await core.embedding_models():
            if model.name == name:
                return json_response(embedding_model(model))
        return json_response(described(name, core.service(name)))

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
        job = await core.chat(request, service, chat_turn(body), options, constraint=constraint)
        if body.prediction is not None:
            job = await core.in_thread(predicted, service, job, body.prediction)
        ignored.note(request, *unknown_tools(body))
        return await self._answer(request, body, job, ChatReply, logprobs=top_logprobs is not None)

    async def completions(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._completion)
        service = core.asked(request, body.model)
        _check(body)
        options = _options(service, body, _completion_tokens(body), body.logprobs, _grammar(request, body))
        given = split_prompts(body)
        prompts = await core.in_thread(_completion_prompts, service, given, body)
        logprobs = body.logprobs is not None
        scores = bool(body.echo) and logprobs
        job = core.completion(service, prompts, options, scores_prompts=scores)
        echoes = [
            Echo(service.vocabulary, prompt, text if isinstance(text, str) else None)
            for prompt, text in zip(prompts, given if body.echo else (), strict=False)
        ]
        reply = CompletionReply(job, logprobs=logprobs, **_usage_wanted(body), echoes=echoes)
        return await self._reply(request, body, job, reply)

    async def fim_completions(self, request: HttpRequest) -> Response:
        """`POST /v1/fim/completions`, as Mistral has it: filling in, with a chat completion for a reply."""
        core = self._core
        body = await core.bodies.read(request, self._fim)
        service = core.asked(request, body.model)
        _check(body)
        options = _options(service, body, _max_tokens(body), None, _grammar(request, body))
        if body.random_seed is not None:
            options = replace(options, sampling=structs.replace(options.sampling, seed=body.random_seed))
        prompt = await core.in_thread(suffix_prompt, service, body.prompt, body.suffix or "")
        job = core.completion(service, [prompt], options)
        return await self._answer(request, body, job, ChatReply, logprobs=False)

    async def infill(self, request: HttpRequest) -> Response:
        """`POST /infill`, as llama.cpp has it."""
        core = self._core
        body = await core.bodies.read(request, self._infill)
        service = core.asked(request, body.model)
        _check(body)
        room = int(service.context * ANSWER_SHARE)
        answer = _max_tokens(body) or room
        options = _options(service, body, answer, None, _grammar(request, body))
        prompt = await core.in_thread(infill_prompt, service, body, min(answer, room))
        job = core.completion(service, [prompt], options)
        return await self._reply(request, body, job, InfillReply(job))

    async def _answer(
        self, request: HttpRequest, body: Common, job: Job, reply_of: type[Reply], *, logprobs: bool
    ) -> Response:
        reply = reply_of(job, logprobs=logprobs, **_usage_wanted(body))
        return await self._reply(request, body, job, reply)

    async def _reply(
        self, request: HttpRequest, body: Common, job: Job, reply: Reply | InfillReply
    ) -> Response:
        if body.stream:
            return self._core.stream(job, reply)
        return json_response(reply.whole(await self._core.whole(request, job)))


def _completion_prompts(
    service: ModelService, prompts: Sequence[GivenPrompt], body: CompletionRequest
) -> list[tuple[int, ...]]:
    """The token ids of a completion's prompts, each with the suffix if there is one."""
    if not body.suffix:
        return completion_prompts(service, prompts)
    if body.echo:
        raise BadRequest("with a suffix the prompt is not repeated: leave echo out", "echo")
    return [suffix_prompt(service, prompt, body.suffix) for prompt in prompts]


def _usage_wanted(body: Common) -> dict[str, bool]:
    wanted = body.stream_options or StreamOptions()
    return {
        "usage_event": bool(wanted.include_usage),
        "usage_always": bool(wanted.continuous_usage_stats),
    }


def _check(body: Common) -> None:
    refuse(body)
    if body.stream_options is not None and not body.stream:
        raise BadRequest(
            "stream_options is for streams: set stream to true, or leave it out", "stream_options"
        )


def _max_tokens(body: Common) -> int | None:
    tokens = limit(body.max_tokens, "max_tokens")
    return limit(body.n_predict, "n_predict") if body.max_tokens is None else tokens


def _completion_tokens(body: CompletionRequest) -> int | None:
    """OpenAI's default where nothing is said; 0 reads the prompt and no more."""
    if body.max_tokens == 0:
        return 0
    is_bound = body.max_tokens is not None or body.n_predict is not None
    return _max_tokens(body) if is_bound else LEGACY_MAX_TOKENS


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


def predicted(service: ModelService, job: Job, prediction: Prediction) -> Job:
    """The job with what its answers may be."""
    given = prediction.content
    text = given if isinstance(given, str) else "".join(part.text or "" for part in given)
    tokens = service.vocabulary.tokenize(text, special=False, add_bos=False)[: service.context]
    return replace(job, requests=[structs.replace(each, prediction=tuple(tokens)) for each in job.requests])
