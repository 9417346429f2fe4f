"""The shapes of the replies of Responses, Anthropic's messages and Ollama's API; see reply_shapes.py."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from cordee.endpoints.reply_shapes import ChosenLogprob, ReplyShape

# Anthropic's messages


class MessagesError(ReplyShape, frozen=True, kw_only=True):
    """What an error is about."""

    type: str
    message: str


class MessagesErrorReply(ReplyShape, frozen=True, kw_only=True):
    """An error, as Anthropic's API has it; also the last event of a stream that failed."""

    type: Literal["error"]
    error: MessagesError


class MessageThinking(ReplyShape, frozen=True, kw_only=True):
    """Tokens of the answer that were thinking."""

    thinking_tokens: int


class MessageUsage(ReplyShape, frozen=True, kw_only=True):
    """What a message took, in tokens; those of the prompt that were in the cache count apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageThinking


class TextBlock(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Text."""

    text: str


class ThinkingBlock(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought."""

    thinking: str
    signature: str


class ToolUseBlock(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageReplyShape(ReplyShape, frozen=True, kw_only=True):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokens(ReplyShape, frozen=True, kw_only=True):
    """How many tokens a prompt has."""

    input_tokens: int


class MessageStart(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="message_start"):
    """The message before any token."""

    message: MessageReplyShape


class Ping(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="ping"):
    """Nothing is to tell yet."""


class BlockStart(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: Block


class TextPiece(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class ThinkingPiece(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="thinking_delta"):
    """More thinking."""

    thinking: str


class SignaturePiece(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="signature_delta"):
    """What stands for a signature."""

    signature: str


class JsonPiece(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    """More of a call's arguments."""

    partial_json: str


class BlockDelta(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="content_block_delta"):
    """A block goes on."""

    index: int
    delta: TextPiece | ThinkingPiece | SignaturePiece | JsonPiece


class BlockStop(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="content_block_stop"):
    """A block ended."""

    index: int


class MessageEnding(ReplyShape, frozen=True, kw_only=True):
    """Why the message ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="message_delta"):
    """Why the message ended, and what it took."""

    delta: MessageEnding
    usage: MessageUsage


class MessageStop(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="message_stop"):
    """Nothing follows."""


class MessageFailed(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The answer failed."""

    error: MessagesError


MessageEvent = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | MessageFailed
)


# Responses


class OutputText(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """Text."""

    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """What the model thought."""

    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A message."""

    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(ReplyShape, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a tool."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


Item = OutputMessage | OutputReasoning | OutputCall


class ResponseFailure(ReplyShape, frozen=True, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class ResponseIncomplete(ReplyShape, frozen=True, kw_only=True):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseCached(ReplyShape, frozen=True, kw_only=True):
    """Tokens of the input that were in the cache."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseThinking(ReplyShape, frozen=True, kw_only=True):
    """Tokens of the output that were thinking."""

    reasoning_tokens: int


class ResponseUsage(ReplyShape, frozen=True, kw_only=True):
    """What a response took, in tokens."""

    input_tokens: int
    input_tokens_details: ResponseCached
    output_tokens: int
    output_tokens_details: ResponseThinking
    total_tokens: int


class ResponseReply(ReplyShape, frozen=True, kw_only=True):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: ResponseIncomplete | None
    model: str
    output: list[Item]
    previous_response_id: None
    store: Literal[False]
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    user: None


class ResponseEvent(ReplyShape, frozen=True, kw_only=True):
    """An event of a streamed response; which fields it has follows from its type."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseReply | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


# Ollama


class OllamaError(ReplyShape, frozen=True, kw_only=True):
    """An error, as Ollama's API has it; also the last line of a stream that failed."""

    error: str


class OllamaVersion(ReplyShape, frozen=True, kw_only=True):
    """The release of Ollama whose API this is, and that of this program."""

    version: str
    cordee: str


class OllamaDetails(ReplyShape, frozen=True, kw_only=True):
    """What a model's file is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(ReplyShape, frozen=True, kw_only=True):
    """A model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    capabilities: list[str]
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModels(ReplyShape, frozen=True, kw_only=True):
    """Models."""

    models: list[OllamaModel]


class OllamaShow(ReplyShape, frozen=True, kw_only=True):
    """What a model is, and what it can do."""

    license: str
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaCalled(ReplyShape, frozen=True, kw_only=True):
    """What is called."""

    name: str
    arguments: dict[str, Any]


class OllamaCall(ReplyShape, frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    function: OllamaCalled


class OllamaSaid(ReplyShape, frozen=True, kw_only=True):
    """An answer, or a piece of it."""

    role: Literal["assistant"]
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaCall] | UnsetType = UNSET


class OllamaAnswer(ReplyShape, frozen=True, kw_only=True):
    """What `chat` and `generate` have in common; durations are nanoseconds, and only the end has them."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[ChosenLogprob] | UnsetType = UNSET


class OllamaChatAnswer(OllamaAnswer, frozen=True, kw_only=True):
    """`/api/chat`"""

    message: OllamaSaid


class OllamaGenerateAnswer(OllamaAnswer, frozen=True, kw_only=True):
    """`/api/generate`"""

    response: str
    thinking: str | UnsetType = UNSET


class OllamaVectors(ReplyShape, frozen=True, kw_only=True):
    """The vectors of texts."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaVector(ReplyShape, frozen=True, kw_only=True):
    """The vector of a text."""

    embedding: list[float]


class OllamaPulled(ReplyShape, frozen=True, kw_only=True):
    """How far a model is there."""

    status: str
