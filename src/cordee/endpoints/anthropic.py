"""Anthropic's messages over model services: `POST /v1/messages`, `POST /v1/messages/count_tokens`."""

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import ignored
from cordee.api.core import AnswerOptions, ApiCore
from cordee.api.failures import json_response
from cordee.endpoints.agents import sampling_of
from cordee.endpoints.anthropic_input import MessagesInput, constraint_of, shows_thinking
from cordee.endpoints.anthropic_reply import MessageReply
from cordee.endpoints.anthropic_schemas import CountRequest, MessagesRequest


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
        job = await core.chat(request, service, given.turn, _options(body), constraint=constraint)
        omits = body.thinking is not None and body.thinking.display == "omitted"
        reply = MessageReply(job, shows_thinking=shows_thinking(body), omits_thinking=omits)
        ignored.note(request, *given.ignored)
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
        count = await core.count_tokens(service, given.turn)
        ignored.note(request, *given.ignored)
        return json_response({"input_tokens": count})


def _options(body: MessagesRequest) -> AnswerOptions:
    sampling = sampling_of(body, "temperature", "top_p", "top_k")
    return AnswerOptions(sampling=sampling, max_tokens=body.max_tokens, stop=tuple(body.stop_sequences or ()))
