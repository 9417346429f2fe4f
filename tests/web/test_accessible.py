"""axe-core finds nothing on any page, in either theme, at either size; and the keyboard alone is enough."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from page_words import words
from scripted_service import ScriptedService
from serving import Running

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
Talk = tuple[Running, ScriptedService]
ANSWER = "# T\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\ndef f(x):  # why\n    return 'a' + 1\n```\n\n[l](https://a.example)"


def violations(page: Page) -> list[str]:
    """What axe-core finds, each with the element."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(talk: Talk, visit: Callable[..., Page], theme: str) -> None:
    t, (server, service) = words("en"), talk
    base = f"http://127.0.0.1:{server.port}"
    page = visit(base, theme=theme, bypass_csp=True)  # for axe, which is no part of the page
    expect(page.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    assert violations(page) == []
    service.script = [f"[think]I think.[say]{ANSWER}[call tool]{{}}", "Again."]
    page.locator(".composer textarea").fill("Go")
    page.keyboard.press("Enter")
    expect(page.locator(".code .hljs-keyword").first).to_be_visible()
    page.get_by_role("button", name=t("chat.settings")).click()
    page.locator("details.thinking summary").click()
    assert violations(page) == []
    for name in ("cluster", "models", "admin"):
        page.get_by_role("link", name=t(f"shell.page.{name}"), exact=True).click()
        page.wait_for_load_state("networkidle")
        assert violations(page) == [], name


def test_the_keyboard_alone_does_it(talk: Talk, visit: Callable[..., Page]) -> None:
    t, (server, service) = words("en"), talk
    service.script = ["One.", "Two."]
    page = visit(f"http://127.0.0.1:{server.port}")
    expect(page.locator(".composer textarea")).to_be_focused()
    page.keyboard.type("Go")
    page.keyboard.press("Enter")
    text = page.locator(".message.assistant .text")
    expect(text).to_have_text("One.")

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Shift+Tab")
            focused = page.evaluate_handle("document.activeElement").as_element()
            assert focused is not None
            if name in (focused.get_attribute("aria-label"), focused.inner_text().strip()):
                return
        raise AssertionError(f"{name} is not reached")

    expect(page.get_by_role("button", name=t("chat.again"))).to_be_visible()
    tab_to(t("chat.again"))
    page.keyboard.press("Enter")
    expect(text).to_have_text("Two.")
    page.keyboard.press("Control+k")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    expect(page.locator(".composer textarea")).to_be_focused()
