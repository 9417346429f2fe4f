"""What a browser gets: the libraries are those of the manifest, words are the same in both languages, and how
the page is sent."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cordee.access.local_key import LocalKey
from cordee.api.authenticator import Authenticator
from cordee.cli.main import cordee
from cordee.cli.open import open_page
from cordee.errors import NotRunning
from cordee.web.bundle import ROOT, Bundle
from serving import Running, running

HERE = Path(__file__).parent
FIRST_PAINT_BYTES_MAX = 300_000
PARTS = sorted({path.name.partition(".")[0] for path in (ROOT / "i18n").iterdir()})
KEYS = re.compile(r"\bt\(\s*[\"']([\w.]+)[\"']")
# Loaded when the first file of its kind, the first code or the first code to scan comes.
LATER = ("pdf.mjs", "pdf.worker.mjs", "fflate.js", "highlight.js", "uqr.js")


@pytest.mark.parametrize("folder", [ROOT / "vendor", HERE / "vendor"])
def test_libraries_are_those_of_the_manifest(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    there = {path.name for path in folder.iterdir() if path.suffix in (".js", ".mjs")}
    assert {each["file"] for each in listed} == there
    for each in listed:
        assert hashlib.sha256((folder / each["file"]).read_bytes()).hexdigest() == each["sha256"], each[
            "file"
        ]
        for package in each["packages"]:
            assert (folder / package["text"]).stat().st_size > 500, package


@pytest.mark.parametrize("part", PARTS)
def test_every_word_is_there_in_both_languages(part: str) -> None:
    words = {
        language: json.loads((ROOT / "i18n" / f"{part}.{language}.json").read_text(encoding="utf-8"))
        for language in ("en", "fr")
    }
    assert words["en"].keys() == words["fr"].keys()
    for key, english in words["en"].items():
        assert key.startswith(f"{part}."), key
        placeholders = set(re.findall(r"\{\w+\}", english))
        assert placeholders == set(re.findall(r"\{\w+\}", words["fr"][key])), key


def test_every_word_that_the_page_uses_is_there() -> None:
    known: set[str] = set()
    for part in PARTS:
        known |= json.loads((ROOT / "i18n" / f"{part}.en.json").read_text(encoding="utf-8")).keys()
    known |= {key.rpartition(".")[0] for key in known if key.endswith((".one", ".other"))}
    used = {
        key
        for path in ROOT.rglob("*.js")
        if path.parent.name != "vendor"
        for key in KEYS.findall(path.read_text(encoding="utf-8"))
    }
    assert used, "the pattern finds them"
    assert sorted(used - known) == []


def test_the_first_paint_is_small() -> None:
    bundle = Bundle()
    first = [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix in (".js", ".css", ".svg", ".html")
        and path.name not in LATER
        and path.parent.name in ("static", "shell", "chat", "vendor")
    ]
    sent = len(gzip.compress(bundle.document.encode()))
    for path in first:
        if (file := bundle.find(path.relative_to(ROOT).as_posix())) is not None:
            sent += len(file.compressed)
    assert sent < FIRST_PAINT_BYTES_MAX


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("page")
    key = LocalKey(folder / "local-key", "cordee-secret")
    with running(None, folder, authenticator=Authenticator(local_key=key)) as started:
        yield started


def test_the_page_is_for_browsers_and_programs_get_what_they_know(server: Running) -> None:
    page = server.request("GET", "/", headers={"Accept": "text/html,*/*"})
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    headers = {"Authorization": "Bearer cordee-secret"}
    assert server.request("GET", "/", headers=headers).body == b"Ollama is running"
    assert server.request("GET", "/").status == 401


def test_files_are_kept_for_good_and_only_those_of_this_release_are_there(server: Running) -> None:
    path = re.search(rb'src="(/static/\w+)/shell/main.js"', Bundle().document.encode()).group(1).decode()
    found = server.request("GET", f"{path}/shell/main.js", headers={"Accept-Encoding": "gzip"})
    assert found.status == 200
    assert "immutable" in found.headers["cache-control"]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert gzip.decompress(found.body) == (ROOT / "shell" / "main.js").read_bytes()
    for other in ("/static/0000/shell/main.js", f"{path}/shell/none.js", f"{path}/../pages.py"):
        reply = server.request("GET", other)
        assert (reply.status, reply.headers["cache-control"]) == (404, "no-store")


def test_a_session_is_a_cookie_that_counts_for_the_page_alone(server: Running) -> None:
    page = {"X-Cordee-Page": "1"}
    assert server.request("GET", "/session", headers=page).json["key_needed"]
    wrong = server.request("POST", "/session", {"key": "cordee-wrong"}, headers=page)
    assert (wrong.status, wrong.error["code"]) == (401, "invalid_api_key")
    right = server.request("POST", "/session", {"key": " cordee-secret "}, headers=page)
    cookie = right.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "cordee-secret" not in cookie
    signed_in = {"Cookie": cookie.partition(";")[0]}
    assert server.request("GET", "/v1/models", headers=page | signed_in).status == 200
    # What another site could make a browser send has no such header.
    assert server.request("GET", "/v1/models", headers=signed_in).status == 401
    assert server.request("GET", "/session", headers=page | signed_in).json == {
        "key_needed": False,
        "name": "",
        "is_admin": False,
    }
    assert server.request("DELETE", "/session", headers=page | signed_in).status == 200
    assert server.request("GET", "/v1/models", headers=page | signed_in).status == 401


def test_no_other_origin_is_told_that_it_may_send_a_session(server: Running) -> None:
    asked = {
        "Origin": "http://127.0.0.1:1",  # a page of this machine may use the API, but not somebody's session
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-cordee-page,content-type",
    }
    reply = server.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert "access-control-allow-credentials" not in reply.headers
    foreign = {"Origin": "http://evil.example", "X-Cordee-Page": "1"}
    assert server.request("POST", "/session", {"key": "cordee-secret"}, headers=foreign).status == 403


def test_cordee_open_prints_the_page_of_a_server(server: Running, home: Path) -> None:
    printed = CliRunner().invoke(cordee, ["open", "--port", str(server.port)])
    assert (printed.exit_code, printed.output) == (0, f"http://127.0.0.1:{server.port}/\n")
    with pytest.raises(NotRunning, match="cordee up"):
        open_page.callback(port=1)
