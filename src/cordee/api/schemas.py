"""The fields of requests: each is honoured, ignored with a reason, or refused by name.

A field that is not listed here is ignored, and so is one that is not offered; the reply names both
(ignored.py), so that a misspelt or a new one is not taken for one that was honoured. `docs/api.md` is
generated from these classes.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec

from cordee.errors import BadRequest
from cordee.generation.sampling import PENALTY_WINDOW_MAX, RANGES
from cordee.generation.text import STOPS_MAX

MESSAGES_MAX = 4096  # turns of a conversation
PARTS_MAX = 1024  # content parts of a message
TOOLS_MAX = 1024  # of a request; OpenAI takes 128, agents with many servers of tools send more
EXTRA_FILES_MAX = 1024  # beside the one that is filled in
CHOICES_MAX = 32  # answers that one request may ask for: prompts times `n`
TOKENS_MAX = 1 << 30  # no context is longer
LEGACY_MAX_TOKENS = 16  # OpenAI's default for completions
HARMLESS_BYTES_MAX = 64  # a refused field's harmless values are all shorter

NULL = msgspec.Raw(b"null")
# The default of a field that is not decoded. A factory: no description shows undecoded JSON (openapi.py).
ABSENT = msgspec.field(default_factory=lambda: NULL)
IDENTIFIER = r"\A[A-Za-z][A-Za-z0-9_-]{0,63}\Z"  # roles stand between control tokens in a prompt
NAME = r"\A[^\x00-\x1f\x7f]{0,128}\Z"  # of a speaker; on one line, as templates have it

TOOL_NAME = r"\A[A-Za-z0-9_.:/-]{1,128}\Z"  # a name stands in a prompt and in a grammar


def honoured(note: str, **constraints: Any) -> msgspec.Meta:
    """A field that has its effect. `constraints` are msgspec's."""
    return msgspec.Meta(description=note, **constraints)


def ignored(reason: str) -> msgspec.Meta:
    """A field that may hold anything, and is not even read."""
    return msgspec.Meta(extra={"ignored": reason})


def refused(reason: str, *harmless: Any) -> msgspec.Meta:
    """A field that must be absent, null, or one of the `harmless` values, which ask for nothing."""
    return msgspec.Meta(extra={"refused": reason, "harmless": (None, *harmless)})


def unoffered(reason: str, *harmless: Any) -> msgspec.Meta:
    """A field that may hold anything, and is named in the reply if it is not null or one of the `harmless`
    values."""
    return msgspec.Meta(extra={"unoffered": reason, "harmless": (None, *harmless)})


class Shape(msgspec.Struct, frozen=True):
    """Base of every object in a request."""


Integral = int | float  # a whole number, which some clients write as 4.0

NO_MEDIA = "models here read and write text only"
NO_FUNCTIONS = "functions are the older form of tools; send tools"
CACHED = "a prompt that begins as an earlier one did is always taken up there while there is room"


class ContentPart(Shape, frozen=True):
    """A part of a message's content."""

    type: Annotated[str, honoured("`text`; other kinds are refused by name")]
    text: Annotated[str | None, honoured("joined with the other parts by line breaks")] = None
    image_url: Annotated[msgspec.Raw, refused(NO_MEDIA)] = ABSENT
    input_audio: Annotated[msgspec.Raw, refused(NO_MEDIA)] = ABSENT
    file: Annotated[msgspec.Raw, refused(NO_MEDIA)] = ABSENT
    refusal: Annotated[msgspec.Raw, refused("send what was said as text")] = ABSENT
    prompt_cache_breakpoint: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    cache_control: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT


class CalledFunction(Shape, frozen=True):
    """What was called."""

    name: Annotated[str, honoured("the tool's name")]
    arguments: Annotated[
        str | dict[str, Any] | None, honoured("JSON text, as it was answered; an object will do")
    ] = None


class MessageToolCall(Shape, frozen=True):
    """A call in an assistant's message."""

    function: Annotated[CalledFunction, honoured("what was called")]
    id: Annotated[str | None, honoured("what the result's `tool_call_id` names")] = None
    type: Annotated[msgspec.Raw, ignored("only functions are called")] = ABSENT
    index: Annotated[msgspec.Raw, ignored("their order says it")] = ABSENT


class ChatMessage(Shape, frozen=True):
    """A message of a conversation, as a client writes it or as it got it from here."""

    role: Annotated[
        str,
        honoured(
            "what the model's chat template knows; `developer` becomes `system` where it does not know that",
            pattern=IDENTIFIER,
        ),
    ]
    content: Annotated[
        str | Annotated[list[ContentPart], msgspec.Meta(max_length=PARTS_MAX)] | None,
        honoured("text; the names of control tokens in it, such as `<|im_end|>`, stay text"),
    ] = None
    name: Annotated[
        Annotated[str, msgspec.Meta(pattern=NAME)] | None, honoured("for templates that use it; on one line")
    ] = None
    tool_calls: Annotated[
        Annotated[list[MessageToolCall], msgspec.Meta(max_length=PARTS_MAX)] | None,
        honoured("the calls that an assistant made"),
    ] = None
    tool_call_id: Annotated[str | None, honoured("the call whose result a message of role `tool` is")] = None
    reasoning_content: Annotated[
        str | None, honoured("what an assistant thought, for templates that show it again")
    ] = None
    reasoning: Annotated[str | None, honoured("another name of `reasoning_content`")] = None
    function_call: Annotated[msgspec.Raw, refused(NO_FUNCTIONS)] = ABSENT
    audio: Annotated[msgspec.Raw, refused(NO_MEDIA)] = ABSENT
    refusal: Annotated[
        msgspec.Raw, ignored("clients send answers back whole; no answer from here has one")
    ] = ABSENT
    annotations: Annotated[
        msgspec.Raw, ignored("clients send answers back whole; no answer from here has any")
    ] = ABSENT


class FunctionDefinition(Shape, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, honoured("how the model calls it", pattern=TOOL_NAME)]
    description: Annotated[str | None, honoured("what it is for; the model reads it")] = None
    parameters: Annotated[
        dict[str, Any] | None, honoured("a JSON schema of an object; the arguments follow it")
    ] = None
    strict: Annotated[
        bool | None,
        honoured("refuse a schema that cannot bind the arguments, instead of leaving out what cannot"),
    ] = None


class ToolDefinition(Shape, frozen=True, forbid_unknown_fields=False):
    """A tool. Those of other types are left out."""

    type: Annotated[str, honoured("`function`")]
    function: Annotated[FunctionDefinition | None, honoured("what can be called")] = None


class FunctionName(Shape, frozen=True):
    """A function by its name."""

    name: Annotated[str, honoured("one of the tools'")]


class FunctionChoice(Shape, tag_field="type", tag="function", frozen=True):
    """The one tool that is to be called."""

    function: Annotated[FunctionName, honoured("which")]


class AllowedSet(Shape, frozen=True):
    """The tools that may be called now."""

    mode: Annotated[str, honoured("`auto` or `required`")]
    tools: Annotated[list[FunctionChoice], honoured("which", max_length=PARTS_MAX)]


class AllowedTools(Shape, tag_field="type", tag="allowed_tools", frozen=True):
    """Some of the tools."""

    allowed_tools: Annotated[AllowedSet, honoured("which")]


class ReasoningOption(Shape, frozen=True):
    """What is wanted of thinking (OpenRouter's form)."""

    effort: Annotated[
        Annotated[str, msgspec.Meta(pattern=IDENTIFIER)] | None, honoured("as `reasoning_effort`")
    ] = None
    max_tokens: Annotated[int | None, honoured("as `thinking_budget`")] = None
    enabled: Annotated[bool | None, honoured("as `enable_thinking`")] = None
    exclude: Annotated[msgspec.Raw, ignored("leave `reasoning_content` unread")] = ABSENT
    summary: Annotated[msgspec.Raw, ignored("what was thought comes as it is")] = ABSENT


class ThinkingOption(Shape, frozen=True):
    """What is wanted of thinking (DeepSeek's and Anthropic's form)."""

    type: Annotated[str, honoured("`enabled` or `disabled`; else as the model is used to")]
    budget_tokens: Annotated[int | None, honoured("as `thinking_budget`")] = None


class StreamOptions(Shape, frozen=True):
    """How an answer is streamed."""

    include_usage: Annotated[bool | None, honoured("a last chunk with `usage` and no choices")] = None
    continuous_usage_stats: Annotated[
        bool | None, honoured("with `include_usage`: `usage` so far in every chunk (vLLM)")
    ] = None
    include_obfuscation: Annotated[
        msgspec.Raw, ignored("padding against eavesdroppers has no use on this machine")
    ] = ABSENT


class TextFormat(Shape, tag_field="type", tag="text", frozen=True):
    """Any text."""


SCHEMA = "a JSON schema that the answer follows (llama.cpp)"


class JsonObjectFormat(Shape, tag_field="type", tag="json_object", frozen=True):
    """Some JSON object."""

    schema: Annotated[msgspec.Raw, honoured(SCHEMA)] = ABSENT


class JsonSchema(Shape, frozen=True):
    """A schema that the answer follows to the letter."""

    schema: Annotated[msgspec.Raw, honoured("the JSON schema")]
    name: Annotated[msgspec.Raw, ignored("the model does not see it")] = ABSENT
    description: Annotated[msgspec.Raw, ignored("say in the prompt what the answer is for")] = ABSENT
    strict: Annotated[
        bool | None,
        honoured("what cannot be enforced is refused; else it is ignored, and named in the reply"),
    ] = None


class JsonSchemaFormat(Shape, tag_field="type", tag="json_schema", frozen=True):
    """JSON that follows a schema."""

    json_schema: Annotated[JsonSchema, honoured("holds the schema")]


HIDDEN_STATE = "its state is all the probabilities so far, so an answer could not go on after a lost stage"
ONE_ORDER = "the order of the samplers is fixed, as this page has it"


class Samplers(Shape, frozen=True):
    """How tokens are chosen, and when an answer ends, in the words of OpenAI, vLLM, llama.cpp and Ollama."""

    stop: Annotated[
        str | Annotated[list[str], msgspec.Meta(max_length=STOPS_MAX)] | None,
        honoured("the answer ends before any of these texts; empty ones do not count"),
    ] = None
    temperature: Annotated[float | None, honoured("0 always takes the likeliest token; default 1")] = None
    top_p: Annotated[float | None, honoured("keeps the likeliest tokens that hold this much probability")] = (
        None
    )
    top_k: Annotated[
        Integral | None,
        honoured("keeps this many of the likeliest tokens; 0 or less: all (llama.cpp, vLLM)"),
    ] = None
    min_p: Annotated[
        float | None, honoured("drops tokens less likely than this share of the likeliest (llama.cpp, vLLM)")
    ] = None
    typical_p: Annotated[
        float | None, honoured("keeps the most typical tokens that hold this much probability (llama.cpp)")
    ] = None
    top_n_sigma: Annotated[
        float | None,
        honoured("drops logits so many standard deviations below the best; 0 or less: none (llama.cpp)"),
    ] = None
    xtc_probability: Annotated[
        float | None, honoured("how often XTC leaves out the likeliest tokens (llama.cpp)")
    ] = None
    xtc_threshold: Annotated[
        float | None, honoured("which: all but the last of those with this much probability; default 0.1")
    ] = None
    dynatemp_range: Annotated[
        float | None, honoured("the temperature goes so much up and down with the entropy (llama.cpp)")
    ] = None
    dynatemp_exponent: Annotated[float | None, honoured("and along this curve; default 1")] = None
    repeat_penalty: Annotated[float | None, honoured("divides the logits of recent tokens (llama.cpp)")] = (
        None
    )
    repetition_penalty: Annotated[float | None, honoured("another name of `repeat_penalty` (vLLM)")] = None
    repeat_last_n: Annotated[
        Integral | None,
        honoured(f"how many tokens are recent; -1, and more than that: {PENALTY_WINDOW_MAX} (llama.cpp)"),
    ] = None
    penalty_last_n: Annotated[Integral | None, honoured("another name of `repeat_last_n`")] = None
    frequency_penalty: Annotated[
        float | None, honoured("lowers a recent token's logit for each occurrence")
    ] = None
    presence_penalty: Annotated[float | None, honoured("lowers the logits of recent tokens once")] = None
    dry_multiplier: Annotated[
        float | None, honoured("DRY lowers logits that would go on with a repetition; 0: not (llama.cpp)")
    ] = None
    dry_base: Annotated[
        float | None, honoured("how much more for each token of its length; default 1.75")
    ] = None
    dry_allowed_length: Annotated[
        Integral | None, honoured("what is longer than this is lowered; default 2")
    ] = None
    dry_penalty_last_n: Annotated[
        Integral | None,
        honoured(f"in how many last tokens it looks; default -1, and more than that: {PENALTY_WINDOW_MAX}"),
    ] = None
    dry_sequence_breakers: Annotated[
        Annotated[list[str], msgspec.Meta(max_length=STOPS_MAX)] | None,
        honoured('no repetition goes through a token with one of these; default `["\\n", ":", "\\"", "*"]`'),
    ] = None
    seed: Annotated[
        Integral | None,
        honoured("the same seed gives the same answer; choice `i` takes `seed + i`; default: a random one"),
    ] = None
    min_tokens: Annotated[
        Integral | None,
        honoured("the model's own end comes after so many tokens, unless a grammar ends (vLLM)"),
    ] = None
    ignore_eos: Annotated[bool | None, honoured("the model's own end never comes (llama.cpp, vLLM)")] = None
    mirostat: Annotated[msgspec.Raw, unoffered(HIDDEN_STATE, 0)] = ABSENT
    mirostat_tau: Annotated[msgspec.Raw, ignored("it needs `mirostat`")] = ABSENT
    mirostat_eta: Annotated[msgspec.Raw, ignored("it needs `mirostat`")] = ABSENT
    adaptive_target: Annotated[msgspec.Raw, unoffered(HIDDEN_STATE, -1)] = ABSENT
    adaptive_decay: Annotated[msgspec.Raw, ignored("it needs `adaptive_target`")] = ABSENT
    samplers: Annotated[msgspec.Raw, unoffered(ONE_ORDER)] = ABSENT


class Common(Samplers, frozen=True):
    """What chat completions and completions share."""

    model: Annotated[
        str | None,
        honoured("an id that `GET /v1/models` lists; where there is one model only, it is that one"),
    ] = None
    stream: Annotated[bool | None, honoured("server-sent events, as the tokens come")] = None
    stream_options: Annotated[StreamOptions | None, honoured("only with `stream`")] = None
    max_tokens: Annotated[
        Integral | None, honoured("the answer ends after this many tokens; less than 0: with the context")
    ] = None
    n_predict: Annotated[Integral | None, honoured("another name of `max_tokens` (llama.cpp)")] = None
    n: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None,
        honoured("answers to each prompt; with several prompts the limit holds for all together"),
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None, honoured("token ids, as strings, to what is added to their logits")
    ] = None
    grammar: Annotated[str | None, honoured("a GBNF grammar that the answer follows (llama.cpp)")] = None
    json_schema: Annotated[msgspec.Raw, honoured(SCHEMA)] = ABSENT
    user: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    store: Annotated[msgspec.Raw, unoffered("nothing is stored", False)] = ABSENT
    metadata: Annotated[msgspec.Raw, ignored("it describes stored answers, and nothing is stored")] = ABSENT
    service_tier: Annotated[msgspec.Raw, ignored("there is one tier")] = ABSENT


class Prediction(Shape, frozen=True):
    """What an answer may be."""

    content: Annotated[str | list[ContentPart], honoured("a text, or parts of one")]
    type: Annotated[str, honoured("`content`")] = "content"


class ChatRequest(Common, kw_only=True, frozen=True):
    """`POST /v1/chat/completions`"""

    messages: Annotated[
        list[ChatMessage], honoured("the conversation", min_length=1, max_length=MESSAGES_MAX)
    ]
    max_completion_tokens: Annotated[
        Integral | None, honoured("the newer name of `max_tokens`; default: up to the end of the context")
    ] = None
    logprobs: Annotated[bool | None, honoured("log-probabilities of the answer's tokens")] = None
    top_logprobs: Annotated[
        int | None, honoured("and of this many of the likeliest at each position; needs `logprobs`")
    ] = None
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
        honoured("`text`, `json_object` or `json_schema`"),
    ] = None
    reasoning_effort: Annotated[
        Annotated[str, msgspec.Meta(pattern=IDENTIFIER)] | None,
        honoured("given to the model's chat template"),
    ] = None
    safety_identifier: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT
    prompt_cache_key: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    prompt_cache_options: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    prompt_cache_retention: Annotated[msgspec.Raw, ignored(CACHED)] = ABSENT
    enable_thinking: Annotated[
        bool | None, honoured("whether a model that can think before it answers does (Qwen)")
    ] = None
    thinking_budget: Annotated[
        int | None, honoured("thinking ends after this many tokens; 0: none; -1: no limit (Qwen)")
    ] = None
    reasoning: Annotated[ReasoningOption | None, honoured("the same in one object (OpenRouter)")] = None
    thinking: Annotated[
        bool | ThinkingOption | None, honoured("the same in one object (DeepSeek, Anthropic)")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, honoured("further variables of the model's chat template (vLLM, llama.cpp)")
    ] = None
    continue_final_message: Annotated[
        bool | None,
        honoured(
            "the answer goes on from the last message, an assistant's; the default where the last one is that"
        ),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, honoured("`true`: a new message, also where the last one is an assistant's (vLLM)")
    ] = None
    tools: Annotated[
        Annotated[list[ToolDefinition], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        honoured("functions that the model may call"),
    ] = None
    tool_choice: Annotated[
        str | FunctionChoice | AllowedTools | None,
        honoured("`none`, `auto` (the default), `required`, a function, or `allowed_tools`"),
    ] = None
    parallel_tool_calls: Annotated[bool | None, honoured("`false`: one call at the most")] = None
    functions: Annotated[msgspec.Raw, refused(NO_FUNCTIONS, [])] = ABSENT
    function_call: Annotated[msgspec.Raw, refused(NO_FUNCTIONS, "none")] = ABSENT
    modalities: Annotated[msgspec.Raw, refused(NO_MEDIA, ["text"])] = ABSENT
    audio: Annotated[msgspec.Raw, refused(NO_MEDIA)] = ABSENT
    moderation: Annotated[msgspec.Raw, refused("nothing is sent anywhere to be judged")] = ABSENT
    prediction: Annotated[
        Prediction | None, honoured("what the answer may be: it comes sooner where that is right")
    ] = None
    verbosity: Annotated[
        msgspec.Raw, unoffered("no model here has such a setting; ask for it in the prompt", "medium")
    ] = ABSENT
    web_search_options: Annotated[msgspec.Raw, refused("nothing is fetched from outside")] = ABSENT


class CompletionRequest(Common, kw_only=True, frozen=True):
    """`POST /v1/completions`"""

    max_tokens: Annotated[
        Integral | None,
        honoured(
            "the answer ends after this many tokens; 0 reads the prompt, and no more; less than 0: with the "
            "context; default 16"
        ),
    ] = None
    prompt: Annotated[
        str | list[str | int | list[str | int]],
        honoured(
            "a text, token ids, texts and token ids that make one prompt (llama.cpp), or a list of any of "
            "these; control tokens in a text are read as tokens"
        ),
    ]
    logprobs: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=RANGES["top_logprobs"][1])] | None,
        honoured(
            "log-probabilities of the answer's tokens, and of this many of the likeliest at each position; "
            "with `echo` of the prompt's, too"
        ),
    ] = None
    best_of: Annotated[msgspec.Raw, refused("answers are not ranked; use `n`", 1)] = ABSENT
    echo: Annotated[bool | None, honoured("the text begins with the prompt")] = None
    suffix: Annotated[
        str | None, honoured("what follows the answer, for models with fill-in-the-middle tokens")
    ] = None


class ExtraFile(Shape, frozen=True):
    """A file, or a piece of one, beside the one that is written."""

    text: Annotated[str, honoured("its text")]
    filename: Annotated[str | None, honoured("its name, for models that know of files")] = None
    time: Annotated[msgspec.Raw, ignored("llama.vim sends it; models do not see it")] = ABSENT


LOOP = "this server has its own way with slots, caches and samplers"


class InfillRequest(Common, kw_only=True, frozen=True):
    """`POST /infill`"""

    input_prefix: Annotated[str, honoured("what stands before the cursor")]
    input_suffix: Annotated[str, honoured("what stands behind it")]
    input_extra: Annotated[
        Annotated[list[ExtraFile], msgspec.Meta(max_length=EXTRA_FILES_MAX)] | None,
        honoured("other files, the most telling last"),
    ] = None
    prompt: Annotated[str | None, honoured("goes on from `input_prefix`: what is being typed")] = None
    id_slot: Annotated[msgspec.Raw, ignored(LOOP)] = ABSENT
    cache_prompt: Annotated[msgspec.Raw, ignored(LOOP)] = ABSENT
    n_indent: Annotated[msgspec.Raw, ignored(LOOP)] = ABSENT
    t_max_prompt_ms: Annotated[msgspec.Raw, ignored("a prompt is read to its end")] = ABSENT
    t_max_predict_ms: Annotated[msgspec.Raw, ignored("bound the answer by `n_predict`")] = ABSENT
    response_fields: Annotated[msgspec.Raw, ignored("all fields are sent")] = ABSENT


class FimRequest(Common, kw_only=True, frozen=True):
    """`POST /v1/fim/completions`"""

    prompt: Annotated[str, honoured("what stands before the answer")]
    suffix: Annotated[str | None, honoured("what stands behind it")] = None
    random_seed: Annotated[int | None, honoured("as `seed`")] = None


class TokenizeRequest(Shape, frozen=True):
    """`POST /tokenize`: llama.cpp's `content`, or vLLM's `prompt` or `messages`."""

    model: Annotated[str | None, honoured("an id that `GET /v1/models` lists; default: the only one")] = None
    content: Annotated[str | None, honoured("a text (llama.cpp)")] = None
    prompt: Annotated[str | None, honoured("a text (vLLM)")] = None
    messages: Annotated[
        Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=MESSAGES_MAX)] | None,
        honoured("a conversation, through the model's chat template (vLLM)"),
    ] = None
    add_special: Annotated[
        bool | None, honoured("with `content`: put the begin-of-text token in front; default false")
    ] = None
    add_special_tokens: Annotated[bool | None, honoured("the same with `prompt`; default true")] = None
    parse_special: Annotated[
        bool | None, honoured("read the names of control tokens as tokens; default true")
    ] = None
    with_pieces: Annotated[bool | None, honoured("each token as `{id, piece}`")] = None
    return_token_strs: Annotated[bool | None, honoured("the texts of the tokens in `token_strs`")] = None
    add_generation_prompt: Annotated[
        bool | None, honoured("with `messages`: end where an answer begins; default true")
    ] = None


class DetokenizeRequest(Shape, frozen=True):
    """`POST /detokenize`"""

    tokens: Annotated[list[int], honoured("token ids", max_length=TOKENS_MAX)]
    model: Annotated[str | None, honoured("an id that `GET /v1/models` lists; default: the only one")] = None


@cache
def policies(kind: type[Shape]) -> Mapping[str, msgspec.Meta]:
    """The `msgspec.Meta` of each field of an object, in the order of declaration."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[-1] for field in msgspec.structs.fields(kind)}


def refuse(shape: Shape, path: str = "") -> None:
    """Refuse an object with a field that cannot be honoured. `path` is the object's place in the request.

    Raises:
        BadRequest: names the field and the reason.
    """
    for name, meta in policies(type(shape)).items():
        if meta.extra is None or "refused" not in meta.extra:
            continue
        raw = bytes(getattr(shape, name))
        if len(raw) > HARMLESS_BYTES_MAX or msgspec.json.decode(raw) not in meta.extra["harmless"]:
            raise BadRequest(f"{path}{name} is not supported: {meta.extra['refused']}", path + name)
