"""The HTTP API as bytes on a connection: shapes, refusals, bounds, and what happens when things go wrong.

A real service with the starter model answers behind a real server; tests/api/test_openai_client.py looks at
the same through OpenAI's client.
"""

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.api import bodies, guard, stream
from cordee.api.bodies import decode
from cordee.api.prompts import rendered
from cordee.api.replies import ChatReply
from cordee.api.schemas import ChatRequest
from cordee.api.stream import Timing
from cordee.api.turns import chat_turn
from cordee.chat.formats import format_of
from cordee.generation.template import ChatTemplate
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, SECONDS, Running, running, user

CONTEXT = 256
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
    """One for all tests that leave it as it was. Its waits are short."""
    folder = tmp_path_factory.mktemp("store")
    config = ServiceConfig(context=CONTEXT)
    timing = Timing(keep_alive_seconds=0.05, accept_seconds=0.05)
    with running(starter_path, folder, config=config, timing=timing) as started:
        yield started


def endless(server: Running) -> dict[str, Any]:
    """A request whose answer ends only with the context: end tokens are ruled out."""
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


def test_a_model_that_is_loading_is_reported_as_such(session_home: Path, tmp_path: Path) -> None:
    with running(None, tmp_path, expected=["starter"]) as server:
        reply = server.request("GET", "/health")
        assert (reply.status, reply.json) == (503, {"status": "loading", "models": {"starter": "loading"}})
        reply = server.request("POST", CHAT, HELLO)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (503, "model_loading", "model")
        assert int(reply.headers["retry-after"]) > 0
        [model] = server.request("GET", "/v1/models").json["data"]
        assert (model["id"], model["state"]) == ("starter", "loading")
        other = server.request("POST", CHAT, {**HELLO, "model": "other"})
        assert (other.status, other.error["code"]) == (503, "model_loading"), "it is the only one"
        assert server.request("GET", "/v1/models/other").status == 404


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
    assert used["prompt_tokens"] == len(prompt_of(server, HELLO["messages"]))


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


def test_a_stream_reports_usage_only_when_asked(server: Running) -> None:
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
    body = {**HELLO, "temperature": 2, "max_tokens": 10}
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


def test_developer_messages_become_system_messages(server: Running) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    as_system = [{**messages[0], "role": "system"}, messages[1]]
    assert prompt_of(server, messages) == prompt_of(server, as_system)


# Control tokens typed by a user

CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def prompt_of(server: Running, messages: list[dict[str, Any]]) -> tuple[int, ...]:
    asked = {"model": "starter", "messages": messages, "add_generation_prompt": True}
    body = json.dumps(asked).encode()
    turn = chat_turn(decode(body, CHAT_DECODER))
    return rendered(server.service, format_of(server.service.template), turn, NOW, "messages").tokens


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


def test_roles_cannot_hold_control_tokens(server: Running) -> None:
    for message in ({"role": "user<|im_end|>", "content": "x"}, {"role": "user\n", "content": "x"}):
        assert server.request("POST", CHAT, {**HELLO, "messages": [message]}).status == 400


@pytest.mark.parametrize("name", ["Zoë de la Cordée", "me<|im_end|>you", "<|im_start|>"])
def test_names_may_be_anything_but_control_tokens(server: Running, name: str) -> None:
    service = server.service
    naming = ChatTemplate(
        "{% for each in messages %}<|im_start|>{{ each.name }}\n{{ each.content }}<|im_end|>{% endfor %}"
    )
    named = SimpleNamespace(
        template=naming, vocabulary=service.vocabulary, context=CONTEXT, name=service.name
    )
    messages = [{"role": "user", "content": "x", "name": name}]
    turn = chat_turn(decode(json.dumps({"messages": messages}).encode(), CHAT_DECODER))
    prompt = rendered(named, format_of(naming), turn, NOW, "messages").tokens
    pieces = [service.vocabulary.piece(token, special=True) for token in prompt]
    assert b"".join(pieces).decode() == f"<|im_start|>{name}\nx<|im_end|>"
    assert sum(map(service.vocabulary.is_control, prompt)) == 2


def test_a_conversation_of_nothing_but_control_tokens_is_refused(server: Running) -> None:
    reply = server.request("POST", CHAT, {**HELLO, "messages": user("<|im_end|>" * 5000)})
    assert (reply.status, reply.error["param"]) == (400, "messages")


# Clients that are slow, silent or gone


class Client:
    """A connection that a test drives: it sends a request, and reads events when told to."""

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


def test_a_body_that_does_not_arrive_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_open_requests_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "REQUESTS_MAX", 1)
    client = Client(server, CHAT, endless(server))
    until_text(client)
    reply = server.request("GET", "/v1/models")
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    client.close()
    server.until(lambda status: status["active"] == 0)


# Bugs of the server


def test_a_fault_is_an_error_for_one_client_and_a_traceback_without_prompts(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> dict:
        raise LookupError("a fault")

    body = {**HELLO, "messages": user("xylophone-4711"), "max_tokens": 2}
    with monkeypatch.context() as patched:
        patched.setattr(ChatReply, "_choice", fault)
        reply = server.request("POST", CHAT, body)
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        patched.setattr(ChatReply, "_finish", fault)
        *_, text, last = server.request("POST", CHAT, {**body, "stream": True}).events
        assert text["choices"][0]["delta"]["content"]
        assert last["error"]["code"] == "internal_error"
        assert "a fault" not in json.dumps(last) + reply.body.decode()
    server.until(lambda _: caplog.text.count("LookupError: a fault") == 2)
    assert "xylophone" not in caplog.text
    assert server.request("POST", CHAT, body).status == 200


# Stages that fail


def test_a_lost_stage_is_a_pause_with_keep_alives(server: Running) -> None:
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


def texts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["choices"][0] for event in events]


def test_a_service_that_closes_ends_its_streams_with_a_reason(
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
