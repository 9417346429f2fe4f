"""Who may ask: keys over real TLS, bounds, wrong keys, browsers; what becomes of a revoked key's answers."""

import asyncio
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from cordee.access.failed_keys import FREE
from cordee.access.keyring import new_key
from cordee.access.ledger import LOCAL
from cordee.access.local_key import LocalKey
from cordee.api.authenticator import Authenticator
from cordee.api.guard import Access, Through
from cordee.api.server import serve
from cordee.errors import KeyNeeded, RateLimited
from cordee.net.server_certificates import OwnAuthority
from cordee.serving.local_service import ServiceConfig
from house import ALLOWED, NAME, House, opened
from serving import CHAT, COMPLETIONS, FRANCE, HELLO, SECONDS, Reply

ENDLESS = FRANCE | {"max_tokens": 1900, "stream": True}


@pytest.fixture(scope="module")
def house(starter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    config = ServiceConfig(context=2048, sequences=4)
    with opened(starter_path, tmp_path_factory.mktemp("house"), config) as made:
        yield made


@pytest.fixture(autouse=True)
def nobody_failed(house: House) -> None:
    house.failed.__init__()


# --- keys


PATHS = [("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/usage"), ("GET", "/nosuch"), ("POST", CHAT)]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_other_machines_need_a_key(house: House, method: str, path: str) -> None:
    key = house.add("marie")
    body = HELLO | {"max_tokens": 2} if method == "POST" else None
    for wrong in (None, "none", key[:-1], key + "a", new_key("marie", ())[1]):
        refused = house.ask(method, path, body, wrong)
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "cordee key add" in refused.error["message"] and key[:-1] not in refused.error["message"]
    assert house.ask(method, path, body, key).status == (404 if path == "/nosuch" else 200)
    assert house.ask(method, path, body, **{"x-api-key": key}).status != 401
    both = {"x-api-key": key}
    assert house.ask(method, path, body, "placeholder", **both).status != 401


def test_programs_of_this_machine_need_none_unless_they_come_by_another_name(house: House) -> None:
    ask = house.server.request
    assert ask("GET", "/v1/models").status == 200
    assert ask("GET", "/v1/models", headers={"Authorization": "Bearer none"}).status == 200
    local = Through(house.server.app, Access([ALLOWED]))
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.run_coroutine_threadsafe(serve(local, listener, is_second=True), house.server.loop)
    docker = {"Host": f"{ALLOWED}:{listener.getsockname()[1]}"}
    port, house.server.port = house.server.port, listener.getsockname()[1]
    try:
        assert ask("GET", "/v1/models").status == 200
        assert ask("GET", "/v1/models", headers=docker).status == 401
        given = docker | {"Authorization": f"Bearer {house.add('docker')}"}
        assert ask("GET", "/v1/models", headers=given).status == 200
        assert ask("GET", "/v1/models", headers={"Host": "other.internal"}).status == 403
    finally:
        house.server.port = port
        serving.cancel()


def test_a_key_that_is_over_is_refused(house: House) -> None:
    key = house.add("marie", expires=time.time() - 1)
    assert house.ask("GET", "/v1/models", key=key).status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((NAME, 200), (NAME.upper(), 200), (ALLOWED, 200), ("192.168.1.11:8322", 200)),
        *(("[fd00::1]:8322", 200), ("localhost", 200), ("evil.example", 403)),
        *(("pc-1.local.evil.example", 403), ("", 403)),
    ],
)
def test_names_that_somebody_else_made_point_here_are_refused(house: House, host: str, status: int) -> None:
    assert house.ask("GET", "/v1/models", key=house.add("marie"), Host=host).status == status


def test_a_key_that_may_only_ask_changes_nothing(house: House) -> None:
    plain, admin = house.add("marie"), house.add("chef", admin=True)
    for path in ("/api/pull", "/api/delete/", "/api/copy"):
        refused = house.ask("POST", path, {}, plain)
        assert refused.status == 403
        assert "`cordee key add NAME --admin`" in refused.json["error"]
        assert house.ask("POST", path, {}, admin).status != 403


# --- TLS


def test_clients_refuse_a_certificate_of_somebody_else(house: House, tmp_path: Path) -> None:
    foreign = OwnAuthority(tmp_path / "authority")
    for context in (ssl.create_default_context(), house.trusting(foreign.folder / "ca.pem")):
        with pytest.raises(ssl.SSLCertVerificationError), closing(house.open(context)) as connection:
            connection.request("GET", "/v1/models")
    for name in (NAME, "127.0.0.1"):
        plain = socket.create_connection(("127.0.0.1", house.port))
        with house.trusting().wrap_socket(plain, server_hostname=name) as link:
            assert link.version() == "TLSv1.3"
    plain = socket.create_connection(("127.0.0.1", house.port))
    with closing(plain), pytest.raises(ssl.SSLCertVerificationError, match="ostname"):
        house.trusting().wrap_socket(plain, server_hostname="pc-2.local")


@pytest.mark.parametrize("said", [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b"G", b"\x00" * 100_000])
def test_plain_http_is_told_to_use_https(house: House, said: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", house.port), SECONDS)) as plain:
        plain.sendall(said[:65_000])
        heard = b""
        while piece := plain.recv(4096):
            heard += piece
    head, _, body = heard.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"text/plain" in head
    assert b"https://" in body and f"Content-Length: {len(body)}".encode() in head
    assert house.ask("GET", "/v1/models", key=house.add("marie")).status == 200


# --- wrong keys


def test_wrong_keys_are_slowed_down_and_right_ones_are_not(house: House) -> None:
    key, other = house.add("marie"), house.add("paul")
    assert house.ask("GET", "/v1/models", key=key).status == 200
    found: dict[int, int] = {}
    with closing(house.open()) as connection:
        for number in range(1000):
            wrong = {"Authorization": f"Bearer {other[:-4]}{number:04d}"}
            connection.request("GET", "/v1/models", headers=wrong)
            response = connection.getresponse()
            response.read()
            found[response.status] = found.get(response.status, 0) + 1
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
    assert found.keys() == {401, 429} and FREE <= found[401] < FREE + 40
    assert house.ask("GET", "/v1/models", key=key).status == 200
    assert house.server.request("GET", "/v1/models").status == 200  # of the same address


def test_who_shows_the_local_key_is_not_held_up_by_wrong_ones(home: Path) -> None:
    home.mkdir()
    local = LocalKey.made()
    authenticator = Authenticator(local_key=local, clock=lambda: 0.0)

    def identify(authorization: str) -> Any:
        headers = Headers({"authorization": authorization})
        return asyncio.run(authenticator.identify(headers, "127.0.0.1", wants_key=False))

    for _ in range(FREE):
        with pytest.raises(KeyNeeded, match="local-key"):
            identify("Bearer none")
    with pytest.raises(RateLimited):
        identify("Bearer none")
    assert identify(local.header) is None


# --- bounds and the ledger


def test_requests_at_once_are_bounded_by_key(house: House) -> None:
    key, free = house.add("marie", requests=1), house.add("paul")
    with streaming(house, key):
        refused = house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 1}, key)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        assert house.ask("GET", "/v1/models", key=key).status == 200  # costs nothing
        assert house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 1}, free).status == 200
    until(lambda: house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 1}, key).status == 200)


def test_tokens_are_bounded_by_key(house: House) -> None:
    key = house.add("marie", tokens=20)
    assert house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 100}, key).status == 200
    refused = house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 1}, key)
    assert refused.status == 429 and "20 tokens a minute" in refused.error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 600


def test_what_was_used_is_counted_by_key_and_nobody_sees_anothers(house: House) -> None:
    names = ("anna", "bert")
    keys = {name: house.add(name) for name in names}
    admin = house.add("chef", admin=True)
    usage: dict[str, int] = {}
    for name, n in zip(names, (1, 3), strict=True):
        reply = house.ask("POST", COMPLETIONS, FRANCE | {"max_tokens": 4, "n": n}, keys[name])
        usage[name] = reply.json["usage"]["completion_tokens"]
    house.server.request("POST", COMPLETIONS, FRANCE | {"max_tokens": 1})
    rows = {row["key"]: row for row in house.ask("GET", "/v1/usage", key=admin).json["data"]}
    for name in names:
        assert rows[name]["tokens_out"] == usage[name] and rows[name]["tokens_in"] > 0
        own = house.ask("GET", "/v1/usage", key=keys[name]).json["data"]
        assert [row["key"] for row in own] == [name]
    assert rows[LOCAL]["requests"] >= 1
    assert "France" not in json.dumps(rows)


def test_a_stream_that_its_client_leaves_is_counted_as_far_as_it_came(house: House) -> None:
    key = house.add("carl")
    with streaming(house, key):
        pass
    counted = house.ledger.read()["carl"]
    assert counted.requests == 1 and counted.tokens_out >= 1


# --- revocation


def test_a_revoked_key_stops_also_for_what_is_under_way(house: House) -> None:
    key = house.add("marie")
    whole: list[Reply] = []
    waits = threading.Thread(
        target=lambda: whole.append(house.ask("POST", COMPLETIONS, ENDLESS | {"stream": False}, key))
    )
    with streaming(house, key) as stream:
        waits.start()
        until(lambda: house.server.status()["active"] == 2)
        house.revoke("marie")
        rest = stream.read()
        waits.join(SECONDS)
    assert b'"code":"invalid_api_key"' in rest and b"revoked" in rest and b"[DONE]" not in rest
    assert (whole[0].status, whole[0].error["code"]) == (401, "invalid_api_key")
    assert house.ask("GET", "/v1/models", key=key).status == 401
    house.server.until(lambda status: status["active"] == 0)


# --- browsers


@pytest.mark.parametrize(
    ("origin", "may"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("http://tauri.localhost", True),
        ("app://obsidian.md", True),
        ("vscode-webview://1ab2", True),
        ("tauri://localhost", True),
        ("https://chat.example", True),
        ("https://chat.example.evil.example", False),
        ("http://chat.example", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
        ("file://", False),
        ("chrome-extension://abc", False),
        ("", False),
    ],
)
def test_browsers_are_told_which_pages_may_ask(house: House, origin: str, may: bool) -> None:
    key = house.add("marie")
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    answered = house.ask("OPTIONS", CHAT, **preflight)
    if may:
        assert answered.status == 200
        assert answered.headers["access-control-allow-origin"] == origin
        assert "POST" in answered.headers["access-control-allow-methods"]
        assert "x-stainless-os" in answered.headers["access-control-allow-headers"]
    else:
        assert answered.status == 403 and "access-control-allow-origin" not in answered.headers
    asked = house.ask("GET", "/v1/models", key=key, Origin=origin)
    assert asked.status == (200 if may else 403)
    refused = house.ask("GET", "/v1/models", Origin=origin)
    assert refused.status == (401 if may else 403)
    for reply in (asked, refused):
        assert (reply.headers.get("access-control-allow-origin") == origin) == may


def test_pages_of_this_very_server_may_ask(house: House) -> None:
    own = {"Host": f"{NAME}:{house.port}", "Origin": f"https://{NAME}:{house.port}"}
    assert house.ask("GET", "/v1/models", key=house.add("marie"), **own).status == 200
    other = own | {"Origin": f"https://{NAME}:1"}
    assert house.ask("GET", "/v1/models", key=house.add("marie"), **other).status == 403


# --- helpers


@contextmanager
def streaming(house: House, key: str) -> Iterator[http.client.HTTPResponse]:
    """A stream of which something has come; its client leaves at the end."""
    with closing(house.open()) as connection:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", COMPLETIONS, json.dumps(ENDLESS), headers)
        response = connection.getresponse()
        assert response.status == 200
        while (line := response.readline()).startswith(b":") or line == b"\n":
            pass  # its place in the queue
        assert line.startswith(b"data: ")
        yield response
        connection.sock.close() if connection.sock else None


def until(true: Any) -> None:
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends, "it did not become true"
        time.sleep(0.02)
