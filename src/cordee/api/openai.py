"""OpenAI's endpoints over model services: HTTP requests in, `replies` out."""

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, ParamSpec, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api.bodies import Bodies
from cordee.api.failures import ModelLoading, json_response
from cordee.api.prompts import chat_prompt, completion_prompts
from cordee.api.replies import ChatReply, CompletionReply, Job, PartialAnswer, Reply
from cordee.api.schemas import (
    CHOICES_MAX,
    LEGACY_MAX_TOKENS,
    ChatRequest,
    Common,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    refuse,
)
from cordee.api.stream import EventStream, Streams, Timing, while_connected
from cordee.errors import BadRequest, ContextExceeded, CordeeError, ModelNotFound
from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.serving.interface import ModelService

P = ParamSpec("P")
Result = TypeVar("Result")

SEEDS = 1 << 63  # seeds are int64, as OpenAI's
# Prompts are rendered and tokenized beside the event loop: the longest takes seconds, but keep-alives go on.
PROMPT_THREADS = 2
NAME_CHARS_MAX = 100  # of a model's name, in a message
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
    """The handlers. `services` may grow while it is used; `expected` names the models that will be in it."""

    def __init__(
        self,
        services: Mapping[str, ModelService],
        expected: Collection[str],
        refusal: Callable[[str], CordeeError | None],
        clock: Callable[[], datetime],
        timing: Timing,
    ) -> None:
        self._services = services
        self._expected = expected
        self._refusal = refusal
        self._clock = clock
        self._timing = timing
        self._bodies = Bodies()
        self._threads = ThreadPoolExecutor(PROMPT_THREADS, "prompts")
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._completion = msgspec.json.Decoder(CompletionRequest)

    def close(self) -> None:
        """Wait until no prompt is being rendered: then services may be closed."""
        self._threads.shutdown(cancel_futures=True)

    async def models(self, _: HttpRequest) -> Response:
        """`GET /v1/models`"""
        listed = [_model(name, service) for name, service in sorted(self._services.items())]
        return json_response({"object": "list", "data": listed})

    async def model(self, request: HttpRequest) -> Response:
        """`GET /v1/models/{id}`"""
        name = request.path_params["name"]
        return json_response(_model(name, self._service(name)))

    async def chat_completions(self, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`"""
        body = await self._bodies.read(request, self._chat)
        service = self._service(body.model)
        _check(body)
        sampling = _sampling(body, _top_logprobs(body), _grammar(body))
        prompt = await self._in_thread(chat_prompt, service, body, self._clock())
        limit = body.max_completion_tokens or body.max_tokens
        job = self._job("chatcmpl-", service, body, [prompt], sampling, limit)
        return await self._answer(request, service, body, ChatReply(job))

    async def completions(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`"""
        body = await self._bodies.read(request, self._completion)
        service = self._service(body.model)
        _check(body)
        sampling = _sampling(body, body.logprobs, _grammar(body))
        prompts = await self._in_thread(completion_prompts, service, body)
        limit = body.max_tokens or LEGACY_MAX_TOKENS
        job = self._job("cmpl-", service, body, prompts, sampling, limit)
        return await self._answer(request, service, body, CompletionReply(job))

    async def _in_thread(
        self, function: Callable[P, Result], *arguments: P.args, **options: P.kwargs
    ) -> Result:
        call = partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _service(self, name: str) -> ModelService:
        service = self._services.get(name)
        if service is not None:
            return service
        if (refusal := self._refusal(name)) is not None:
            raise refusal
        if name in self._expected:
            raise ModelLoading(f"{name} is still being loaded; try again in a moment")
        wanted = f"no model {name[:NAME_CHARS_MAX]!r} is served here"
        if self._services:
            raise ModelNotFound(f"{wanted}; there is: {', '.join(sorted(self._services))}")
        raise ModelNotFound(
            f"{wanted}, and no other yet: `cordee deploy starter` on this machine serves the small model "
            "that comes with Cordée, `cordee pull MODEL` and `cordee deploy MODEL` any other"
        )

    def _job(
        self,
        prefix: str,
        service: ModelService,
        body: Common,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> Job:
        n = body.n or 1
        if n * len(prompts) > CHOICES_MAX:
            raise BadRequest(
                f"{len(prompts)} prompts with n = {n} ask for more than {CHOICES_MAX} answers", "n"
            )
        for prompt in prompts:
            _check_length(service, body, prompt)
        name = prefix + secrets.token_hex(12)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        requests = [
            Request(
                id=f"{name}-{place * n + choice}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=_seed(sampling.seed, choice)),
                max_tokens=max_tokens,
                stop=stop,
            )
            for place, prompt in enumerate(prompts)
            for choice in range(n)
        ]
        return Job(
            id=name,
            created=int(self._clock().timestamp()),
            model=service.name,
            vocabulary=service.vocabulary,
            requests=requests,
            n=n,
            logprobs=sampling.top_logprobs is not None,
            usage_event=bool(body.stream_options and body.stream_options.include_usage),
        )

    async def _answer(
        self, request: HttpRequest, service: ModelService, body: Common, reply: Reply
    ) -> Response:
        requests = reply.job.requests
        if body.stream:
            return EventStream(service, requests, reply, self._timing)
        answers = await while_connected(request.receive, _collect(service, requests))
        return json_response(reply.whole(answers))


async def _collect(service: ModelService, requests: Sequence[Request]) -> list[PartialAnswer]:
    answers = [PartialAnswer() for _ in requests]
    async with Streams(service, requests) as streams:
        while streams.open:
            item = await streams.next()
            assert item is not None, "it waits without a bound"
            index, chunk = item
            answers[index].add(chunk)
    return answers


def _check(body: Common) -> None:
    refuse(body)
    if body.stream_options is not None and not body.stream:
        raise BadRequest(
            "stream_options is for streams: set stream to true, or leave it out", "stream_options"
        )


def _check_length(service: ModelService, body: Common, prompt: Sequence[int]) -> None:
    """Refuse a prompt that leaves no room for an answer; the error names its field in the request."""
    if len(prompt) >= service.context:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens; the context of {service.name} holds "
            f"{service.context}, the answer included: shorten it, or serve the model with a larger --context",
            "messages" if isinstance(body, ChatRequest) else "prompt",
        )


def _sampling(body: Common, top_logprobs: int | None, grammar: Grammar | None) -> SamplingParams:
    """How tokens are chosen. What a client leaves out, or sends as null, keeps OpenAI's default."""
    given = {name: getattr(body, name) for name in SAMPLING if getattr(body, name) is not None}
    return SamplingParams(
        **given,
        seed=secrets.randbelow(SEEDS) if body.seed is None else body.seed,
        logit_bias=_logit_bias(body.logit_bias or {}),
        grammar=grammar,
        top_logprobs=top_logprobs,
    )


def _seed(seed: int, choice: int) -> int:
    """The seed of a prompt's i-th answer: int64, as the first is."""
    return (seed + choice + SEEDS) % (2 * SEEDS) - SEEDS if choice else seed


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


def _model(name: str, service: ModelService) -> dict[str, Any]:
    added = datetime.fromisoformat(service.model.added)
    return {"id": name, "object": "model", "created": int(added.timestamp()), "owned_by": "cordee"}
