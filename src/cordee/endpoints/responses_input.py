"""From the body of `POST /v1/responses` to a turn of a conversation."""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from cordee.api.bodies import decode
from cordee.api.options import is_given, schema_grammar
from cordee.api.schemas import refuse
from cordee.api.turns import check_names
from cordee.chat.roles import alternating
from cordee.chat.turn import ChatTurn, Message, Tool, ToolCall, ToolChoice
from cordee.endpoints.agents import choice_of, thinking_by
from cordee.endpoints.responses_schemas import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputPart,
    ItemKind,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    ResponsesToolChoice,
)
from cordee.errors import BadRequest
from cordee.generation.request import Grammar

ROLES = ("user", "assistant", "system", "developer")
LOGPROBS = "message.output_text.logprobs"
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
MODES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "required": "required",
}

Item = TypeVar("Item")


class ResponsesInput:
    """What a request asks for. `ignored` names what of it cannot be had.

    Raises:
        BadRequest: the request cannot be used; `param` says where.
    """

    def __init__(self, body: ResponsesRequest, decoders: "ItemDecoders") -> None:
        refuse(body)
        if LOGPROBS in (body.include or ()):
            raise BadRequest(f"{LOGPROBS} is not given here: use /v1/chat/completions", "include")
        self.ignored: list[str] = ["store"] if body.store else []
        self.tools = self._tools(body)
        self.turn = ChatTurn(
            messages=alternating(self._messages(body, decoders)),
            tools=_allowed(body.tool_choice, self.tools),
            tool_choice=_tool_choice(body.tool_choice, self.tools),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            thinking=thinking_by(body.reasoning.effort if body.reasoning else None, "reasoning.effort"),
        )

    def _tools(self, body: ResponsesRequest) -> list[Tool]:
        tools: list[Tool] = []
        for tool in body.tools or ():
            if tool.type == "function":
                tools.append(
                    Tool(
                        tool.name or "",
                        tool.description or "",
                        tool.parameters or {},
                        strict=bool(tool.strict),
                    )
                )
            else:
                self.ignored.append(f"tools.{tool.type}")
        check_names(tools, "tools")
        return tools

    def _messages(self, body: ResponsesRequest, decoders: "ItemDecoders") -> Iterable[Message]:
        if body.instructions:
            yield Message("system", body.instructions)
        if isinstance(body.input, str):
            yield Message("user", body.input)
            return
        for place, raw in enumerate(body.input):
            message = decoders.message(raw, f"input[{place}]")
            if isinstance(message, Message):
                yield message
            else:
                self.ignored.append(f"input.{message}")


class ItemDecoders:
    """Reads the items of an input."""

    def __init__(self) -> None:
        self._kind = msgspec.json.Decoder(ItemKind)
        self._message = msgspec.json.Decoder(MessageItem)
        self._call = msgspec.json.Decoder(FunctionCallItem)
        self._output = msgspec.json.Decoder(FunctionCallOutputItem)
        self._reasoning = msgspec.json.Decoder(ReasoningItem)

    def message(self, raw: msgspec.Raw, path: str) -> Message | str:
        """An item as a message, or part of one; the name of its type, where there is none for it.

        Raises:
            BadRequest: the item is wrong.
        """
        kind = self._read(raw, self._kind, path).type
        match kind:
            case "message" | None:
                return _spoken(self._read(raw, self._message, path), path)
            case "function_call":
                call = self._read(raw, self._call, path)
                return Message("assistant", tool_calls=(ToolCall(call.call_id, call.name, call.arguments),))
            case "function_call_output":
                output = self._read(raw, self._output, path)
                text = _text(output.output, f"{path}.output")
                return Message("tool", text, tool_call_id=output.call_id)
            case "reasoning":
                thought = self._read(raw, self._reasoning, path)
                return Message("assistant", thinking=_text(thought.content or thought.summary or [], path))
            case "item_reference":
                raise BadRequest(f"{path} refers to an item, but nothing is stored here: send it whole", path)
            case _:
                return kind

    def _read(self, raw: msgspec.Raw, decoder: msgspec.json.Decoder[Item], path: str) -> Item:
        return decode(bytes(raw), decoder, path)


def _spoken(item: MessageItem, path: str) -> Message:
    if item.role not in ROLES:
        raise BadRequest(f"{path}.role must be one of {', '.join(ROLES)}", f"{path}.role")
    return Message(item.role, _text(item.content, f"{path}.content"))


def _text(content: str | Sequence[InputPart], path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{path}[{place}]") for place, part in enumerate(content))


def _part(part: InputPart, path: str) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type not in TEXT_PARTS:
        raise BadRequest(
            f"{path}: a part of type {part.type!r} cannot be used: models here read text only", f"{path}.type"
        )
    if part.text is None:
        raise BadRequest(f"{path}.text is missing", f"{path}.text")
    return part.text


def _tool_choice(given: str | ResponsesToolChoice | None, tools: Sequence[Tool]) -> ToolChoice:
    name = None
    if given is None:
        mode = "auto"
    elif isinstance(given, str):
        mode = given
    elif given.type == "function":
        mode, name = "required", given.name or ""
    elif given.type == "allowed_tools":
        mode = given.mode or "auto"
    else:
        raise BadRequest(
            f"tool_choice asks for a tool of type {given.type!r}, which is not offered here", "tool_choice"
        )
    if mode not in MODES:
        raise BadRequest(f"tool_choice must be one of {', '.join(MODES)}, or an object", "tool_choice")
    return choice_of(MODES[mode], name, _allowed(given, tools))


def _allowed(given: str | ResponsesToolChoice | None, tools: Sequence[Tool]) -> Sequence[Tool]:
    """The tools that may be called."""
    if given is None or isinstance(given, str) or given.type != "allowed_tools":
        return tools
    names = {each.name for each in given.tools or () if each.type == "function"}
    return [tool for tool in tools if tool.name in names]


def constraint_of(request: HttpRequest, body: ResponsesRequest) -> Grammar | None:
    """What binds the text.

    Raises:
        BadRequest: it is no known kind of format, or has no schema.
    """
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar("json_object")
    if wanted.type != "json_schema":
        raise BadRequest("text.format.type must be text, json_object or json_schema", "text.format.type")
    if not is_given(wanted.schema):
        raise BadRequest("text.format.schema is missing", "text.format.schema")
    return schema_grammar(request, wanted.schema, "text.format.schema", strict=bool(wanted.strict))
