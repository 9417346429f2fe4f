"""Ollama's API as bytes on a connection, and how its conversations and replies are made."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.api.answers import AnswerPiece, Job, ParsedAnswers
from cordee.api.bodies import decode
from cordee.api.stream import EventStream, Timing, collect
from cordee.chat.events import ArgumentsDelta, CallBegun, Event, TextDelta, ThinkingDelta
from cordee.chat.turn import Message, Thinking, ToolCall
from cordee.endpoints import ollama_replies
from cordee.endpoints.described import short_count
from cordee.endpoints.ollama_replies import OllamaChatReply, OllamaGenerateReply
from cordee.endpoints.ollama_schemas import OllamaChatRequest
from cordee.endpoints.ollama_turns import chat_turn
from cordee.errors import StageFailed
from cordee.generation.request import Request
from cordee.serving.local_service import ServiceConfig
from serving import HELLO, Reply, Running, running, user

CONTEXT = 256
CHAT, GENERATE = "/api/chat", "/api/generate"
SHORT = {"num_predict": 4, "temperature": 0}
ASK = {"model": "starter", "messages": user("Say hello."), "options": SHORT}
FRANCE = {"model": "starter", "prompt": "The capital of France is", "raw": True, "options": SHORT}


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One for all tests that leave it as it was. Its waits are short."""
    timing = Timing(keep_alive_seconds=0.02, accept_seconds=0.02)
    config = ServiceConfig(context=CONTEXT)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config, timing=timing) as started:
        yield started


def lines(reply: Reply) -> list[dict[str, Any]]:
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-ndjson")
    assert reply.body.endswith(b"\n")
    return [json.loads(line) for line in reply.body.splitlines()]


def error(reply: Reply) -> str:
    """The text of an error, which is all that there is."""
    assert list(reply.json) == ["error"] and isinstance(reply.json["error"], str)
    return reply.json["error"]


# What is here


def test_the_root_says_what_clients_look_for(server: Running) -> None:
    for method in ("GET", "HEAD"):
        reply = server.request(method, "/")
        assert (reply.status, reply.body) == (200, b"Ollama is running" if method == "GET" else b"")
    version = server.request("GET", "/api/version").json["version"]
    assert [part.isdecimal() for part in version.split(".")] == [True] * 3


def test_models_are_listed_with_what_they_can_do(server: Running) -> None:
    [model] = server.request("GET", "/api/tags").json["models"]
    assert (model["name"], model["model"]) == ("starter", "starter")
    assert "sha256:" + model["digest"] == server.service.model.digest
    assert model["size"] == server.service.model.path.stat().st_size
    assert datetime.fromisoformat(model["modified_at"]).tzinfo
    assert model["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "134.5M",
        "quantization_level": "Q4_1",
    }
    [loaded] = server.request("GET", "/api/ps").json["models"]
    assert loaded["context_length"] == CONTEXT and datetime.fromisoformat(loaded["expires_at"])
    assert loaded["digest"] == model["digest"]


@pytest.mark.parametrize("body", [{"model": "starter"}, {"name": "starter:latest", "verbose": True}])
def test_a_model_is_shown_with_the_context_that_it_has_here(server: Running, body: dict) -> None:
    shown = server.request("POST", "/api/show", body).json
    assert "completion" in shown["capabilities"] and "embedding" not in shown["capabilities"]
    assert shown["model_info"]["llama.context_length"] == CONTEXT
    assert shown["model_info"]["general.parameter_count"] == 134_515_008
    assert f"num_ctx {CONTEXT}" in shown["parameters"]
    assert shown["template"] == server.service.template.source
    assert "tokenizer.ggml.tokens" not in shown["model_info"] and len(json.dumps(shown)) < 5000


def test_counts_are_as_people_write_them() -> None:
    assert [short_count(count) for count in (7, 1500, 134_515_008, 8_030_000_000, 2 * 10**12)] == [
        "7", "1.5K", "134.5M", "8.0B", "2.0T",
    ]  # fmt: skip


# Answers


def test_a_chat_is_streamed_unless_it_is_not_wanted(server: Running) -> None:
    *said, last = lines(server.request("POST", CHAT, ASK))
    assert all(line["done"] is False and line["message"]["role"] == "assistant" for line in said)
    assert [set(line) for line in said] == [{"model", "created_at", "message", "done"}] * len(said)
    whole = server.request("POST", CHAT, {**ASK, "stream": False})
    assert whole.headers["content-type"] == "application/json"
    assert whole.json["message"] == {
        "role": "assistant",
        "content": "".join(line["message"]["content"] for line in said),
    }
    for end in (last, whole.json):
        assert (end["done"], end["done_reason"], end["model"]) == (True, "length", "starter")
        assert (end["eval_count"], end["prompt_eval_count"]) == (4, last["prompt_eval_count"])
        durations = [end[f"{kind}_duration"] for kind in ("prompt_eval", "eval", "total")]
        assert all(isinstance(each, int) and each > 0 for each in durations)
        assert durations[0] + durations[1] <= durations[2]
    moments = [datetime.fromisoformat(line["created_at"]) for line in (*said, last)]
    assert all(earlier <= later for earlier, later in pairwise(moments))


def test_generate_with_and_without_the_template(server: Running) -> None:
    raw = server.request("POST", GENERATE, {**FRANCE, "stream": False}).json
    assert raw["response"].startswith(" Paris") and raw["prompt_eval_count"] == 5
    *said, last = lines(server.request("POST", GENERATE, FRANCE))
    assert "".join(line["response"] for line in said) == raw["response"] and last["response"] == ""
    prompt = {"model": "starter", "prompt": "Say hello.", "options": SHORT, "stream": False}
    chatted = server.request("POST", CHAT, {**ASK, "stream": False}).json
    assert server.request("POST", GENERATE, prompt).json["response"] == chatted["message"]["content"]
    system = {**prompt, "system": "You speak like a pirate."}
    longer = server.request("POST", GENERATE, system).json
    asked = [{"role": "system", "content": system["system"]}, *ASK["messages"]]
    same = server.request("POST", CHAT, {**ASK, "messages": asked, "stream": False}).json
    assert longer["response"] == same["message"]["content"]


@pytest.mark.parametrize(("path", "said"), [(CHAT, "message"), (GENERATE, "response")])
def test_without_a_prompt_the_model_is_loaded(server: Running, path: str, said: str) -> None:
    for keep in (300, "5m", 0, -1):
        reply = server.request("POST", path, {"model": "starter", "keep_alive": keep}).json
        assert (reply["done"], reply["done_reason"]) == (True, "load") and said in reply


SCHEMA = {
    "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "uniqueItems": True, "maxItems": 1}}
}


def test_formats_bind(server: Running) -> None:
    ask = {**ASK, "stream": False, "options": {"num_predict": 150, "temperature": 0}}
    bound = server.request("POST", CHAT, {**ask, "format": {**SCHEMA, "required": ["ok"]}})
    assert isinstance(json.loads(bound.json["message"]["content"])["ok"], bool)
    assert bound.headers["x-cordee-ignored"] == "format.uniqueItems"
    prompt = {**FRANCE, "stream": False, "options": ask["options"], "format": {"const": {"city": "Paris"}}}
    assert json.loads(server.request("POST", GENERATE, prompt).json["response"]) == {"city": "Paris"}
    free = server.request("POST", CHAT, {**ask, "format": "json"}).json["message"]["content"]
    assert free.startswith("{")
    for nothing in ("", None):
        assert server.request("POST", CHAT, {**ASK, "format": nothing}).status == 200


def test_options_have_their_effect_and_ollama_s_defaults(server: Running) -> None:
    def text(**options: Any) -> str:
        body = {**ASK, "stream": False, "options": {"num_predict": 6, **options}}
        return server.request("POST", CHAT, body).json["message"]["content"]

    hot = {"temperature": 2, "top_p": 1, "top_k": 0}
    assert text(seed=5) == text(seed=5, temperature=0.8, top_k=40, top_p=0.9)
    assert text(seed=5, **hot) != text(seed=6, **hot)
    assert len({text(seed=-1, **hot) for _ in range(3)}) > 1, "a random one"
    assert text(temperature=0, stop=["!", ","]) != text(temperature=0, repeat_penalty=9, repeat_last_n=-1)


def test_what_has_no_effect_is_named(server: Running) -> None:
    options = {
        "num_ctx": CONTEXT + 1,
        "num_gpu": 1,
        "num_thread": 4,
        "mirostat": 2,
        "zork": 1,
        "num_predict": 1,
    }
    reply = server.request("POST", CHAT, {**ASK, "options": options, "truncate": True})
    assert sorted(reply.headers["x-cordee-ignored"].split(", ")) == [
        "options.mirostat", "options.num_ctx", "options.zork", "truncate",
    ]  # fmt: skip
    enough = {**ASK, "options": {"num_ctx": CONTEXT, "num_predict": 1}}
    assert "x-cordee-ignored" not in server.request("POST", CHAT, enough).headers


def test_logprobs(server: Running) -> None:
    *said, _ = lines(server.request("POST", CHAT, {**ASK, "logprobs": True, "top_logprobs": 2}))
    entries = [entry for line in said for entry in line["logprobs"]]
    assert len(entries) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert "".join(entry["token"] for entry in entries) == "".join(
        line["message"]["content"] for line in said
    )
    whole = server.request("POST", CHAT, {**ASK, "logprobs": True, "stream": False}).json
    assert [entry["token"] for entry in whole["logprobs"]] == [entry["token"] for entry in entries]


def test_a_body_needs_no_declaration(server: Running) -> None:
    """As curl sends what its -d has, and all of Ollama's examples are written."""
    for kind in ("application/x-www-form-urlencoded", "", "text/plain"):
        assert server.request("POST", CHAT, ASK, {"Content-Type": kind}).status == 200


def test_a_silent_stream_is_kept_alive_by_white_space(server: Running) -> None:
    ends = {str(token): -100 for token in server.service.vocabulary.end_of_generation}
    longest = {**HELLO, "messages": user("word " * 180), "logit_bias": ends, "stream": True, "max_tokens": 1}
    assert server.request("POST", "/v1/chat/completions", longest).status == 200
    reply = server.request("POST", CHAT, {**ASK, "messages": user("other " * 180)})
    assert reply.body.startswith(b" ") and lines(reply)[-1]["done"]


# Refusals

REFUSALS = [
    (
        "POST",
        CHAT,
        {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
        400,
        "messages[0].images",
    ),
    ("POST", CHAT, {"messages": [{"role": "user\n", "content": "x"}]}, 400, "role"),
    ("POST", CHAT, {"messages": user("word " * CONTEXT)}, 400, f"holds {CONTEXT}"),
    ("POST", CHAT, {"messages": user("x"), "options": {"temperature": "hot"}}, 400, "options.temperature"),
    ("POST", CHAT, {"messages": user("x"), "options": {"temperature": 9}}, 400, "temperature"),
    ("POST", CHAT, {"messages": user("x"), "options": {"num_predict": 0}}, 400, "num_predict"),
    ("POST", CHAT, {"messages": user("x"), "format": "xml"}, 400, "format"),
    ("POST", CHAT, {"messages": user("x"), "format": {"type": "strin"}, "stream": False}, 400, "schema"),
    ("POST", CHAT, {"messages": user("x"), "think": "so hard!"}, 400, "think"),
    ("POST", CHAT, {"messages": user("x"), "top_logprobs": 3}, 400, "logprobs"),
    ("POST", CHAT, {"messages": user("x"), "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ("POST", GENERATE, {"prompt": "x", "images": ["aGk="]}, 400, "images"),
    ("POST", GENERATE, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("POST", GENERATE, {"prompt": "x", "template": "{{ .Prompt }}"}, 400, "template"),
    ("POST", GENERATE, b"{", 400, "JSON"),
    ("POST", "/api/show", {"model": "nosuch"}, 404, "nosuch"),
    ("POST", "/api/show", {}, 400, "model is missing"),
    ("POST", "/api/pull", {"model": "llama3.2"}, 501, "cordee pull"),
    ("DELETE", "/api/delete", {"model": "starter"}, 501, "cordee rm"),
    ("POST", "/api/copy", {"source": "starter", "destination": "x"}, 501, "cordee pull"),
    ("POST", "/api/create", {"model": "x", "from": "starter"}, 501, "cordee pull"),
    ("POST", "/api/push", {"model": "starter"}, 501, "hub"),
    ("POST", "/api/embed", {"model": "nosuch", "input": "x"}, 404, "nosuch"),
    ("POST", "/api/embed", {"model": "starter"}, 400, "input is missing"),
    ("GET", "/api/nothing", None, 404, "/api/nothing"),
    ("GET", CHAT, None, 405, "GET"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "says"), REFUSALS)
def test_refusals_are_a_text(
    server: Running, method: str, path: str, body: Any, status: int, says: str
) -> None:
    reply = server.request(method, path, body)
    assert reply.status == status
    assert says in error(reply)


def test_a_page_of_another_site_may_not_ask(server: Running) -> None:
    reply = server.request(
        "POST", CHAT, ASK, {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    )
    assert reply.status == 403 and "evil.example" in error(reply)


def test_what_is_here_is_pulled_at_once(server: Running) -> None:
    assert lines(server.request("POST", "/api/pull", {"model": "starter:latest"}))[-1] == {
        "status": "success"
    }
    assert server.request("POST", "/api/pull", {"name": "starter", "stream": False}).json == {
        "status": "success"
    }


def test_a_failure_in_mid_stream_is_the_last_line(
    starter_path: Path, session_home: Path, tmp_path: Path
) -> None:
    with running(starter_path, tmp_path, config=ServiceConfig(context=CONTEXT)) as started:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", started.port, timeout=60)
        body = json.dumps({**ASK, "options": {"ignore_eos": True}})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        json.loads(response.readline())
        started.run(started.service.close())
        *_, last = response.read().splitlines()
        assert list(json.loads(last)) == ["error"]
        connection.close()


# Conversations, and replies with calls and thinking: what a model's family writes is parsed elsewhere


def turn_of(**body: Any) -> Any:
    return chat_turn(
        decode(json.dumps({"messages": user("x"), **body}).encode(), msgspec.json.Decoder(OllamaChatRequest))
    )


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def test_results_find_their_calls() -> None:
    messages = [
        {
            "role": "assistant",
            "content": "",
            "thinking": "hm",
            "tool_calls": [call("a", x=1), call("b"), call("a", x=2)],
        },
        {"role": "tool", "tool_name": "b", "content": "of b"},
        {"role": "tool", "tool_name": "a", "content": "of a 1"},
        {"role": "tool", "content": "of a 2"},
        {"role": "assistant", "tool_calls": [{"id": "own", **call("c")}]},
        {"role": "tool", "tool_call_id": "own", "content": "of c"},
        {"role": "tool", "name": "nobody", "content": "?"},
    ]
    first, of_b, of_a1, of_a2, second, of_c, of_none = turn_of(messages=messages).messages
    assert first.tool_calls == (
        ToolCall("call_1", "a", '{"x":1}'),
        ToolCall("call_2", "b", "{}"),
        ToolCall("call_3", "a", '{"x":2}'),
    )
    assert first.thinking == "hm"
    assert [each.tool_call_id for each in (of_b, of_a1, of_a2, of_c)] == ["call_2", "call_1", "call_3", "own"]
    assert [each.name for each in (of_b, of_a1, of_a2, of_c)] == ["b", "a", "a", "c"]
    assert second.tool_calls[0].id == "own"
    assert of_none == Message("tool", "?", name="nobody")


def test_tools_and_thinking_are_asked_for() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "weather", "description": "The weather", "parameters": parameters}
    turn = turn_of(tools=[{"type": "function", "function": function}], think=True)
    [tool] = turn.tools
    assert (tool.name, tool.description, tool.parameters) == ("weather", "The weather", parameters)
    assert turn.thinking == Thinking(enabled=True)
    assert turn_of(think=False).thinking == Thinking(enabled=False)
    assert turn_of(think="low").thinking == Thinking(enabled=True, effort="low")
    assert turn_of().thinking == Thinking()


class Scripted(ParsedAnswers):
    """An answer of given pieces; it ends with an error if that is what comes last."""

    def __init__(self, pieces: Sequence[AnswerPiece | Exception]) -> None:
        self._pieces = pieces

    async def generate(self, request: Request) -> AsyncGenerator[AnswerPiece]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def replied(
    events: Sequence[Event], reason: str = "stop", cuts: Sequence[int] = (), kind: type = OllamaChatReply
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of a streamed reply, and the whole one, for events that come in pieces cut at `cuts`."""
    edges = [0, *sorted(cuts), len(events)]
    pieces = [AnswerPiece(events=events[start:end]) for start, end in pairwise(edges)]
    pieces.append(AnswerPiece(finish_reason=reason, prompt_tokens=3, completion_tokens=len(events)))
    return streamed(pieces, kind), whole(pieces, kind)


def reply_of(pieces: Sequence[AnswerPiece | Exception], kind: type) -> Any:
    job = Job(
        id="x",
        created=0,
        model="m",
        vocabulary=None,
        answers=Scripted(pieces),
        requests=[Request(id="x", prompt=(1,))],
        fingerprint="fp",
    )
    return kind(job, 0, logprobs=False)


def whole(pieces: Sequence[AnswerPiece], kind: type) -> dict[str, Any]:
    reply = reply_of(pieces, kind)
    [answer] = asyncio.run(collect(reply.job))
    return json.loads(json.dumps(reply.whole(answer)))


def streamed(pieces: Sequence[AnswerPiece | Exception], kind: type) -> list[dict[str, Any]]:
    reply, sent = reply_of(pieces, kind), bytearray()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.extend(message.get("body", b""))

    asyncio.run(EventStream(reply.job, reply, Timing())({"type": "http"}, receive, send))
    return [json.loads(line) for line in sent.splitlines()]


ROUND = [
    ThinkingDelta("I should "),
    ThinkingDelta("look."),
    TextDelta("Looking."),
    CallBegun("1", "weather"),
    ArgumentsDelta('{"city": "Chamo'),
    ArgumentsDelta('nix", "days": 2}'),
    CallBegun("2", "time"),
    CallBegun("3", "weather"),
    ArgumentsDelta('{"city": "Sion"}'),
]


@given(st.sets(st.integers(0, len(ROUND))))
def test_calls_are_whole_and_their_arguments_objects(cuts: set[int]) -> None:
    said, complete = replied(ROUND, "tool_calls", sorted(cuts))
    *said, last = said
    messages = [line["message"] for line in said]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": {"city": "Chamonix", "days": 2}},
        {"name": "time", "arguments": {}},
        {"name": "weather", "arguments": {"city": "Sion"}},
    ]
    assert "".join(message.get("thinking", "") for message in messages) == "I should look."
    assert "".join(message["content"] for message in messages) == "Looking."
    assert (last["done_reason"], last["eval_count"], last["prompt_eval_count"]) == ("stop", len(ROUND), 3)
    assert complete["message"] == {
        "role": "assistant",
        "content": "Looking.",
        "thinking": "I should look.",
        "tool_calls": calls,
    }


def test_a_call_that_the_limit_cut_off_is_left_out() -> None:
    said, complete = replied(ROUND[:5], "length")
    assert not any("tool_calls" in line["message"] for line in [*said, complete])
    assert said[-1]["done_reason"] == complete["done_reason"] == "length"


def test_generate_tells_thinking_apart() -> None:
    said, complete = replied(ROUND[:3], kind=OllamaGenerateReply)
    assert (complete["response"], complete["thinking"]) == ("Looking.", "I should look.")
    assert "".join(line.get("thinking", "") for line in said) == "I should look."


def test_an_error_is_a_line_of_its_own() -> None:
    pieces = [AnswerPiece(events=[TextDelta("x")]), AnswerPiece(events=[TextDelta("y")]), StageFailed("gone")]
    *_, last = streamed(pieces, OllamaChatReply)
    assert last == {"error": "gone"}


def test_durations_are_those_of_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 10_000, 100))
    monkeypatch.setattr(ollama_replies.time, "monotonic_ns", lambda: next(clock))
    pieces = [AnswerPiece(events=[TextDelta("x")]) for _ in range(4)]
    last = whole([*pieces, AnswerPiece(finish_reason="stop")], OllamaChatReply)
    assert (last["prompt_eval_duration"], last["eval_duration"], last["total_duration"]) == (100, 400, 600)
