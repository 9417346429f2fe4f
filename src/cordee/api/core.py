"""What all endpoints share: the services by name, requests for them, and the threads that render prompts."""

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import ParamSpec, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import callers
from cordee.api.answers import Job, ParsedAnswers, WholeAnswer
from cordee.api.bodies import Bodies
from cordee.api.failures import ModelLoading
from cordee.api.prompts import chat_prompt, check_length
from cordee.api.schemas import CHOICES_MAX
from cordee.api.stream import Adapter, EventStream, Timing, collect, while_connected
from cordee.chat.formats import format_of
from cordee.chat.turn import ChatTurn
from cordee.errors import BadRequest, CordeeError, ModelNotFound
from cordee.generation import template
from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.serving.embedders import Embedders
from cordee.serving.interface import ModelService

P = ParamSpec("P")
Result = TypeVar("Result")

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
        self._expected = expected
        self._refusal = refusal
        self._clock = clock
        self._timing = timing
        self._threads = ThreadPoolExecutor(PROMPT_THREADS, "prompts")

    def close(self) -> None:
        """Wait until no prompt is being rendered: then services may be closed."""
        self._threads.shutdown(cancel_futures=True)

    def service(self, name: str) -> ModelService:
        """The service of a model.

        Raises:
            ModelNotFound: there is none.
            ModelLoading: there will be.
            CordeeError: it cannot be used here, and why.
        """
        service = self.services.get(name)
        if service is not None:
            return service
        if (refusal := self._refusal(name)) is not None:
            raise refusal
        if name in self._expected:
            raise ModelLoading(f"{name} is still being loaded; try again in a moment")
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
        service: ModelService,
        turn: ChatTurn,
        options: AnswerOptions,
        *,
        constraint: Grammar | None = None,
        param: str = "messages",
    ) -> Job:
        """The job of answering a turn. `constraint` is what the client itself binds the text to; errors
        about the conversation name the body's field `param`.

        Raises:
            BadRequest: the turn cannot be used, or asks for too many answers.
            ContextExceeded: it is too long.
            UnsupportedModel: the model has no chat template, or a broken one.
        """
        if service.template is None:
            raise template.missing(service.name)
        chat_format = format_of(service.template)
        prompt = await self.in_thread(chat_prompt, service, chat_format, turn, self._clock(), param)
        check_length(service, prompt, param)
        grammar = chat_format.grammar(turn, constraint)
        sampling = msgspec.structs.replace(options.sampling, grammar=grammar)
        answers = ParsedAnswers(service, partial(chat_format.parser, turn))
        shows = chat_format.shows_control_tokens
        return self._job(service, [prompt], sampling, options, answers, shows_control_tokens=shows)

    def completion(
        self,
        service: ModelService,
        prompts: Sequence[tuple[int, ...]],
        options: AnswerOptions,
        param: str = "prompt",
    ) -> Job:
        """The job of going on from prompts.

        Raises:
            BadRequest: it asks for too many answers.
            ContextExceeded: a prompt is too long.
        """
        for prompt in prompts:
            check_length(service, prompt, param)
        return self._job(service, prompts, options.sampling, options, ParsedAnswers(service))

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
        shows_control_tokens: bool = False,
    ) -> Job:
        n = options.n
        if n * len(prompts) > CHOICES_MAX:
            raise BadRequest(
                f"{len(prompts)} prompts with n = {n} ask for more than {CHOICES_MAX} answers", "n"
            )
        name = secrets.token_hex(12)
        requests = [
            Request(
                id=f"{name}-{place * n + choice}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=_seed(sampling.seed, choice)),
                max_tokens=options.max_tokens,
                stop=options.stop,
                share=callers.current().name,
                shows_control_tokens=shows_control_tokens,
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
            n=n,
        )


def random_seed() -> int:
    """A seed for a request that gives none."""
    return secrets.randbelow(SEEDS)


def _seed(seed: int, choice: int) -> int:
    """The seed of a prompt's i-th answer: int64, as the first is."""
    return (seed + choice + SEEDS) % (2 * SEEDS) - SEEDS if choice else seed
