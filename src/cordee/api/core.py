"""What all endpoints share: the services by name, requests for them, and the threads that render prompts."""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import ParamSpec, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import cordee
from cordee.api import callers, ignored
from cordee.api.answers import Job, ParsedAnswers, ReadPrompts, WholeAnswer
from cordee.api.bodies import Bodies
from cordee.api.failures import ModelLoading
from cordee.api.metrics import Metrics
from cordee.api.prompts import check_length, rendered
from cordee.api.schemas import CHOICES_MAX
from cordee.api.stream import Adapter, EventStream, Timing, collect, while_connected
from cordee.chat.formats import AnswerFormat, ChatFormat, format_of
from cordee.chat.turn import ChatTurn
from cordee.errors import BadRequest, CordeeError, ModelNotFound
from cordee.generation import template
from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.models.store import StoredModel
from cordee.serving.embedders import Embedders
from cordee.serving.interface import ModelService

P = ParamSpec("P")
Result = TypeVar("Result")

FINGERPRINT_CHARS = 12
SEEDS = 1 << 63  # seeds are int64, as OpenAI's
# Prompts are rendered and tokenized beside the event loop: the longest takes seconds, but keep-alives go on.
PROMPT_THREADS = 2
NAME_CHARS_MAX = 100  # of a model's name, in a message


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How an answer is made, whatever the prompt: the same for every endpoint."""

    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1


class ApiCore:
    """`services` may grow while it is used; `expected` names the models that will be in it. `refusal` says
    why a model cannot be used here, if that is so."""

    def __init__(
        self,
        services: Mapping[str, ModelService],
        embedders: Embedders,
        expected: Collection[str],
        refusal: Callable[[str], CordeeError | None],
        clock: Callable[[], datetime],
        timing: Timing,
    ) -> None:
        self.services = services
        self.embedders = embedders
        self.bodies = Bodies()
        self.metrics = Metrics()
        self.expected = expected
        self._refusal = refusal
        self._clock = clock
        self._timing = timing
        self._threads = ThreadPoolExecutor(PROMPT_THREADS, "prompts")

    def close(self) -> None:
        """Wait until no prompt is being rendered: then services may be closed."""
        self._threads.shutdown(cancel_futures=True)

    def asked(self, request: HttpRequest, name: str | None) -> ModelService:
        """The service that a request for an answer means: that of the model it names; where there is one
        model only, that one, and an unknown name is noted as without effect.

        Raises as `service` does.
        """
        known = {*self.services, *self.expected}
        only = next(iter(known)) if len(known) == 1 else None
        if name and (only is None or _untagged(name) in self.services or self._refusal(name) is not None):
            return self.service(name)
        if only is None:
            raise BadRequest(f"model is missing; there is: {', '.join(sorted(known)) or 'none'}", "model")
        if name and _untagged(name) != only:
            ignored.note(request, "model")
        return self.service(only)

    @property
    def now(self) -> datetime:
        """The time for chat templates and replies."""
        return self._clock()

    def service(self, name: str) -> ModelService:
        """The service of a model, by its name, or by that and Ollama's tag `:latest`.

        Raises:
            ModelNotFound: there is none.
            ModelLoading: there will be.
            CordeeError: it cannot be used here, and why.
        """
        service = self.services.get(name) or self.services.get(_untagged(name))
        if service is not None:
            return service
        if (refusal := self._refusal(name)) is not None:
            raise refusal
        if name in self.expected or _untagged(name) in self.expected:
            raise ModelLoading(f"{name[:NAME_CHARS_MAX]} is still being loaded; try again in a moment")
        wanted = f"no model {name[:NAME_CHARS_MAX]!r} is served here"
        if self.services:
            raise ModelNotFound(f"{wanted}; there is: {', '.join(sorted(self.services))}")
        raise ModelNotFound(
            f"{wanted}, and no other yet: `cordee deploy starter` on this machine serves the small model "
            "that comes with Cordée, `cordee pull MODEL` and `cordee deploy MODEL` any other"
        )

    async def in_thread(
        self, function: Callable[P, Result], *arguments: P.args, **options: P.kwargs
    ) -> Result:
        """Call what takes its time."""
        call = partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def chat(
        self,
        request: HttpRequest,
        service: ModelService,
        turn: ChatTurn,
        options: AnswerOptions,
        *,
        constraint: Grammar | None = None,
        param: str = "messages",
    ) -> Job:
        """The job of answering a turn. `constraint` is what the client itself binds the text to; errors
        about the conversation name the body's field `param`. What of the tools' schemas cannot be bound is
        noted as without effect.

        Raises:
            BadRequest: the turn cannot be used, or asks for too many answers.
            ContextExceeded: it is too long.
            UnsupportedModel: the model has no chat template, or a broken one.
        """
        prompt, answer = await self.in_thread(self._prepared, service, turn, constraint, param)
        check_length(service, prompt, param)
        ignored.note(request, *answer.ignored)
        sampling = msgspec.structs.replace(options.sampling, grammar=answer.grammar)
        answers = ParsedAnswers(service, partial(answer.parser, _call_id))
        return self._job(service, [prompt], sampling, options, answers, shown_tokens=answer.shown_tokens)

    async def count_tokens(self, service: ModelService, turn: ChatTurn, param: str = "messages") -> int:
        """How many tokens the prompt of a turn has. Raises as `chat` does."""
        prompt = await self.in_thread(rendered, service, chat_format_of(service), turn, self._clock(), param)
        return len(prompt.tokens)

    async def embedding_models(self) -> list[StoredModel]:
        """The models of this machine that give vectors, and do nothing else; read from its disk."""
        return await self.in_thread(self.embedders.models)

    def _prepared(
        self, service: ModelService, turn: ChatTurn, constraint: Grammar | None, param: str
    ) -> tuple[tuple[int, ...], AnswerFormat]:
        """The prompt of a turn, and the format of its answer."""
        chat_format = chat_format_of(service)
        prompt = rendered(service, chat_format, turn, self._clock(), param)
        return prompt.tokens, chat_format.answer(turn, prompt.text, constraint, service.vocabulary)

    def completion(
        self,
        service: ModelService,
        prompts: Sequence[tuple[int, ...]],
        options: AnswerOptions,
        param: str = "prompt",
        *,
        scores_prompts: bool = False,
    ) -> Job:
        """The job of going on from prompts; with 0 as `max_tokens` they are read, and that is all.
        `scores_prompts`: their tokens get log-probabilities, too.

        Raises:
            BadRequest: it asks for too many answers.
            ContextExceeded: a prompt is too long.
        """
        for prompt in prompts:
            check_length(service, prompt, param)
        kind = ParsedAnswers
        if options.max_tokens == 0:
            kind, options = ReadPrompts, replace(options, max_tokens=1)
        return self._job(
            service, prompts, options.sampling, options, kind(service), scores_prompts=scores_prompts
        )

    async def whole(self, request: HttpRequest, job: Job) -> list[WholeAnswer]:
        """The whole answers, as long as the client is there."""
        return await while_connected(request.receive, collect(job))

    def stream(self, job: Job, adapter: Adapter) -> Response:
        """The answers as they come."""
        return EventStream(job, adapter, self._timing)

    def _job(
        self,
        service: ModelService,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        options: AnswerOptions,
        answers: ParsedAnswers,
        *,
        shown_tokens: tuple[int, ...] = (),
        scores_prompts: bool = False,
    ) -> Job:
        n = options.n
        if n * len(prompts) > CHOICES_MAX:
            raise BadRequest(
                f"{len(prompts)} prompts with n = {n} ask for more than {CHOICES_MAX} answers", "n"
            )
        answers.watch = partial(self.metrics.watch, service.name)
        name = secrets.token_hex(12)
        requests = [
            Request(
                id=f"{name}-{place * n + choice}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=_seed(sampling.seed, choice)),
                max_tokens=options.max_tokens,
                stop=options.stop,
                shown_tokens=shown_tokens,
                scores_prompt=scores_prompts,
                share=callers.current().name,
            )
            for place, prompt in enumerate(prompts)
            for choice in range(n)
        ]
        return Job(
            id=name,
            created=int(self._clock().timestamp()),
            model=service.name,
            vocabulary=service.vocabulary,
            answers=answers,
            requests=requests,
            fingerprint=fingerprint(service),
            n=n,
        )


def chat_format_of(service: ModelService) -> ChatFormat:
    """The format of a model's conversations.

    Raises:
        UnsupportedModel: it has no chat template.
    """
    if service.template is None:
        raise template.missing(service.name)
    return format_of(service.template)


def _untagged(name: str) -> str:
    return name.removesuffix(":latest")


def fingerprint(service: ModelService) -> str:
    """What an answer depends on beside the request, as a name: this program and the model's file."""
    digest = hashlib.sha256(f"{cordee.__version__} {service.model.digest}".encode())
    return f"fp_{digest.hexdigest()[:FINGERPRINT_CHARS]}"


def random_seed() -> int:
    """A seed for a request that gives none."""
    return secrets.randbelow(SEEDS)


def _call_id() -> str:
    """An id for a call; none is given twice."""
    return "call_" + secrets.token_hex(12)


def _seed(seed: int, choice: int) -> int:
    """The seed of a prompt's i-th answer: int64, as the first is."""
    return (seed + choice + SEEDS) % (2 * SEEDS) - SEEDS if choice else seed
