"""From the body of Anthropic's messages to a turn of a conversation."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec
from starlette.requests import Request as HttpRequest

from cordee.api.bodies import decode
from cordee.api.options import is_given, schema_grammar
from cordee.api.turns import check_names
from cordee.chat.roles import alternating
from cordee.chat.turn import ChatTurn, Message, Thinking, Tool, ToolCall, ToolChoice
from cordee.endpoints.agents import choice_of, thinking_by
from cordee.endpoints.anthropic_schemas import (
    AnthropicMessage,
    AnthropicTool,
    ContentBlock,
    DocumentSource,
    Prompt,
)
from cordee.errors import BadRequest
from cordee.generation.request import Grammar

MODES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "any": "required",
    "tool": "required",
}
THINKING = ("enabled", "adaptive", "between_tools", "disabled")
# Claude Code's first block of `system`: a header for Anthropic's accounts. It may differ in each request, and
# then no prompt would begin as the one before did.
BILLING = "x-anthropic-billing-header:"
# Blocks of tools that run on Anthropic's servers: `server_tool_use`, `web_search_tool_result`, …
SERVER_SUFFIXES = ("server_tool_use", "mcp_tool_use", "_tool_result")
FAILED = "Error: "


class MessagesInput:
    """What a request asks for. `ignored` names what of it cannot be had.

    Raises:
        BadRequest: the request cannot be used; `param` says where.
    """

    def __init__(self, body: Prompt) -> None:
        self.ignored: list[str] = []
        self._source = msgspec.json.Decoder(DocumentSource)
        if bytes(body.mcp_servers) not in (b"null", b"[]"):
            self.ignored.append("mcp_servers")
        tools = self._tools(body.tools or ())
        choice = body.tool_choice
        messages = alternating(self._messages(body))
        self.turn = ChatTurn(
            messages=messages,
            tools=tools,
            tool_choice=_tool_choice(body, tools),
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            thinking=_thinking(body),
            continues=messages[-1].role == "assistant" and not messages[-1].tool_calls,
        )

    def _tools(self, given: Iterable[AnthropicTool]) -> list[Tool]:
        tools: list[Tool] = []
        for tool in given:
            if tool.type in (None, "custom"):
                tools.append(
                    Tool(
                        tool.name or "",
                        tool.description or "",
                        tool.input_schema or {},
                        strict=bool(tool.strict),
                    )
                )
            else:
                self.ignored.append(f"tools.{tool.type}")
        check_names(tools, "tools")
        return tools

    def _messages(self, body: Prompt) -> Iterator[Message]:
        if system := self._system(body.system):
            yield Message("system", system)
        for place, message in enumerate(body.messages):
            path = f"messages[{place}]"
            match message.role:
                case "user":
                    yield from self._user(message, path)
                case "assistant":
                    yield self._assistant(message, path)
                case "system":
                    yield Message("system", self._texts(message.content, path))
                case _:
                    raise BadRequest(f"{path}.role must be user, assistant or system", f"{path}.role")

    def _system(self, given: str | Sequence[ContentBlock] | None) -> str:
        if given is None or isinstance(given, str):
            return given or ""
        texts = [self._text(block, f"system[{place}]") for place, block in enumerate(given)]
        return "\n\n".join(text for text in texts if not text.startswith(BILLING))

    def _user(self, message: AnthropicMessage, path: str) -> Iterator[Message]:
        """A user's turn: what calls returned, then what is said."""
        if isinstance(message.content, str):
            yield Message("user", message.content)
            return
        said: list[Message] = []
        for place, block in enumerate(message.content):
            where = f"{path}.content[{place}]"
            if block.type == "tool_result":
                yield self._result(block, where)
            elif (text := self._said(block, where)) is not None:
                said.append(Message("user", text))
        yield from said

    def _assistant(self, message: AnthropicMessage, path: str) -> Message:
        if isinstance(message.content, str):
            return Message("assistant", message.content)
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        for place, block in enumerate(message.content):
            where = f"{path}.content[{place}]"
            if block.type == "tool_use":
                calls.append(_call(block, where))
            elif block.type == "thinking":
                thoughts.append(block.thinking or "")
            elif (text := self._said(block, where)) is not None:
                texts.append(text)
        return Message("assistant", "".join(texts), thinking="\n".join(thoughts), tool_calls=tuple(calls))

    def _result(self, block: ContentBlock, path: str) -> Message:
        if block.tool_use_id is None:
            raise BadRequest(f"{path}.tool_use_id is missing", f"{path}.tool_use_id")
        text = self._texts(block.content or "", path)
        if block.is_error and not text.casefold().startswith("error"):
            text = FAILED + text
        return Message("tool", text, tool_call_id=block.tool_use_id)

    def _texts(self, content: str | Sequence[ContentBlock], path: str) -> str:
        if isinstance(content, str):
            return content
        texts = [self._text(block, f"{path}.content[{place}]") for place, block in enumerate(content)]
        return "\n".join(texts)

    def _said(self, block: ContentBlock, path: str) -> str | None:
        """A block's text; None if the model is not told of it."""
        if block.type == "redacted_thinking":
            return None
        if block.type.endswith(SERVER_SUFFIXES):
            self.ignored.append(f"messages.content.{block.type}")
            return None
        return self._text(block, path)

    def _text(self, block: ContentBlock, path: str) -> str:
        match block.type:
            case "text":
                if block.text is None:
                    raise BadRequest(f"{path}.text is missing", f"{path}.text")
                return block.text
            case "tool_reference":
                return block.tool_name or ""
            case "document":
                return self._document(block, path)
            case _:
                raise BadRequest(
                    f"{path}: a block of type {block.type!r} cannot be used here: models read text only",
                    f"{path}.type",
                )

    def _document(self, block: ContentBlock, path: str) -> str:
        source = decode(bytes(block.source), self._source, f"{path}.source")
        if source.type != "text" or source.data is None:
            raise BadRequest(
                f"{path}: a document of type {source.type!r} cannot be used: send its text", f"{path}.source"
            )
        return f"{block.title}\n\n{source.data}" if block.title else source.data


def _call(block: ContentBlock, path: str) -> ToolCall:
    if block.id is None or block.name is None:
        missing = "id" if block.id is None else "name"
        raise BadRequest(f"{path}.{missing} is missing", f"{path}.{missing}")
    return ToolCall(block.id, block.name, msgspec.json.encode(block.input or {}).decode())


def _tool_choice(body: Prompt, tools: Sequence[Tool]) -> ToolChoice:
    given = body.tool_choice
    if given is None:
        return ToolChoice()
    if given.type not in MODES:
        raise BadRequest(f"tool_choice.type must be one of {', '.join(MODES)}", "tool_choice.type")
    name = (given.name or "") if given.type == "tool" else None
    return choice_of(MODES[given.type], name, tools)


def _thinking(body: Prompt) -> Thinking:
    """Anthropic's models think only where they are asked to."""
    given = body.thinking
    if given is not None and given.type not in THINKING:
        raise BadRequest(f"thinking.type must be one of {', '.join(THINKING)}", "thinking.type")
    if given is None or not shows_thinking(body):
        return Thinking(enabled=False)
    effort = body.output_config.effort if body.output_config else None
    asked = thinking_by(effort, "output_config.effort")
    if given.type == "adaptive":
        return asked
    return Thinking(enabled=True, effort=asked.effort, tokens_max=given.budget_tokens)


def shows_thinking(body: Prompt) -> bool:
    """Whether the answer has blocks of thinking."""
    return body.thinking is not None and body.thinking.type in ("enabled", "adaptive")


def constraint_of(request: HttpRequest, body: Prompt) -> Grammar | None:
    """What binds the text.

    Raises:
        BadRequest: it is no JSON schema.
    """
    wanted = body.output_config.format if body.output_config else None
    wanted = wanted or body.output_format
    if wanted is None:
        return None
    if wanted.type != "json_schema" or not is_given(wanted.schema):
        raise BadRequest(
            "output_config.format must be of type json_schema, with a schema", "output_config.format"
        )
    return schema_grammar(request, wanted.schema, "output_config.format")
