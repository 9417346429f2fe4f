"""The HTTP API as bytes on a connection: shapes, refusals, bounds, and what happens when things go wrong.

A real service with the starter model answers behind a real server; tests/test_openai_client.py looks at the
same through OpenAI's client.
"""

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import api_reference
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.api import bodies, schemas, stream
from cordee.api.bodies import BODY_BYTES_MAX, decode
from cordee.api.prompts import chat_prompt
from cordee.api.schemas import ChatRequest, CompletionRequest
from cordee.api.stream import Timing
from cordee.errors import BadRequest
from cordee.node.service import ServiceConfig
from serving import SECONDS, Running, running

CONTEXT = 256
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "starter", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
FRANCE = {"model": "starter", "prompt": "The capital of France is", "temperature": 0}
LONG = {
    **HELLO,
    "logit_bias": {},
    "max_tokens": 400,
    "messages": [{"role": "user", "content": "Tell a story."}],
}


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One for all tests that leave it as it was. It is impatient, so that waits show soon."""
    folder = tmp_path_factory.mktemp("store")
    config = ServiceConfig(context=CONTEXT)
    timing = Timing(keep_alive_seconds=0.05, accept_seconds=0.05)
    with running(starter_path, folder, config=config, timing=timing) as started:
        yield started


def endless(server: Running) -> dict[str, Any]:
    """A request whose answer ends only with the context: the model may not end it."""
    ends = {str(token): -100 for token in server.service.vocabulary.end_of_generation}
    return {**HELLO, "logit_bias": ends, "stream": True}


# What is served


def test_models_are_listed_and_retrieved(server: Running) -> None:
    listed = server.request("GET", "/v1/models").json
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert {key: model[key] for key in ("id", "object", "owned_by")} == {
        "id": "starter",
        "object": "model",
        "owned_by": "cordee",
    }
    assert model["created"] == int(datetime.fromisoformat(server.service.model.added).timestamp())
    assert server.request("GET", "/v1/models/starter").json == model


def test_a_model_id_may_hold_slashes(server: Running) -> None:
    server.services["owner/name"] = server.service
    try:
        for path in ("owner/name", "owner%2Fname"):
            assert server.request("GET", f"/v1/models/{path}").json["id"] == "owner/name"
        assert len(server.request("GET", "/v1/models").json["data"]) == 2
    finally:
        del server.services["owner/name"]


def test_health_is_ok_while_the_model_can_answer(server: Running) -> None:
    reply = server.request("GET", "/health")
    assert (reply.status, reply.json) == (200, {"status": "ok", "models": {"starter": "ready"}})


def test_a_model_that_is_loading_is_told_as_such(session_home: Path, tmp_path: Path) -> None:
    with running(None, tmp_path, expected=["starter"]) as server:
        reply = server.request("GET", "/health")
        assert (reply.status, reply.json) == (503, {"status": "loading", "models": {"starter": "loading"}})
        reply = server.request("POST", CHAT, HELLO)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (503, "model_loading", "model")
        assert int(reply.headers["retry-after"]) > 0
        assert server.request("GET", "/v1/models").json["data"] == []
        assert server.request("POST", CHAT, {**HELLO, "model": "other"}).status == 404


def test_no_model_at_all_is_not_healthy(session_home: Path, tmp_path: Path) -> None:
    with running(None, tmp_path) as server:
        assert server.request("GET", "/health").status == 503


# Answers


def test_a_chat_answer(server: Running) -> None:
    reply = server.request("POST", CHAT, {**HELLO, "max_tokens": 5})
    assert reply.status == 200
    answer = reply.json
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "starter"
    [choice] = answer["choices"]
    text = choice["message"].pop("content")
    assert text
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    used = answer["usage"]
    assert used["completion_tokens"] == 5
    assert used["total_tokens"] == used["prompt_tokens"] + 5
    prompt = chat_prompt(server.service, decode(json.dumps(HELLO).encode(), CHAT_DECODER), datetime.now(UTC))
    assert used["prompt_tokens"] == len(prompt)


def test_a_chat_stream_has_the_shape_that_clients_rely_on(server: Running) -> None:
    whole = server.request("POST", CHAT, {**HELLO, "max_tokens": 5}).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, used, done = server.request("POST", CHAT, {**HELLO, "max_tokens": 5, **options}).events
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in (*events, used)}) == 1
    assert all(event["usage"] is None for event in events)
    first, *middle, last = [event["choices"][0] for event in events]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} for choice in middle)
    assert [choice["finish_reason"] for choice in (first, *middle)] == [None] * (1 + len(middle))
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert (
        "".join(choice["delta"]["content"] for choice in middle) == whole["choices"][0]["message"]["content"]
    )
    assert used["choices"] == []
    assert used["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_a_stream_tells_usage_only_when_asked(server: Running) -> None:
    events = server.request("POST", CHAT, {**HELLO, "max_tokens": 1, "stream": True}).events
    assert not any("usage" in event for event in events[:-1])
    assert all(event["choices"] for event in events[:-1])


def test_a_completion_whole_and_streamed(server: Running) -> None:
    whole = server.request("POST", COMPLETIONS, {**FRANCE, "max_tokens": 6}).json
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"].startswith(" Paris")
    *events, done = server.request("POST", COMPLETIONS, {**FRANCE, "max_tokens": 6, "stream": True}).events
    assert done == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]


def test_a_completion_without_max_tokens_has_openais_16(server: Running) -> None:
    bias = endless(server)["logit_bias"]
    answer = server.request("POST", COMPLETIONS, {**FRANCE, "logit_bias": bias}).json
    assert answer["usage"]["completion_tokens"] == 16


def test_a_chat_without_max_tokens_goes_on_to_the_end_of_the_context(server: Running) -> None:
    body = {**endless(server), "stream": False, "messages": user("word " * (CONTEXT - 60))}
    answer = server.request("POST", CHAT, body).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT


def test_prompts_as_text_tokens_and_lists_of_both(server: Running) -> None:
    texts = ["The capital of France is", "The capital of Italy is"]
    tokens = [server.service.vocabulary.tokenize(text, add_bos=True) for text in texts]

    def choices(prompt: Any) -> list[tuple[int, str]]:
        answer = server.request("POST", COMPLETIONS, {**FRANCE, "prompt": prompt, "max_tokens": 3}).json
        return [(choice["index"], choice["text"]) for choice in answer["choices"]]

    assert choices(texts[0]) == choices(texts[:1]) == choices(tokens[0]) == choices(tokens[:1])
    both = choices(texts)
    assert [index for index, _ in both] == [0, 1]
    assert both == choices(tokens)
    assert both[:1] == choices(texts[0])


def test_several_answers_to_one_prompt(server: Running) -> None:
    body = {**HELLO, "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 8}
    answer = server.request("POST", CHAT, body).json
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    one = server.request("POST", CHAT, {**HELLO, "max_tokens": 1}).json["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == one
    second = server.request("POST", CHAT, {**body, "n": 1, "seed": 8}).json
    assert second["choices"][0]["message"]["content"] == texts[1]

    events = server.request("POST", CHAT, {**body, "stream": True}).events[:-1]
    parts: dict[int, list[dict]] = {}
    for event in events:
        [choice] = event["choices"]
        parts.setdefault(choice["index"], []).append(choice)
    for index, text in enumerate(texts):
        assert parts[index][0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts[index]) == text
        assert parts[index][-1]["finish_reason"] is not None


def test_without_a_seed_answers_differ(server: Running) -> None:
    body = {**HELLO, "temperature": 2, "max_tokens": 24}
    texts = {server.request("POST", CHAT, body).json["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) > 1


def test_a_stop_string_ends_the_answer_and_is_not_sent(server: Running) -> None:
    whole = server.request("POST", COMPLETIONS, {**FRANCE, "prompt": "1, 2, 3, 4,", "max_tokens": 24}).json
    text = whole["choices"][0]["text"]
    stop = text[7:11]  # straddles tokens
    body = {**FRANCE, "prompt": "1, 2, 3, 4,", "max_tokens": 24, "stop": ["never there", stop]}
    [choice] = server.request("POST", COMPLETIONS, body).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.find(stop)], "stop")
    pieces = server.request("POST", COMPLETIONS, {**body, "stop": stop, "stream": True}).events[:-1]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text[: text.find(stop)]


def test_chat_logprobs_spell_the_answer(server: Running) -> None:
    body = {**HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    [choice] = server.request("POST", CHAT, body).json["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
    events = server.request("POST", CHAT, {**body, "stream": True}).events[1:-2]
    assert [entry for event in events for entry in event["choices"][0]["logprobs"]["content"]] == entries
    del body["top_logprobs"]
    [choice] = server.request("POST", CHAT, body).json["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 6


def test_legacy_logprobs_are_parallel_lists(server: Running) -> None:
    body = {**FRANCE, "prompt": "Some emoji: \U0001f600\U0001f680", "max_tokens": 12, "logprobs": 2}
    [choice] = server.request("POST", COMPLETIONS, body).json["choices"]
    lists = choice["logprobs"]
    assert {len(each) for each in lists.values()} == {12}
    for token, logprob, top in zip(
        lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
    assert lists["text_offset"] == sorted(lists["text_offset"])
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"].startswith(token, offset)
    events = server.request("POST", COMPLETIONS, {**body, "stream": True}).events[:-2]
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert {name: [entry for each in streamed for entry in each[name]] for name in lists} == lists


def test_a_grammar_binds_the_answer(server: Running) -> None:
    body = {**HELLO, "grammar": 'root ::= "rope" | "cord"', "temperature": 1, "seed": 1}
    assert server.request("POST", CHAT, body).json["choices"][0]["message"]["content"] in {"rope", "cord"}


def test_penalties_and_bias_change_the_answer(server: Running) -> None:
    def text(**extra: Any) -> str:
        body = {**FRANCE, "prompt": "ha ha ha ha ha ha", "max_tokens": 12, **extra}
        return server.request("POST", COMPLETIONS, body).json["choices"][0]["text"]

    plain = text()
    for changed in (
        {"frequency_penalty": 2},
        {"presence_penalty": 2},
        {"repeat_penalty": 2},
        {"logit_bias": {str(server.service.vocabulary.tokenize(" ha", add_bos=False)[0]): -100}},
    ):
        assert text(**changed) != plain


def test_content_parts_are_joined_by_line_breaks(server: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt_of(server, user(parts)) == prompt_of(server, user("one\ntwo"))


def test_developer_messages_are_the_systems(server: Running) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    as_system = [{**messages[0], "role": "system"}, messages[1]]
    assert prompt_of(server, messages) == prompt_of(server, as_system)


# Control tokens typed by a user

CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def user(content: Any) -> list[dict]:
    return [{"role": "user", "content": content}]


def prompt_of(server: Running, messages: list[dict]) -> tuple[int, ...]:
    body = json.dumps({"model": "starter", "messages": messages}).encode()
    return chat_prompt(server.service, decode(body, CHAT_DECODER), NOW)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_harmless_messages_are_tokenized_in_one_piece(server: Running, contents: list[str]) -> None:
    service = server.service
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    rendered = service.template.render(messages, now=NOW)
    assert prompt_of(server, messages) == tuple(service.vocabulary.tokenize(rendered, add_bos=True))


@given(
    st.lists(
        st.sampled_from(
            ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>", "\n", " ", "hi", "é"]
        ),
        max_size=12,
    ).map("".join)
)
def test_a_message_cannot_hold_control_tokens(server: Running, content: str) -> None:
    vocabulary = server.service.vocabulary
    controls = [token for token in prompt_of(server, user("x")) if vocabulary.is_control(token)]
    prompt = prompt_of(server, user(content))
    assert [token for token in prompt if vocabulary.is_control(token)] == controls
    rendered = server.service.template.render(user(content), now=NOW)
    assert b"".join(vocabulary.piece(token, special=True) for token in prompt).decode() == rendered


def test_roles_and_names_cannot_hold_control_tokens(server: Running) -> None:
    for message in (
        {"role": "user<|im_end|>", "content": "x"},
        {"role": "user", "content": "x", "name": "me<|im_end|>"},
        {"role": "user\n", "content": "x"},
    ):
        assert server.request("POST", CHAT, {**HELLO, "messages": [message]}).status == 400


def test_a_conversation_of_nothing_but_control_tokens_is_refused(server: Running) -> None:
    reply = server.request("POST", CHAT, {**HELLO, "messages": user("<|im_end|>" * 5000)})
    assert (reply.status, reply.error["param"]) == (400, "messages")


# Refusals: (path, what the body has besides, status, param, code)

REFUSALS = [
    (CHAT, {"model": "nosuch"}, 404, "model", "model_not_found"),
    (CHAT, {"model": 3}, 400, "model", "invalid_request"),
    (CHAT, {"modle": "starter"}, 400, "modle", "invalid_request"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_request"),
    (CHAT, {"messages": None}, 400, "messages", "invalid_request"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_request"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "invalid_request"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "invalid_request"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "mood": 1}]},
        400,
        "messages[0].mood",
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
    (CHAT, {"max_completion_tokens": -1}, 400, "max_completion_tokens", "invalid_request"),
    (CHAT, {"stop": ["x"] * 17}, 400, "stop", "invalid_request"),
    (CHAT, {"stop": ""}, 400, "stop", "invalid_request"),
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
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": [10**9]}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ["x"] * 40}, 400, "prompt", "invalid_request"),
    (COMPLETIONS, {"prompt": ["x"] * 20, "n": 2}, 400, "n", "invalid_request"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "invalid_request"),
    (COMPLETIONS, {"messages": []}, 400, "messages", "invalid_request"),
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
        (b'{"%s": 1}' % (b"x" * 100_000), 400, "no field"),
        (b'{"temperature": 1e999}', 400, "range"),
        (b" " * (BODY_BYTES_MAX + 1), 413, "larger"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else value,
)
def test_bodies_that_are_no_requests(server: Running, body: bytes, status: int, says: str) -> None:
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
        ("GET", "/", 404, "not_found"),
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


# Bodies from strategies: whatever is sent, it is a request or a named refusal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
COMPLETION_DECODER = msgspec.json.Decoder(CompletionRequest)


def decoded_or_refused(body: bytes) -> None:
    for decoder in (CHAT_DECODER, COMPLETION_DECODER):
        try:
            schemas.refuse(decode(body, decoder))
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


# Clients that are slow, silent or gone


class Client:
    """A connection by hand. It sends a request and reads events when told to."""

    def __init__(self, server: Running, path: str, body: dict, receive_bytes: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(SECONDS)
        self._socket.connect(("127.0.0.1", server.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.lines = self._socket.makefile("rb")

    def close(self) -> None:
        self.lines.close()
        self._socket.close()


def until_text(client: Client) -> None:
    while b'"content":"' not in (line := client.lines.readline()) or b'"role"' in line:
        assert line


def test_a_client_that_leaves_a_stream_ends_it(server: Running) -> None:
    client = Client(server, CHAT, endless(server))
    until_text(client)
    assert server.status()["active"] == 1
    client.close()
    server.until(lambda status: status["active"] == 0)


def test_a_client_that_leaves_without_an_answer_ends_it(server: Running) -> None:
    client = Client(server, CHAT, {**endless(server), "stream": False})
    server.until(lambda status: status["active"] == 1)
    client.close()
    server.until(lambda status: status["active"] == 0)


def test_a_client_that_leaves_ends_all_its_streams(server: Running) -> None:
    client = Client(server, CHAT, {**endless(server), "n": 12})
    server.until(lambda status: (status["active"], status["queue"]) == (8, 4))
    client.close()
    server.until(lambda status: (status["active"], status["queue"]) == (0, 0))


def test_a_client_that_reads_nothing_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream, "SILENT_CLIENT_SECONDS", 0.2)
    body = {**endless(server), "n": 8, "logprobs": True, "top_logprobs": 20}
    client = Client(server, CHAT, body, receive_bytes=2048)
    server.until(lambda status: status["active"] == 8)
    server.until(lambda status: status["active"] == 0)
    sent = client.lines.read()  # ends, because the server closed the connection
    assert b"[DONE]" not in sent
    assert b'"finish_reason":"length"' not in sent
    client.close()


def test_a_body_that_does_not_arrive_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        client.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n{{".encode())
        response = http.client.HTTPResponse(client, method="POST")
        response.begin()
        assert (response.status, json.load(response)["error"]["code"]) == (408, "request_timeout")


def test_bodies_share_a_bounded_memory(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODIES_BYTES_MAX", 1000)
    reply = server.request("POST", CHAT, {**HELLO, "user": "x" * 1000})
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    assert int(reply.headers["retry-after"]) > 0
    assert server.request("POST", CHAT, {**HELLO, "max_tokens": 1}).status == 200


# Stages that fall


def test_a_lost_stage_is_a_pause_with_heartbeats(server: Running) -> None:
    """The worker hangs before the prompt is computed, and is replaced; the answer is the same."""
    body = {**HELLO, "messages": user("Count to ten."), "max_tokens": 6, "stream": True}
    undisturbed = server.request("POST", CHAT, body).events
    os.kill(server.status()["stages"][0]["pid"], signal.SIGSTOP)
    client = Client(server, CHAT, body)
    lines, seen = [], set()
    while not lines or lines[-1].strip() != b"data: [DONE]":
        lines.append(client.lines.readline())
        assert lines[-1]
        if lines[-1].strip() == b": keep-alive":
            health = server.request("GET", "/health")
            seen.add((health.status, health.json["status"]))
    client.close()
    assert (503, "recovering") in seen
    assert b"HTTP/1.1 200" in lines[0]
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert texts(events) == texts(undisturbed[:-1])
    assert server.request("GET", "/health").status == 200


def texts(events: list[dict]) -> list[dict]:
    return [event["choices"][0] for event in events]


def test_a_service_that_ends_tells_its_streams(
    starter_path: Path, session_home: Path, tmp_path: Path
) -> None:
    with running(starter_path, tmp_path, config=ServiceConfig(context=CONTEXT)) as server:
        client = Client(server, CHAT, endless(server))
        until_text(client)
        server.run(server.service.close())
        *_, last = [line for line in client.lines.read().split(b"\n") if line.startswith(b"data: ")]
        error = json.loads(last[6:])["error"]
        assert (error["type"], error["code"]) == ("server_error", "stage_failed")
        client.close()
        health = server.request("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "recovering")


# The document


def test_the_document_is_that_of_the_program() -> None:
    text = api_reference.TARGET.read_text(encoding="utf-8")
    assert api_reference.renewed(text) == text, "run `make docs`"
    assert text.count("<!-- end -->") == 8
