"""From Ollama's conversations to turns (cordee.chat)."""

import re

import msgspec

from cordee.api.prompts import text_prompt
from cordee.api.schemas import IDENTIFIER, refuse
from cordee.chat.turn import ChatTurn, Message, Thinking, Tool, ToolCall
from cordee.endpoints.ollama_schemas import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaRequest,
    OllamaToolCall,
)
from cordee.errors import BadRequest
from cordee.serving.interface import ModelService


def chat_turn(body: OllamaChatRequest) -> ChatTurn:
    """The turn that a request of `/api/chat` asks for.

    Raises:
        BadRequest: a message cannot be used; `param` says which.
    """
    numbered = _Numbered()
    messages = [numbered.message(message, place) for place, message in enumerate(body.messages or [])]
    functions = [tool.function for tool in body.tools or []]
    tools = [Tool(each.name, each.description or "", each.parameters or {}) for each in functions]
    return ChatTurn(messages=messages, tools=tools, thinking=_thinking(body))


def prompt_turn(body: OllamaGenerateRequest) -> ChatTurn:
    """The turn of a prompt alone, with its system message."""
    system = [Message("system", body.system)] if body.system else []
    return ChatTurn(messages=[*system, Message("user", body.prompt or "")], thinking=_thinking(body))


def raw_prompt(service: ModelService, body: OllamaGenerateRequest) -> tuple[int, ...]:
    """The prompt as it is; a model without a chat template gets a system message as text before it.

    Raises:
        ContextExceeded: it is too long, whatever tokens it becomes.
    """
    system = f"{body.system}\n\n" if body.system and not body.raw else ""
    return text_prompt(service, system + (body.prompt or ""))


class _Numbered:
    """Calls and their results, which Ollama's clients leave without ids: they belong together in order."""

    def __init__(self) -> None:
        self._count = 0
        self._unanswered: list[ToolCall] = []

    def message(self, message: OllamaMessage, place: int) -> Message:
        path = f"messages[{place}]."
        refuse(message, path)
        calls = tuple(map(self._call, message.tool_calls or ()))
        self._unanswered += calls
        role, name = message.role.lower(), message.tool_name or message.name or None
        answers = self._answered(message, name) if role == "tool" else None
        return Message(
            role,
            message.content or "",
            name=answers.name if answers is not None and name is None else name,
            thinking=message.thinking or "",
            tool_calls=calls,
            tool_call_id=message.tool_call_id or (answers.id if answers is not None else None),
        )

    def _call(self, call: OllamaToolCall) -> ToolCall:
        self._count += 1
        given = call.function.arguments
        text = given if isinstance(given, str) else msgspec.json.encode(given or {}).decode()
        return ToolCall(call.id or f"call_{self._count}", call.function.name, text)

    def _answered(self, message: OllamaMessage, name: str | None) -> ToolCall | None:
        """The call that a result belongs to: by its id, else the first of that tool, or of any if none is
        named."""
        wanted = message.tool_call_id
        fitting = (
            call
            for call in self._unanswered
            if (call.id == wanted if wanted is not None else name in (None, call.name))
        )
        found = next(fitting, None)
        if found is not None:
            self._unanswered.remove(found)
        return found


def _thinking(body: OllamaRequest) -> Thinking:
    if not isinstance(body.think, str):
        return Thinking(enabled=body.think)
    if not re.match(IDENTIFIER, body.think):
        raise BadRequest("think must be true, false, or an effort such as low, medium, high", "think")
    return Thinking(enabled=True, effort=body.think)
