"""What was said so far, as chat templates take it."""

import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from cordee.chat.families import TAGGED, Family, JsonCalls
from cordee.chat.turn import ChatTurn, Message, Tool, ToolCall

UNKNOWN_TOOL = "tool"  # of a result whose call is not in the conversation any more
_ID_CHARACTERS = string.ascii_letters + string.digits

TOOLS_PROMPT = """\
# Tools

You may call functions to help with the request. Their signatures, as JSON, stand between <tools></tools>:
<tools>
{tools}
</tools>

For each call answer with its name and arguments, as JSON between <tool_call></tool_call>:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
You get what they return between <tool_response></tool_response>. If no function is needed, answer as
usual."""


def described(tool: Tool) -> dict[str, Any]:
    """A tool as templates take it: as in OpenAI's API."""
    parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call as an object; what is none becomes one, with the key `arguments`."""
    if not call.arguments.strip():
        return {}
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else {"arguments": arguments}


def native(turn: ChatTurn, family: Family) -> list[dict[str, Any]]:
    """The messages for a template that knows calls and their results."""
    messages = _named(turn.messages)
    if family.single_calls:
        messages = list(_one_by_one(messages))
    made = [_native(message, family) for message in messages]
    return _with_results(made) if family.own_results else made


def _with_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, where each that calls has what was returned to it (`tool_responses`, Google's form), and
    what was said next if that made no further call."""
    made: list[dict[str, Any]] = []
    for message in messages:
        last = made[-1] if made else {}
        results: list[dict[str, Any]] = last.get("tool_responses", [])
        if message["role"] == "tool" and "tool_calls" in last:
            result = {"name": message["name"], "response": message["content"]}
            made[-1] = last | {"tool_responses": [*results, result]}
        elif (
            message["role"] == "assistant" and results and "tool_calls" not in message and not last["content"]
        ):
            made[-1] = last | {"content": message["content"]}
        else:
            made.append(message)
    return made


def by_prompt(
    turn: ChatTurn, tools: Sequence[Tool], form: JsonCalls = TAGGED, *, knows_system: bool
) -> list[dict[str, Any]]:
    """The messages for a template that knows none: tools are described in the system prompt, calls are text
    of the assistant, and results are text of the user. Neighbours of one role are joined, as most of these
    templates want roles to alternate."""
    messages: list[dict[str, Any]] = []
    if tools:
        text = TOOLS_PROMPT.format(tools="\n".join(_json(described(tool)) for tool in tools))
        messages.append({"role": "system", "content": text})
    uses_tools = bool(tools) or any(each.tool_calls or each.role == "tool" for each in turn.messages)
    for message in turn.messages:
        plain = _without_calls(message, form)
        if uses_tools and messages and messages[-1]["role"] == plain["role"] and "name" not in plain:
            messages[-1] = plain | {"content": messages[-1]["content"] + "\n\n" + plain["content"]}
        else:
            messages.append(plain)
    return messages if knows_system or not tools else _without_system(messages)


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, where the user says first what the system prompt did."""
    system, *others = messages
    if others and others[0]["role"] == "user":
        return [others[0] | {"content": system["content"] + "\n\n" + others[0]["content"]}, *others[1:]]
    return [system | {"role": "user"}, *others]


def _without_calls(message: Message, form: JsonCalls) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    parts = [message.content] if message.content else []
    parts += [_written(message.tool_calls, form)] if message.tool_calls else []
    return _plain(message, "\n".join(parts))


def _plain(message: Message, content: str | None) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.thinking:  # Qwen, DeepSeek and GLM call it the one, gpt-oss the other
        plain |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    return plain


def _native(message: Message, family: Family) -> dict[str, Any]:
    plain = _plain(message, None if message.tool_calls and family.null_content else message.content)
    if message.tool_calls:
        plain["tool_calls"] = [_call(call, family) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = _id(message.tool_call_id, family)
    return plain


def _written(made: Sequence[ToolCall], form: JsonCalls) -> str:
    """Calls as a model writes them."""
    calls = [f"{form.head}{each.name}{form.middle}{_json(arguments_of(each))}{form.tail}" for each in made]
    sections = calls if form.between is None else [form.between.join(calls)]
    return (form.again or "").join(f"{form.open}{section}{form.close}" for section in sections)


def _call(call: ToolCall, family: Family) -> dict[str, Any]:
    arguments = arguments_of(call)
    given = _json(arguments) if family.text_arguments else arguments
    function = {"name": call.name, "arguments": given}
    return {"id": _id(call.id, family), "type": "function", "function": function}


def _id(written: str, family: Family) -> str:
    """The id of a call in the family's form; the same for the same one."""
    length = family.id_chars
    if length is None or (len(written) == length and written.isalnum() and written.isascii()):
        return written
    digest = hashlib.sha256(written.encode("utf-8", "surrogatepass")).digest()
    return "".join(_ID_CHARACTERS[byte % len(_ID_CHARACTERS)] for byte in digest[:length])


def _named(messages: Sequence[Message]) -> list[Message]:
    """The messages, where each result has the name of the tool that was called."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        replace(message, name=names.get(message.tool_call_id or "", UNKNOWN_TOOL))
        if message.role == "tool" and message.name is None
        else message
        for message in messages
    ]


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages, where each has one call at the most, and the call's result follows."""
    done: set[int] = set()
    for place, message in enumerate(messages):
        if place in done:
            continue
        if len(message.tool_calls) < 2:
            yield message
            continue
        for number, call in enumerate(message.tool_calls):
            first = replace(message, tool_calls=(call,))
            yield first if number == 0 else replace(first, content="", thinking="")
            for later in range(place + 1, len(messages)):
                if messages[later].role != "tool":
                    break
                if messages[later].tool_call_id == call.id and later not in done:
                    done.add(later)
                    yield messages[later]
                    break


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
