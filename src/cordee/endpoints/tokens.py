"""Text to tokens and back: llama.cpp's `/tokenize`, `/detokenize` and `/apply-template`, and vLLM's."""

from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cordee.api.core import ApiCore, chat_format_of
from cordee.api.failures import json_response
from cordee.api.prompts import chat_text, check_bytes, check_ids, utf8_bytes
from cordee.api.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from cordee.api.turns import chat_turn
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest
from cordee.serving.interface import ModelService


class TokenEndpoints:
    """The handlers. Replies have the fields of both servers, which do not clash."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)
        self._template = msgspec.json.Decoder(ChatRequest)

    async def tokenize(self, request: HttpRequest) -> Response:
        """`POST /tokenize`"""
        core = self._core
        body = await core.bodies.read(request, self._tokenize)
        service = core.asked(request, body.model)
        tokens = await core.in_thread(self._tokens, service, body)
        vocabulary = service.vocabulary
        shown = [_piece(vocabulary, token) for token in tokens] if body.with_pieces else tokens
        texts = [vocabulary.piece(token, special=True).decode("utf-8", "replace") for token in tokens]
        return json_response(
            {
                "tokens": shown,
                "count": len(tokens),
                "max_model_len": service.context,
                "token_strs": texts if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: HttpRequest) -> Response:
        """`POST /detokenize`"""
        body = await self._core.bodies.read(request, self._detokenize)
        vocabulary = self._core.asked(request, body.model).vocabulary
        check_ids(vocabulary, body.tokens, "tokens")
        pieces = (vocabulary.piece(token, special=True) for token in body.tokens)
        text = b"".join(pieces).decode("utf-8", "replace")
        return json_response({"content": text, "prompt": text})

    async def apply_template(self, request: HttpRequest) -> Response:
        """`POST /apply-template`"""
        body = await self._core.bodies.read(request, self._template)
        service = self._core.asked(request, body.model)
        text = await self._core.in_thread(self._rendered, service, body, body.add_generation_prompt)
        return json_response({"prompt": text})

    async def tokenizer_info(self, request: HttpRequest) -> Response:
        """`GET /tokenizer_info`: what lm-eval wants of a remote tokenizer (vLLM)."""
        service = self._core.asked(request, request.query_params.get("model"))
        vocabulary = service.vocabulary
        return json_response(
            {
                "tokenizer_class": "GGUF",
                "model_max_length": service.context,
                "bos_token": vocabulary.bos_text or None,
                "eos_token": vocabulary.eos_text or None,
                "pad_token": None,
                "add_bos_token": vocabulary.wants_bos,
                "chat_template": vocabulary.chat_template,
            }
        )

    def _tokens(self, service: ModelService, body: TokenizeRequest) -> list[int]:
        given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise BadRequest("give one of content, prompt and messages", given[-1] if given else "content")
        if body.messages is not None:
            chat = ChatRequest(model=service.name, messages=body.messages)
            text, begins = self._rendered(service, chat, body.add_generation_prompt), True
        elif body.content is not None:
            text, begins = body.content, bool(body.add_special)
        else:
            text, begins = body.prompt or "", body.add_special_tokens is not False
        check_bytes(service, utf8_bytes(text), given[0])
        return service.vocabulary.tokenize(text, special=body.parse_special is not False, add_bos=begins)

    def _rendered(self, service: ModelService, body: ChatRequest, for_answer: bool | None) -> str:
        turn, chat_format = chat_turn(body), chat_format_of(service)
        now = self._core.now
        return chat_text(service, chat_format, turn, now, "messages", for_answer=for_answer is not False)


def _piece(vocabulary: Vocabulary, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where these are no whole characters."""
    data = vocabulary.piece(token, special=True)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
