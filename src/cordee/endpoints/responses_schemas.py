"""The fields of `POST /v1/responses`, each honoured, ignored with a reason, or refused by name.

Fields that are not listed are ignored: clients of this API send many, and new ones each month.
"""

from typing import Annotated, Any

import msgspec

from cordee.api.schemas import (
    ABSENT,
    CACHED,
    NO_MEDIA,
    PARTS_MAX,
    TOKENS_MAX,
    TOOLS_MAX,
    Shape,
    honoured,
    ignored,
    refused,
)

ITEMS_MAX = 8192  # of an input: an agent's conversation has a few for each step

OWN_ID = "ids are the client's: nothing is stored here"
SENT_BACK = "clients send answers back whole"
NOTHING_STORED = "nothing is stored here: send the whole conversation in `input`"
BUILT_IN = "no tool runs on this server"


class InputPart(Shape, frozen=True):
    """A part of a content."""

    type: Annotated[
        str,
        honoured(
            "`input_text`, `output_text`, `text`, `refusal`, in reasoning also `reasoning_text` and "
            "`summary_text`; others are refused by name"
        ),
    ]
    text: Annotated[str | None, honoured("joined with the other parts by line breaks")] = None
    refusal: Annotated[str | None, honoured("the text of a `refusal`")] = None
    annotations: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT
    logprobs: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT
    prompt_cache_breakpoint: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT


Parts = Annotated[list[InputPart], msgspec.Meta(max_length=PARTS_MAX)]


class ItemKind(Shape, frozen=True):
    """What every item begins with."""

    type: Annotated[str | None, honoured("the kind of item; `message` where it is left out")] = None


class MessageItem(ItemKind, frozen=True, kw_only=True):
    """`message`, by whomever."""

    role: Annotated[str, honoured("`user`, `assistant`, `system` or `developer`")]
    content: Annotated[str | Parts, honoured("text, or parts of text")]
    id: Annotated[msgspec.Raw, ignored(OWN_ID)] = ABSENT
    status: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT
    phase: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT


class FunctionCallItem(ItemKind, frozen=True, kw_only=True):
    """`function_call`: a call that the model made."""

    call_id: Annotated[str, honoured("what the output of the call refers to")]
    name: Annotated[str, honoured("the function's name")]
    arguments: Annotated[str, honoured("JSON text")]
    id: Annotated[msgspec.Raw, ignored(OWN_ID)] = ABSENT
    status: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT


class FunctionCallOutputItem(ItemKind, frozen=True, kw_only=True):
    """`function_call_output`: what the call returned."""

    call_id: Annotated[str, honoured("that of the call")]
    output: Annotated[str | Parts, honoured("text, or parts of text")]
    id: Annotated[msgspec.Raw, ignored(OWN_ID)] = ABSENT
    status: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT


class ReasoningItem(ItemKind, frozen=True):
    """`reasoning`: what the model thought before."""

    content: Annotated[
        Parts | None, honoured("given back to the model, where its template knows thinking")
    ] = None
    summary: Annotated[Parts | None, honoured("in its place where there is no content")] = None
    encrypted_content: Annotated[msgspec.Raw, ignored("no answer from here has one")] = ABSENT
    id: Annotated[msgspec.Raw, ignored(OWN_ID)] = ABSENT
    status: Annotated[msgspec.Raw, ignored(SENT_BACK)] = ABSENT


class ResponsesTool(Shape, frozen=True):
    """A tool."""

    type: Annotated[str, honoured("`function`; other types are left out, and named in `x-cordee-ignored`")]
    name: Annotated[str | None, honoured("the function's name")] = None
    description: Annotated[str | None, honoured("told to the model")] = None
    parameters: Annotated[dict[str, Any] | None, honoured("the JSON schema of its arguments")] = None
    strict: Annotated[
        bool | None,
        honoured("refuse a schema that cannot bind the arguments, instead of leaving out what cannot"),
    ] = None


class NamedTool(Shape, frozen=True, omit_defaults=True):
    """A tool as `tool_choice` names it."""

    type: Annotated[str, honoured("`function`")]
    name: Annotated[str | None, honoured("the function's name")] = None


class ResponsesToolChoice(Shape, frozen=True, omit_defaults=True):
    """A choice that is more than a word."""

    type: Annotated[str, honoured("`function`: this one is called; `allowed_tools`: no others are")]
    name: Annotated[str | None, honoured("of the function")] = None
    mode: Annotated[str | None, honoured("`auto` or `required`, with `allowed_tools`")] = None
    tools: Annotated[
        Annotated[list[NamedTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        honoured("with `allowed_tools`"),
    ] = None


class TextConfigFormat(Shape, frozen=True):
    """What binds the text."""

    type: Annotated[str, honoured("`text`, `json_object` or `json_schema`")] = "text"
    schema: Annotated[msgspec.Raw, honoured("the JSON schema, with `json_schema`")] = ABSENT
    name: Annotated[msgspec.Raw, ignored("the model does not see it")] = ABSENT
    description: Annotated[msgspec.Raw, ignored("say in the prompt what the answer is for")] = ABSENT
    strict: Annotated[
        bool | None,
        honoured("what cannot be enforced is refused; else it is ignored, and named in the reply"),
    ] = None


class TextConfig(Shape, frozen=True):
    """How text is written."""

    format: Annotated[TextConfigFormat | None, honoured("what binds the text")] = None
    verbosity: Annotated[
        msgspec.Raw, ignored("no model here has such a setting; ask for it in the prompt")
    ] = ABSENT


class Reasoning(Shape, frozen=True):
    """How the model thinks."""

    effort: Annotated[
        str | None,
        honoured("`none` asks for no thinking; `minimal` is `low`, `xhigh` and `max` are `high`"),
    ] = None
    summary: Annotated[msgspec.Raw, ignored("thinking is given as it is, not summarised")] = ABSENT


class ResponsesRequest(Shape, frozen=True, kw_only=True):
    """`POST /v1/responses`"""

    model: Annotated[str, honoured("an id that `GET /v1/models` lists")]
    input: Annotated[
        str | Annotated[list[msgspec.Raw], msgspec.Meta(max_length=ITEMS_MAX)],
        honoured("a text, or the items of the whole conversation"),
    ] = ""
    instructions: Annotated[str | None, honoured("a system message before the conversation")] = None
    stream: Annotated[bool | None, honoured("server-sent events, as the tokens come")] = None
    max_output_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)] | None,
        honoured("the answer ends after this many tokens; default: up to the end of the context"),
    ] = None
    temperature: Annotated[float | None, honoured("0 always takes the likeliest token; default 1")] = None
    top_p: Annotated[float | None, honoured("keeps the likeliest tokens that hold this much probability")] = (
        None
    )
    tools: Annotated[
        Annotated[list[ResponsesTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        honoured("functions that the model may call"),
    ] = None
    tool_choice: Annotated[
        str | ResponsesToolChoice | None, honoured("`auto`, `none`, `required`, or an object")
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, honoured("whether one answer may hold several calls; default true")
    ] = None
    text: Annotated[TextConfig | None, honoured("what binds the text")] = None
    reasoning: Annotated[Reasoning | None, honoured("how much the model thinks")] = None
    metadata: Annotated[dict[str, Any] | None, honoured("is in the reply")] = None
    store: Annotated[
        bool | None, honoured("nothing is stored: the reply says false, and `x-cordee-ignored` names it")
    ] = None
    previous_response_id: Annotated[msgspec.Raw, refused(NOTHING_STORED)] = ABSENT
    conversation: Annotated[msgspec.Raw, refused(NOTHING_STORED)] = ABSENT
    prompt: Annotated[
        msgspec.Raw, refused("no prompts are stored here: send it in `instructions` and `input`")
    ] = ABSENT
    background: Annotated[
        msgspec.Raw, refused("nothing is stored, so an answer has to be waited for: use `stream`", False)
    ] = ABSENT
    top_logprobs: Annotated[
        msgspec.Raw, refused("use `/v1/chat/completions`, which gives log-probabilities", 0)
    ] = ABSENT
    include: Annotated[
        Annotated[list[str], msgspec.Meta(max_length=PARTS_MAX)] | None,
        honoured(
            "`message.output_text.logprobs` is refused; other entries, for results of built-in tools and "
            "encrypted thinking, are ignored"
        ),
    ] = None
    max_tool_calls: Annotated[msgspec.Raw, ignored(BUILT_IN)] = ABSENT
    truncation: Annotated[
        msgspec.Raw, ignored("a conversation that is too long is refused, so that nothing is lost unseen")
    ] = ABSENT
    context_management: Annotated[msgspec.Raw, ignored("a conversation is taken as it is sent")] = ABSENT
    moderation: Annotated[msgspec.Raw, refused("nothing is sent anywhere to be judged")] = ABSENT
    service_tier: Annotated[msgspec.Raw, ignored("there is one tier")] = ABSENT
    user: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    safety_identifier: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    client_metadata: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    prompt_cache_key: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    prompt_cache_options: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    prompt_cache_retention: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    stream_options: Annotated[
        msgspec.Raw, ignored("padding against eavesdroppers has no use on this machine")
    ] = ABSENT
    access_programs: Annotated[msgspec.Raw, ignored("there are none")] = ABSENT
    background_options: Annotated[msgspec.Raw, ignored("`background` is refused")] = ABSENT
    image: Annotated[msgspec.Raw, ignored(NO_MEDIA)] = ABSENT
