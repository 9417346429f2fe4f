"""What a request may hold, field by field: honoured, ignored with a reason, or refused by name.

A field that stands nowhere here is refused as unknown, so that a misspelt or a new one never passes for
one that was honoured. `docs/api.md` is made from these classes.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec

from cordee.errors import BadRequest
from cordee.generation.sampling import RANGES
from cordee.generation.text import STOPS_MAX

MESSAGES_MAX = 4096  # turns of a conversation
PARTS_MAX = 1024  # content parts of a message
CHOICES_MAX = 32  # answers that one request may ask for: prompts times `n`
TOKENS_MAX = 1 << 30  # no context is longer
LEGACY_MAX_TOKENS = 16  # OpenAI's default for completions
HARMLESS_BYTES_MAX = 64  # a refused field's harmless values are all shorter

ABSENT = msgspec.Raw(b"null")
IDENTIFIER = r"\A[A-Za-z][A-Za-z0-9_-]{0,63}\Z"  # roles and names stand between control tokens in a prompt


def honoured(kind: Any, note: str, **constraints: Any) -> Any:
    """A field that has its effect. `constraints` are msgspec's."""
    return Annotated[kind, msgspec.Meta(description=note, **constraints)]


def ignored(reason: str) -> Any:
    """A field that may hold anything, and is not even read."""
    return Annotated[msgspec.Raw, msgspec.Meta(extra={"ignored": reason})]


def refused(reason: str, *harmless: Any) -> Any:
    """A field that must be absent, null, or one of the `harmless` values, which ask for nothing."""
    return Annotated[msgspec.Raw, msgspec.Meta(extra={"refused": reason, "harmless": (None, *harmless)})]


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every object in a request."""


NO_MEDIA = "models here read and write text only"
NO_TOOLS = "tool calls are not implemented"
NO_FUNCTIONS = "function calls are not implemented"
CACHED = "a prompt that begins as an earlier one did is always taken up there while there is room"


class ContentPart(Shape):
    """A part of a message's content."""

    type: honoured(str, "`text`; other kinds are refused by name")
    text: honoured(str | None, "joined with the other parts by line breaks") = None
    image_url: refused(NO_MEDIA) = ABSENT
    input_audio: refused(NO_MEDIA) = ABSENT
    file: refused(NO_MEDIA) = ABSENT
    refusal: refused("send what was said as text") = ABSENT
    prompt_cache_breakpoint: ignored(CACHED) = ABSENT


class Message(Shape):
    """A message of a conversation, as a client writes it or as it got it from here."""

    role: honoured(
        str,
        "what the model's chat template knows; `developer` becomes `system` where it does not know that",
        pattern=IDENTIFIER,
    )
    content: honoured(
        str | Annotated[list[ContentPart], msgspec.Meta(max_length=PARTS_MAX)] | None,
        "text; the names of control tokens in it, such as `<|im_end|>`, stay text",
    ) = None
    name: honoured(Annotated[str, msgspec.Meta(pattern=IDENTIFIER)] | None, "for templates that use it") = (
        None
    )
    tool_calls: refused(NO_TOOLS, []) = ABSENT
    tool_call_id: refused(NO_TOOLS) = ABSENT
    function_call: refused(NO_FUNCTIONS) = ABSENT
    audio: refused(NO_MEDIA) = ABSENT
    refusal: ignored("clients send answers back whole; no answer from here has one") = ABSENT
    annotations: ignored("clients send answers back whole; no answer from here has any") = ABSENT


class StreamOptions(Shape):
    """How an answer is streamed."""

    include_usage: honoured(bool | None, "a last chunk with `usage` and no choices") = None
    include_obfuscation: ignored("padding against eavesdroppers has no use on this machine") = ABSENT


class TextFormat(Shape, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Shape, tag_field="type", tag="json_object"):
    """Some JSON object."""


class JsonSchema(Shape):
    """A schema that the answer follows to the letter."""

    schema: honoured(msgspec.Raw, "the JSON schema")
    name: ignored("the model does not see it") = ABSENT
    description: ignored("say in the prompt what the answer is for") = ABSENT
    strict: ignored("every schema is enforced") = ABSENT


class JsonSchemaFormat(Shape, tag_field="type", tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: honoured(JsonSchema, "holds the schema")


class Common(Shape):
    """What chat completions and completions share."""

    model: honoured(str, "an id that `GET /v1/models` lists")
    stream: honoured(bool | None, "server-sent events, as the tokens come") = None
    stream_options: honoured(StreamOptions | None, "only with `stream`") = None
    max_tokens: honoured(
        Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)] | None, "ends the answer after so many tokens"
    ) = None
    n: honoured(
        Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None,
        "answers to each prompt; with several prompts the limit holds for all together",
    ) = None
    stop: honoured(
        str | Annotated[list[str], msgspec.Meta(max_length=STOPS_MAX)] | None,
        "ends the answer before any of these texts",
    ) = None
    temperature: honoured(float | None, "0 always takes the likeliest token; default 1") = None
    top_p: honoured(float | None, "keeps the likeliest tokens that hold this much probability") = None
    top_k: honoured(int | None, "keeps so many of the likeliest tokens; 0: all (llama.cpp, vLLM)") = None
    min_p: honoured(
        float | None, "drops tokens less likely than this share of the likeliest (llama.cpp, vLLM)"
    ) = None
    repeat_penalty: honoured(float | None, "divides the logits of recent tokens (llama.cpp)") = None
    frequency_penalty: honoured(float | None, "lowers a recent token's logit for each occurrence") = None
    presence_penalty: honoured(float | None, "lowers the logits of recent tokens once") = None
    logit_bias: honoured(
        dict[str, float] | None, "token ids, as strings, to what is added to their logits"
    ) = None
    seed: honoured(
        int | None, "the same seed gives the same answer; choice `i` takes `seed + i`; default: a random one"
    ) = None
    grammar: honoured(str | None, "a GBNF grammar that the answer follows (llama.cpp)") = None
    user: ignored("nothing is kept about who asks") = ABSENT
    store: refused("nothing is stored", False) = ABSENT
    metadata: ignored("it describes stored answers, and nothing is stored") = ABSENT
    service_tier: ignored("there is one tier") = ABSENT


class ChatRequest(Common, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: honoured(list[Message], "the conversation", min_length=1, max_length=MESSAGES_MAX)
    max_completion_tokens: honoured(
        Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)] | None,
        "the newer name of `max_tokens`; default: up to the end of the context",
    ) = None
    logprobs: honoured(bool | None, "log-probabilities of the answer's tokens") = None
    top_logprobs: honoured(int | None, "and of so many of the likeliest at each place; needs `logprobs`") = (
        None
    )
    response_format: honoured(
        TextFormat | JsonObjectFormat | JsonSchemaFormat | None, "`text`, `json_object` or `json_schema`"
    ) = None
    reasoning_effort: honoured(
        Annotated[str, msgspec.Meta(pattern=IDENTIFIER)] | None, "given to the model's chat template"
    ) = None
    safety_identifier: ignored("nothing is kept about who asks") = ABSENT
    prompt_cache_key: ignored(CACHED) = ABSENT
    prompt_cache_options: ignored(CACHED) = ABSENT
    prompt_cache_retention: ignored(CACHED) = ABSENT
    tools: refused(NO_TOOLS, []) = ABSENT
    tool_choice: refused(NO_TOOLS, "none") = ABSENT
    parallel_tool_calls: ignored("it needs `tools`, which are refused") = ABSENT
    functions: refused(NO_FUNCTIONS, []) = ABSENT
    function_call: refused(NO_FUNCTIONS, "none") = ABSENT
    modalities: refused(NO_MEDIA, ["text"]) = ABSENT
    audio: refused(NO_MEDIA) = ABSENT
    moderation: refused("nothing is sent anywhere to be judged") = ABSENT
    prediction: refused("predicted outputs are not implemented") = ABSENT
    verbosity: refused("no model here has such a setting; ask for it in the prompt", "medium") = ABSENT
    web_search_options: refused("nothing is fetched from outside") = ABSENT


class CompletionRequest(Common, kw_only=True):
    """`POST /v1/completions`"""

    prompt: honoured(
        str | list[str | int | list[int]],
        "a text, token ids, or a list of either; control tokens in a text are read as tokens",
    )
    logprobs: honoured(
        Annotated[int, msgspec.Meta(ge=0, le=RANGES["top_logprobs"][1])] | None,
        "log-probabilities of the answer's tokens and of so many of the likeliest at each place",
    ) = None
    best_of: refused("answers are not ranked; use `n`", 1) = ABSENT
    echo: refused("the prompt is not repeated", False) = ABSENT
    suffix: refused("insertion is not implemented; write the model's own infill tokens in the prompt", "") = (
        ABSENT
    )


@cache
def policies(kind: type[Shape]) -> Mapping[str, msgspec.Meta]:
    """What each field of an object is for, in the order in which they are declared."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[-1] for field in msgspec.structs.fields(kind)}


def refuse(shape: Shape, path: str = "") -> None:
    """Refuse an object with a field that asks for what cannot be honoured. `path` is where it stands.

    Raises:
        BadRequest: names the field and the reason.
    """
    for name, meta in policies(type(shape)).items():
        if meta.extra is None or "refused" not in meta.extra:
            continue
        raw = bytes(getattr(shape, name))
        if len(raw) > HARMLESS_BYTES_MAX or msgspec.json.decode(raw) not in meta.extra["harmless"]:
            raise BadRequest(f"{path}{name} is not supported: {meta.extra['refused']}", path + name)
