"""Anthropic's messages: the shape of replies, events and errors, what is taken, what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from cordee.access.local_key import LocalKey
from cordee.api.stream import Timing
from cordee.errors import Overloaded, StageFailed
from scripted_service import ScriptedService, scripted
from serving import Reply, Running, running, user

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
ARGUMENTS = '{"place": "Chamonix"}'
CALL = f"[think]Where?[say]I look.[call weather]{ARGUMENTS}"
ASKED = {"model": "scripted", "max_tokens": 100, "messages": user("Weather?"), "tools": [WEATHER]}
HELLO = {"model": "starter", "max_tokens": 8, "messages": user("Say hello."), "temperature": 0}
ADAPTIVE = {"thinking": {"type": "adaptive"}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The events, whose names stand in them as well."""
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [each for each in reply.body.decode().split("\n\n") if not each.startswith(":")]
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def error_of(reply: Reply) -> tuple[int, str, str]:
    """Status, type and message of an error; its shape is the same for every error."""
    assert set(reply.json) == {"type", "error"}
    assert reply.json["type"] == "error"
    assert set(reply.json["error"]) == {"type", "message"}
    return reply.status, reply.json["error"]["type"], reply.json["error"]["message"]


# Shapes


def usage(prompt: int, cached: int, output: int, thinking: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
        "output_tokens_details": {"thinking_tokens": thinking},
    }


def test_an_answer_has_exactly_these_events(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL]
    start, *rest = events_of(
        server.request("POST", MESSAGES + "?beta=true", ASKED | ADAPTIVE | {"stream": True})
    )
    message = start["message"]
    assert message.pop("id").startswith("msg_")
    prompt = len(service.requests[0].prompt)
    assert start == {
        "type": "message_start",
        "message": {
            "type": "message",
            "role": "assistant",
            "model": "scripted",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(prompt, 0, 0, 0),
        },
    }
    output, thinking = (
        rest[-2]["usage"]["output_tokens"],
        rest[-2]["usage"]["output_tokens_details"]["thinking_tokens"],
    )
    assert output > thinking > 0
    begun = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}
    assert rest == [
        {"type": "ping"},
        started(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, {"type": "thinking_delta", "thinking": "Where?"}),
        delta(0, {"type": "signature_delta", "signature": "unsigned"}),
        {"type": "content_block_stop", "index": 0},
        started(1, {"type": "text", "text": ""}),
        delta(1, {"type": "text_delta", "text": "I look."}),
        {"type": "content_block_stop", "index": 1},
        started(2, begun),
        *(
            delta(2, {"type": "input_json_delta", "partial_json": piece})
            for piece in (ARGUMENTS[:7], ARGUMENTS[7:14], ARGUMENTS[14:])
        ),
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": usage(prompt, 3, output, thinking),
        },
        {"type": "message_stop"},
    ]


def started(index: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, change: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": change}


def test_a_whole_reply(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL]
    reply = server.request("POST", MESSAGES, ASKED | ADAPTIVE).json
    assert reply.pop("id").startswith("msg_")
    assert reply.pop("usage")["cache_read_input_tokens"] == 3
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [
            {"type": "thinking", "thinking": "Where?", "signature": "unsigned"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"place": "Chamonix"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
    }


@pytest.mark.parametrize(
    ("thinking", "enabled", "effort", "budget", "shown"),
    [
        (None, False, None, None, None),
        ({"type": "disabled"}, False, None, None, None),
        ({"type": "between_tools"}, False, None, None, None),
        ({"type": "adaptive"}, None, "high", None, "Where?"),
        ({"type": "enabled", "budget_tokens": 2000}, True, "high", 2000, "Where?"),
        ({"type": "adaptive", "display": "omitted"}, None, "high", None, ""),
    ],
)
def test_thinking_comes_where_it_is_asked_for(
    talk: tuple[Running, ScriptedService], thinking: Any, enabled: Any, effort: Any, budget: Any, shown: Any
) -> None:
    server, service = talk
    service.script = [CALL, CALL]
    asked = ASKED | {"thinking": thinking, "output_config": {"effort": "max"}}
    content = server.request("POST", MESSAGES, asked).json["content"]
    assert [each["thinking"] for each in content if each["type"] == "thinking"] == (
        [] if shown is None else [shown]
    )
    events = events_of(server.request("POST", MESSAGES, asked | {"stream": True}))
    thought = [
        event["delta"]["thinking"]
        for event in events
        if event.get("delta", {}).get("type") == "thinking_delta"
    ]
    assert "".join(thought) == (shown or "")
    kinds = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert kinds == [each["type"] for each in content]
    turn = service.turns[0]
    assert (turn.thinking.enabled, turn.thinking.effort, turn.thinking.tokens_max) == (
        enabled,
        effort,
        budget,
    )


def test_whole_and_streamed_are_the_same(server: Running) -> None:
    whole = server.request("POST", MESSAGES, HELLO).json
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 8)
    events = events_of(server.request("POST", MESSAGES, HELLO | {"stream": True}))
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert len(texts) > 1
    assert [{"type": "text", "text": "".join(texts)}] == whole["content"]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_the_stop_sequence_that_ended_an_answer_is_named(server: Running) -> None:
    counting = HELLO | {"messages": user("Count: 1, 2, 3, 4"), "max_tokens": 16}
    text = server.request("POST", MESSAGES, counting).json["content"][0]["text"]
    stop = text[5:8]
    reply = server.request("POST", MESSAGES, counting | {"stop_sequences": ["nowhere", stop]}).json
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", stop)
    assert "".join(each["text"] for each in reply["content"]) == text.partition(stop)[0]
    other = server.request("POST", MESSAGES, counting | {"stop_sequences": ["nowhere"]}).json
    assert (other["stop_reason"], other["stop_sequence"]) == ("max_tokens", None)


def test_a_call_that_was_cut_off_is_not_offered_whole(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL]
    reply = server.request("POST", MESSAGES, ASKED | {"max_tokens": 7}).json
    assert reply["stop_reason"] == "max_tokens"
    assert [each["type"] for each in reply["content"]] == ["text"]


def test_a_failure_is_the_last_event(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [("I look.[call", StageFailed("the stage is gone"))]
    events = events_of(server.request("POST", MESSAGES, ASKED | {"stream": True}))
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "the stage is gone"}}


def test_a_silent_stream_is_kept_alive_by_pings(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the model thinks and nobody has asked to see that."""
    timing = Timing(keep_alive_seconds=0.05, accept_seconds=0.01)
    with scripted(starter_path, tmp_path, monkeypatch, timing=timing) as (server, service):
        service.script, service.pause_seconds = ["[think]word" + "[think]word" * 20 + "[say]So."], 0.02
        events = events_of(server.request("POST", MESSAGES, ASKED | {"stream": True}))
    kinds = [event["type"] for event in events]
    assert kinds.count("ping") > 2
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


# Requests


CONVERSATION = {
    "model": "scripted",
    "max_tokens": 100,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1;"},
        {"type": "text", "text": "You are a guide.", **CACHED},
        {"type": "text", "text": "Be brief."},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", **CACHED}]},
        {"role": "system", "content": "There are two tools."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Where?", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "é"}},
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "So?"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "cold", **CACHED},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "place"}],
                },
                {
                    "type": "document",
                    "title": "Report",
                    "source": {"type": "text", "media_type": "text/plain", "data": "snow"},
                },
            ],
        },
    ],
    "tools": [WEATHER, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    "top_k": 5,
    "top_p": 0.9,
    "metadata": {"user_id": "x"},
    "context_management": {"edits": []},
    "mcp_servers": [{"type": "url", "url": "https://example.org", "name": "x"}],
    "some_new_field": [1],
}


def test_a_conversation_of_blocks_becomes_turns(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = ["It is cold."]
    reply = server.request("POST", MESSAGES, CONVERSATION)
    assert reply.status == 200, reply.body
    unknown = ["some_new_field", "tools.max_uses"]
    names = [*unknown, "mcp_servers", "tools.web_search_20250305", "messages.content.server_tool_use"]
    assert reply.headers["x-cordee-ignored"] == ", ".join(names)
    [turn] = service.turns
    system, question, called, *results, last = turn.messages
    assert (system.role, system.content) == ("system", "You are a guide.\n\nBe brief.")
    assert (question.role, question.content) == (
        "user",
        "Weather?\n\n<system-reminder>\nThere are two tools.\n</system-reminder>",
    )
    assert (called.role, called.content, called.thinking) == ("assistant", "I look.", "Where?")
    assert [(call.id, call.name, json.loads(call.arguments)) for call in called.tool_calls] == [
        ("toolu_1", "weather", {"place": "é"}),
        ("toolu_2", "weather", {}),
    ]
    assert [(each.role, each.tool_call_id, each.content) for each in results] == [
        ("tool", "toolu_1", "cold"),
        ("tool", "toolu_2", "Error: no\nplace"),
    ]
    assert (last.role, last.content) == ("user", "So?\n\nReport\n\nsnow")
    assert [(tool.name, tool.parameters) for tool in turn.tools] == [("weather", WEATHER["input_schema"])]
    assert (turn.tool_choice.mode, turn.tool_choice.tool) == ("required", "weather")
    assert (turn.parallel_tool_calls, turn.continues) == (False, False)
    sampling = service.requests[0].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (5, 0.9, 1.0)


@pytest.mark.parametrize(("given", "mode"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_choices_of_tools(talk: tuple[Running, ScriptedService], given: str, mode: str) -> None:
    server, service = talk
    service.script = ["x"]
    assert server.request("POST", MESSAGES, ASKED | {"tool_choice": {"type": given}}).status == 200
    [turn] = service.turns
    assert (turn.tool_choice.mode, turn.tool_choice.tool) == (mode, None)
    assert turn.parallel_tool_calls is True


def test_an_answer_that_the_client_began_goes_on(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = ["x"]
    begun = [*user("Capital of France?"), {"role": "assistant", "content": "It is"}]
    assert server.request("POST", MESSAGES, ASKED | {"messages": begun}).status == 200
    [turn] = service.turns
    assert turn.continues is True


def test_text_follows_a_schema(server: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "schema": schema | {"additionalProperties": False}}
    for place in ({"output_config": {"format": form}}, {"output_format": form}):
        reply = server.request("POST", MESSAGES, HELLO | {"max_tokens": 16} | place).json
        assert reply["content"][0]["text"].lstrip().startswith("{")
        if reply["stop_reason"] == "end_turn":
            assert set(json.loads(reply["content"][0]["text"])) == {"n"}


def test_tokens_are_counted_as_the_prompt_has_them(server: Running) -> None:
    asked = {key: HELLO[key] for key in ("model", "messages")} | {"system": "Be brief.", "tools": [WEATHER]}
    counted = server.request("POST", COUNT + "?beta=true", asked)
    assert counted.status == 200, counted.body
    sent = server.request("POST", MESSAGES, asked | {"max_tokens": 1}).json["usage"]
    assert counted.json == {"input_tokens": sent["input_tokens"] + sent["cache_read_input_tokens"]}
    # more than the context holds, though not by its bytes alone: the number says so
    long = server.request("POST", COUNT, asked | {"messages": user("a b " * 400)})
    assert long.json["input_tokens"] > 512


def test_head_of_the_root_says_that_somebody_is_there(server: Running) -> None:
    reply = server.request("HEAD", "/")
    assert (reply.status, reply.body) == (200, b"")


# Errors


def content(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": user(list(blocks))}


def said(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*user("x"), {"role": role, "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "x"}
NOT_FOUND, INVALID = (404, "not_found_error"), (400, "invalid_request_error")
REFUSALS = [
    ({"max_tokens": None}, INVALID, "max_tokens"),
    ({"max_tokens": 0}, INVALID, "max_tokens"),
    ({"messages": []}, INVALID, "messages"),
    ({"messages": [{"role": "critic", "content": "x"}]}, INVALID, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, INVALID, "messages[0].content"),
    (content(IMAGE), INVALID, "messages[0].content[0]: a block of type 'image' cannot be used"),
    (
        content(RESULT | {"content": [IMAGE]}),
        INVALID,
        "messages[0].content[0].content[0]: a block of type 'image'",
    ),
    (content({"type": "tool_result"}), INVALID, "messages[0].content[0].tool_use_id is missing"),
    (content({"type": "text"}), INVALID, "messages[0].content[0].text is missing"),
    (content({"type": "document", "source": {"type": "url", "url": "x"}}), INVALID, "document of type 'url'"),
    (content({"type": "document"}), INVALID, "messages[0].content[0].source"),
    (said("assistant", {"type": "tool_use", "id": "x"}), INVALID, "messages[1].content[0].name is missing"),
    ({"system": [IMAGE]}, INVALID, "system[0]: a block of type 'image'"),
    ({"temperature": 3}, INVALID, "temperature"),
    ({"top_k": -5}, INVALID, "top_k"),
    ({"stop_sequences": [""]}, INVALID, "a stop string must have"),
    ({"thinking": {"type": "deep"}}, INVALID, "thinking.type"),
    (ADAPTIVE | {"output_config": {"effort": "utmost"}}, INVALID, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, INVALID, "output_config.format"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "wrong"}}}},
        INVALID,
        "the JSON schema cannot be used",
    ),
    ({"system": [{"type": "text"}]}, INVALID, "system[0].text is missing"),
    ({"tool_choice": {"type": "any"}}, INVALID, "no tool is given"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, INVALID, "names x"),
    ({"tools": [WEATHER], "tool_choice": {"type": "perhaps"}}, INVALID, "tool_choice.type"),
    ({"tools": [WEATHER, WEATHER]}, INVALID, "two tools of tools are called weather"),
    ({"messages": user("word " * 600)}, INVALID, "the prompt has"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "expected", "words"), REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, change: dict[str, Any], expected: tuple[int, str], words: str, stream: bool
) -> None:
    status, kind, message = error_of(server.request("POST", MESSAGES, HELLO | {"stream": stream} | change))
    assert (status, kind) == expected, message
    assert words in message


def test_errors_have_anthropics_names(
    talk: tuple[Running, ScriptedService], starter_path: Path, tmp_path: Path, home: Path
) -> None:
    server, service = talk
    service.script = [("", Overloaded("full")), ("", StageFailed("gone")), ("", ValueError("secret"))]
    found = [error_of(server.request("POST", MESSAGES, ASKED)) for _ in range(3)]
    assert found[:2] == [(503, "overloaded_error", "full"), (503, "api_error", "gone")]
    assert found[2][:2] == (500, "api_error")
    assert "secret" not in found[2][2]
    plain = server.request("POST", MESSAGES, b"{}", {"Content-Type": "text/plain"})
    assert error_of(plain)[:2] == (415, "invalid_request_error")
    foreign = server.request("POST", MESSAGES, ASKED, {"Origin": "https://example.org"})
    assert error_of(foreign)[:2] == (403, "permission_error")
    large = server.request(
        "POST", MESSAGES, b"x", {"Content-Type": "application/json", "Content-Length": "99999999"}
    )
    assert error_of(large)[:2] == (413, "request_too_large")
    with running(None, tmp_path / "keyed", key=LocalKey.made()) as keyed:
        assert error_of(keyed.request("POST", MESSAGES, ASKED))[:2] == (401, "authentication_error")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", MESSAGES, 405), ("POST", MESSAGES + "/batches", 404)]
)
def test_what_is_not_offered_is_said_in_anthropics_words(
    server: Running, method: str, path: str, status: int
) -> None:
    found = error_of(server.request(method, path, None if method == "GET" else {}))
    assert found[0] == status
