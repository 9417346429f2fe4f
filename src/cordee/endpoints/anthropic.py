"""Anthropic's messages over model services: `POST /v1/messages`, `POST /v1/messages/count_tokens`."""

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import ignored
from cordee.api.core import AnswerOptions, ApiCore, random_seed
from cordee.api.failures import json_response
from cordee.api.prompts import chat_prompt
from cordee.chat.formats import format_of
from cordee.endpoints.anthropic_input import MessagesInput, constraint_of, shows_thinking
from cordee.endpoints.anthropic_reply import MessageReply
from cordee.endpoints.anthropic_schemas import CountRequest, MessagesRequest
from cordee.generation import template
from cordee.generation.request import SamplingParams


class Anthropic:
    """The handlers."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._messages = msgspec.json.Decoder(MessagesRequest)
        self._count = msgspec.json.Decoder(CountRequest)

    async def messages(self, request: HttpRequest) -> Response:
        """`POST /v1/messages`"""
        core = self._core
        body = await core.bodies.read(request, self._messages)
        service = core.asked(request, body.model)
        given = MessagesInput(body)
        constraint = constraint_of(request, body)
        job = await core.chat(service, given.turn, _options(body), constraint=constraint)
        omits = body.thinking is not None and body.thinking.display == "omitted"
        reply = MessageReply(job, shows_thinking=shows_thinking(body), omits_thinking=omits)
        ignored.note(request, *given.ignored, *job.ignored)
        if body.stream:
            return core.stream(job, reply)
        [answer] = await core.whole(request, job)
        return json_response(reply.whole(answer))

    async def count_tokens(self, request: HttpRequest) -> Response:
        """`POST /v1/messages/count_tokens`"""
        core = self._core
        body = await core.bodies.read(request, self._count)
        given = MessagesInput(body)
        service = core.asked(request, body.model)
        if service.template is None:
            raise template.missing(service.name)
        form = format_of(service.template)
        prompt = await core.in_thread(chat_prompt, service, form, given.turn, core.now, "messages")
        ignored.note(request, *given.ignored)
        return json_response({"input_tokens": len(prompt)})


def _options(body: MessagesRequest) -> AnswerOptions:
    """How tokens are chosen. What a client leaves out, or sends as null, keeps Anthropic's default."""
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = SamplingParams(**given, seed=random_seed())
    return AnswerOptions(sampling=sampling, max_tokens=body.max_tokens, stop=tuple(body.stop_sequences or ()))
