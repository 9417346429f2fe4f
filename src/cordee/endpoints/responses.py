"""OpenAI's Responses over model services, without a store: `POST /v1/responses`."""

from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import ignored
from cordee.api.core import AnswerOptions, ApiCore
from cordee.api.failures import json_response
from cordee.chat.turn import Tool
from cordee.endpoints.agents import sampling_of
from cordee.endpoints.responses_input import ItemDecoders, ResponsesInput, constraint_of
from cordee.endpoints.responses_reply import ResponsesReply
from cordee.endpoints.responses_schemas import ResponsesRequest, ResponsesToolChoice


class Responses:
    """The handler."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._body = msgspec.json.Decoder(ResponsesRequest)
        self._items = ItemDecoders()

    async def create(self, request: HttpRequest) -> Response:
        """`POST /v1/responses`"""
        core = self._core
        body = await core.bodies.read(request, self._body)
        service = core.asked(request, body.model)
        given = ResponsesInput(body, self._items)
        job = await core.chat(
            request,
            service,
            given.turn,
            _options(body),
            constraint=constraint_of(request, body),
            param="input",
        )
        reply = ResponsesReply(job, _echo(body, given.tools))
        ignored.note(request, *given.ignored)
        if body.stream:
            return core.stream(job, reply)
        [answer] = await core.whole(request, job)
        return json_response(reply.whole(answer))


def _options(body: ResponsesRequest) -> AnswerOptions:
    sampling = sampling_of(body, "temperature", "top_p")
    return AnswerOptions(sampling=sampling, max_tokens=body.max_output_tokens)


def _echo(body: ResponsesRequest, tools: list[Tool]) -> dict[str, Any]:
    """The fields of the request that a response repeats, with their defaults."""
    choice = body.tool_choice or "auto"
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": msgspec.to_builtins(choice) if isinstance(choice, ResponsesToolChoice) else choice,
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": True,
            }
            for tool in tools
        ],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "user": None,
    }


def _format(body: ResponsesRequest) -> Any:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return {"type": "text"}
    given = {name: getattr(wanted, name) for name in ("name", "schema")}
    return {"type": wanted.type} | {
        name: msgspec.json.decode(raw) for name, raw in given.items() if bytes(raw) != b"null"
    }
