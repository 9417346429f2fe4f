"""What the HTTP API refuses: every refusal names the field, and has its own status and OpenAI's shape."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import api_reference
from cordee.api import schemas
from cordee.api.bodies import BODY_BYTES_MAX, decode
from cordee.api.ignored import NAMES_MAX, unknown_fields
from cordee.api.schemas import ChatRequest, CompletionRequest
from cordee.errors import BadRequest
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, SECONDS, Running, running, user

CONTEXT = 256


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One for all tests: a refusal leaves it as it was."""
    config = ServiceConfig(context=CONTEXT)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config) as started:
        yield started


# Refusals: (path, what the body has besides, status, param, code)

REFUSALS = [
    (CHAT, {"model": 3}, 400, "model", "invalid_request"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_request"),
    (CHAT, {"messages": None}, 400, "messages", "invalid_request"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_request"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "invalid_request"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "invalid_request"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "name": "a\nb"}]},
        400,
        "messages[0].name",
        "invalid_request",
    ),
    (CHAT, {"messages": user([{"type": "text"}])}, 400, "messages[0].content[0].text", "invalid_request"),
    (
        CHAT,
        {"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])},
        400,
        "messages[0].content[0].type",
        "invalid_request",
    ),
    (CHAT, {"messages": user("word " * CONTEXT)}, 400, "messages", "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "word " * CONTEXT}, 400, "prompt", "context_length_exceeded"),
    (CHAT, {"temperature": 2.5}, 400, "temperature", "invalid_request"),
    (CHAT, {"temperature": "hot"}, 400, "temperature", "invalid_request"),
    (CHAT, {"top_p": -1}, 400, "top_p", "invalid_request"),
    (CHAT, {"seed": 1 << 64}, 400, "seed", "invalid_request"),
    (CHAT, {"n": 0}, 400, "n", "invalid_request"),
    (CHAT, {"n": 1000}, 400, "n", "invalid_request"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", "invalid_request"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens", "invalid_request"),
    (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_request"),
    (CHAT, {"max_tokens": None, "n_predict": 0}, 400, "n_predict", "invalid_request"),
    (CHAT, {"top_k": 1.5}, 400, "top_k", "invalid_request"),
    (CHAT, {"min_tokens": -1}, 400, "min_tokens", "invalid_request"),
    (CHAT, {"typical_p": 2}, 400, "typical_p", "invalid_request"),
    (CHAT, {"xtc_probability": "often"}, 400, "xtc_probability", "invalid_request"),
    (CHAT, {"dynatemp_range": -1}, 400, "dynatemp_range", "invalid_request"),
    (CHAT, {"stop": ["x"] * 17}, 400, "stop", "invalid_request"),
    (CHAT, {"stop": [1]}, 400, "stop[0]", "invalid_request"),
    (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_request"),
    (CHAT, {"logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_request"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "invalid_request"),
    (CHAT, {"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs", "invalid_request"),
    (CHAT, {"stream": False, "stream_options": {}}, 400, "stream_options", "invalid_request"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_request"),
    (
        CHAT,
        {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
        "invalid_request",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}},
        400,
        "response_format",
        "invalid_request",
    ),
    (
        CHAT,
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"strict": True, "schema": {"type": "array", "uniqueItems": True}},
            }
        },
        400,
        "response_format",
        "invalid_request",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_object", "schema": 3}},
        400,
        "response_format",
        "invalid_request",
    ),
    (CHAT, {"json_schema": []}, 400, "response_format", "invalid_request"),
    (CHAT, {"grammar": "root ::= missing"}, 400, "grammar", "invalid_request"),
    (
        CHAT,
        {"grammar": 'root ::= "x"', "response_format": {"type": "json_object"}},
        400,
        "grammar",
        "invalid_request",
    ),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ["a", [1], 1]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": [1, ["a"]]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"max_tokens": 1.5}, 400, "max_tokens", "invalid_request"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": [10**9]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ["x"] * 40}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ["x"] * 20, "n": 2}, 400, "n", "invalid_request"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "invalid_request"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt", "invalid_request"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "change", "status", "param", "code"), REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, path: str, change: dict, status: int, param: str, code: str, streamed: bool
) -> None:
    body = {**(HELLO if path == CHAT else FRANCE), "max_tokens": 1, "stream": streamed, **change}
    reply = server.request("POST", path, body)
    assert reply.status == status
    assert (reply.error["param"], reply.error["code"]) == (param, code)


# Half a surrogate pair, where nothing else looks at it: a name, and values that are not decoded at first.
HALVES = (
    rb'"\ud800": 1',
    rb'"mirostat": "\ud800"',
    rb'"service_tier": 1, "response_format": {"type": "text", "\udfff": 1}',
    rb'"moderation": "\ud800", "best_of": "\ud800"',
    rb'"json_schema": {"enum": ["\ud800"]}',
)


def policies(kind: str) -> list[tuple[str, str, msgspec.Meta]]:
    """(endpoint, field, meta) of the fields that are ignored, or refused."""
    return [
        (endpoint, name, meta)
        for endpoint, shape in ((CHAT, ChatRequest), (COMPLETIONS, CompletionRequest))
        for name, meta in schemas.policies(shape).items()
        if kind in (meta.extra or {})
    ]


@pytest.mark.parametrize(("path", "name", "meta"), policies("refused"))
def test_refused_fields_are_refused_unless_they_ask_for_nothing(
    server: Running, path: str, name: str, meta: msgspec.Meta
) -> None:
    body = {**(HELLO if path == CHAT else FRANCE), "max_tokens": 1}
    reply = server.request("POST", path, {**body, name: [{"type": "function"}]})
    assert (reply.status, reply.error["param"]) == (400, name)
    assert meta.extra["refused"] in reply.error["message"]
    for harmless in meta.extra["harmless"]:
        assert server.request("POST", path, {**body, name: harmless}).status == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_ignored_fields_may_hold_anything(server: Running, path: str) -> None:
    anything = {
        name: {"any": ["thing", None]} for endpoint, name, _ in policies("ignored") if endpoint == path
    }
    body = {**(HELLO if path == CHAT else FRANCE), "max_tokens": 1}
    assert server.request("POST", path, {**body, **anything}).status == 200


def test_every_field_may_be_null_unless_it_is_required(server: Running) -> None:
    for path, shape, body in ((CHAT, ChatRequest, HELLO), (COMPLETIONS, CompletionRequest, FRANCE)):
        nothing = {field.name: None for field in msgspec.structs.fields(shape) if not field.required}
        assert server.request("POST", path, {**nothing, **body, "max_tokens": 1}).status == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"null", 400, "object"),
        (b'{"model": NaN}', 400, "JSON"),
        (b'{"model": "starter"} {}', 400, ""),
        (b"\xef\xbb\xbf{}", 400, "JSON"),
        (b'{"user": "\xff"}', 400, "UTF-8"),
        ("{}".encode("utf-16"), 400, "UTF-8"),
        (b'{"model": "\\ud800"}', 400, ""),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
        (b'{"user": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", 400, "nested"),
        (b'{"user": ' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}", 400, "nested"),
        (b'{"%s": 1}' % (b"x" * 100_000), 400, "missing"),
        (b'{"user": "\\ud800", "messages": 1}', 400, ""),
        *(
            (b'{"messages":[{"role":"user","content":"x"}],"prompt":"x",%s}' % each, 400, "")
            for each in HALVES
        ),
        (b'{"temperature": 1e999}', 400, "range"),
        (b" " * (BODY_BYTES_MAX + 1), 413, "larger"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else value,
)
def test_bodies_that_are_not_requests(server: Running, body: bytes, status: int, says: str) -> None:
    for path in (CHAT, COMPLETIONS):
        reply = server.request("POST", path, body)
        assert reply.status == status
        assert says in reply.error["message"]
        assert len(reply.body) < 4000
    assert server.request("GET", "/health").status == 200


def test_a_body_too_large_that_does_not_say_its_length(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    pieces = (b" " * (1 << 20) for _ in range(17))
    connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, json.load(response)["error"]["code"]) == (413, "request_too_large")
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
    ],
)
def test_bodies_that_are_not_declared_as_json(server: Running, headers: dict[str, str]) -> None:
    reply = server.request("POST", CHAT, HELLO, headers)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


def test_a_charset_may_be_declared(server: Running) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.request("POST", CHAT, {**HELLO, "max_tokens": 1}, headers).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nosuch", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/starter", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/nosuch", 404, "model_not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "model_not_found"),
    ],
)
def test_paths_and_methods_that_do_not_exist(
    server: Running, method: str, path: str, status: int, code: str
) -> None:
    reply = server.request(method, path)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:8321"}, 200),
        ({"Host": "cordee.localhost:8321"}, 200),
        ({"Host": "127.8.9.10:1"}, 200),
        ({"Host": "[::1]:8321"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8321"}, 403),
        ({"Host": "192.168.1.2:8321"}, 403),
        ({"Host": "0.0.0.0:8321"}, 403),
        ({"Host": "2130706433"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://127.0.0.1:8321"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
    ],
)
def test_only_this_machine_may_ask(server: Running, headers: dict[str, str], status: int) -> None:
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/nowhere")):
        reply = server.request(method, path, headers=headers)
        assert (reply.status == 403) == (status == 403)
        if status == 403:
            assert reply.error["code"] == "forbidden_origin"


# Bodies from strategies: anything that is sent is a request, or is refused by name

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
COMPLETION_DECODER = msgspec.json.Decoder(CompletionRequest)


def decoded_or_refused(body: bytes) -> None:
    for decoder in (CHAT_DECODER, COMPLETION_DECODER):
        try:
            schemas.refuse(decode(body, decoder))
            assert len(unknown_fields(body, decoder.type)) <= NAMES_MAX + 64
        except BadRequest as error:
            assert error.message


@given(st.dictionaries(st.sampled_from(sorted(schemas.policies(ChatRequest))), JSON))
def test_any_values_are_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    body = {**HELLO, **FRANCE, **fields}
    for unknown in ("prompt", "messages"):
        decoded_or_refused(json.dumps({name: body[name] for name in body if name != unknown}).encode())


@given(st.binary())
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    decoded_or_refused(body)


# The document


def test_the_document_is_generated_from_the_program() -> None:
    text = api_reference.TARGET.read_text(encoding="utf-8")
    assert api_reference.renewed(text) == text, "run `make docs`"
    assert text.count("<!-- end -->") == 43
