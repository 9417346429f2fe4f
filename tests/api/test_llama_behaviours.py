"""Behaviours of llama.cpp's own server that its clients count on, and docs/llama-server.md, which lists them.

The page says of each whether it is the same here, and which test shows it: one of this file, or another."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from serving import CHAT, COMPLETIONS, FRANCE, HELLO, Running, user

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "llama-server.md"
BEHAVIOURS = 60  # at least
ROW = re.compile(
    r"^\| (?P<what>.+?) \| (?P<here>same|different: .+?) \| `(?P<test>\w+)\.(?P<name>test_\w+)` \|$"
)
UNOFFERED = re.compile(r"^\| `(?P<method>GET|POST) (?P<path>/\S*)` \| (?P<why>.+) \|$")
FIELD = re.compile(r"^\| `(?P<field>\w+)` \| (?P<why>.+) \|$")


def section(heading: str) -> list[str]:
    """The rows of the table under a heading."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found
    rows = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return rows[2:]


# The page


def test_every_behaviour_is_listed_once_with_a_test_that_exists() -> None:
    rows = section("Behaviours")
    found = [match for row in rows if (match := ROW.match(row))]
    assert len(found) == len(rows), [row for row in rows if not ROW.match(row)]
    assert len({each["what"] for each in found}) == len(found) >= BEHAVIOURS
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for each in found:
        tree = ast.parse(files[each["test"]].read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert each["name"] in names, each["what"]


def test_what_is_not_offered_is_refused(server: Running) -> None:
    rows = section("Not offered")
    found = [match for row in rows if (match := UNOFFERED.match(row))]
    assert len(found) == len(rows) > 15
    for each in found:
        reply = server.request(each["method"], each["path"], {} if each["method"] == "POST" else None)
        assert reply.status in (404, 405), each["path"]
        assert reply.json["error"]


@pytest.mark.slow
def test_fields_without_effect_are_named_in_the_reply(server: Running) -> None:
    rows = section("Fields without effect")
    found = [match["field"] for row in rows if (match := FIELD.match(row))]
    assert len(found) == len(rows) > 10
    for field in found:
        reply = server.request("POST", COMPLETIONS, FRANCE | {"max_tokens": 1, field: 1})
        assert reply.status == 200
        assert reply.headers["x-cordee-ignored"] == field


# What no other test shows


def said(server: Running, body: dict[str, Any]) -> str:
    reply = server.request("POST", COMPLETIONS, FRANCE | body)
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["text"]


def test_the_path_of_the_model_may_be_any_name(server: Running) -> None:
    for name in ("gpt-4o", "davinci-002", None):
        reply = server.request("POST", COMPLETIONS, FRANCE | {"model": name, "max_tokens": 1})
        assert (reply.status, reply.json["model"]) == (200, "starter")


def test_a_prompt_that_came_before_is_taken_from_the_cache(server: Running) -> None:
    prompt = "Once upon a time there was a rope that held " + "two " * 30
    first = server.request("POST", COMPLETIONS, FRANCE | {"prompt": prompt, "max_tokens": 2}).json
    again = server.request("POST", COMPLETIONS, FRANCE | {"prompt": prompt, "max_tokens": 2}).json
    assert again["choices"] == first["choices"]
    assert again["timings"]["cache_n"] > 30 > again["timings"]["prompt_n"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["timings"]["cache_n"]


def test_temperature_zero_takes_the_likeliest_token(server: Running) -> None:
    texts = {said(server, {"max_tokens": 4, "seed": seed}) for seed in (1, 2, 3)}
    assert len(texts) == 1
    assert said(server, {"max_tokens": 4, "temperature": 1.5, "top_k": 1, "seed": 5}) in texts


def test_a_bias_forbids_a_token_and_forces_another(server: Running) -> None:
    [token] = server.request("POST", "/tokenize", {"content": " snow"}).json["tokens"]
    assert said(server, {"max_tokens": 1, "logit_bias": {str(token): 100}}) == " snow"
    likeliest = said(server, {"max_tokens": 1})
    [first, *_] = server.request("POST", "/tokenize", {"content": likeliest}).json["tokens"]
    assert said(server, {"max_tokens": 1, "logit_bias": {str(first): -100}}) != likeliest
    wrong = server.request("POST", COMPLETIONS, FRANCE | {"logit_bias": [[token, 100]]})
    assert (wrong.status, wrong.error["param"]) == (400, "logit_bias")


def test_a_schema_may_be_a_constant_or_a_tuple(server: Running) -> None:
    for schema, text in (({"const": "42"}, '"42"'), ({"enum": ["foooooo"]}, '"foooooo"')):
        wanted = {"type": "json_object", "schema": schema}
        reply = server.request("POST", CHAT, HELLO | {"response_format": wanted}).json
        assert reply["choices"][0]["message"]["content"] == text
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        reply = server.request("POST", CHAT, HELLO | {"response_format": given}).json
        assert reply["choices"][0]["message"]["content"] == text
        assert said(server, {"json_schema": schema, "max_tokens": 20}) == text


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
        {"type": "json_schema"},
    ],
)
def test_a_format_that_is_none_is_refused(server: Running, wanted: dict[str, Any]) -> None:
    reply = server.request("POST", CHAT, HELLO | {"response_format": wanted})
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


def test_a_grammar_that_is_none_is_refused(server: Running) -> None:
    reply = server.request("POST", COMPLETIONS, FRANCE | {"grammar": "root ::= ("})
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert said(server, {"grammar": 'root ::= "a"{5,5}', "max_tokens": 9}) == "aaaaa"


def test_a_grammar_and_a_schema_at_once_are_refused(server: Running) -> None:
    both = {"grammar": 'root ::= "a"', "json_schema": {"const": 1}}
    reply = server.request("POST", COMPLETIONS, FRANCE | both)
    assert reply.status == 400 and "cannot both bind" in reply.error["message"]


def test_tokens_are_made_with_and_without_the_beginning(server: Running) -> None:
    plain = server.request("POST", "/tokenize", {"content": "What is the capital?"}).json["tokens"]
    assert server.request("POST", "/tokenize", {"content": ""}).json["tokens"] == []
    special = server.request("POST", "/tokenize", {"content": "What is the capital?", "add_special": True})
    assert special.json["tokens"][-len(plain) :] == plain
    back = server.request("POST", "/detokenize", {"tokens": plain}).json["content"]
    assert back == "What is the capital?"


def test_what_fills_the_context_ends_there(server: Running) -> None:
    """Without a limit an answer ends with the context; nothing of the prompt is pushed out."""
    prompt = [1000] * (server.service.context - 4)
    reply = server.request(
        "POST", COMPLETIONS, FRANCE | {"prompt": prompt, "max_tokens": -1, "ignore_eos": True}
    )
    assert reply.json["choices"][0]["finish_reason"] == "length"
    assert reply.json["usage"]["total_tokens"] == server.service.context
    full = server.request("POST", COMPLETIONS, FRANCE | {"prompt": [1000] * server.service.context})
    assert (full.status, full.error["code"]) == (400, "context_length_exceeded")
    assert str(server.service.context) in full.error["message"]


def test_samplers_that_leave_one_token_make_chance_certain(server: Running) -> None:
    wild = {"max_tokens": 4, "temperature": 2}
    likeliest = said(server, {"max_tokens": 4})
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_n_sigma": 0.001}):
        assert said(server, wild | narrow | {"seed": 1}) == likeliest, narrow


def test_an_answer_has_the_identifiers_that_clients_look_for(server: Running) -> None:
    chat = server.request("POST", CHAT, HELLO | {"max_tokens": 1}).json
    text = server.request("POST", COMPLETIONS, FRANCE | {"max_tokens": 1}).json
    assert chat["id"].startswith("chatcmpl-") and text["id"].startswith("cmpl-")
    assert chat["system_fingerprint"] == text["system_fingerprint"] != ""
    assert (chat["object"], text["object"]) == ("chat.completion", "text_completion")


def test_log_probabilities_are_in_every_event(server: Running) -> None:
    body = HELLO | {"max_tokens": 3, "logprobs": True, "top_logprobs": 10, "stream": True}
    *events, done = server.request("POST", CHAT, body).events
    assert done == "[DONE]"
    spoken = [each["choices"][0] for each in events if each["choices"][0]["delta"].get("content")]
    for each in spoken:
        for token in each["logprobs"]["content"]:
            assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 10
    text = "".join(token["token"] for each in spoken for token in each["logprobs"]["content"])
    assert text == "".join(each["delta"]["content"] for each in spoken)


@pytest.mark.parametrize(
    "messages", [None, "text", [123], [{}], [{"role": 123}], [{"role": "user", "content": 5}]]
)
def test_messages_that_are_none_are_refused(server: Running, messages: Any) -> None:
    reply = server.request("POST", CHAT, HELLO | {"messages": messages})
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


def test_parts_of_text_are_one_prompt(server: Running) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the best book"}]
    made = server.request("POST", "/apply-template", {"messages": user(parts)}).json["prompt"]
    plain = server.request("POST", "/apply-template", {"messages": user("What is\nthe best book")}).json
    assert made == plain["prompt"]


def test_filling_in_wants_both_sides(server: Running) -> None:
    for body in ({"input_suffix": "b"}, {"input_prefix": "a"}, {"input_prefix": 1, "input_suffix": "b"}):
        assert server.request("POST", "/infill", body).status == 400
    extra = {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "x"}]}
    assert server.request("POST", "/infill", extra).error["param"] == "input_extra[0].text"


def test_an_unknown_path_is_an_error_in_json(server: Running) -> None:
    for method, path in (("GET", "/nosuch"), ("POST", "/v1/nosuch")):
        reply = server.request(method, path, {} if method == "POST" else None)
        assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_the_number_of_a_choice_is_in_every_event(server: Running) -> None:
    body = FRANCE | {"n": 2, "max_tokens": 2, "stream": True}
    *events, _ = server.request("POST", COMPLETIONS, body).events
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}
    several = server.request("POST", COMPLETIONS, FRANCE | {"prompt": ["a", "b"], "max_tokens": 1}).json
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
