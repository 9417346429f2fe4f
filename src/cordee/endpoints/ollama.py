"""Ollama's API, at the root as its clients expect it: the same models, the same answers.

What would change the models of this machine is refused: whoever may ask for an answer may be any account of
this machine, or any holder of a key, and what is served here is served to all of them.
"""

import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import cordee
from cordee.api import ignored
from cordee.api.answers import Job
from cordee.api.core import AnswerOptions, ApiCore
from cordee.api.embeddings import embedded, inputs, shortened
from cordee.api.failures import NotOffered, json_response
from cordee.api.listing import capabilities
from cordee.api.options import answer_options, is_given, limit, schema_grammar, whole
from cordee.api.schemas import refuse
from cordee.api.stream import while_connected
from cordee.endpoints.described import file_facts, short_count
from cordee.endpoints.ollama_replies import OllamaChatReply, OllamaGenerateReply, OllamaReply, stamp
from cordee.endpoints.ollama_schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaModelRequest,
    OllamaOptions,
    OllamaRequest,
)
from cordee.endpoints.ollama_turns import chat_turn, prompt_turn, raw_prompt
from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.models.store import StoredModel
from cordee.serving.interface import ModelService

# The release of Ollama whose API this is. Clients compare it with the oldest that they work with.
VERSION = "0.20.0"
# Ollama's defaults where they differ from OpenAI's (its DefaultOptions).
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "penalty_window": 64}
NEVER = "9999-12-31T23:59:59Z"  # when a model is unloaded
EMBEDDING = ["embedding"]  # what a model for vectors can do
NDJSON = "application/x-ndjson"

KEPT = (
    "models are not {0} by the API, which every account of this machine may use: `cordee {1}` does that, by "
    "the account that runs Cordée"
)
REFUSED = {
    ("DELETE", "/api/delete"): KEPT.format("removed", "rm MODEL` or `cordee undeploy MODEL"),
    ("POST", "/api/copy"): KEPT.format("renamed or copied", "pull SOURCE --name NAME"),
    ("POST", "/api/create"): KEPT.format("made", "pull FILE --name NAME"),
    ("POST", "/api/push"): "nothing is sent from here to a hub",
}


class Ollama:
    """The handlers."""

    def __init__(self, core: ApiCore) -> None:
        self._core = core
        self._chat = msgspec.json.Decoder(OllamaChatRequest)
        self._generate = msgspec.json.Decoder(OllamaGenerateRequest)
        self._embed = msgspec.json.Decoder(OllamaEmbedRequest)
        self._embeddings = msgspec.json.Decoder(OllamaEmbeddingsRequest)
        self._model = msgspec.json.Decoder(OllamaModelRequest)

    def routes(self) -> list[Route]:
        """Its endpoints."""
        return [
            Route("/", self.alive),
            Route("/api/version", self.version),
            Route("/api/tags", self.tags),
            Route("/api/ps", self.running),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/embed", self.embed, methods=["POST"]),
            Route("/api/embeddings", self.embeddings, methods=["POST"]),
            Route("/api/pull", self.pull, methods=["POST"]),
            *(Route(path, self.refused, methods=[method]) for method, path in REFUSED),
        ]

    async def alive(self, _: HttpRequest) -> Response:
        """`GET /`, in the words that clients look for."""
        return PlainTextResponse("Ollama is running")

    async def version(self, _: HttpRequest) -> Response:
        """`GET /api/version`"""
        return json_response({"version": VERSION, "cordee": cordee.__version__})

    async def tags(self, _: HttpRequest) -> Response:
        """`GET /api/tags`"""
        found = {model.name: (model, EMBEDDING) for model in await self._core.embedding_models()}
        for name, service in self._core.services.items():
            found[name] = service.model, capabilities(service)
        return json_response({"models": [await self._listed(name, *found[name]) for name in sorted(found)]})

    async def running(self, _: HttpRequest) -> Response:
        """`GET /api/ps`: the models that answer at once. Where their memory is, is not told."""
        found = [
            await self._listed(name, service.model, capabilities(service))
            | {"expires_at": NEVER, "size_vram": 0, "context_length": service.context}
            for name, service in sorted(self._core.services.items())
            if service.health != "idle"
        ]
        return json_response({"models": found})

    async def show(self, request: HttpRequest) -> Response:
        """`POST /api/show`"""
        name = await self._named(request)
        untagged = name.removesuffix(":latest")
        vectors = next(
            (each for each in await self._core.embedding_models() if each.name in (name, untagged)), None
        )
        service = None if vectors is not None else self._core.service(name)
        model, able = (vectors, EMBEDDING) if service is None else (service.model, capabilities(service))
        assert model is not None, "it is one or the other"
        facts = await self._core.in_thread(file_facts, model.path, model.digest)
        info = dict(facts.metadata) | {
            "general.architecture": model.architecture,
            "general.parameter_count": facts.parameters,
        }
        if service is not None:
            # What clients fill is the context that answers have here, not the one the model was made for.
            info[f"{model.architecture}.context_length"] = service.context
        listed = await self._listed(model.name, model, able)
        template = service.template if service is not None else None
        return json_response(
            {
                "license": facts.license,
                "modelfile": f"FROM {model.name}\n",
                "parameters": f"num_ctx {service.context}" if service is not None else "",
                "template": template.source if template is not None else "",
                "details": listed["details"],
                "model_info": info,
                "capabilities": able,
                "modified_at": listed["modified_at"],
            }
        )

    async def chat(self, request: HttpRequest) -> Response:
        """`POST /api/chat`"""
        core, begun = self._core, time.monotonic_ns()
        body = await core.bodies.read(request, self._chat, declared=False)
        service = core.asked(request, body.model)
        if not body.messages:
            return json_response(_loaded(service, {"message": {"role": "assistant", "content": ""}}))
        options = _options(request, service, body)
        constraint = _constraint(request, body)
        job = await core.chat(request, service, chat_turn(body), options, constraint=constraint)
        return await self._answer(request, body, OllamaChatReply(job, begun, logprobs=bool(body.logprobs)))

    async def generate(self, request: HttpRequest) -> Response:
        """`POST /api/generate`"""
        core, begun = self._core, time.monotonic_ns()
        body = await core.bodies.read(request, self._generate, declared=False)
        service = core.asked(request, body.model)
        refuse(body)
        if not body.prompt:
            return json_response(_loaded(service, {"response": ""}))
        job = await self._generating(request, service, body)
        return await self._answer(
            request, body, OllamaGenerateReply(job, begun, logprobs=bool(body.logprobs))
        )

    async def embed(self, request: HttpRequest) -> Response:
        """`POST /api/embed`"""
        begun = time.monotonic_ns()
        body = await self._core.bodies.read(request, self._embed, declared=False)
        given = body.input
        texts = inputs(given if isinstance(given, str) else [*given]) if given else []
        vectors, tokens = await self._vectors(request, body.model, texts, body.truncate is not False)
        cut = [shortened(vector, body.dimensions, body.model).tolist() for vector in vectors]
        took = time.monotonic_ns() - begun
        counts = {"total_duration": took, "load_duration": 0, "prompt_eval_count": tokens}
        return json_response({"model": body.model, "embeddings": cut, **counts})

    async def embeddings(self, request: HttpRequest) -> Response:
        """`POST /api/embeddings`"""
        body = await self._core.bodies.read(request, self._embeddings, declared=False)
        vectors, _ = await self._vectors(request, body.model, inputs(body.prompt), True)
        return json_response({"embedding": vectors[0].tolist()})

    async def pull(self, request: HttpRequest) -> Response:
        """`POST /api/pull`: what is served here is there already, and nothing else is fetched."""
        body = await self._core.bodies.read(request, self._model, declared=False)
        name = body.model or body.name or ""
        if name.removesuffix(":latest") not in self._core.services and name not in self._core.services:
            raise NotOffered(
                f"{name!r} is not here, and the API, which every account of this machine may use, fetches "
                "nothing: `cordee pull MODEL` does, and `cordee deploy MODEL` or `cordee serve MODEL` "
                "serves it"
            )
        steps = [{"status": "pulling manifest"}, {"status": "verifying sha256 digest"}, {"status": "success"}]
        if body.stream is False:
            return json_response(steps[-1])
        return Response(b"".join(msgspec.json.encode(step) + b"\n" for step in steps), media_type=NDJSON)

    async def refused(self, request: HttpRequest) -> Response:
        """What this server deliberately does not do."""
        raise NotOffered(REFUSED[request.method, request.url.path])

    async def _generating(
        self, request: HttpRequest, service: ModelService, body: OllamaGenerateRequest
    ) -> Job:
        core, options = self._core, _options(request, service, body)
        constraint = _constraint(request, body)
        if not body.raw and service.template is not None:
            return await core.chat(
                request, service, prompt_turn(body), options, constraint=constraint, param="prompt"
            )
        prompt = await core.in_thread(raw_prompt, service, body)
        sampling = msgspec.structs.replace(options.sampling, grammar=constraint)
        return core.completion(service, [prompt], replace(options, sampling=sampling))

    async def _answer(self, request: HttpRequest, body: OllamaRequest, reply: OllamaReply) -> Response:
        if body.stream is not False:
            return self._core.stream(reply.job, reply)
        [answer] = await self._core.whole(request, reply.job)
        return json_response(reply.whole(answer))

    async def _vectors(
        self, request: HttpRequest, model: str, texts: list[str | tuple[int, ...]], truncate: bool
    ) -> tuple[list[np.ndarray], int]:
        """The vectors of texts, as long as the client is there, and how many tokens they had."""
        core, untagged = self._core, model.removesuffix(":latest")
        name = untagged if any(each.name == untagged for each in await core.embedding_models()) else model
        service = await core.embedders.service(name)
        return await while_connected(request.receive, embedded(service, texts, truncate))

    async def _named(self, request: HttpRequest) -> str:
        body = await self._core.bodies.read(request, self._model, declared=False)
        name = body.model or body.name
        if not name:
            raise BadRequest("model is missing", "model")
        return name

    async def _listed(self, name: str, model: StoredModel, able: list[str]) -> dict[str, Any]:
        """A model in a list."""
        facts = await self._core.in_thread(file_facts, model.path, model.digest)
        return {
            "name": name,
            "model": name,
            "modified_at": stamp(datetime.fromisoformat(model.added)),
            "size": model.nbytes,
            "digest": model.digest.removeprefix("sha256:"),
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": model.architecture,
                "families": [model.architecture],
                "parameter_size": short_count(facts.parameters) if facts.parameters else "",
                "quantization_level": facts.quantization,
            },
            "capabilities": able,
        }


def _loaded(service: ModelService, said: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request without a prompt, by which clients have a model loaded: it is."""
    now = stamp(datetime.now(UTC))
    return {"model": service.name, "created_at": now, **said, "done": True, "done_reason": "load"}


def _options(request: HttpRequest, service: ModelService, body: OllamaRequest) -> AnswerOptions:
    given = body.options or OllamaOptions()
    context = whole(given.num_ctx, "num_ctx")
    if context is not None and context > service.context:
        ignored.note(request, "options.num_ctx")
    if given.seed == -1:  # a random one
        given = msgspec.structs.replace(given, seed=None)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    return answer_options(
        given,
        service.vocabulary,
        limit(given.num_predict, "num_predict"),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        defaults=DEFAULTS,
    )


def _constraint(request: HttpRequest, body: OllamaRequest) -> Grammar | None:
    if not is_given(body.format) or bytes(body.format) == b'""':
        return None
    if bytes(body.format) == b'"json"':
        return Grammar("json_object")
    if bytes(body.format)[:1] != b"{":
        raise BadRequest('format must be "json", or a JSON schema', "format")
    return schema_grammar(request, body.format, "format")
