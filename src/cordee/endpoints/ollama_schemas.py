"""The fields of Ollama's requests; what schemas.py says of fields holds here as well."""

from typing import Annotated, Any

import msgspec

from cordee.api.embeddings import DIMENSION_MAX
from cordee.api.schemas import (
    ABSENT,
    MESSAGES_MAX,
    NO_MEDIA,
    TOOLS_MAX,
    Integral,
    Samplers,
    Shape,
    honoured,
    ignored,
    refused,
    unoffered,
)
from cordee.generation.sampling import RANGES

CALLS_MAX = 128  # of a message

STAYS = "a model that is served stays in memory"
LOADED = "how a model is loaded is set where it is served"
NO_SHIFT = "a conversation is never shortened: one that is too long is refused"
OLLAMA_ROLE = r"\A[A-Za-z][A-Za-z0-9_-]{0,63}\Z"  # roles stand between control tokens in a prompt


class OllamaOptions(Samplers, frozen=True):
    """`options`: how tokens are chosen; defaults are Ollama's."""

    num_predict: Annotated[
        Integral | None, honoured("the answer ends after this many tokens; less than 0: with the context")
    ] = None
    num_ctx: Annotated[
        Integral | None,
        honoured(
            "the context that is wanted; one larger than the model is served with is named in the reply"
        ),
    ] = None
    num_keep: Annotated[msgspec.Raw, ignored(NO_SHIFT)] = ABSENT
    num_batch: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    num_gpu: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    main_gpu: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    num_thread: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    use_mmap: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    use_mlock: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    numa: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    low_vram: Annotated[msgspec.Raw, ignored(LOADED)] = ABSENT
    tfs_z: Annotated[msgspec.Raw, unoffered("libllama has this sampler no more", 1)] = ABSENT


class OllamaCalledFunction(Shape, frozen=True):
    """The function that was called."""

    name: Annotated[str, honoured("its name")]
    arguments: Annotated[
        dict[str, Any] | str | None, honoured("an object; or JSON text, as OpenAI has it")
    ] = None
    index: Annotated[msgspec.Raw, ignored("calls come in order")] = ABSENT


class OllamaToolCall(Shape, frozen=True):
    """A call that the model made."""

    function: Annotated[OllamaCalledFunction, honoured("what was called")]
    id: Annotated[str | None, honoured("the result's `tool_call_id` names it; default: in order")] = None
    type: Annotated[msgspec.Raw, ignored("all calls are of functions")] = ABSENT


class OllamaMessage(Shape, frozen=True):
    """A message of a conversation."""

    role: Annotated[
        str,
        honoured(
            "`system`, `user`, `assistant`, `tool`, or what the model's template knows", pattern=OLLAMA_ROLE
        ),
    ]
    content: Annotated[str | None, honoured("text; the names of control tokens in it stay text")] = None
    thinking: Annotated[str | None, honoured("what the model thought, for templates that want it back")] = (
        None
    )
    images: Annotated[msgspec.Raw, refused(NO_MEDIA, [])] = ABSENT
    tool_calls: Annotated[
        Annotated[list[OllamaToolCall], msgspec.Meta(max_length=CALLS_MAX)] | None,
        honoured("calls that the model made"),
    ] = None
    tool_name: Annotated[str | None, honoured("which tool a message of role `tool` has the result of")] = None
    name: Annotated[str | None, honoured("an older name of `tool_name`")] = None
    tool_call_id: Annotated[str | None, honoured("which call; default: the first one without a result")] = (
        None
    )


class OllamaFunction(Shape, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, honoured("its name")]
    description: Annotated[str | None, honoured("what it does")] = None
    parameters: Annotated[dict[str, Any] | None, honoured("a JSON schema of its arguments")] = None
    strict: Annotated[msgspec.Raw, ignored("arguments follow the schema in any case")] = ABSENT


class OllamaTool(Shape, frozen=True):
    """A tool."""

    function: Annotated[OllamaFunction, honoured("the function")]
    type: Annotated[str | None, honoured("`function`")] = None


class OllamaRequest(Shape, frozen=True):
    """What `chat` and `generate` share."""

    model: Annotated[
        str | None,
        honoured("a name that `GET /api/tags` lists, with or without `:latest`; as `/v1` takes it"),
    ] = None
    stream: Annotated[bool | None, honoured("a JSON object on a line for each token; default true")] = None
    format: Annotated[msgspec.Raw, honoured('`"json"`, or a JSON schema')] = ABSENT
    options: Annotated[OllamaOptions | None, honoured("how tokens are chosen")] = None
    think: Annotated[
        bool | str | None, honoured("whether the model thinks first, or how hard: `low`, `medium`, `high`")
    ] = None
    logprobs: Annotated[bool | None, honoured("log-probabilities of the answer's tokens")] = None
    top_logprobs: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=RANGES["top_logprobs"][1])] | None,
        honoured("and of this many of the likeliest at each position; needs `logprobs`"),
    ] = None
    keep_alive: Annotated[msgspec.Raw, ignored(STAYS)] = ABSENT
    truncate: Annotated[msgspec.Raw, unoffered(NO_SHIFT, False)] = ABSENT
    shift: Annotated[msgspec.Raw, unoffered(NO_SHIFT, False)] = ABSENT


class OllamaChatRequest(OllamaRequest, frozen=True):
    """`POST /api/chat`"""

    messages: Annotated[
        Annotated[list[OllamaMessage], msgspec.Meta(max_length=MESSAGES_MAX)] | None,
        honoured("the conversation; without any, the reply says that the model is loaded"),
    ] = None
    tools: Annotated[
        Annotated[list[OllamaTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        honoured("what the model may call"),
    ] = None


class OllamaGenerateRequest(OllamaRequest, frozen=True):
    """`POST /api/generate`"""

    prompt: Annotated[
        str | None, honoured("what a user says; without it, the reply says that the model is loaded")
    ] = None
    system: Annotated[str | None, honoured("a system message before it")] = None
    raw: Annotated[
        bool | None,
        honoured("the prompt as it is, without a chat template; control tokens are read as tokens"),
    ] = None
    suffix: Annotated[
        msgspec.Raw,
        refused("insertion is not implemented; write the model's own tokens for it, with `raw`", ""),
    ] = ABSENT
    template: Annotated[
        msgspec.Raw, refused("a model's own template is used; write the whole prompt, with `raw`", "")
    ] = ABSENT
    context: Annotated[
        msgspec.Raw, unoffered("no reply from here has one; `/api/chat` takes a conversation", [])
    ] = ABSENT
    images: Annotated[msgspec.Raw, refused(NO_MEDIA, [])] = ABSENT


class OllamaEmbedRequest(Shape, frozen=True):
    """`POST /api/embed`"""

    model: Annotated[str, honoured("a model whose file is on the machine that is asked")]
    input: Annotated[str | list[str], honoured("a text, or a list of texts")]
    truncate: Annotated[
        bool | None, honoured("a text that is too long is cut at its end; else it is refused; default true")
    ] = None
    dimensions: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=DIMENSION_MAX)] | None,
        honoured("the vectors' first so many numbers, of unit length again: for models trained for that"),
    ] = None
    options: Annotated[msgspec.Raw, ignored("nothing about a vector is chosen")] = ABSENT
    keep_alive: Annotated[msgspec.Raw, ignored("it stays in memory for five minutes")] = ABSENT


class OllamaEmbeddingsRequest(Shape, frozen=True):
    """`POST /api/embeddings`, the older form"""

    model: Annotated[str, honoured("a model whose file is on the machine that is asked")]
    prompt: Annotated[str, honoured("a text; one that is too long is cut at its end")]
    options: Annotated[msgspec.Raw, ignored("nothing about a vector is chosen")] = ABSENT
    keep_alive: Annotated[msgspec.Raw, ignored("it stays in memory for five minutes")] = ABSENT


class OllamaModelRequest(Shape, frozen=True):
    """`POST /api/show`, `/api/pull`, `DELETE /api/delete`, and others that name a model."""

    model: Annotated[str | None, honoured("the model's name")] = None
    name: Annotated[str | None, honoured("an older name of `model`")] = None
    stream: Annotated[bool | None, honoured("`pull`: a line for each step; default true")] = None
    verbose: Annotated[msgspec.Raw, ignored("the vocabulary is not shown")] = ABSENT
    insecure: Annotated[msgspec.Raw, ignored("nothing is fetched")] = ABSENT
