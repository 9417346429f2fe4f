"""The chat in a real browser, with a model that says what the test tells it to."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from cordee.serving.local_service import ServiceConfig
from page_words import LOCALES, Reader, words
from scripted_service import ScriptedService
from serving import Running, running

Talk = tuple[Running, ScriptedService]
Visit = Callable[..., Page]

ANSWER = """## Notes

| Pupil | Mark |
|:------|-----:|
| Ana   | 12   |

1. first
2. second

```python
print("hello")
```

So $a_1 * b * c$ stays.
"""


# Draws a text piece by piece, and another time at once; both as HTML.
ALIKE = """async () => {
  const main = document.querySelector("script[type=module]").src;
  const { GrowingText } = await import(new URL("../chat/growing.js", main).href);
  const html = (element) => element.innerHTML.replace(/<[/]?p>|\\s+/g, "");
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  window.grown = async (text, size) => {
    const [one, other] = [document.createElement("div"), document.createElement("div")];
    const growing = new GrowingText(one);
    for (let at = size; at < text.length; at += size) {
      growing.text = text.slice(0, at);
      growing.draw(Infinity);
    }
    for (const each of [growing, new GrowingText(other)]) {
      each.text = text;
      each.isWhole = true;
      each.draw(Infinity);
    }
    await frame();
    return [html(one), html(other)];
  };
}"""


def base(talk: Talk) -> str:
    return f"http://127.0.0.1:{talk[0].port}"


def ask(page: Page, question: str) -> None:
    page.locator(".composer textarea").fill(question)
    page.keyboard.press("Enter")


def beside(page: Page) -> Locator:
    """The list of conversations, which a phone shows when it is asked to."""
    opener = page.locator(".to-side")
    expect(opener).to_be_attached()
    if opener.is_visible() and opener.get_attribute("aria-expanded") == "false":
        opener.click()
    return page.locator(".sidebar")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


@pytest.mark.parametrize(
    ("language", "size"),
    [
        ("en", "desk"),
        ("fr", "phone"),
        pytest.param("fr", "desk", marks=pytest.mark.slow),
        pytest.param("en", "phone", marks=pytest.mark.slow),
    ],
)
def test_a_question_its_answer_and_their_versions(talk: Talk, visit: Visit, language: str, size: str) -> None:
    t, service = words(language), talk[1]
    page = visit(base(talk), language=LOCALES[language], size=size)
    expect(page.get_by_role("heading", name=t("chat.welcome"))).to_be_visible()
    service.script = [f"[think]Let me see.[say]{ANSWER}", "Another one.", "An edited one."]
    ask(page, "What are the marks?")
    text = answers(page).locator(".text")
    expect(text.locator("table td")).to_have_text(["Ana", "12"])
    expect(text.locator("ol li")).to_have_text(["first", "second"])
    expect(text.locator("code .hljs-string")).to_have_text('"hello"')
    expect(text.locator(".formula")).to_have_text("$a_1 * b * c$")
    # Thinking is folded, and there.
    thinking = answers(page).locator("details.thinking")
    expect(thinking.locator(".thoughts")).to_be_hidden()
    thinking.locator("summary").press("Enter")
    expect(thinking.locator(".thoughts")).to_have_text("Let me see.")

    page.get_by_role("button", name=t("chat.again")).click()
    expect(text).to_have_text("Another one.")
    page.get_by_role("button", name=t("chat.version.before")).click()
    expect(text.locator("table")).to_be_visible()
    page.locator(".message.user").get_by_role("button", name=t("chat.edit")).click()
    page.get_by_role("textbox", name=t("chat.edit")).fill("And whose?")
    page.keyboard.press("Enter")
    expect(text).to_have_text("An edited one.")
    page.locator(".message.user").get_by_role("button", name=t("chat.version.before")).click()
    expect(page.locator(".asked")).to_have_text("What are the marks?")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    # What the model was asked: each time the branch that was shown.
    assert [[turn.content for turn in asked.messages] for asked in service.turns] == [
        ["What are the marks?"],
        ["What are the marks?"],
        ["And whose?"],
    ]


def test_what_was_drawn_is_left_alone_while_more_comes(talk: Talk, visit: Visit) -> None:
    service = talk[1]
    page = visit(base(talk))
    service.pause_seconds = 0.002
    rows = "".join(f"| {number} | {number * number} |[say]\n" for number in range(40))
    code = "".join(f"print({number})[say]\n" for number in range(60))
    service.script = [
        f"# Head[say]\n\nBegin.\n\n[say]| n | n² |\n|---|---|\n{rows}\n```python\n{code}```\n\nEnd."
    ]
    ask(page, "Go")
    text = answers(page).locator(".text")
    first, cell = text.locator("h1"), text.locator("td").first
    for each in (first, cell):
        expect(each).to_be_visible()
    page.evaluate("document.querySelector('.text h1').seen = 1")
    code_block = text.locator("pre code")
    expect(code_block).to_contain_text("print(3)")
    page.evaluate("document.querySelector('.text table').seen = 1")
    page.evaluate("document.querySelector('.text pre').seen = 1")
    expect(text.locator("p").last).to_have_text("End.")
    expect(code_block.locator(".hljs-number")).to_have_count(60)
    seen = "['h1', 'table', 'pre'].map(name => document.querySelector('.text ' + name).seen)"
    assert page.evaluate(seen) == [1, 1, 1]
    assert text.locator("tr").count() == 41


LONG = {
    "table": ("| n | n² |\n|---|---:|\n", lambda n: f"| {n} | {n * n}, which is the square |\n", "tbody tr"),
    "ordered": ("", lambda n: f"{n + 1}. item {n + 1}, of which there are many\n", ":scope > ol > li"),
    "loose": ("", lambda n: f"- item {n}\n\n  and more of it\n\n  - below\n\n", ":scope > ul > li"),
}


@pytest.mark.parametrize("kind", ["table", "loose", pytest.param("ordered", marks=pytest.mark.slow)])
def test_a_long_table_or_list_grows_by_its_rows(talk: Talk, visit: Visit, kind: str) -> None:
    """Each row is drawn once for good, and the whole is more than the page reads at a time."""
    head, part, rows = LONG[kind]
    count = 13_000 // len(part(100)) + 1
    service = talk[1]
    page = visit(base(talk))
    service.pause_seconds = 0.0005
    text = head + "".join(map(part, range(count))) + "\nEnd."
    service.script = ["[say]".join(text[at : at + 350] for at in range(0, len(text), 350))]
    ask(page, "Go")
    shown = answers(page).locator(".text")
    found = shown.locator(rows)
    expect(found.nth(3)).to_be_visible()
    page.evaluate("document.querySelectorAll('.text tr, .text li').forEach(each => { each.seen = 1 })")
    expect(shown.locator("p").last).to_have_text("End.")
    expect(found).to_have_count(count)
    seen = found.evaluate_all("all => all.map(each => each.seen ?? 0)")
    assert seen[:3] == [1, 1, 1]
    assert shown.locator(".long").count() == 0
    assert shown.locator("> *").count() == 2  # one block, and the end
    assert "|" not in shown.inner_text()


@pytest.mark.parametrize(
    "text",
    [
        "| a | b |\n|---|---|\n| 1 | 2 |\n-5 | 3 |\n- item\n",
        "1. one\n2. two\n2.5 is between, and belongs to two\n3. three\n- other\n- more\n",
        "- a\n - b\n  - c\n\n      code\n- d\n***\n- e\n\n1) x\n2) y\n",
        "| a |\n|---|\n| 1 |\n| 2 |\n# Head\n- a\n\n  ```js\n  x\n  ```\n- b\n> said\n",
    ],
)
def test_what_comes_token_by_token_is_what_is_drawn_at_once(talk: Talk, visit: Visit, text: str) -> None:
    page = visit(base(talk))
    page.evaluate(ALIKE)
    for size in (1, 2, 5):
        grown, at_once = page.evaluate("([text, size]) => window.grown(text, size)", [text, size])
        assert grown == at_once


def test_a_block_as_long_as_is_read_at_a_time_stays_what_it_is(talk: Talk, visit: Visit) -> None:
    text = f"{'**bold** ' * 1332}.......\n\n- a\n- b\n"
    assert text.index("- a") == 11_997  # so that its line is cut
    page = visit(base(talk))
    page.evaluate(ALIKE)
    _, drawn = page.evaluate("([text, size]) => window.grown(text, size)", [text, len(text)])
    assert drawn.count("<strong>") == 1332 and "<ul" in drawn and 'class="long"' not in drawn


def test_an_answer_is_stopped_and_gone_on_with(talk: Talk, visit: Visit, reader: Reader) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    service.pause_seconds = 0.02
    service.script = ["word [say]" * 2000, "and the end."]
    ask(page, "Go")
    expect(answers(page)).to_contain_text("word word word word")
    expect(answers(page).locator(".progress")).to_contain_text(t("chat.rate", rate=""))
    page.keyboard.press("Escape")
    expect(answers(page).locator(".actions")).to_contain_text(t("chat.ended.stopped"))
    begun = answers(page).locator(".text").inner_text()
    page.get_by_role("button", name=t("chat.go_on")).click()
    expect(answers(page).locator(".text")).to_contain_text("and the end.")
    assert service.turns[1].messages[-1].content.strip() == begun.strip()


@pytest.mark.slow
def test_a_long_question_shows_how_far_it_was_read(starter_path: Path, tmp_path: Path, visit: Visit) -> None:
    config = ServiceConfig(context=8192)
    with running(starter_path, tmp_path, config=config) as server:
        page = visit(f"http://127.0.0.1:{server.port}")
        ask(page, "A long story, which begins here and goes on. " * 600)
        progress = answers(page).locator("progress")
        expect(progress).to_be_visible(timeout=30_000)
        total = int(progress.get_attribute("max") or 0)
        assert 6000 < total < 8192
        assert 0 < int(progress.get_attribute("value") or 0) < total
        page.keyboard.press("Escape")
        expect(answers(page).locator(".actions")).to_contain_text("starter")


def test_settings_reach_the_model(talk: Talk, visit: Visit, reader: Reader) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    page.get_by_role("button", name=t("chat.settings")).click()
    page.get_by_label(t("chat.system")).fill("You are brief.")
    page.get_by_label(re.compile(f"^{t('chat.temperature')}")).fill("1.2")
    page.get_by_label(t("chat.length")).select_option("150")
    page.locator(".drawer").get_by_role("button", name=t("chat.close")).click()
    ask(page, "Hello")
    expect(answers(page).locator(".text")).to_have_text("So it is.")
    [turn], [request] = service.turns, service.requests
    assert [(each.role, each.content) for each in turn.messages] == [
        ("system", "You are brief."),
        ("user", "Hello"),
    ]
    assert (request.sampling.temperature, request.max_tokens) == (1.2, 150)
    assert page.url == base(talk) + "/"


def test_conversations_are_kept_found_exported_imported_and_deleted(
    talk: Talk, visit: Visit, reader: Reader, tmp_path: Path
) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    service.script = ["About an elephant.", "About a giraffe.", "About a mouse."]
    for question in ("One at the École", "Two"):
        beside(page).get_by_role("button", name=t("chat.new")).click()
        ask(page, question)
        expect(answers(page).locator(".actions")).to_be_visible()
        if question != "Two":
            page.get_by_role("button", name=t("chat.again")).click()
            expect(answers(page).locator(".text")).to_have_text("About a giraffe.")
            expect(answers(page).locator(".actions")).to_be_visible()
    page.reload()
    titles = page.locator(".conversations bdi")
    expect(titles).to_have_text(["Two", "One at the École"])
    for search in ("elephant", "ecole"):
        beside(page).get_by_role("searchbox").fill(search)
        expect(titles).to_have_text(["One at the École"])
    titles.click()
    expect(answers(page).locator(".text")).to_have_text("About a giraffe.")

    saved: dict[str, Path] = {}
    for kind, action in (("md", "chat.export.markdown"), ("json", "chat.export.json")):
        beside(page).locator(".menu summary").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=t(action)).click()
        saved[kind] = tmp_path / f"saved.{kind}"
        download.value.save_as(saved[kind])
    [kept] = json.loads(saved["json"].read_text(encoding="utf-8"))["conversations"]
    assert kept["title"] == "One at the École"
    beside(page).get_by_role("searchbox").fill("")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name=t("chat.delete.all"), exact=True).click()
    expect(titles).to_have_count(0)
    for kind, file in saved.items():
        beside(page).locator("input[type=file]").set_input_files(file)
        expect(titles, kind).to_have_text(["One at the École"])
        titles.click()
        expect(page.locator(".asked")).to_have_text("One at the École")
        expect(answers(page).locator(".text")).to_have_text("About a giraffe.")
        before = page.get_by_role("button", name=t("chat.version.before"))
        if kind == "json":  # with all branches
            before.click()
            expect(answers(page).locator(".text")).to_have_text("About an elephant.")
        else:
            expect(before).to_have_count(0)
        beside(page).locator(".menu summary").click()
        page.get_by_role("button", name=t("chat.delete"), exact=True).click()
        expect(titles).to_have_count(0)
    beside(page).locator("input[type=file]").set_input_files(
        {"name": "other.json", "mimeType": "application/json", "buffer": b'{"format": "other"}'}
    )
    expect(page.locator(".sidebar")).to_contain_text(t("chat.import.fault", name="other.json"))
    page.reload()
    expect(beside(page)).to_contain_text(t("chat.none"))


def test_what_goes_wrong_is_said_in_words(talk: Talk, visit: Visit, reader: Reader) -> None:
    from cordee.errors import Overloaded, StageFailed

    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    service.script = [
        ("Il était[say]", StageFailed("stage 2 of starter failed")),
        ("", Overloaded("256 wait")),
    ]
    ask(page, "Raconte")
    expect(answers(page).get_by_role("alert")).to_have_text(t("shell.error.stage_failed"))
    expect(answers(page).locator(".text")).to_have_text("Il était")
    page.get_by_role("button", name=t("chat.again")).click()
    expect(answers(page).get_by_role("alert")).to_have_text(t("shell.error.overloaded"))
    visit.faults.clear()  # the browser notes a status of 503 as an error of its own


def test_a_call_of_a_tool_is_shown_as_what_it_is(talk: Talk, visit: Visit, reader: Reader) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    service.script = ['I look.[call weather]{"city": "Lyon"}']
    ask(page, "Weather?")
    call = answers(page).locator("details.call")
    expect(call.locator("summary")).to_have_text(t("chat.call", name="weather"))
    call.locator("summary").click()
    expect(call.locator("pre")).to_have_text('{"city": "Lyon"}')


def test_code_and_answers_are_copied(talk: Talk, visit: Visit, reader: Reader) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view, permissions=["clipboard-read", "clipboard-write"])
    code = "def f():\n    return 1\n"
    service.script = [f"So:\n\n```python\n{code}```\n\n**Done.**"]
    ask(page, "Go")
    expect(answers(page).locator(".actions")).to_be_visible()
    pressed = page.locator(".code").get_by_role("button")
    pressed.click()
    expect(pressed).to_have_text(t("chat.copied"))
    assert page.evaluate("navigator.clipboard.readText()") == code
    answers(page).locator(".actions").get_by_role("button", name=t("chat.copy"), exact=True).click()
    expect(answers(page).locator(".actions")).to_contain_text(t("chat.copied"))
    assert page.evaluate("navigator.clipboard.readText()") == f"So:\n\n```python\n{code}```\n\n**Done.**"


def test_a_model_is_picked_by_how_it_is(talk: Talk, visit: Visit, reader: Reader, starter_path: Path) -> None:
    t, (server, service) = reader.t, talk
    other = ScriptedService(starter_path, "another")
    other.health = "recovering"
    server.services["another"] = other
    page = visit(base(talk), **reader.view)
    picker = page.get_by_label(t("chat.model"))
    expect(picker.locator("option")).to_have_text(
        [f"another · {t('chat.state.recovering')}", f"scripted · {t('chat.state.ready')}"]
    )
    other.script = ["I am the other."]
    picker.select_option("another")
    ask(page, "Who are you?")
    expect(answers(page).locator(".text")).to_have_text("I am the other.")
    assert service.requests == []
    expect(answers(page).locator(".actions")).to_contain_text("another")
    page.reload()  # what was chosen last stays
    expect(picker).to_have_value("another")


def test_text_runs_in_the_direction_of_its_own_words(talk: Talk, visit: Visit, reader: Reader) -> None:
    service = talk[1]
    page = visit(base(talk), **reader.view)
    service.script = ["مرحبا بالعالم\n\nHello, world.\n\n- שלום\n- عالم\n\n`code`"]
    ask(page, "كيف حالك؟")
    text = answers(page).locator(".text")
    expect(answers(page).locator(".actions")).to_be_visible()
    direction = "each => getComputedStyle(each).direction"
    found = [
        text.locator(name).first.evaluate(direction) for name in ("p:nth-child(1)", "p:nth-child(2)", "ul")
    ]
    assert found == ["rtl", "ltr", "rtl"]
    assert page.locator(".asked").evaluate(direction) == "rtl"


def test_an_answer_goes_on_while_its_reader_is_elsewhere(talk: Talk, visit: Visit, reader: Reader) -> None:
    t, service = reader.t, talk[1]
    page = visit(base(talk), **reader.view)
    service.pause_seconds = 0.01
    service.script = ["word [say]" * 100]
    ask(page, "Go")
    expect(answers(page)).to_contain_text("word")
    page.get_by_role("link", name=t("shell.page.models")).click()
    expect(page).to_have_title(re.compile(t("shell.page.models")))
    page.get_by_role("link", name=t("shell.page.chat")).click()
    expect(answers(page).locator(".actions")).to_contain_text("scripted")
    assert answers(page).locator(".text").inner_text().split() == ["word"] * 100


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_theme_and_language_are_chosen_and_stay(talk: Talk, visit: Visit, theme: str) -> None:
    other = {"light": "dark", "dark": "light"}[theme]
    t, to = words("en"), words("fr")
    page = visit(base(talk), theme=theme)
    page.get_by_role("button", name=t(f"shell.{other}")).click()
    page.get_by_role("button", name="Français").click()
    for _ in range(2):
        expect(page.get_by_role("heading", name=to("chat.welcome"))).to_be_visible()
        assert page.evaluate("document.documentElement.lang") == "fr"
        colour: Any = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 25, 27)"}[other]
        page.reload()
