"""`POST /v1/responses`: the shape of its replies and events, what it takes, and what it refuses by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from cordee.api.stream import Timing
from cordee.errors import StageFailed
from scripted_service import ScriptedService, scripted
from serving import Reply, Running

RESPONSES = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = '[think]Where?[say]I look.[call weather]{"place": "Chamonix"}'
ASKED = {"model": "scripted", "input": "Weather?", "tools": [WEATHER]}
FRANCE = {"model": "starter", "input": "Say hello.", "temperature": 0, "max_output_tokens": 8}


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The events, whose names stand in them as well; their numbers rise, and are left out."""
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [each for each in reply.body.decode().split("\n\n") if not each.startswith(":")]
    assert blocks.pop() == ""
    events = []
    for block in (block for block in blocks if not block.startswith(":")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    return events


def without_ids(value: Any, key: str) -> Any:
    """A value in which the job's random number is no part of ids."""
    return json.loads(json.dumps(value).replace(key, "ID"))


# Shapes

THOUGHT = {"type": "reasoning_text", "text": "Where?"}
SAID = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
NO_TEXT = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
ARGUMENTS = '{"place": "Chamonix"}'
CALLED = {"type": "function_call", "call_id": "call_1", "name": "weather"}
OUTPUT = [
    {"id": "rs_ID_0", "status": "completed", "type": "reasoning", "summary": [], "content": [THOUGHT]},
    {"id": "msg_ID_1", "status": "completed", "type": "message", "role": "assistant", "content": [SAID]},
    {"id": "fc_ID_2", "status": "completed", **CALLED, "arguments": ARGUMENTS},
]


def begun(item: dict[str, Any]) -> dict[str, Any]:
    empty = {"content": []} if "content" in item else {"arguments": ""}
    return item | {"status": "in_progress"} | empty


def test_an_answer_has_exactly_these_events(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL]
    events = events_of(server.request("POST", RESPONSES, ASKED | {"stream": True}))
    key = events[0]["response"]["id"].removeprefix("resp_")
    created, in_progress, *middle, completed = without_ids(events, key)
    assert created == {"type": "response.created", "response": in_progress["response"]}
    assert in_progress["type"] == "response.in_progress"
    assert in_progress["response"] | {"status": "completed", "output": OUTPUT, "usage": None} == (
        completed["response"] | {"usage": None}
    )
    assert (completed["type"], completed["response"]["status"]) == ("response.completed", "completed")
    thinking, text, call = (
        {"item_id": item["id"], "output_index": place} | ({} if place == 2 else {"content_index": 0})
        for place, item in enumerate(OUTPUT)
    )
    said = text | {"logprobs": []}
    assert middle == [
        {"type": "response.output_item.added", "output_index": 0, "item": begun(OUTPUT[0])},
        {"type": "response.content_part.added", **thinking, "part": THOUGHT | {"text": ""}},
        {"type": "response.reasoning_text.delta", **thinking, "delta": "Where?"},
        {"type": "response.reasoning_text.done", **thinking, "text": "Where?"},
        {"type": "response.content_part.done", **thinking, "part": THOUGHT},
        {"type": "response.output_item.done", "output_index": 0, "item": OUTPUT[0]},
        {"type": "response.output_item.added", "output_index": 1, "item": begun(OUTPUT[1])},
        {"type": "response.content_part.added", **text, "part": NO_TEXT},
        {"type": "response.output_text.delta", **said, "delta": "I look."},
        {"type": "response.output_text.done", **said, "text": "I look."},
        {"type": "response.content_part.done", **text, "part": SAID},
        {"type": "response.output_item.done", "output_index": 1, "item": OUTPUT[1]},
        {"type": "response.output_item.added", "output_index": 2, "item": begun(OUTPUT[2])},
        *(
            {"type": "response.function_call_arguments.delta", **call, "delta": piece}
            for piece in (ARGUMENTS[:7], ARGUMENTS[7:14], ARGUMENTS[14:])
        ),
        {"type": "response.function_call_arguments.done", **call, "arguments": ARGUMENTS, "name": "weather"},
        {"type": "response.output_item.done", "output_index": 2, "item": OUTPUT[2]},
    ]


def test_a_whole_reply_is_the_last_events_response(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL, CALL]
    asked = ASKED | {"metadata": {"a": "b"}, "instructions": "Be brief.", "temperature": 0.5}
    whole = server.request("POST", RESPONSES, asked)
    assert whole.status == 200, whole.body
    last = events_of(server.request("POST", RESPONSES, asked | {"stream": True}))[-1]["response"]
    keys = [each["id"].removeprefix("resp_") for each in (whole.json, last)]
    timeless = {"created_at": 0}
    assert without_ids(whole.json, keys[0]) | timeless == without_ids(last, keys[1]) | timeless
    reply = without_ids(whole.json, keys[0])
    assert reply["output"] == OUTPUT
    usage = reply.pop("usage")
    assert usage["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 0}
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert reply | {"created_at": 0, "output": []} == {
        "id": "resp_ID",
        "object": "response",
        "created_at": 0,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "Be brief.",
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "model": "scripted",
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [WEATHER | {"strict": True}],
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }


def test_items_stand_in_the_order_in_which_they_came(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [f"{CALL}[say]And now[call weather]{{}}"] * 2
    whole = server.request("POST", RESPONSES, ASKED).json
    streamed = events_of(server.request("POST", RESPONSES, ASKED | {"stream": True}))[-1]["response"]
    kinds = ["reasoning", "message", "function_call", "message", "function_call"]
    assert (
        [each["type"] for each in whole["output"]] == [each["type"] for each in streamed["output"]] == kinds
    )


def test_an_answer_that_the_limit_cuts_off_is_incomplete(server: Running) -> None:
    reply = server.request("POST", RESPONSES, FRANCE).json
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    [item] = reply["output"]
    assert item["status"] == "incomplete"
    assert reply["usage"]["output_tokens"] == 8
    events = events_of(server.request("POST", RESPONSES, FRANCE | {"stream": True}))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["content"] == item["content"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == item["content"][0]["text"]


def test_a_failure_is_the_last_event(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [("I look.[call", StageFailed("the stage is gone"))]
    events = events_of(server.request("POST", RESPONSES, ASKED | {"stream": True}))
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "the stage is gone"}


def test_a_stream_is_kept_alive(starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(keep_alive_seconds=0.01, accept_seconds=0.01)
    with scripted(starter_path, tmp_path, monkeypatch, timing=timing) as (server, service):
        service.script, service.pause_seconds = ["I look."], 0.3
        reply = server.request("POST", RESPONSES, ASKED | {"stream": True})
    assert b"\n\n: keep-alive\n\n" in reply.body
    assert events_of(reply)[-1]["type"] == "response.completed"


# Requests


CONVERSATION = {
    "model": "scripted",
    "instructions": "Be brief.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "In verse."}],
        },
        {"role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [THOUGHT],
            "encrypted_content": None,
        },
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [SAID]},
        {"id": "fc_1", "status": "completed", **CALLED, "arguments": ARGUMENTS},
        {"type": "function_call", "call_id": "call_2", "name": "weather", "arguments": "{}"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "function_call_output", "call_id": "call_1", "output": "cold"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ],
    "tools": [WEATHER, {"type": "namespace", "name": "n", "tools": []}, {"type": "custom", "name": "c"}],
    "tool_choice": {"type": "function", "name": "weather"},
    "parallel_tool_calls": False,
    "reasoning": {"effort": "xhigh", "summary": "auto"},
    "store": True,
    "some_new_field": [1],
}


def test_a_conversation_of_items_becomes_turns(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = ["It is cold."]
    reply = server.request("POST", RESPONSES, CONVERSATION)
    assert reply.status == 200, reply.body
    left_out = ["tools.namespace", "tools.custom", "input.web_search_call"]
    names = ["some_new_field", "tools.tools", "store", *left_out]
    assert reply.headers["x-cordee-ignored"] == ", ".join(names)
    assert reply.json["store"] is False
    [turn] = service.turns
    system, question, called, *results, last = turn.messages
    assert (system.role, system.content) == ("system", "Be brief.\n\nIn verse.")
    assert (question.role, question.content) == ("user", "Weather?")
    assert (called.role, called.content, called.thinking) == ("assistant", "I look.", "Where?")
    assert [(call.id, call.name, call.arguments) for call in called.tool_calls] == [
        ("call_1", "weather", ARGUMENTS),
        ("call_2", "weather", "{}"),
    ]
    assert [(each.role, each.tool_call_id, each.content) for each in results] == [
        ("tool", "call_1", "cold"),
        ("tool", "call_2", "a\nb"),
    ]
    assert (last.role, last.content) == ("user", "So?")
    assert [(tool.name, tool.parameters) for tool in turn.tools] == [("weather", WEATHER["parameters"])]
    assert (turn.tool_choice.mode, turn.tool_choice.tool) == ("required", "weather")
    assert turn.parallel_tool_calls is False
    assert (turn.thinking.enabled, turn.thinking.effort) == (None, "high")


@pytest.mark.parametrize(
    ("choice", "mode", "tool", "names"),
    [
        ("none", "none", None, ["weather", "other"]),
        ("required", "required", None, ["weather", "other"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
            "required",
            None,
            ["other"],
        ),
    ],
)
def test_choices_of_tools(
    talk: tuple[Running, ScriptedService], choice: Any, mode: str, tool: str | None, names: list[str]
) -> None:
    server, service = talk
    service.script = ["x"]
    asked = ASKED | {"tools": [WEATHER, WEATHER | {"name": "other"}], "tool_choice": choice}
    reply = server.request("POST", RESPONSES, asked)
    assert reply.status == 200, reply.body
    assert reply.json["tool_choice"] == choice
    [turn] = service.turns
    assert (turn.tool_choice.mode, turn.tool_choice.tool) == (mode, tool)
    assert [each.name for each in turn.tools] == names


@pytest.mark.parametrize("given", ["", []])
def test_a_warm_up_says_nothing_and_gets_a_token(server: Running, given: Any) -> None:
    for stream in (False, True):
        asked = {"model": "starter", "input": given, "max_output_tokens": 1, "stream": stream}
        reply = server.request("POST", RESPONSES, asked)
        found = events_of(reply)[-1]["response"] if stream else reply.json
        assert found["usage"]["output_tokens"] == 1
        assert [item["type"] for item in found["output"]] == ["message"]


def test_text_follows_a_schema(server: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "number", "schema": schema | {"additionalProperties": False}}
    asked = {"model": "starter", "input": "A number?", "text": {"format": form}, "max_output_tokens": 30}
    reply = server.request("POST", RESPONSES, asked | {"temperature": 0}).json
    assert reply["text"] == {"format": form}
    if reply["status"] == "completed":
        assert set(json.loads(reply["output"][0]["content"][0]["text"])) == {"n"}
    loose = server.request("POST", RESPONSES, asked | {"text": {"format": {"type": "json_object"}}}).json
    assert loose["output"][0]["content"][0]["text"].lstrip().startswith("{")


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


REFUSALS = [
    ({"model": None}, 400, "model"),
    ({"input": 3}, 400, "input"),
    ({"input": [3]}, 400, "input[0]"),
    (item(role="user"), 400, "input[0].content"),
    (item(content="x"), 400, "input[0].role"),
    (item(role="critic", content="x"), 400, "input[0].role"),
    (item(role="user", content=[{"type": "input_image", "image_url": "x"}]), 400, "input[0].content[0].type"),
    (item(role="user", content=[{"type": "input_text"}]), 400, "input[0].content[0].text"),
    (item(type="function_call", name="x", arguments="{}"), 400, "input[0].call_id"),
    (item(type="function_call_output", call_id="x", output={}), 400, "input[0].output"),
    (item(type="item_reference", id="msg_1"), 400, "input[0]"),
    ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ({"conversation": "conv_1"}, 400, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, 400, "prompt"),
    ({"background": True}, 400, "background"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, 400, "include"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"reasoning": {"effort": "utmost"}}, 400, "reasoning.effort"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wrong"}}}},
        400,
        "text.format",
    ),
    ({"tool_choice": "perhaps"}, 400, "tool_choice"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, 400, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, 400, "tools"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"input": "word " * 600}, 400, "input"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "param"), REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, change: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    reply = server.request("POST", RESPONSES, FRANCE | {"stream": stream} | change)
    assert (reply.status, reply.error["param"]) == (status, param), reply.error


def test_whoever_needs_a_store_is_told_that_there_is_none(server: Running) -> None:
    for name in ("previous_response_id", "conversation"):
        reply = server.request("POST", RESPONSES, FRANCE | {name: "x"})
        assert "nothing is stored here: send the whole conversation" in reply.error["message"]
