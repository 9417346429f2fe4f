"""The shapes of replies, for the description of the API (openapi.py): OpenAI's, llama.cpp's and our own.

Replies are made elsewhere; tests hold real ones against these classes, in which nothing may be left out.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from cordee.api.timings import Timings

Ended = Literal["stop", "length", "tool_calls"]


class ReplyShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every object in a reply."""


class ApiError(ReplyShape, frozen=True, kw_only=True):
    """What an error is about."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorReply(ReplyShape, frozen=True, kw_only=True):
    """An error, as OpenAI's API has it."""

    error: ApiError


class CachedTokens(ReplyShape, frozen=True, kw_only=True):
    """Tokens of the prompt that were still in the KV cache."""

    cached_tokens: int


class CompletionDetails(ReplyShape, frozen=True, kw_only=True):
    """Tokens of the answer that were thinking (of a chat), and guesses that were right or not."""

    reasoning_tokens: int | UnsetType = UNSET
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET


class TokenUsage(ReplyShape, frozen=True, kw_only=True):
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class PromptUsage(ReplyShape, frozen=True, kw_only=True):
    """What was read, in tokens."""

    prompt_tokens: int
    total_tokens: int


class TokenLogprob(ReplyShape, frozen=True, kw_only=True):
    """A token, and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob, frozen=True, kw_only=True):
    """The token that was chosen, and the likeliest at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(ReplyShape, frozen=True, kw_only=True):
    """The log-probabilities of an answer's tokens."""

    content: list[ChosenLogprob]
    refusal: None


class CallText(ReplyShape, frozen=True, kw_only=True):
    """What is called. `arguments` is JSON text."""

    name: str
    arguments: str


class CallReply(ReplyShape, frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CallText


class AnswerMessage(ReplyShape, frozen=True, kw_only=True):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChatChoice(ReplyShape, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Ended


class Frame(ReplyShape, frozen=True, kw_only=True):
    """What is around choices."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Frame, frozen=True, kw_only=True):
    """The reply of chat completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenUsage
    timings: Timings | UnsetType = UNSET


class CallTextDelta(ReplyShape, frozen=True, kw_only=True):
    """A piece of a call."""

    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(ReplyShape, frozen=True, kw_only=True):
    """The beginning of a call, with its id, or what it goes on with."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CallTextDelta


class AnswerDelta(ReplyShape, frozen=True, kw_only=True):
    """A piece of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class DeltaChoice(ReplyShape, frozen=True, kw_only=True):
    """A piece of one of the answers."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None
    finish_reason: Ended | None


class ChatChunk(Frame, frozen=True, kw_only=True):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[DeltaChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET


class CompletionLogprobs(ReplyShape, frozen=True, kw_only=True):
    """The log-probabilities of a completion's tokens, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(ReplyShape, frozen=True, kw_only=True):
    """One of the texts; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ended | None


class Completion(Frame, frozen=True, kw_only=True):
    """The reply of completions, whole or as events."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET


class InfillEvent(ReplyShape, frozen=True, kw_only=True):
    """An event of a streamed filling in; only the last one says more than text and counts."""

    index: int
    content: str
    stop: bool
    tokens_predicted: int
    tokens_evaluated: int
    model: str | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    stop_type: Literal["limit", "word", "eos"] | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class InfillAnswer(ReplyShape, frozen=True, kw_only=True):
    """The reply of filling in."""

    index: int
    content: str
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    stop_type: Literal["limit", "word", "eos"]
    stopping_word: str
    timings: Timings


class ModelEntry(ReplyShape, frozen=True, kw_only=True):
    """A model: its state, and what is known of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    context_length: int | UnsetType = UNSET
    max_model_len: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    architecture: str | UnsetType = UNSET
    capabilities: list[str] | UnsetType = UNSET


class ModelEntries(ReplyShape, frozen=True, kw_only=True):
    """All models."""

    object: Literal["list"]
    data: list[ModelEntry]


class EmbeddingEntry(ReplyShape, frozen=True, kw_only=True):
    """A vector: numbers, or base64 of them as float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingReply(ReplyShape, frozen=True, kw_only=True):
    """The vectors of texts."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: PromptUsage


class RankedText(ReplyShape, frozen=True, kw_only=True):
    """A document's text."""

    text: str


class Ranked(ReplyShape, frozen=True, kw_only=True):
    """A document's place in the request, and how well it answers."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class RerankReply(ReplyShape, frozen=True, kw_only=True):
    """Documents, the best first."""

    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: PromptUsage


class TokenPiece(ReplyShape, frozen=True, kw_only=True):
    """A token with its text, or its bytes."""

    id: int
    piece: str | list[int]


class TokenizeReply(ReplyShape, frozen=True, kw_only=True):
    """The tokens of a text."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class DetokenizeReply(ReplyShape, frozen=True, kw_only=True):
    """The text of tokens, by two names."""

    content: str
    prompt: str


class TemplateReply(ReplyShape, frozen=True, kw_only=True):
    """A conversation as the model is given it."""

    prompt: str


class TokenizerInfo(ReplyShape, frozen=True, kw_only=True):
    """Special tokens and the chat template."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: None
    add_bos_token: bool
    chat_template: str | None


class Live(ReplyShape, frozen=True, kw_only=True):
    """The server runs."""

    status: Literal["ok"]


class Health(ReplyShape, frozen=True, kw_only=True):
    """Whether models can answer, and the state of each."""

    status: Literal["ok", "loading", "recovering"]
    models: dict[str, str]


class UsageRow(ReplyShape, frozen=True, kw_only=True):
    """What a key used; the first and the last time, in seconds since 1970."""

    key: str
    requests: int
    tokens_in: int
    tokens_out: int
    joules: float | None
    first: float
    last: float


class UsageReply(ReplyShape, frozen=True, kw_only=True):
    """What each key used."""

    object: Literal["list"]
    data: list[UsageRow]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """This description (OpenAPI 3.1)."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
