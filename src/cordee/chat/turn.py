"""A turn of a conversation, whatever API it came by: what was said so far, and what may be answered.

OpenAI's chat completions and Responses, Anthropic's messages and Ollama's chat all become a `ChatTurn`; the
format of the model (formats.py) makes a prompt of it, and events of the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of an object; with `strict` all of it
    must bind the arguments, else what cannot is left out."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer calls tools: never, as the model likes, at least one, or the one named `tool`."""

    mode: Literal["none", "auto", "required"] = "auto"
    tool: str | None = None  # with "required" alone


@dataclass(frozen=True)
class ToolCall:
    """A call that a model made. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """A message. `tool_calls` and `thinking` are an assistant's; `tool_call_id` is of role `tool`, whose
    content is what the call returned, and whose `name` is the tool's where a client gave it."""

    role: str
    content: str = ""
    name: str | None = None
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Thinking:
    """What is asked of a model that thinks before it answers; None: as the model is used to.

    `effort` is what its template knows (low, medium, high); after `tokens_max` tokens the thinking is ended.
    """

    enabled: bool | None = None
    effort: str | None = None
    tokens_max: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChatTurn:
    """What the next answer is to be made from. `variables` are the client's own for the template.

    `continues` has the answer go on from the last message, which is the assistant's, without a new beginning.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    thinking: Thinking = Thinking()
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    continues: bool = False
