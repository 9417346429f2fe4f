"""Vectors and rankings: `POST /v1/embeddings` as OpenAI has it, `POST /v1/rerank` as Jina and Cohere do."""

import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api import callers
from cordee.api.core import ApiCore
from cordee.api.failures import json_response
from cordee.api.schemas import ABSENT, Shape, honoured, ignored
from cordee.api.stream import while_connected
from cordee.errors import BadRequest, CordeeError
from cordee.serving.embedding_service import EmbeddingService

INPUTS_MAX = 2048  # as OpenAI's
DOCUMENTS_MAX = 1024
DIMENSION_MAX = 1 << 20

Tokens = list[int]


class EmbeddingRequest(Shape, frozen=True):
    """`POST /v1/embeddings`"""

    model: Annotated[str, honoured("a model whose file is on the machine that is asked")]
    input: Annotated[
        str | list[str | int | Tokens],
        honoured("a text, a list of texts, token ids, or a list of those"),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, honoured("`float`, or `base64`: float32, little-endian")
    ] = None
    dimensions: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=DIMENSION_MAX)] | None,
        honoured("the vectors' first so many numbers, of unit length again: for models trained for that"),
    ] = None
    user: Annotated[msgspec.Raw, ignored("nothing is kept about who asks")] = ABSENT


class RerankDocument(Shape, frozen=True):
    """A document."""

    text: Annotated[str, honoured("what is ranked")]


class RerankRequest(Shape, frozen=True):
    """`POST /v1/rerank`"""

    model: Annotated[str, honoured("a model that ranks, whose file is on the machine that is asked")]
    query: Annotated[str, honoured("what is looked for")]
    documents: Annotated[
        list[str | RerankDocument],
        honoured("what it is looked for in", min_length=1, max_length=DOCUMENTS_MAX),
    ]
    top_n: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=DOCUMENTS_MAX)] | None,
        honoured("the best so many; default: all"),
    ] = None
    return_documents: Annotated[bool | None, honoured("each result has its text")] = None


class Embeddings:
    """The handlers."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._embedding = msgspec.json.Decoder(EmbeddingRequest)
        self._rerank = msgspec.json.Decoder(RerankRequest)

    async def embeddings(self, request: HttpRequest) -> Response:
        """`POST /v1/embeddings`"""
        body = await self._core.bodies.read(request, self._embedding)
        texts = inputs(body.input)
        service = await self._core.embedders.service(body.model)
        vectors, tokens = await while_connected(request.receive, embedded(service, texts))
        is_base64 = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": place,
                "embedding": _written(shortened(vector, body.dimensions, body.model), is_base64),
            }
            for place, vector in enumerate(vectors)
        ]
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": body.model, "usage": used})

    async def rerank(self, request: HttpRequest) -> Response:
        """`POST /v1/rerank`"""
        body = await self._core.bodies.read(request, self._rerank)
        service = await self._core.embedders.service(body.model)
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        scores, tokens = await while_connected(request.receive, _ranked(service, body.query, texts))
        order = sorted(range(len(texts)), key=lambda place: (-scores[place], place))[: body.top_n]
        results = [
            {"index": place, "relevance_score": scores[place]}
            | ({"document": {"text": texts[place]}} if body.return_documents else {})
            for place in order
        ]
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "model": body.model, "results": results, "usage": used})


def inputs(given: str | list[str | int | Tokens], param: str = "input") -> list[str | tuple[int, ...]]:
    """The texts, or token ids, that a request means.

    Raises:
        BadRequest: there are none or too many, or numbers stand beside texts.
    """
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [tuple(each for each in given if isinstance(each, int))]
    if not 0 < len(given) <= INPUTS_MAX:
        raise BadRequest(f"{param} must hold 1 to {INPUTS_MAX} texts, not {len(given)}", param)
    texts: list[str | tuple[int, ...]] = []
    for each in given:
        if isinstance(each, int):
            raise BadRequest(f"{param} must be a text, a list of token ids, or a list of either", param)
        texts.append(each if isinstance(each, str) else tuple(each))
    return texts


async def embedded(
    service: EmbeddingService, texts: list[str | tuple[int, ...]], truncate: bool = False
) -> tuple[list[np.ndarray], int]:
    """The vectors of texts, and how many tokens they had.

    Raises:
        CordeeError: one cannot be read; `param` says which.
    """
    vectors: list[np.ndarray] = []
    total = 0
    for place, text in enumerate(texts):
        try:
            vector, tokens = await service.embed(text, truncate)
        except CordeeError as error:
            raise _placed(error, f"input[{place}]" if len(texts) > 1 else "input") from error
        vectors.append(vector)
        callers.current().spend(tokens, 0)
        total += tokens
    return vectors, total


async def _ranked(service: EmbeddingService, query: str, texts: list[str]) -> tuple[list[float], int]:
    scores: list[float] = []
    total = 0
    for place, text in enumerate(texts):
        try:
            score, tokens = await service.rank(query, text)
        except CordeeError as error:
            raise _placed(error, f"documents[{place}]") from error
        scores.append(score)
        callers.current().spend(tokens, 0)
        total += tokens
    return scores, total


def _placed(error: CordeeError, param: str) -> CordeeError:
    """The same error, with the place of the text that it is about."""
    is_about_text = isinstance(error, BadRequest) and error.param is None
    return type(error)(error.message, param) if is_about_text else error


def shortened(vector: np.ndarray, wanted: int | None, model: str) -> np.ndarray:
    """The first `wanted` numbers of a model's vector, of length 1 again; None: all.

    Raises:
        BadRequest: there are not so many.
    """
    if wanted is None or wanted == len(vector):
        return vector
    if wanted > len(vector):
        raise BadRequest(f"{model} gives vectors of {len(vector)} numbers, not {wanted}", "dimensions")
    part = vector[:wanted]
    length = np.sqrt(np.sum(part.astype(np.float64) ** 2))
    return (part / length).astype(np.float32) if length > 0 else part


def _written(vector: np.ndarray, is_base64: bool) -> Any:
    if is_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
