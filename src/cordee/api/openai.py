"""OpenAI's endpoints over model services: HTTP requests in, `replies` out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
from msgspec import structs
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api.answers import Job
from cordee.api.core import AnswerOptions, ApiCore, random_seed
from cordee.api.failures import json_response
from cordee.api.infill import ANSWER_SHARE, InfillReply, infill_prompt, suffix_prompt
from cordee.api.listing import coming_model, described, listed
from cordee.api.logprobs import Echo
from cordee.api.prompts import Prompt, chat_turn, completion_prompts, split_prompts
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
    refuse,
)
from cordee.errors import BadRequest
from cordee.generation.request import Grammar, SamplingParams
from cordee.serving.interface import ModelService

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
        self._fim = msgspec.json.Decoder(FimRequest)
        self._infill = msgspec.json.Decoder(InfillRequest)

    async def models(self, _: HttpRequest) -> Response:
        """`GET /v1/models`"""
        core = self._core
        data = listed(core.services, core.expected, core.now)
        return json_response({"object": "list", "data": data})

    async def model(self, request: HttpRequest) -> Response:
        """`GET /v1/models/{id}`"""
        name, core = request.path_params["name"], self._core
        if name in core.expected and name not in core.services:
            return json_response(coming_model(name, core.now))
        return json_response(described(name, core.service(name)))

    async def chat_completions(self, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._chat)
        service = core.asked(request, body.model)
        _check(body)
        top_logprobs = _top_logprobs(body)
        options = _options(body, top_logprobs, body.max_completion_tokens or body.max_tokens)
        job = await core.chat(service, chat_turn(body), options, constraint=_grammar(body))
        return await self._answer(request, body, job, ChatReply, logprobs=top_logprobs is not None)

    async def completions(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`"""
        core = self._core
        body = await core.bodies.read(request, self._completion)
        service = core.asked(request, body.model)
        _check(body)
        max_tokens = LEGACY_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        options = _options(body, body.logprobs, max_tokens, _grammar(body))
        given = split_prompts(body)
        prompts = await core.in_thread(_completion_prompts, service, given, body)
        logprobs = body.logprobs is not None
        scores = bool(body.echo) and logprobs
        job = core.completion(service, prompts, options, scores_prompts=scores)
        echoes = [
            Echo(service.vocabulary, prompt, text if isinstance(text, str) else None)
            for prompt, text in zip(prompts, given if body.echo else (), strict=False)
        ]
        reply = CompletionReply(job, logprobs=logprobs, usage_event=_wants_usage(body), echoes=echoes)
        return await self._reply(request, body, job, reply)

    async def fim_completions(self, request: HttpRequest) -> Response:
        """`POST /v1/fim/completions`, as Mistral has it: filling in, with a chat completion for a reply."""
        core = self._core
        body = await core.bodies.read(request, self._fim)
        service = core.asked(request, body.model)
        _check(body)
        options = _options(body, None, body.max_tokens, _grammar(body))
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
        bound = body.n_predict if body.max_tokens is None else body.max_tokens
        room = int(service.context * ANSWER_SHARE)
        answer = room if bound is None or bound < 0 else bound
        options = _options(body, None, answer, _grammar(body))
        prompt = await core.in_thread(infill_prompt, service, body, min(answer, room))
        job = core.completion(service, [prompt], options)
        return await self._reply(request, body, job, InfillReply(job))

    async def _answer(
        self, request: HttpRequest, body: Common, job: Job, reply_of: type[Reply], *, logprobs: bool
    ) -> Response:
        reply = reply_of(job, logprobs=logprobs, usage_event=_wants_usage(body))
        return await self._reply(request, body, job, reply)

    async def _reply(
        self, request: HttpRequest, body: Common, job: Job, reply: Reply | InfillReply
    ) -> Response:
        if body.stream:
            return self._core.stream(job, reply)
        return json_response(reply.whole(await self._core.whole(request, job)))


def _completion_prompts(
    service: ModelService, prompts: Sequence[Prompt], body: CompletionRequest
) -> list[tuple[int, ...]]:
    """The token ids of a completion's prompts, each with the suffix if there is one."""
    if not body.suffix:
        return completion_prompts(service, prompts)
    if body.echo:
        raise BadRequest("with a suffix the prompt is not repeated: leave echo out", "echo")
    return [suffix_prompt(service, prompt, body.suffix) for prompt in prompts]


def _wants_usage(body: Common) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


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
