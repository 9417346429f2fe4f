"""What one client asks for holds up no other: slow grammars, long prompts; and who may ask at all."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cordee.access.local_key import KEY_CHARS_MAX, LocalKey
from cordee.errors import KeyNeeded, StorageFailed
from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.generation.streams import Ask, Assert
from cordee.serving.local_service import ServiceConfig
from cordee.worker import grammar_trials
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, SECONDS, Reply, Running, running, user

CONTEXT = 512
COUNTING = {
    "model": "starter",
    "prompt": "1 2 3 4",
    "max_tokens": 24,
    "temperature": 0,
    "stream": True,
}


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(context=CONTEXT, sequences=4)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config, stages=2) as started:
        yield started


def patterns(count: int) -> dict[str, Any]:
    properties = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(count)}
    return {"type": "object", "patternProperties": properties}


def bound_to(schema: dict[str, Any]) -> dict[str, Any]:
    given = {"name": "x", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": given}}


class Later(threading.Thread):
    """A request on a thread of its own, and its reply."""

    def __init__(self, server: Running, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._ask = lambda: server.request("POST", path, body)
        self.reply: Reply | None = None
        self.start()

    def run(self) -> None:
        self.reply = self._ask()

    def result(self) -> Reply:
        self.join(SECONDS)
        assert self.reply is not None, "it hangs"
        return self.reply


@pytest.mark.slow
def test_grammars_that_take_minutes_hold_up_no_answer(server: Running) -> None:
    alone = server.request("POST", COMPLETIONS, COUNTING).events
    slow = [Later(server, CHAT, HELLO | bound_to(patterns(2000 + number))) for number in range(3)]
    beside = server.request("POST", COMPLETIONS, COUNTING)
    assert [each["choices"] for each in beside.events[:-1]] == [each["choices"] for each in alone[:-1]]
    for each in slow:
        refused = each.result()
        assert (refused.status, refused.error["param"]) == (400, "response_format")
        assert "too complex" in refused.error["message"] and "use fewer patterns" in refused.error["message"]


@pytest.mark.long
def test_a_grammar_that_creeps_ends_its_own_answer_alone(server: Running) -> None:
    """Ambiguous without end: its mask takes a little longer at each token, seconds in the end."""
    ends = dict.fromkeys(map(str, server.service.vocabulary.end_of_generation), -100)
    grammar = "root ::= word*\nword ::= [a-z]+ | word word | [a-z]+ word"
    creeping = {"grammar": grammar, "logit_bias": ends, "max_tokens": 400, "temperature": 1, "seed": 1}
    alone = server.request("POST", COMPLETIONS, COUNTING).events
    creeps = Later(server, CHAT, HELLO | creeping)
    beside = server.request("POST", COMPLETIONS, COUNTING).events
    assert [each["choices"] for each in beside[:-1]] == [each["choices"] for each in alone[:-1]]
    assert "it takes too long for each token" in creeps.result().error["message"]
    again = server.request("POST", CHAT, HELLO | creeping)  # it is remembered
    assert (again.status, again.error["param"]) == (400, "grammar")
    assert (
        server.request("POST", CHAT, HELLO | bound_to({"type": "integer"}) | {"max_tokens": 3}).status == 200
    )


@pytest.mark.slow
def test_a_gateway_that_tries_no_grammars_harms_nobody(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host of a model is asked by another node's gateway, which somebody has taken over."""
    host, said = server.service._cluster.host, []
    own = host._send
    monkeypatch.setattr(grammar_trials, "WAITING_MAX", 2)
    monkeypatch.setattr(
        host, "_send", lambda node, news: said.append(news) if node == "x" else own(node, news)
    )
    numbers, key = range(2, 12), server.service.key

    async def ask() -> None:
        for number in numbers:
            schema = json.dumps(patterns(3000 + number))
            sampling = SamplingParams(grammar=Grammar("json_schema", schema))
            request = Request(id="x", prompt=(1,), sampling=sampling)
            host.receive("x", Ask(7, 1, key, number, number, request, ()))
        host.receive("x", Assert(7, 1, key, 50, tuple((number, 0) for number in numbers)))

    server.run(ask())
    assert server.request("POST", CHAT, HELLO | bound_to({"const": 7}) | {"max_tokens": 3}).status == 200
    server.until(lambda _: sum(len(news.pieces) for news in said) == len(numbers))
    failures = [piece.failure for news in said for piece in news.pieces]
    found = Counter(failure.error for failure in failures)
    assert set(found) == {"BadRequest", "Overloaded"}
    assert found["Overloaded"] >= len(numbers) - 3  # two wait, and one may be tried already


def test_a_schema_is_obeyed_by_stages_in_several_processes(server: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = HELLO | bound_to(schema | {"additionalProperties": False}) | {"max_tokens": 100, "n": 3}
    for choice in server.request("POST", CHAT, body | {"temperature": 1}).json["choices"]:
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"n"}


@contextmanager
def no_tokenizer(server: Running) -> Iterator[None]:
    """The process that tokenizes is stopped: who needs it waits."""
    server.request("POST", COMPLETIONS, FRANCE | {"max_tokens": 1})  # it runs now
    pid = server.service.vocabulary._child._process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": user("word " * 1_000_000)}, "messages"),
        (CHAT, {"messages": user([{"type": "text", "text": "é" * 30_000}] * 8)}, "messages"),
        (COMPLETIONS, {"prompt": "<" * 1_000_000}, "prompt"),
        (COMPLETIONS, {"prompt": ["short", "\U0001f9d7" * 100_000]}, "prompt"),
    ],
)
def test_prompts_that_no_context_holds_are_refused_before_they_are_tokenized(
    server: Running, path: str, body: dict[str, Any], param: str
) -> None:
    with no_tokenizer(server):
        refused = server.request("POST", path, (HELLO if path == CHAT else FRANCE) | body)
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    assert refused.error["param"] == param
    assert "bytes" in refused.error["message"] and f"holds {CONTEXT}" in refused.error["message"]


def test_answers_go_on_while_a_prompt_is_tokenized(server: Running) -> None:
    alone = server.request("POST", COMPLETIONS, COUNTING).events
    ids = server.service.vocabulary.tokenize(COUNTING["prompt"], add_bos=True)
    with no_tokenizer(server):
        waits = Later(server, CHAT, HELLO)
        beside = server.request("POST", COMPLETIONS, COUNTING | {"prompt": ids}).events
        assert waits.is_alive()
    assert [each["choices"] for each in beside[:-1]] == [each["choices"] for each in alone[:-1]]
    assert waits.result().status == 200


# --- the key ----------------------------------------------------------------------------------------


@pytest.fixture
def key(home: Path) -> LocalKey:
    home.mkdir()
    return LocalKey.made()


def test_a_key_is_made_once_and_only_its_owner_may_read_it(key: LocalKey, home: Path) -> None:
    assert key.path == home / "local-key"
    assert key.path.stat().st_mode & 0o777 == 0o600
    assert LocalKey.made().header == key.header == f"Bearer {key.path.read_text().strip()}"
    found = LocalKey.found()
    assert found is not None and found.header == key.header


def test_a_key_that_others_may_read_is_not_used(key: LocalKey) -> None:
    key.path.chmod(0o644)
    with pytest.raises(StorageFailed, match="delete it"):
        LocalKey.made()


NO_KEYS = [b"", b"\xff\xfe", b"cordee-\x00", b"cordee-" + b"a" * KEY_CHARS_MAX, b"other"]


@pytest.mark.parametrize("content", NO_KEYS)
def test_what_is_no_key_is_made_anew(home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "local-key").write_bytes(content)
    assert LocalKey.found() is None
    assert len(LocalKey.made().header) > 40


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer none",
    "Basic {key}",
    "{key}",
    "Bearer {key}x",
    "Bearer {key} {key}",
    "Bearer \udce9",
]


@pytest.mark.parametrize("header", WRONG)
def test_without_the_key_nothing_is_answered(key: LocalKey, header: str | None) -> None:
    own = key.header.removeprefix("Bearer ")
    with pytest.raises(KeyNeeded) as refused:
        key.check(None if header is None else header.replace("{key}", own))
    assert str(key.path) in refused.value.message and own not in refused.value.message
    key.check(key.header)
    key.check(key.header.replace("Bearer", "bearer"))


def test_an_api_with_a_key_answers_only_who_knows_it(
    key: LocalKey, starter_path: Path, tmp_path: Path
) -> None:
    with running(starter_path, tmp_path, config=ServiceConfig(context=256), key=key) as server:
        for method, path, body in (
            ("GET", "/health", None),
            ("GET", "/v1/models", None),
            ("GET", "/nosuch", None),
            ("POST", CHAT, HELLO),
            ("POST", COMPLETIONS, FRANCE),
        ):
            for given in ({}, {"Authorization": "Bearer none"}):
                refused = server.request(method, path, body, given)
                assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
                assert str(key.path) in refused.error["message"]
        answered = server.request("POST", CHAT, HELLO | {"max_tokens": 2}, {"Authorization": key.header})
        assert answered.status == 200
