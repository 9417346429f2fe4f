"""What those need who run a server: metrics, health, lists, places in the queue, HTTP as the RFCs have it."""

import http.client
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cordee.api.stream import Timing
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, SECONDS, Running, running, user

SECRET = "the-name-of-the-patient"


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(context=512, sequences=1)
    timing = Timing(keep_alive_seconds=0.05, accept_seconds=0.05)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config, timing=timing) as started:
        yield started


def scraped(server: Running) -> dict[tuple[str, ...], float]:
    """The samples by name and values of labels, in the order of their names."""
    reply = server.request("GET", "/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.body.decode()))
    assert all(re.fullmatch(r"cordee_[a-z_]+", family.name) for family in families)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_was_asked_and_answered(server: Running) -> None:
    before = scraped(server)
    body = {**FRANCE, "prompt": f"{SECRET} lives in", "max_tokens": 5}
    used = server.request("POST", COMPLETIONS, body).json["usage"]
    server.request("POST", COMPLETIONS, {**body, "prompt": [1, 10**9]})
    found = scraped(server)

    def grew(*name: str) -> float:
        return found[name] - before.get(name, 0.0)

    assert grew("cordee_prompt_tokens_total", "starter") == used["prompt_tokens"]
    assert grew("cordee_generated_tokens_total", "starter") == 5
    assert grew("cordee_answers_total", "length", "starter") == 1
    assert grew("cordee_time_to_first_token_seconds_count", "starter") == 1
    assert grew("cordee_time_between_tokens_seconds_count", "starter") == 4
    assert found["cordee_requests_running", "starter"] == found["cordee_requests_waiting", "starter"] == 0
    assert found["cordee_kv_cache_tokens", "starter"] >= used["prompt_tokens"]
    assert found["cordee_kv_cache_tokens_max", "starter"] == 512
    assert found[("cordee_stage_restarts_total",)] == 0
    again = server.request("POST", COMPLETIONS, body).json["usage"]
    cached = again["prompt_tokens_details"]["cached_tokens"]
    more = scraped(server)["cordee_prompt_tokens_cached_total", "starter"]
    assert more - found.get(("cordee_prompt_tokens_cached_total", "starter"), 0.0) == cached > 0
    assert SECRET.encode() not in server.request("GET", "/metrics").body


def endless(server: Running, prompt: str = "One, two,") -> dict[str, Any]:
    ends = {str(token): -100 for token in server.service.vocabulary.end_of_generation}
    return {**FRANCE, "prompt": prompt, "max_tokens": 450, "stream": True, "logit_bias": ends}


def opened(server: Running, body: dict[str, Any]) -> http.client.HTTPResponse:
    """A stream whose headers have come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def line_with(response: http.client.HTTPResponse, start: bytes) -> bytes:
    while line := response.readline():
        if line.startswith(start):
            return line
    raise AssertionError("the stream ended")


def test_a_request_that_waits_says_where_it_stands(server: Running) -> None:
    first = opened(server, endless(server))
    assert line_with(first, b"data: ")
    second, third = opened(server, endless(server)), opened(server, {**endless(server), "max_tokens": 3})
    assert line_with(second, b": queue") == b": queue 1\n"
    assert line_with(third, b": queue") == b": queue 2\n"
    found = scraped(server)
    assert found["cordee_requests_running", "starter"] == 1
    assert found["cordee_requests_waiting", "starter"] == 2
    first.close()
    assert line_with(second, b"data: ")
    assert line_with(third, b": queue") == b": queue 1\n"
    second.close()
    last = b"".join(iter(lambda: third.read1(1 << 16), b""))
    assert last.endswith(b"data: [DONE]\n\n") and b'"timings"' in last
    server.until(lambda status: status["active"] == status["queue"] == 0)
    found = scraped(server)
    assert found["cordee_requests_running", "starter"] == found["cordee_requests_waiting", "starter"] == 0
    assert found["cordee_answers_total", "left", "starter"] >= 2


def test_a_lost_stage_is_counted(server: Running) -> None:
    before = scraped(server)[("cordee_stage_restarts_total",)]
    [stage] = server.status()["stages"]
    os.kill(stage["pid"], signal.SIGKILL)
    server.until(lambda status: status["stages"][0]["restarts"] > stage["restarts"])
    server.request("POST", COMPLETIONS, {**FRANCE, "max_tokens": 1})
    assert scraped(server)[("cordee_stage_restarts_total",)] == before + 1


def test_alive_and_ready_are_two_things(session_home: Path, tmp_path: Path, server: Running) -> None:
    with running(None, tmp_path, expected=["starter"]) as loading:
        assert loading.request("GET", "/live").status == 200
        for path in ("/ready", "/health"):
            reply = loading.request("GET", path)
            assert (reply.status, reply.json["models"]) == (503, {"starter": "loading"})
            assert reply.headers["retry-after"]
        [model] = loading.request("GET", "/v1/models").json["data"]
        assert (model["id"], model["object"], model["state"]) == ("starter", "model", "loading")
        assert loading.request("GET", "/v1/models/starter").json == model
        assert loading.request("GET", "/metrics").status == 200
    assert server.request("GET", "/ready").status == server.request("GET", "/live").status == 200


def test_a_list_says_what_a_model_can_do(server: Running) -> None:
    [model] = server.request("GET", "/v1/models").json["data"]
    assert model["state"] == "ready"
    assert model["context_length"] == model["max_model_len"] == 512
    assert model["size"] == server.service.model.nbytes
    assert model["capabilities"] == ["completion", "tools"]


# HTTP


def raw(server: Running, request: bytes) -> tuple[int, bytes]:
    """What a request by hand is answered: the status, and all that follows."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        link.sendall(request)
        answer = b"".join(iter(lambda: link.recv(1 << 16), b""))
    return int(answer.split()[1]), answer


def test_a_target_may_be_a_whole_url(server: Running) -> None:
    """As proxies get it; then the Host header has no say (RFC 9112, section 3.2.2)."""
    host = f"127.0.0.1:{server.port}".encode()
    close = b"Connection: close\r\n\r\n"
    for target in (b"http://" + host + b"/v1/models", b"HTTP://localhost/v1/models?x=1"):
        status, answer = raw(server, b"GET %s HTTP/1.1\r\nHost: evil.example\r\n%s" % (target, close))
        assert status == 200 and b'"starter"' in answer
    status, _ = raw(server, b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n" + close)
    assert status == 200, "Ollama's clients ask for the root"
    foreign = b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n"
    status, answer = raw(server, foreign + close)
    assert status == 403 and b"evil.example" in answer


def h2c(body: dict[str, Any], path: str = CHAT) -> bytes:
    """What Java's client sends before it knows whether a server speaks HTTP/2."""
    data = json.dumps(body).encode()
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
    )


def test_an_offer_of_http_2_is_declined_in_silence(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        for _ in range(2):  # on one connection
            link.sendall(h2c({**HELLO, "max_tokens": 2}))
            response = http.client.HTTPResponse(link)
            response.begin()
            assert response.status == 200 and response.version == 11
            assert response.getheader("upgrade") is None
            assert json.loads(response.read())["usage"]["completion_tokens"] == 2
    assert caplog.records == []


def test_a_client_that_offered_http_2_and_leaves_ends_its_stream(server: Running) -> None:
    left = ("cordee_answers_total", "left", "starter")
    before = scraped(server).get(left, 0)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        link.sendall(h2c(endless(server), COMPLETIONS))
        assert link.recv(100).startswith(b"HTTP/1.1 200")
    server.until(lambda status: status["active"] == 0)
    assert scraped(server)[left] == before + 1


def test_no_log_holds_what_was_asked_or_answered(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    for body in (
        {**HELLO, "messages": user(SECRET)},
        {**HELLO, "messages": user(SECRET), "temperature": 9},
        {**HELLO, "messages": [{"role": "user", "content": {"x": SECRET}}]},
    ):
        server.request("POST", CHAT, {**body, "max_tokens": 4})
    server.request("POST", "/infill", {"input_prefix": SECRET, "input_suffix": SECRET})
    server.request("POST", "/tokenize", {"content": SECRET})
    assert SECRET not in caplog.text


def test_the_board_shows_what_is_measured(server: Running) -> None:
    board = (Path(__file__).resolve().parents[2] / "docs" / "grafana.json").read_text()
    wanted = set(re.findall(r"cordee_[a-z_]+", json.dumps(json.loads(board)["panels"])))
    names = {name for name, *_ in scraped(server)}
    of_machines = {"cordee_energy_joules_total"}  # where the machine tells
    of_clusters = {"cordee_nodes", "cordee_replans_total"}  # `cordee up` has them
    assert wanted - names <= of_machines | of_clusters
    assert len(wanted & names) >= 10
