"""The console of a machine by itself: what it shows, who may change something, what is noted of it."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from cluster_processes import until
from cordee.access.api_keys import ApiKey
from cordee.access.keyring import Keyring, new_key
from cordee.access.keys_file import KeysFile
from cordee.access.ledger import Ledger
from cordee.api.authenticator import Authenticator
from cordee.console.journal import ERRORS_KEPT, Journal
from cordee.console.owner import is_owner
from cordee.console.shared import REST_SECONDS_MAX, SharedValue
from fake_hub import FakeHub
from serving import Reply, Running, running

PULLED = {"source": "story-small"}


class Asked:
    """A server, asked as a page of its own would."""

    def __init__(self, server: Running, keys: dict[str, str]) -> None:
        self.server, self._keys = server, keys

    def get(self, path: str, key: str = "", **headers: str) -> Reply:
        return self.server.request("GET", f"/console/{path}", headers=self._with(key) | headers)

    def post(self, path: str, body: Any = None, key: str = "", **headers: str) -> Reply:
        given = {"Origin": f"http://127.0.0.1:{self.server.port}"} | headers
        return self.server.request("POST", f"/console/{path}", body or {}, self._with(key) | given)

    def _with(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._keys[key]}"} if key else {}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Nothing is served yet; there are keys of marie, who may ask, and of chef, an admin."""
    folder = tmp_path_factory.mktemp("console")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORDEE_HOME", str(folder))
        shown: dict[str, str] = {}
        keys: list[ApiKey] = []
        for name, is_admin in (("marie", False), ("chef", True)):
            key, shown[name] = new_key(name, keys, admin=is_admin)
            keys.append(key)
        KeysFile(folder).write(tuple(keys))
        keyring = Keyring(KeysFile(folder).read)
        authenticator = Authenticator(keyring, Ledger(folder))
        with running(None, folder / "models", authenticator=authenticator) as server:
            yield Asked(server, shown)


def ended(asked: Asked) -> list[dict[str, Any]]:
    """What is fetched, once the last that was begun has ended."""

    def pulls() -> list[dict[str, Any]]:
        return asked.get("overview").json["pulls"]

    until(lambda: pulls()[0]["state"] != "running")
    return pulls()


def test_a_machine_by_itself_shows_itself(asked: Asked) -> None:
    reply = asked.get("overview", key="marie")
    assert (reply.status, reply.json["kind"], reply.json["models"]) == (200, "single", [])
    [node] = reply.json["nodes"]
    assert node["self"] and node["state"] == "alive" and node["devices"][0]["memory_bytes"] > 0
    assert asked.get("snapshots").json == []
    known = {card["name"]: card for card in asked.get("models").json["cards"]}
    assert known["starter"]["license"] and known["qwen3-8b"]["bytes"] > 1e9


def test_what_has_not_changed_is_not_sent_again(asked: Asked) -> None:
    first = asked.get("snapshots")
    again = asked.get("snapshots", **{"If-None-Match": first.headers["etag"]})
    assert (first.body, again.status, again.body) == (b"[]", 304, b"")
    assert asked.get("snapshots", **{"If-None-Match": '"another"'}).status == 200


def test_a_model_is_judged_before_it_is_fetched(asked: Asked) -> None:
    found = asked.post("fit", {"model": "story-small"}, key="marie").json
    assert found["together"]["fits"] and found["together"]["tokens_per_second"] > 0
    [machine] = found["machines"]
    assert machine["fits"] and machine["name"]
    huge = asked.post("fit", {"model": "gpt-oss-120b"}).json
    assert not huge["together"]["fits"] and "GB" in huge["together"]["why"]
    wrong = asked.post("fit", {"model": "qwen3-8"})
    assert wrong.status == 404 and "qwen3-8b" in wrong.error["message"]
    for path in ("../secret.gguf", "/etc/passwd", "~/model.gguf", ""):
        assert asked.post("fit", {"model": path}).status == 400


def test_a_model_is_fetched_and_removed(asked: Asked) -> None:
    assert asked.post("pull", PULLED).json["state"] == "running"
    pulls = ended(asked)
    assert (pulls[0]["state"], pulls[0]["model"]) == ("done", "story-small")
    assert "story-small" in [each["name"] for each in asked.get("models").json["stored"]]
    assert asked.post("model/remove", {"name": "story-small"}, key="chef").status == 200
    assert asked.get("models").json["stored"] == []
    gone = asked.post("model/remove", {"name": "story-small"})
    assert gone.status == 404
    done = [(each["who"], each["what"], each["about"]) for each in asked.get("admin").json["actions"]]
    assert ("chef", "model/remove", "story-small") in done and (
        "(this machine)",
        "pull",
        "story-small",
    ) in done


def test_a_model_that_cannot_be_fetched_says_why(asked: Asked) -> None:
    assert asked.post("pull", {"source": "no-such-model"}).status == 200
    pulls = ended(asked)
    assert pulls[0]["state"] == "failed" and "no-such-model" in pulls[0]["error"]
    assert any("no-such-model" in each["text"] for each in asked.get("admin").json["errors"])
    assert asked.post("pull/stop", {"number": pulls[0]["number"]}).status == 400


ACTS = {
    "pull": PULLED,
    "model/remove": {"name": "starter"},
    "deploy": {"model": "starter"},
    "undeploy": {"model": "starter"},
    "invite": {},
    "node/drain": {"node": "pc-2"},
    "node/remove": {"node": "pc-2"},
    "key/add": {"name": "eve", "admin": True},
    "key/limit": {"name": "chef", "limit": "tokens=1/min"},
    "key/remove": {"name": "chef"},
}


@pytest.mark.parametrize("path", ACTS)
def test_nothing_is_changed_for_a_key_that_may_only_ask(asked: Asked, path: str) -> None:
    refused = asked.post(path, ACTS[path], key="marie")
    assert refused.status == 403 and refused.error["code"] == "admin_key_needed"
    assert "key marie" in refused.error["message"]


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://localhost:3000"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)
@pytest.mark.parametrize("path", ["key/add", "fit"])
def test_nothing_is_done_for_a_page_of_another_program(
    asked: Asked, path: str, headers: dict[str, str]
) -> None:
    refused = asked.post(path, ACTS.get(path, {"model": "starter"}), key="chef", **headers)
    assert refused.status == 403 and refused.error["code"] == "forbidden_origin"


def test_a_form_of_another_site_does_nothing(asked: Asked) -> None:
    body = json.dumps(ACTS["key/add"]).encode()
    refused = asked.post("key/add", body, key="chef", **{"Content-Type": "text/plain"})
    assert refused.status == 415
    assert "eve" not in [each["name"] for each in asked.get("admin").json["keys"]]


def test_keys_are_made_shown_once_and_revoked(asked: Asked) -> None:
    made = asked.post("key/add", {"name": "paul", "limit": "requests=2,tokens=900/min", "days": 30})
    asked._keys["paul"] = made.json["key"]
    until(lambda: asked.get("me", key="paul").json == {"name": "paul", "admin": False})
    seen = asked.get("admin", key="chef")
    [paul] = [each for each in seen.json["keys"] if each["name"] == "paul"]
    assert (paul["limit"], paul["state"], paul["admin"]) == ("requests=2,tokens=900/min", "valid", False)
    assert paul["expires"] > paul["created"] and made.json["key"].encode() not in seen.body
    assert asked.get("admin", key="paul").status == 403
    wrong = asked.post("key/add", {"name": "paul"})
    assert wrong.status == 400 and "paul" in wrong.error["message"]
    assert asked.post("key/limit", {"name": "paul", "limit": "tokens=7/min"}).status == 200
    changed = [each for each in asked.get("admin").json["keys"] if each["name"] == "paul"]
    assert changed == [paul | {"limit": "tokens=7/min"}]
    assert asked.post("key/limit", {"name": "paul", "limit": "7"}).status == 400
    assert asked.post("key/remove", {"name": "paul"}).status == 200
    assert "paul" not in [each["name"] for each in asked.get("admin").json["keys"]]


@pytest.mark.parametrize("path", ["deploy", "undeploy", "invite", "node/drain", "node/remove"])
def test_what_needs_a_cluster_says_so(asked: Asked, path: str) -> None:
    refused = asked.post(path, ACTS[path])
    assert refused.status == 501 and "cordee up" in refused.error["message"]


def test_only_the_owner_needs_no_key() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        closing(listener.accept()[0]),
    ):
        ends = client.getsockname()[:2], client.getpeername()[:2]
        assert is_owner(*ends)
        assert not is_owner((ends[0][0], ends[0][1] ^ 1), ends[1])
    assert not is_owner(None, ends[1]) and not is_owner(("unix", 0), ends[1])


HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = "   0: {} {} 01 00000000:00000000 00:00000000 00000000 {} 0 1 1\n"
CLIENT, SERVER = ("127.0.0.1", 40000), ("127.0.0.1", 8321)
HERE, THERE = "0100007F:9C40", "0100007F:2081"


@pytest.mark.parametrize(
    ("lines", "owned"),
    [
        ([(HERE, THERE, 0)], True),
        ([(HERE, THERE, 4242)], False),
        ([("0200007F:9C40", THERE, 0), (HERE, THERE, 4242)], False),
        ([(HERE, "0200007F:2081", 0)], False),
        ([("0000000000000000FFFF00000100007F:9C40", "0000000000000000FFFF00000100007F:2081", 0)], True),
        ([], False),
    ],
)
def test_a_connection_is_its_accounts(tmp_path: Path, lines: list[tuple], owned: bool) -> None:
    table = tmp_path / "tcp"
    table.write_text(HEAD + "".join(LINE.format(*each) for each in lines))
    assert is_owner(CLIENT, SERVER, (table,)) == owned
    assert not is_owner(CLIENT, SERVER, (tmp_path / "none",))


def test_the_journal_is_bounded_and_holds_no_more_than_the_log() -> None:
    journal, log = Journal(), logging.getLogger("cordee.test")
    try:
        for number in range(2 * ERRORS_KEPT):
            logging.getLogger(f"cordee.test{number}").handle(
                logging.LogRecord("cordee", logging.WARNING, f"file{number}", 1, "x" * 9000, None, None)
            )
        log.info("not this")
        assert len(journal.errors) <= ERRORS_KEPT
        assert {len(each.text) for each in journal.errors} <= {500}
    finally:
        journal.close()
    before = len(journal.errors)
    log.warning("later")
    assert len(journal.errors) == before


def test_what_takes_long_is_not_made_all_the_time() -> None:
    """Pages ask each second; a node that takes three to say how it is still has time for other things."""
    made: list[float] = []
    now = 0.0

    async def make() -> float:
        nonlocal now
        made.append(now)
        now += 3.0
        return now

    async def story() -> None:
        nonlocal now
        value = SharedValue(make, clock=lambda: now)
        request = Request({"type": "http", "headers": []})
        while now < 100:
            await asyncio.gather(*(value.response(request) for _ in range(5)))
            now += 1.0
        value.forget()
        before = len(made)
        await value.response(request)
        assert len(made) == before + 1

    asyncio.run(story())
    assert len(made) <= 100 / (3 + REST_SECONDS_MAX) + 2


@pytest.mark.slow
def test_what_is_fetched_can_be_stopped_and_goes_on_later(
    asked: Asked, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a hub that stops in the middle; the second time only the rest is fetched."""
    hub = FakeHub({"house/model-GGUF": {"model-Q4_K_M.gguf": starter_path.read_bytes()}})
    hub.stop_after, hub.stall = 40_000_000, threading.Event()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def last() -> dict[str, Any]:
        return asked.get("overview").json["pulls"][0]

    try:
        assert asked.post("pull", {"source": "house/model-GGUF"}, key="marie").status == 403
        number = asked.post("pull", {"source": "house/model-GGUF"}).json["number"]
        until(lambda: last()["done_bytes"] > 10_000_000)
        assert last()["total_bytes"] == starter_path.stat().st_size
        again = asked.post("pull", {"source": "house/model-GGUF"})
        assert again.status == 400 and "already" in again.error["message"]
        assert asked.post("pull/stop", {"number": number}).status == 200
        until(lambda: last()["state"] != "running")
        assert last()["state"] == "stopped"
        hub.stop_after = None
        hub.stall.set()
        asked.post("pull", {"source": "house/model-GGUF", "name": "resumed"})
        assert ended(asked)[0] | {"number": 0, "done_bytes": 0, "total_bytes": 0} == {
            **dict.fromkeys(("number", "done_bytes", "total_bytes"), 0),
            **dict.fromkeys(("error", "code"), ""),
            "source": "house/model-GGUF",
            "state": "done",
            "model": "resumed",
        }
        assert hub.ranges[-1] is not None
        assert asked.post("model/remove", {"name": "resumed"}).status == 200
    finally:
        hub.stall.set()
        hub.close()
