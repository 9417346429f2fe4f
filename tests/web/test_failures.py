"""Machines that fall while the page is answered: real nodes of one cluster, ended by SIGKILL."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from cluster_processes import MEMORY, SERVED, Cluster, Node, free_port, until
from page_words import words

pytestmark = pytest.mark.slow
SECONDS = 120_000  # ms; what takes longer hangs, however busy the machine is
BEGUN = re.compile(r"\w \w+ \w")
QUESTION = "Tell me a long story about three climbers on a mountain."


class House:
    """Three nodes of which any two hold the model; each has the page for other machines, too."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        first = Node(folder / "a")
        first.home.mkdir()
        self.key = first.do("key", "add", "ana").split()[-1]
        for name in "abc":
            peer = () if name == "a" else ("--peer", f"127.0.0.1:{self.cluster.port}")
            self.cluster.add(name, "--lan", f"127.0.0.1:{free_port()}", *peer)
        self.nodes = self.cluster.nodes
        self.nodes["a"].do("deploy", "starter", *SERVED)
        until(lambda: self.nodes["a"].model("starter")["state"] == "serving")

    @property
    def page(self) -> str:
        told = self.nodes["a"].do("open").strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", told)
        return told.rstrip("/")

    def kill(self, name: str) -> None:
        process = self.nodes[name].process
        assert process is not None
        agent = psutil.Process(process.pid)
        agent.suspend()  # or it would notice that its workers end
        for each in (*agent.children(recursive=True), agent):
            each.kill()
        process.wait()

    def runs_stages(self) -> list[str]:
        """The nodes beside the first that run stages."""
        nodes = self.nodes["a"].asked("/nodes")["nodes"]
        return [each["name"] for each in nodes if each["stages"] and not each["self"]]


@pytest.fixture
def house(starter_path: Path, short_path: Path) -> Iterator[House]:
    with closing(Cluster(short_path, starter_path, "--memory", MEMORY, "--scouting", "off")) as cluster:
        yield House(short_path, cluster)


def ask(page: Page) -> None:
    page.keyboard.press("Control+Shift+O")
    page.locator(".composer textarea").fill(QUESTION)
    page.keyboard.press("Enter")


def whole(page: Page) -> str:
    """The text of the answer, once it is complete."""
    expect(page.locator(".message.assistant .actions")).to_be_visible(timeout=SECONDS)
    return page.locator(".message.assistant .text").inner_text()


def test_answers_go_on_and_another_machine_is_named(house: House, visit: Callable[..., Page]) -> None:
    t = words("en")
    page = visit(house.page)
    page.get_by_role("button", name=t("chat.settings")).click()
    page.get_by_label(re.compile(f"^{t('chat.temperature')}")).fill("0")
    page.get_by_label(t("chat.length")).select_option("150")
    ask(page)
    undisturbed = whole(page)
    assert len(undisturbed) > 200

    ask(page)
    text = page.locator(".message.assistant .text")
    expect(text).to_have_text(BEGUN, timeout=SECONDS)
    [fallen, *_] = house.runs_stages()
    house.kill(fallen)
    expect(page.locator(".progress")).to_contain_text(t("chat.healing"), timeout=SECONDS)
    expect(page.locator(".progress")).to_contain_text(t("chat.healed"), timeout=SECONDS)
    assert whole(page) == undisturbed

    # The page's own node: what was said stays, and the page names the machine that is left.
    ask(page)
    expect(text).to_have_text(BEGUN, timeout=SECONDS)
    house.kill("a")
    fault = page.locator(".message.assistant [role=alert]")
    expect(fault).to_contain_text(t("shell.error.unreachable"), timeout=SECONDS)
    begun = text.inner_text()
    assert begun
    assert undisturbed.startswith(begun.rstrip())
    [left] = {"b", "c"} - {fallen}
    link = fault.get_by_role("link", name=left, exact=True)
    url = link.get_attribute("href") or ""
    visit.faults.clear()  # requests that nobody answered

    other = visit(url.rstrip("/"), ignore_https_errors=True)
    other.get_by_label(t("shell.sign_in.key")).fill(house.key)
    other.keyboard.press("Enter")
    expect(other.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    visit.faults.clear()
