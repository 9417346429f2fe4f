"""The table of routes: what each operation takes and gives. `openapi.py` makes the description of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cordee.api.embeddings import EmbeddingRequest, RerankRequest
from cordee.api.guard import AUTHORITY_PATH
from cordee.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FimRequest,
    InfillRequest,
    TokenizeRequest,
)
from cordee.endpoints import agent_reply_shapes as agents
from cordee.endpoints import reply_shapes as shapes
from cordee.endpoints.anthropic_schemas import CountRequest, MessagesRequest
from cordee.endpoints.ollama_schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaModelRequest,
)
from cordee.endpoints.responses_schemas import ResponsesRequest

JSON, NDJSON, SSE, TEXT = "application/json", "application/x-ndjson", "text/event-stream", "text/plain"
PEM = "application/x-pem-file"
# What any request may get (guard.py), and what one with a body may (bodies.py) whose model is to answer.
ALWAYS = (401, 403, 429, 503)
WITH_BODY = (400, 404, 408, 413, 415, 422)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of a path. `reply` is a shape, or the media type of a text; `stream` has the media type of a
    streamed reply, and the shape of its events or lines."""

    summary: str
    reply: Any
    body: type | None = None
    stream: tuple[str, Any] | None = None
    statuses: tuple[int, ...] = ()  # of errors, beside ALWAYS and WITH_BODY


def _get(summary: str, reply: Any, *statuses: int) -> Operation:
    return Operation(summary=summary, reply=reply, statuses=statuses)


def _post(
    summary: str, body: type, reply: Any, stream: tuple[str, Any] | None = None, *statuses: int
) -> Operation:
    return Operation(summary=summary, body=body, reply=reply, stream=stream, statuses=statuses)


def _refused(summary: str) -> Operation:
    return Operation(summary=summary, reply=None, statuses=(501,))


_RERANK = _post("Which documents answer a query best", RerankRequest, shapes.RerankReply)
_HEALTH = _get("Whether a model can answer", shapes.Health)
_OLLAMA_PULLED = (NDJSON, agents.OllamaPulled)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/live"): _get("That the server runs", shapes.Live),
    ("GET", "/ready"): _HEALTH,
    ("GET", "/health"): _HEALTH,
    ("GET", "/metrics"): _get("Counts and times, for Prometheus", TEXT),
    ("GET", "/openapi.json"): _get("This description", shapes.Document),
    ("GET", AUTHORITY_PATH): _get("The certificate that clients have to trust", PEM),
    ("GET", "/v1/usage"): _get("What each key used", shapes.UsageReply),
    ("GET", "/v1/models"): _get("The models", shapes.ModelEntries),
    ("GET", "/v1/models/{name}"): _get("A model", shapes.ModelEntry, 404, 422),
    ("GET", "/tokenizer_info"): _get("Special tokens and the template", shapes.TokenizerInfo, 400, 404, 422),
    ("POST", "/v1/chat/completions"): _post(
        "An answer in a conversation", ChatRequest, shapes.ChatCompletion, (SSE, shapes.ChatChunk)
    ),
    ("POST", "/v1/completions"): _post(
        "A text that goes on from a prompt",
        CompletionRequest,
        shapes.Completion,
        (SSE, shapes.Completion),
    ),
    ("POST", "/v1/fim/completions"): _post(
        "What stands between two texts (Mistral)", FimRequest, shapes.ChatCompletion, (SSE, shapes.ChatChunk)
    ),
    ("POST", "/infill"): _post(
        "What stands at a cursor (llama.cpp)",
        InfillRequest,
        shapes.InfillAnswer | list[shapes.InfillAnswer],
        (SSE, shapes.InfillEvent),
    ),
    ("POST", "/v1/responses"): _post(
        "An answer, as OpenAI's Responses have it, without a store",
        ResponsesRequest,
        agents.ResponseReply,
        (SSE, agents.ResponseEvent),
    ),
    ("POST", "/v1/messages"): _post(
        "An answer, as Anthropic's messages have it",
        MessagesRequest,
        agents.MessageReplyShape,
        (SSE, agents.MessageEvent),
    ),
    ("POST", "/v1/messages/count_tokens"): _post(
        "How many tokens their prompt has", CountRequest, agents.MessageTokens
    ),
    ("POST", "/v1/embeddings"): _post("Vectors of texts", EmbeddingRequest, shapes.EmbeddingReply),
    ("POST", "/v1/rerank"): _RERANK,
    ("POST", "/v1/reranking"): _RERANK,
    ("POST", "/rerank"): _RERANK,
    ("POST", "/tokenize"): _post("Text to tokens", TokenizeRequest, shapes.TokenizeReply),
    ("POST", "/detokenize"): _post("Tokens to text", DetokenizeRequest, shapes.DetokenizeReply),
    ("POST", "/apply-template"): _post("A conversation as text", ChatRequest, shapes.TemplateReply),
    ("GET", "/"): _get("That a server for Ollama's clients is here", TEXT),
    ("GET", "/api/version"): _get("The release of Ollama whose API this is", agents.OllamaVersion),
    ("GET", "/api/tags"): _get("The models", agents.OllamaModels),
    ("GET", "/api/ps"): _get("The models that answer at once", agents.OllamaModels),
    ("POST", "/api/show"): _post("What a model is", OllamaModelRequest, agents.OllamaShow),
    ("POST", "/api/chat"): _post(
        "An answer in a conversation, as Ollama has it",
        OllamaChatRequest,
        agents.OllamaChatAnswer,
        (NDJSON, agents.OllamaChatAnswer),
    ),
    ("POST", "/api/generate"): _post(
        "An answer to a prompt, as Ollama has it",
        OllamaGenerateRequest,
        agents.OllamaGenerateAnswer,
        (NDJSON, agents.OllamaGenerateAnswer),
    ),
    ("POST", "/api/embed"): _post(
        "Vectors of texts, as Ollama has them", OllamaEmbedRequest, agents.OllamaVectors
    ),
    ("POST", "/api/embeddings"): _post(
        "The vector of a text, as Ollama has it", OllamaEmbeddingsRequest, agents.OllamaVector
    ),
    ("POST", "/api/pull"): _post(
        "Success for a model that is served here; nothing is fetched",
        OllamaModelRequest,
        agents.OllamaPulled,
        _OLLAMA_PULLED,
        501,
    ),
    ("DELETE", "/api/delete"): _refused("Refused: the API removes no models"),
    ("POST", "/api/copy"): _refused("Refused: the API copies no models"),
    ("POST", "/api/create"): _refused("Refused: the API makes no models"),
    ("POST", "/api/push"): _refused("Refused: nothing is sent to a hub"),
}
