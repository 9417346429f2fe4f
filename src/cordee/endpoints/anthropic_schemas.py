"""The fields of Anthropic's messages, each honoured, ignored with a reason, or refused by name.

Fields that are not listed are ignored: clients of this API send many, and new ones each month.
"""

from typing import Annotated, Any

import msgspec

from cordee.api.schemas import (
    ABSENT,
    CACHED,
    MESSAGES_MAX,
    PARTS_MAX,
    TOKENS_MAX,
    TOOLS_MAX,
    Shape,
    honoured,
    ignored,
)
from cordee.generation.text import STOPS_MAX

BLOCKS_MAX = PARTS_MAX


class DocumentSource(Shape, frozen=True):
    """Where a document is."""

    type: Annotated[str, honoured("`text`; others are refused by name")]
    data: Annotated[str | None, honoured("the text")] = None
    media_type: Annotated[msgspec.Raw, ignored("the model reads text")] = ABSENT


class ContentBlock(Shape, frozen=True):
    """A block of a content."""

    type: Annotated[
        str,
        honoured(
            "`text`, `thinking`, `redacted_thinking`, `tool_use`, `tool_result`, `tool_reference`, "
            "`document`; blocks of tools that run on a server are left out, and named in `x-cordee-ignored`; "
            "others are refused by name"
        ),
    ]
    text: Annotated[str | None, honoured("of a `text`")] = None
    thinking: Annotated[
        str | None, honoured("of a `thinking`: given back to the model, where its template knows thinking")
    ] = None
    id: Annotated[str | None, honoured("of a `tool_use`")] = None
    name: Annotated[str | None, honoured("of a `tool_use`: the tool's")] = None
    input: Annotated[dict[str, Any] | None, honoured("of a `tool_use`: the arguments")] = None
    tool_use_id: Annotated[str | None, honoured("of a `tool_result`: the call's id")] = None
    content: Annotated[
        str | Annotated[list["ContentBlock"], msgspec.Meta(max_length=BLOCKS_MAX)] | None,
        honoured("of a `tool_result`: text, or blocks of text"),
    ] = None
    is_error: Annotated[
        bool | None, honoured("of a `tool_result`: the model is told that the call failed")
    ] = None
    source: Annotated[msgspec.Raw, honoured('of a `document`: `{"type": "text", "data": …}`')] = ABSENT
    tool_name: Annotated[str | None, honoured("of a `tool_reference`")] = None
    title: Annotated[str | None, honoured("of a `document`")] = None
    data: Annotated[msgspec.Raw, ignored("of a `redacted_thinking`: encrypted for Anthropic")] = ABSENT
    signature: Annotated[msgspec.Raw, ignored("nothing is signed here")] = ABSENT
    cache_control: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    citations: Annotated[msgspec.Raw, ignored("there are none")] = ABSENT


Content = Annotated[list[ContentBlock], msgspec.Meta(max_length=BLOCKS_MAX)]


class AnthropicMessage(Shape, frozen=True):
    """A message."""

    role: Annotated[
        str, honoured("`user` or `assistant`; `system` is marked in the user's words, but at the beginning")
    ]
    content: Annotated[str | Content, honoured("text, or blocks")]


class AnthropicTool(Shape, frozen=True):
    """A tool."""

    name: Annotated[str | None, honoured("the tool's name")] = None
    type: Annotated[
        str | None,
        honoured(
            "`custom`, or left out; tools that run on a server are left out, and named in `x-cordee-ignored`"
        ),
    ] = None
    description: Annotated[str | None, honoured("told to the model")] = None
    input_schema: Annotated[dict[str, Any] | None, honoured("the JSON schema of its arguments")] = None
    strict: Annotated[
        bool | None,
        honoured("refuse a schema that cannot bind the arguments, instead of leaving out what cannot"),
    ] = None
    cache_control: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT


class AnthropicToolChoice(Shape, frozen=True):
    """Whether the answer calls tools."""

    type: Annotated[str, honoured("`auto`, `any`, `tool` or `none`")]
    name: Annotated[str | None, honoured("with `tool`: which one")] = None
    disable_parallel_tool_use: Annotated[bool | None, honoured("one call at most")] = None


class AnthropicThinking(Shape, frozen=True):
    """How the model thinks."""

    type: Annotated[
        str,
        honoured(
            "`enabled`, `adaptive` (as the model is used to), `disabled` or `between_tools` (the same); "
            "left out, it is `disabled`"
        ),
    ]
    budget_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)] | None,
        honoured("with `enabled`: after this many tokens the thinking is ended"),
    ] = None
    display: Annotated[str | None, honoured("`omitted`: the blocks come without their text")] = None


class OutputFormat(Shape, frozen=True):
    """What binds the text."""

    type: Annotated[str, honoured("`json_schema`")]
    schema: Annotated[msgspec.Raw, honoured("the JSON schema")] = ABSENT


class OutputConfig(Shape, frozen=True):
    """How the answer is written."""

    effort: Annotated[str | None, honoured("how much the model thinks; `xhigh` and `max` are `high`")] = None
    format: Annotated[OutputFormat | None, honoured("what binds the text")] = None


class Prompt(Shape, frozen=True, kw_only=True):
    """What `POST /v1/messages` and `POST /v1/messages/count_tokens` share."""

    model: Annotated[str, honoured("an id that `GET /v1/models` lists")]
    messages: Annotated[
        list[AnthropicMessage], honoured("the conversation", min_length=1, max_length=MESSAGES_MAX)
    ]
    system: Annotated[str | Content | None, honoured("text, or blocks of text")] = None
    tools: Annotated[
        Annotated[list[AnthropicTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        honoured("that the model may call"),
    ] = None
    tool_choice: Annotated[AnthropicToolChoice | None, honoured("default `auto`")] = None
    thinking: Annotated[AnthropicThinking | None, honoured("how the model thinks")] = None
    output_config: Annotated[OutputConfig | None, honoured("effort, and what binds the text")] = None
    output_format: Annotated[OutputFormat | None, honoured("the older place of `output_config.format`")] = (
        None
    )
    context_management: Annotated[msgspec.Raw, ignored("a conversation is taken as it is sent")] = ABSENT
    cache_control: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    mcp_servers: Annotated[
        msgspec.Raw, ignored("this server asks no others; `x-cordee-ignored` names it")
    ] = ABSENT


class CountRequest(Prompt, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`"""


class MessagesRequest(Prompt, frozen=True, kw_only=True):
    """`POST /v1/messages`"""

    max_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)], honoured("the answer ends after this many tokens")
    ]
    stream: Annotated[bool | None, honoured("server-sent events, as the tokens come")] = None
    stop_sequences: Annotated[
        Annotated[list[str], msgspec.Meta(max_length=STOPS_MAX)] | None,
        honoured("the answer ends before any of these texts, and `stop_sequence` says which"),
    ] = None
    temperature: Annotated[float | None, honoured("0 always takes the likeliest token; default 1")] = None
    top_p: Annotated[float | None, honoured("keeps the likeliest tokens that hold this much probability")] = (
        None
    )
    top_k: Annotated[int | None, honoured("keeps this many of the likeliest tokens")] = None
    speed: Annotated[msgspec.Raw, ignored("there is one")] = ABSENT
    diagnostics: Annotated[msgspec.Raw, ignored("nothing is kept of earlier requests")] = ABSENT
    user_profile_id: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    workspace_id: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    metadata: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    service_tier: Annotated[msgspec.Raw, ignored("there is one tier")] = ABSENT
    inference_geo: Annotated[msgspec.Raw, ignored("answers are made on these machines")] = ABSENT
    container: Annotated[msgspec.Raw, ignored("no tool runs on this server")] = ABSENT
