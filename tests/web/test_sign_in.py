"""From another machine: a browser, a key, an answer; over TLS with the house's certificate."""

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from cordee.access.api_keys import ApiKey
from cordee.access.keyring import Keyring, new_key, revoked
from cordee.api.authenticator import Authenticator
from cordee.api.guard import Access, Through
from cordee.api.server import serve
from cordee.net import address
from cordee.net.server_certificates import OwnAuthority
from page_words import words
from scripted_service import ScriptedService, scripted
from serving import Running

NAME = "office.localhost"  # a name of this machine that browsers resolve without asking anybody


class House:
    """A server for other machines, with keys."""

    def __init__(self, server: Running, service: ScriptedService, keys: dict[str, ApiKey], base: str) -> None:
        self.server, self.service, self.keys, self.base = server, service, keys, base

    def key(self, name: str) -> str:
        self.keys[name], shown = new_key(name, self.keys.values())
        return shown

    def revoke(self, name: str) -> None:
        self.keys[name] = revoked(name, self.keys.values())


@pytest.fixture
def house(starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    keys: dict[str, ApiKey] = {}
    authenticator = Authenticator(Keyring(lambda: tuple(keys.values())))
    own = OwnAuthority(tmp_path / "authority")
    (tmp_path / "api.pem").write_bytes(own.sign(["127.0.0.1", NAME], time.time()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "api.pem", own.folder / "api.key")
    listener = address.listener("127.0.0.1", 0)
    with scripted(starter_path, tmp_path, monkeypatch, authenticator=authenticator) as (server, service):
        assert server.app is not None
        lan = Through(server.app, Access([NAME], is_lan=True))
        serving = asyncio.run_coroutine_threadsafe(serve(lan, listener, context, is_second=True), server.loop)
        yield House(server, service, keys, f"https://{NAME}:{listener.getsockname()[1]}")
        serving.cancel()


@pytest.mark.parametrize("language", ["en", "fr"])
def test_a_key_in_hand_to_an_answer(house: House, visit: Callable[..., Page], language: str) -> None:
    t, key = words(language), house.key("ana")
    page = visit(house.base, language=language, size="phone", ignore_https_errors=True)
    field = page.get_by_label(t("shell.sign_in.key"))
    expect(field).to_be_focused()
    field.fill("cordee-0123456789abcdef-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(t("shell.error.invalid_api_key"))
    field.fill(f" {key}\n")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    page.locator(".composer textarea").fill("Go")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .text")).to_have_text("So it is.")
    assert [request.share for request in house.service.requests] == ["ana"]

    # Neither the key nor the session can be read by what runs in the page; another tab is signed in, too.
    assert page.evaluate("document.cookie") == ""
    assert key not in str(page.evaluate("[{...localStorage}, {...sessionStorage}, location.href]"))
    [cookie] = page.context.cookies()
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Strict")
    assert cookie["expires"] == -1
    assert key not in cookie["value"]
    other = page.context.new_page()
    other.goto(house.base)
    expect(other.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()

    house.revoke("ana")
    page.locator(".composer textarea").fill("And now?")
    page.keyboard.press("Enter")
    expect(page.get_by_label(t("shell.sign_in.key"))).to_be_visible()
    page.get_by_label(t("shell.sign_in.key")).fill(house.key("leo"))
    page.keyboard.press("Enter")
    # Nothing of the conversation is lost.
    expect(page.locator(".asked")).to_have_text(["Go", "And now?"])
    page.get_by_role("button", name=t("shell.sign_out", name="leo")).click()
    expect(page.get_by_label(t("shell.sign_in.key"))).to_be_visible()
    assert page.context.cookies() == []
    visit.faults.clear()  # statuses of 401 are errors to the browser's console
