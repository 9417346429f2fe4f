"""A colleague's machine with a browser and nothing else, beside three that serve; none has a way out."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import cordee
from cordee.access.lan import PORT
from netcapture import captured, conversations, is_tls
from netcluster import Node, until
from netlab import NETNS, Lab, Machine, run
from page_words import LOCALES, words

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
MEMORY = "250MB"  # any two machines hold the starter model as it is served here
SERVED = ("--context", "1024", "--sequences", "4")
MINUTE_MS = 60_000
NETWORK = "10.78.0"  # beside that of the other tests' lab

expect.set_options(timeout=MINUTE_MS)


class House:
    """Three nodes that serve other machines, the keys of ana (who asks) and chef (an admin), and a browser on
    a fourth host."""

    def __init__(self, lab: Lab, starter: Path) -> None:
        self.lab = lab
        self.nodes = [Node(host, "--lan", "--memory", MEMORY) for host in lab.hosts[:3]]
        first = self.nodes[0]
        first.verb("pull", str(starter), "--name", "starter")
        self.keys = {name: first.verb("key", "add", name).split()[-1] for name in ("ana", "leo")}
        self.keys["chef"] = first.verb("key", "add", "chef", "--admin").split()[-1]
        first.up()
        for node in self.nodes[1:]:
            node.verb("join", first.verb("invite").strip())
            node.up()
        first.verb("deploy", "starter", *SERVED)
        until(lambda: self._state() == "serving", "the model is served")

    def _state(self) -> str:
        models = {each["name"]: each for each in self.nodes[0].ask("/status")["models"]}
        return models.get("starter", {}).get("state", "")

    @property
    def url(self) -> str:
        return f"https://{self.nodes[0].host.address}:{PORT}"


@pytest.fixture(scope="module")
def house(starter_path: Path) -> Iterator[House]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's package chromium")
    os.environ["PYTHONPATH"] = str(Path(cordee.__file__).parents[1])
    with Lab([Machine()] * 4, name="page", network=NETWORK) as lab:
        yield House(lab, starter_path)


@pytest.fixture(scope="module")
def browser(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser in the fourth host's network, which has neither an internet nor name servers."""
    wrapper = tmp_path_factory.mktemp("browser") / "chromium"
    namespace = NETNS / house.lab.hosts[3].namespace
    wrapper.write_text(f'#!/bin/sh\nexec nsenter --net={namespace} {CHROMIUM} "$@"\n')
    wrapper.chmod(0o755)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=wrapper)
        yield started
        started.close()


class Visitor:
    """A new profile of the browser: a page, and all that it asked for."""

    def __init__(self, browser: Browser, language: str) -> None:
        # Who comes for the first time is warned of the certificate, and goes on: docs/page.md.
        self.context = browser.new_context(locale=LOCALES[language], ignore_https_errors=True)
        self.context.set_default_timeout(MINUTE_MS)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))

    def sign_in(self, url: str, key: str, language: str) -> None:
        t = words(language)
        self.page.goto(url)
        self.page.get_by_label(t("shell.sign_in.key")).fill(key)
        self.page.keyboard.press("Enter")


def ask(page: Page, question: str) -> str:
    """What an answer begins with; it is stopped then, as the model may go on for long."""
    page.locator(".composer textarea").fill(question)
    page.keyboard.press("Enter")
    text = page.locator(".message.assistant .text").last
    expect(text).to_have_text(re.compile(r"\w"))  # some answers are short
    page.keyboard.press("Escape")
    expect(page.locator(".message.assistant .actions").last).to_be_visible(timeout=MINUTE_MS)
    return text.inner_text()


def test_no_host_has_a_way_out(house: House) -> None:
    for host in house.lab.hosts:
        routes = run("ip", "-n", host.namespace, "route", "show").splitlines()
        assert [route.split()[0] for route in routes] == [f"{NETWORK}.0/24"]


@pytest.mark.parametrize(("language", "name"), [("en", "ana"), ("fr", "leo")])
def test_a_key_in_hand_to_the_first_answer(house: House, browser: Browser, language: str, name: str) -> None:
    """By somebody who has a browser and a key: every step has a minute at most; all of them take seconds."""
    visitor = Visitor(browser, language)
    with captured(house.lab) as frames:
        visitor.sign_in(house.url, house.keys[name], language)
        answer = ask(visitor.page, "The owls are not what they seem.")
    assert answer.strip()
    assert visitor.asked and all(each.startswith(house.url) for each in visitor.asked)
    said = conversations(frames)
    assert said and all(map(is_tls, said))
    wire = b"".join(frames)
    for secret in ("owls are not", house.keys[name], answer[:20]):
        assert secret.encode() not in wire
    visitor.context.close()


def test_everything_works_without_the_internet(house: House, browser: Browser) -> None:
    """The pages of whoever looks after the machines, from another host: every kind of thing they do."""
    t = words("en")
    visitor = Visitor(browser, "en")
    page = visitor.page
    visitor.sign_in(f"{house.url}/cluster", house.keys["chef"], "en")
    expect(page.locator("svg .machine")).to_have_count(3)
    expect(page.get_by_text(t("cluster.health.serving"))).to_be_visible()

    page.get_by_role("link", name=t("shell.page.models"), exact=True).click()
    story = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="story-small"))
    story.get_by_role("button", name=t("models.pull")).click()
    confirm(page, t("models.pull"))
    idle = page.get_by_role("region", name=t("models.idle"))
    idle.get_by_role("button", name=t("models.deploy"), exact=True).click()
    confirm(page, t("models.deploy"))
    served = page.get_by_role("region", name=t("models.served"), exact=True)
    mine = served.get_by_role("listitem").filter(has_text="story-small")
    expect(mine.get_by_text(t("common.model.serving"))).to_be_visible()

    page.get_by_role("link", name=t("shell.page.admin"), exact=True).click()
    page.get_by_role("button", name=t("admin.invite")).click()
    confirm(page, t("admin.invite"))
    expect(page.get_by_role("img", name=t("admin.invite.qr"))).to_be_visible()
    page.get_by_label(t("admin.key.for")).fill("zoe")
    page.get_by_role("button", name=t("admin.key.make")).click()
    confirm(page, t("admin.key.make"))
    expect(page.get_by_role("img", name=t("admin.key.qr", name="zoe"))).to_be_visible()

    page.get_by_role("link", name=t("shell.page.chat"), exact=True).click()
    page.locator(".picker select").select_option("story-small")
    assert ask(page, "Once upon a time").strip()
    assert all(each.startswith((house.url, "blob:")) for each in visitor.asked)
    visitor.context.close()


def confirm(page: Page, action: str) -> None:
    """Press the button of the dialog, and wait until it is done."""
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_when_the_machine_of_the_page_falls_another_one_answers(house: House, browser: Browser) -> None:
    """The last one: its first node is gone."""
    t = words("en")
    visitor = Visitor(browser, "en")
    visitor.sign_in(house.url, house.keys["chef"], "en")
    assert ask(visitor.page, "Hello").strip()
    house.nodes[0].host.crash()  # and nothing on the wire says so
    visitor.page.locator(".composer textarea").fill("And now?")
    visitor.page.keyboard.press("Enter")
    fault = visitor.page.locator(".message.assistant [role=alert]").last
    expect(fault).to_contain_text(t("shell.error.unreachable"))
    url = fault.get_by_role("link").first.get_attribute("href") or ""
    other = Visitor(browser, "en")
    other.sign_in(url, house.keys["ana"], "en")
    expect(other.page.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    assert ask(other.page, "Tell me about the sea.").strip()
