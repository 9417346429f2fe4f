"""From the body of a chat completion to a turn: messages, tools, and what is wanted of thinking."""

from collections.abc import Sequence
from typing import Any

import msgspec

from cordee.api.schemas import (
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionChoice,
    ThinkingOption,
    ToolDefinition,
    refuse,
)
from cordee.chat.formats import THINKING_SWITCHES
from cordee.chat.turn import ChatTurn, Message, Thinking, Tool, ToolCall, ToolChoice
from cordee.errors import BadRequest

# Variables of a template that are ours to give.
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "now", "bos_token", "eos_token"})
MODES = {"none": "none", "auto": "auto", "required": "required", "any": "required"}  # any: Mistral's word


def chat_turn(request: ChatRequest) -> ChatTurn:
    """The turn that a chat completion asks for.

    Raises:
        BadRequest: a message, a tool or a choice cannot be used; `param` says which.
    """
    messages = [_message(message, f"messages[{place}].") for place, message in enumerate(request.messages)]
    tools = [_tool(tool) for tool in request.tools or () if tool.type == "function"]
    check_names(tools, "tools")
    choice, tools = _choice(request, tools)
    if request.grammar is not None and tools and choice.mode != "none":
        raise BadRequest("grammar and tools cannot both bind the answer: leave one out", "grammar")
    return ChatTurn(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        thinking=_thinking(request),
        variables=_variables(request),
        continues=_continues(request, messages[-1]),
    )


def unknown_tools(request: ChatRequest) -> tuple[str, ...]:
    """The kinds of tools that are left out, by name."""
    return tuple(
        sorted({f"tools.{tool.type[:40]}" for tool in request.tools or () if tool.type != "function"})
    )


def check_names(tools: Sequence[Tool], param: str) -> None:
    """Refuse tools that a call could not tell apart.

    Raises:
        BadRequest: two have one name, or one has none.
    """
    names: set[str] = set()
    for tool in tools:
        if not tool.name:
            raise BadRequest(f"a tool of {param} has no name", param)
        if tool.name in names:
            raise BadRequest(f"two tools of {param} are called {tool.name}", param)
        names.add(tool.name)


def _tool(tool: ToolDefinition) -> Tool:
    function = tool.function
    if function is None:
        raise BadRequest("a tool of type function needs function", "tools")
    return Tool(
        function.name, function.description or "", function.parameters or {}, strict=bool(function.strict)
    )


def _choice(request: ChatRequest, tools: list[Tool]) -> tuple[ToolChoice, list[Tool]]:
    """The choice, and the tools among which it is."""
    wanted = request.tool_choice
    if wanted is None:
        return ToolChoice(), tools
    if isinstance(wanted, FunctionChoice):
        name = wanted.function.name
        _require(tools, name)
        return ToolChoice("required", name), tools
    if isinstance(wanted, AllowedTools):
        names = [each.function.name for each in wanted.allowed_tools.tools]
        for name in names:
            _require(tools, name)
        tools = [tool for tool in tools if tool.name in names]
        mode = wanted.allowed_tools.mode
    else:
        mode = wanted
    if mode not in MODES:
        raise BadRequest("tool_choice must be none, auto, required, or name a function", "tool_choice")
    if MODES[mode] == "required" and not tools:
        raise BadRequest(f"tool_choice {mode} needs tools", "tool_choice")
    return ToolChoice(MODES[mode]), tools  # pyright: ignore[reportArgumentType] - MODES' values are its modes


def _require(tools: list[Tool], name: str) -> None:
    if all(tool.name != name for tool in tools):
        raise BadRequest(f"tool_choice names {name[:80]!r}, which is not among the tools", "tool_choice")


def _thinking(request: ChatRequest) -> Thinking:
    """Of several fields that say the same the first that is given counts: a client sends one."""
    options = request.chat_template_kwargs or {}
    reasoning, option = request.reasoning, request.thinking
    switches = [request.enable_thinking, *(options.get(name) for name in THINKING_SWITCHES)]
    efforts = [request.reasoning_effort, options.get("reasoning_effort")]
    budgets = [request.thinking_budget, options.get("thinking_budget")]
    if reasoning is not None:
        switches.append(reasoning.enabled)
        efforts.append(reasoning.effort)
        budgets.append(reasoning.max_tokens)
    if isinstance(option, ThinkingOption):
        switches.append({"enabled": True, "disabled": False}.get(option.type))
        budgets.append(option.budget_tokens)
    else:
        switches.append(option)
    enabled = next((each for each in switches if isinstance(each, bool)), None)
    effort = next((each for each in efforts if isinstance(each, str)), None)
    budget = next((each for each in budgets if isinstance(each, int) and each >= 0), None)
    if effort == "none" or budget == 0:
        enabled = False
    return Thinking(enabled, None if effort == "none" else effort, budget or None)


def _variables(request: ChatRequest) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    for name in given:
        if name in OWN_VARIABLES:
            raise BadRequest(f"chat_template_kwargs cannot set {name}", "chat_template_kwargs")
    return dict(given)


def _continues(request: ChatRequest, last: Message) -> bool:
    """Whether the answer goes on from the last message: if it is told to, or, as llama.cpp does, where that
    is an assistant's text."""
    can = last.role == "assistant" and not last.tool_calls and bool(last.content)
    if request.continue_final_message and not can:
        raise BadRequest(
            "continue_final_message needs a last message of the assistant with text", "continue_final_message"
        )
    if request.continue_final_message and request.add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other", "add_generation_prompt"
        )
    return can and request.continue_final_message is not False and not request.add_generation_prompt


def _message(message: ChatMessage, path: str) -> Message:
    refuse(message, path)
    calls = [
        ToolCall(call.id or f"call_{place}", call.function.name, _arguments(call.function.arguments))
        for place, call in enumerate(message.tool_calls or ())
    ]
    return Message(
        message.role,
        _content(message, path),
        message.name or None,
        thinking=message.reasoning_content or message.reasoning or "",
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
    )


def _arguments(given: str | dict[str, Any] | None) -> str:
    """JSON text; some clients send the object itself."""
    return given if isinstance(given, str) else msgspec.json.encode(given or {}).decode()


def _content(message: ChatMessage, path: str) -> str:
    if message.content is None:
        if message.role in ("assistant", "tool"):  # a message of calls has none, nor has one of thinking
            return ""
        raise BadRequest(f"{path}content is missing", f"{path}content")
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for place, part in enumerate(message.content):
        at = f"{path}content[{place}]."
        if part.type != "text":
            raise BadRequest(
                f"{at}type: {part.type[:40]} is not supported: models here read and write text only",
                f"{at}type",
            )
        refuse(part, at)
        if part.text is None:
            raise BadRequest(f"{at}text is missing", f"{at}text")
        texts.append(part.text)
    return "\n".join(texts)
