"""`/openapi.json` is true: it has every route, real replies have the shapes that it says, and a tool that
makes requests from it finds no fault that it does not announce."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from cordee.endpoints import agent_reply_shapes as agents
from cordee.endpoints import reply_shapes as shapes
from cordee.endpoints.app import create_app
from cordee.endpoints.operations import NDJSON, OPERATIONS, SSE
from cordee.models.store import Store
from cordee.serving.embedders import Embedders
from cordee.serving.local_service import ServiceConfig
from scripted_service import ScriptedService
from serving import HELLO, SECONDS, Running, running
from tiny import make_tiny
from tiny_encoders import POOLING_RANK, make_bert

REQUESTS = 20_000  # of the long test
# The folder where `schemathesis` is; it is no dependency of the tests.
SCHEMATHESIS = "CORDEE_TEST_SCHEMATHESIS"
ROOMS = ("cordee.api.", "cordee.endpoints.")  # whose handlers are the API; pages are none
CHECKS = (
    *("status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method"),
)
SAID = '[think]Hm.[say]Well.[call weather]{"city": "Bern"}'
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "", "parameters": WEATHER}
TOOLS = [{"type": "function", "function": FUNCTION}]
TURNS = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def tiny(
    session_home: Path, tmp_path_factory: pytest.TempPathFactory, starter_path: Path
) -> Iterator[Running]:
    """A model of random weights, which answers at once, one for vectors, and one that ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny("llama", folder / "tiny.gguf", tokenizer="bytes")
    vectors = [make_bert(folder / "vectors.gguf"), make_bert(folder / "ranks.gguf", POOLING_RANK)]
    with running(model, folder / "store", config=ServiceConfig(context=256), embedding=vectors) as server:
        yield server


def document(server: Running) -> dict[str, Any]:
    reply = server.request("GET", "/openapi.json")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    return reply.json


# What it says


def test_it_has_every_route_and_no_other(tmp_path: Path) -> None:
    app = create_app({}, embedders=Embedders(Store(tmp_path)), authority=b"-")
    assert isinstance(app, Starlette)
    routes = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route) and route.endpoint.__module__.startswith(ROOMS)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == set(OPERATIONS)


def test_its_references_lead_somewhere(tiny: Running) -> None:
    told = document(tiny)
    text = json.dumps(told)
    wanted = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert wanted == set(told["components"]["schemas"])
    assert "\\\\A" not in text, "a mark that only Python's patterns have"


def test_it_says_what_has_no_effect_and_what_is_refused(tiny: Running) -> None:
    fields = document(tiny)["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["mirostat"]["description"].startswith("no effect: its state")
    assert fields["audio"] == {"enum": [None], "description": "refused: models here read and write text only"}
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in fields["temperature"]["anyOf"]


# What replies are


def fits(server: Running, method: str, path: str, body: Any = None, **options: Any) -> None:
    """The reply to a request, whole and as a stream where there are both, has the shape that is described."""
    described = re.sub(r"^/v1/models/.+", "/v1/models/{name}", path)
    operation = OPERATIONS[method, described]
    body = body and {**body, "stream": False, **options}
    reply = server.request(method, path, body)
    assert reply.status == 200, reply.body
    msgspec.json.decode(reply.body, type=operation.reply)
    if operation.stream is None:
        return
    media_type, event = operation.stream
    reply = server.request(method, path, {**body, "stream": True})
    assert reply.headers["content-type"].startswith(media_type)
    lines = reply.body.splitlines()
    if media_type == SSE:
        data = (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))
        lines = [line for line in data if line != b"[DONE]"]
    else:
        assert media_type == NDJSON
    assert lines
    for line in lines:
        msgspec.json.decode(line, type=event)


def test_replies_have_the_shapes_that_are_described(tiny: Running) -> None:
    for path in ("/live", "/ready", "/health", "/v1/usage", "/v1/models", "/v1/models/starter"):
        fits(tiny, "GET", path)
    for path in ("/v1/models/vectors", "/tokenizer_info", "/api/version", "/api/tags", "/api/ps"):
        fits(tiny, "GET", path)
    few = {"model": "starter", "max_tokens": 3}
    chat = few | {"messages": TURNS, "n": 2, "logprobs": True, "top_logprobs": 2}
    fits(tiny, "POST", "/v1/chat/completions", chat)
    fits(tiny, "POST", "/v1/chat/completions", few | {"messages": TURNS})
    fits(tiny, "POST", "/v1/completions", few | {"prompt": "Hello", "logprobs": 1, "echo": True})
    fits(tiny, "POST", "/v1/completions", few | {"prompt": ["a", "b"]})
    fits(tiny, "POST", "/apply-template", {"messages": TURNS})
    for options in ({}, {"with_pieces": True}, {"return_token_strs": True}):
        fits(tiny, "POST", "/tokenize", {"content": "Hello, é"}, **options)
    fits(tiny, "POST", "/detokenize", {"tokens": [1, 2]})
    fits(tiny, "POST", "/v1/embeddings", {"model": "vectors", "input": ["a", "b"]})
    fits(tiny, "POST", "/v1/embeddings", {"model": "vectors", "input": "a", "encoding_format": "base64"})
    fits(tiny, "POST", "/api/embed", {"model": "vectors", "input": "a"})
    fits(tiny, "POST", "/api/embeddings", {"model": "vectors", "prompt": "a"})
    fits(tiny, "POST", "/api/show", {"model": "starter"})
    fits(tiny, "POST", "/api/show", {"model": "vectors"})
    fits(tiny, "POST", "/api/pull", {"model": "starter"})
    fits(tiny, "POST", "/v1/messages/count_tokens", {"model": "starter", "messages": TURNS})
    loaded = tiny.request("POST", "/api/chat", {"messages": []})
    msgspec.json.decode(loaded.body, type=agents.OllamaChatAnswer)
    options = {"num_predict": 3}
    fits(tiny, "POST", "/api/generate", {"prompt": "Hello", "logprobs": True, "options": options})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"tools": TOOLS, "messages": TURNS}),
        ("/v1/chat/completions", {"messages": TURNS, "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"tools": [{"type": "function", **FUNCTION}], "input": "How?"}),
        ("/v1/responses", {"input": "How?", "metadata": {"a": "b"}, "instructions": "Be brief."}),
        ("/v1/responses", {"input": "How?", "max_output_tokens": 1}),
        (
            "/v1/messages",
            {"messages": TURNS, "max_tokens": 99, "thinking": {"type": "enabled", "budget_tokens": 9}},
        ),
        ("/api/chat", {"messages": TURNS, "tools": TOOLS, "think": True}),
        ("/api/generate", {"prompt": "How?", "think": True}),
    ],
)
def test_thoughts_and_calls_have_the_shapes_that_are_described(
    talk: tuple[Running, ScriptedService], path: str, body: dict[str, Any]
) -> None:
    server, service = talk
    service.script = [SAID, SAID]
    if "stream_options" in body:
        body = {**body, "stream": True}
        reply = server.request("POST", path, {"model": "scripted", **body})
        for event in reply.events[:-1]:
            msgspec.convert(event, shapes.ChatChunk)
    else:
        fits(server, "POST", path, {"model": "scripted", **body})


def test_errors_have_the_shapes_that_are_described(tiny: Running) -> None:
    for path, shape in (
        ("/v1/chat/completions", shapes.ErrorReply),
        ("/v1/responses", shapes.ErrorReply),
        ("/v1/messages", agents.MessagesErrorReply),
        ("/api/chat", agents.OllamaError),
    ):
        reply = tiny.request("POST", path, b"{")
        assert reply.status == 400
        msgspec.json.decode(reply.body, type=shape)
        said = document(tiny)["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]
        assert said["schema"]["$ref"].endswith(shape.__name__)


# What a tool finds that makes requests from it


def with_models(told: dict[str, Any]) -> dict[str, Any]:
    """The description, where the names of models are those that are here: any other is 404, and no more."""
    for shape, name in (
        *(("EmbeddingRequest", "vectors"), ("OllamaEmbedRequest", "vectors")),
        *(("OllamaEmbeddingsRequest", "vectors"), ("RerankRequest", "ranks")),
    ):
        told["components"]["schemas"][shape]["properties"]["model"] = {"enum": [name]}
    return told


@pytest.mark.long
@pytest.mark.parametrize("seed", [1])
def test_twenty_thousand_requests_get_what_is_described(tiny: Running, tmp_path: Path, seed: int) -> None:
    program = shutil.which("schemathesis", path=os.environ.get(SCHEMATHESIS))
    if program is None:
        pytest.skip(f"schemathesis is not installed: `pip install schemathesis`, or {SCHEMATHESIS}=FOLDER")
    (tmp_path / "openapi.json").write_text(json.dumps(with_models(document(tiny))))
    with_body = sum(each.body is not None for each in OPERATIONS.values())
    options = ["--url", f"http://127.0.0.1:{tiny.port}", "--checks", ",".join(CHECKS)]
    options += ["--max-examples", str(REQUESTS // with_body), "--seed", str(seed), "--no-color"]
    options += ["--phases", "coverage,fuzzing", "--continue-on-failure", "--generation-database", "none"]
    options += ["--suppress-health-check", "all", "--warnings", "off"]
    # A connection that was idle too long is closed; who has sent meanwhile sends again, as all clients do.
    options += ["--request-timeout", str(2 * SECONDS), "--request-retries", "2"]
    command = [program, "run", "openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:]
    counted = re.search(r"(\d+) generated", done.stdout)
    assert counted is not None and int(counted[1]) >= REQUESTS, done.stdout[-2000:]
    assert tiny.request("POST", "/v1/chat/completions", HELLO | {"max_tokens": 2}).status == 200
