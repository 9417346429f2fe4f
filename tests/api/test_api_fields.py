"""Fields that clients send: aliases that have their effect, and what has none and is named in the reply."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cordee.api import ignored
from cordee.api.ignored import HEADER, NAME_CHARS_MAX, NAMES_MAX, OBJECTS_MAX, unknown_fields
from cordee.api.schemas import ChatRequest
from cordee.endpoints.ollama_schemas import OllamaChatRequest
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, Reply, Running, running, user

CONTEXT = 96


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    with running(
        starter_path, tmp_path_factory.mktemp("store"), config=ServiceConfig(context=CONTEXT)
    ) as started:
        yield started


def asked(server: Running, path: str = CHAT, **fields: Any) -> Reply:
    body = {**(HELLO if path == CHAT else FRANCE), "max_tokens": 4, **fields}
    reply = server.request("POST", path, body)
    assert reply.status == 200, reply.body
    return reply


def text(reply: Reply) -> str:
    [choice] = reply.json["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def names(reply: Reply) -> list[str]:
    given = reply.headers.get(HEADER)
    return given.split(", ") if given else []


SAID = {"role": "assistant", "content": "x"}
PART = {"type": "text", "text": "x"}

# What popular clients add to a request (docs/clients.md has their names), and what of it the reply names.
SENT = [
    ({"repetition_penalty": 1.1}, []),
    ({"repeat_penalty": 1.1, "repeat_last_n": 64}, []),
    ({"repeat_last_n": -1}, []),
    ({"penalty_last_n": 0}, []),
    ({"top_k": -1}, []),
    ({"top_k": 40.0}, []),
    ({"max_tokens": 4.0}, []),
    ({"max_tokens": 3, "n_predict": -1}, []),
    ({"max_completion_tokens": 4.0}, []),
    ({"seed": 1.0}, []),
    ({"stop": ""}, []),
    ({"stop": ["", "never"]}, []),
    ({"stop": [str(number) for number in range(14)]}, []),
    ({"min_p": 0.05, "typical_p": 0.9, "top_n_sigma": -1}, []),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.1, "temperature": 1}, []),
    ({"dynatemp_range": 0.3, "dynatemp_exponent": 1, "temperature": 1}, []),
    ({"min_tokens": 2}, []),
    ({"ignore_eos": False}, []),
    ({"mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1}, []),
    ({"mirostat": 2, "mirostat_tau": 5, "mirostat_eta": 0.1}, ["mirostat"]),
    ({"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2}, []),
    ({"dry_multiplier": 0, "dry_sequence_breakers": ["\n"], "dry_penalty_last_n": -1}, []),
    ({"samplers": ["top_k", "temperature"]}, ["samplers"]),
    ({"num_ctx": 8192}, ["num_ctx"]),
    ({"keep_alive": "5m"}, ["keep_alive"]),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, []),
    ({"provider": {"order": ["x"]}, "transforms": [], "route": None}, ["provider", "transforms", "route"]),
    ({"cache_prompt": True, "id_slot": -1}, ["cache_prompt", "id_slot"]),
    ({"timings_per_token": True, "return_progress": True}, ["timings_per_token", "return_progress"]),
    ({"skip_special_tokens": True, "spaces_between_special_tokens": False}, None),
    ({"length_penalty": 1.0, "use_beam_search": False, "top_a": 0}, None),
    ({"guided_json": None, "guided_regex": None}, ["guided_json", "guided_regex"]),
    ({"user": "x", "store": False, "metadata": {}, "service_tier": "auto"}, []),
    ({"store": True}, ["store"]),
    ({"verbosity": "low"}, ["verbosity"]),
    ({"prediction": {"type": "content", "content": "x"}}, []),
    ({"safety_identifier": "x", "prompt_cache_key": "y"}, []),
    ({"messages": [{**SAID, "id": "x", "timestamp": 1, "annotations": []}, *user("x")]}, None),
    (
        {"messages": [{**SAID, "provider_specific_fields": {"a": 1}}, *user("x")]},
        ["messages.provider_specific_fields"],
    ),
    ({"messages": [{**user("x")[0], "name": "Zoë Müller (IT)"}]}, []),
    ({"messages": [{**user("x")[0], "name": ""}]}, []),
    ({"messages": user([{**PART, "cache_control": {"type": "ephemeral"}}])}, []),
    ({"messages": user([{**PART, "annotations": None}])}, ["messages.content.annotations"]),
    ({"response_format": {"type": "text"}}, []),
    ({"response_format": {"type": "json_object", "schema": {"type": "integer"}}}, []),
    ({"model": "gpt-4o-mini"}, ["model"]),
    ({"model": None}, []),
    ({"model": "starter:latest"}, []),
]


@pytest.mark.parametrize(("fields", "expected"), SENT, ids=lambda value: json.dumps(value)[:60])
def test_what_clients_add_is_no_error(server: Running, fields: dict, expected: list[str] | None) -> None:
    reply = asked(server, **({"max_tokens": 1} | fields))
    if expected is not None:
        assert names(reply) == expected
    if fields.get("model"):
        assert reply.json["model"] == "starter"


def test_the_stream_and_completions_name_them_too(server: Running) -> None:
    streamed = asked(server, stream=True, zork=1, stream_options={"include_usage": True, "sometimes": 1})
    assert sorted(names(streamed)) == ["stream_options.sometimes", "zork"]
    assert streamed.events[-1] == "[DONE]"
    assert names(asked(server, COMPLETIONS, zork=1)) == ["zork"]
    refused = server.request("POST", CHAT, {**HELLO, "zork": 1, "temperature": 9})
    assert (refused.status, names(refused)) == (400, ["zork"])


def test_the_model_may_be_left_out_where_there_is_one(server: Running) -> None:
    body = {name: value for name, value in HELLO.items() if name != "model"} | {"max_tokens": 1}
    assert server.request("POST", CHAT, body).json["model"] == "starter"
    server.services["other"] = server.service
    try:
        for given, status in (({}, 400), ({"model": "nosuch"}, 404), ({"model": "starter:latest"}, 200)):
            reply = server.request("POST", CHAT, body | given)
            assert reply.status == status
            if status != 200:
                assert reply.error["param"] == "model" and "other, starter" in reply.error["message"]
    finally:
        del server.services["other"]


def test_aliases_have_their_effect(server: Running) -> None:
    plain = text(asked(server, max_tokens=8))
    penalised = text(asked(server, max_tokens=8, repetition_penalty=5))
    assert penalised == text(asked(server, max_tokens=8, repeat_penalty=5)) != plain
    assert text(asked(server, max_tokens=8, repeat_penalty=5, repeat_last_n=0)) == plain
    hot = {"temperature": 2, "seed": 3, "max_tokens": 6}
    drawn = text(asked(server, **hot))
    assert text(asked(server, **hot, top_k=-1)) == drawn != text(asked(server, **hot, top_k=1))
    assert asked(server, max_tokens=None, n_predict=3).json["usage"]["completion_tokens"] == 3
    assert asked(server, COMPLETIONS, max_tokens=None, n_predict=3).json["usage"]["completion_tokens"] == 3


def test_less_than_no_tokens_is_no_limit(server: Running) -> None:
    unlimited = asked(server, max_tokens=-1, ignore_eos=True, messages=user("word " * 50)).json
    assert unlimited["usage"]["total_tokens"] == CONTEXT
    completed = asked(server, COMPLETIONS, max_tokens=-1, ignore_eos=True, prompt="word " * 75).json
    assert completed["usage"]["total_tokens"] == CONTEXT


def test_the_end_comes_no_sooner_than_asked_for(server: Running) -> None:
    ends = {str(token): 100 for token in server.service.vocabulary.end_of_generation}
    at_once = asked(server, max_tokens=20, logit_bias=ends).json
    later = asked(server, max_tokens=20, logit_bias=ends, min_tokens=7).json
    never = asked(server, max_tokens=20, logit_bias=ends, ignore_eos=True).json
    assert [each["usage"]["completion_tokens"] for each in (at_once, later, never)] == [0, 7, 20]
    schema = {"response_format": {"type": "json_object", "schema": {"const": 7}}}
    assert text(asked(server, max_tokens=20, ignore_eos=True, **schema)) == "7", "a grammar ends it"


OK = {
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9, "minimum": 1}},
    "required": ["ok", "n"],
}


@pytest.mark.parametrize(
    "binding",
    [
        {"response_format": {"type": "json_object", "schema": OK}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": OK}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": OK, "strict": True},
            }
        },
        {"json_schema": OK},
    ],
)
def test_a_schema_binds_in_all_its_places_without_waste(server: Running, binding: dict) -> None:
    reply = asked(server, max_tokens=200, **binding)
    assert set(json.loads(text(reply))) == {"ok", "n"}
    assert reply.json["usage"]["completion_tokens"] <= 13 and names(reply) == []


def test_what_a_schema_cannot_bind_is_named(server: Running) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}
    reply = asked(server, max_tokens=20, response_format={"type": "json_object", "schema": schema})
    assert names(reply) == ["response_format.uniqueItems"]
    assert names(asked(server, max_tokens=20, json_schema=schema)) == ["json_schema.uniqueItems"]
    assert isinstance(json.loads(text(reply)), list)


def test_usage_in_every_chunk_where_it_is_asked_for(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _ = asked(server, stream=True, n=2, stream_options=options).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 8 and len(set(counts)) > 4
    assert events[-1]["usage"]["prompt_tokens"] == events[-2]["usage"]["prompt_tokens"]


# Names in the header and the log


def test_the_header_is_bounded_and_plain(server: Running) -> None:
    strange = {"é\r\nx-evil: 1": 1, "a, b": 2, "z" * 500: 3, "": 4}
    given = names(asked(server, **strange))
    assert given == ["???x-evil??1", "a??b", "z" * NAME_CHARS_MAX, "?"]
    many = asked(server, **{f"f{number}": 1 for number in range(1000)})
    assert names(many) == [f"f{number}" for number in range(NAMES_MAX)]


def test_a_name_is_logged_once_and_never_a_value(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ignored, "_logged", set())
    with caplog.at_level(logging.INFO, "cordee"):
        for _ in range(3):
            asked(server, blorb="a secret")
    said = [each.getMessage() for each in caplog.records if "blorb" in each.getMessage()]
    assert len(said) == 1
    assert "secret" not in caplog.text


def test_unknown_fields_are_found_at_every_level() -> None:
    chat = {
        "messages": [
            {"role": "user", "mood": 1, "content": [{"type": "text", "text": "x", "colour": 1}]},
            {"role": "user", "mood": 1, "content": "x"},
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"free": 1}, "odd": 1},
            "even": 1,
        },
        "logit_bias": {"7": 1},
        "a": {"b": {"c": 1}},
        "mirostat": 1,
    }
    found = unknown_fields(json.dumps(chat).encode(), ChatRequest)
    assert sorted(found) == [
        "a",
        "messages.content.colour",
        "messages.mood",
        "mirostat",
        "response_format.even",
        "response_format.json_schema.odd",
    ]
    ollama = {
        "options": {"x": 1},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"y": 1}, "z": 1}}],
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"w": 1}}, "v": 1}]}
        ],
        "format": {"u": 1},
    }
    found = unknown_fields(json.dumps(ollama).encode(), OllamaChatRequest)
    assert sorted(found) == ["messages.tool_calls.v", "options.x", "tools.function.z"]


def test_a_body_of_very_many_objects_is_looked_at_in_part() -> None:
    """What is not looked at is ignored like the rest; a million parts must not hold up other answers."""
    parts = b",".join([b'{"type":"text"}'] * (OBJECTS_MAX + 10) + [b'{"type":"text","late":1}'])
    body = b'{"messages":[{"role":"user","content":[' + parts + b"]}]}"
    assert unknown_fields(body, ChatRequest) == []


def test_dry_breaks_at_the_texts_that_are_given(server: Running) -> None:
    """A model that would say it again does not, unless a break stands in each repetition."""
    [again] = server.service.vocabulary.tokenize(" blue", add_bos=False)
    saying = {
        "prompt": "red blue, red blue, red blue, red blue, red",
        "max_tokens": 1,
        "logit_bias": {str(again): 40},
    }
    assert text(asked(server, COMPLETIONS, **saying)) == " blue"
    dry = {"dry_multiplier": 9, "dry_allowed_length": 2}
    assert text(asked(server, COMPLETIONS, **saying, **dry)) != " blue"
    broken = {**dry, "dry_sequence_breakers": [","]}
    assert text(asked(server, COMPLETIONS, **saying, **broken)) == " blue"
