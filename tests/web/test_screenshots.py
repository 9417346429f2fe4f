"""The pictures of `docs/page.md`, of each page in both languages.

    CORDEE_SCREENSHOTS=docs/images python -m pytest -m '' tests/web/test_screenshots.py

writes them anew; without the variable they are made and thrown away.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from cluster_processes import MEMORY, SERVED, Cluster, until
from page_words import LOCALES, words
from scripted_service import ScriptedService
from serving import Running

pytestmark = pytest.mark.slow
SAID = {
    "en": (
        "Which classes go on the trip, and what does it cost?",
        "Three classes go to Annecy:\n\n| Class | Pupils | Cost |\n|:--|--:|--:|\n| 6A | 24 | 312 € |\n"
        "| 6B | 26 | 338 € |\n| 5A | 22 | 286 € |\n\nThat is **936 €** for 72 pupils, or 13 € each:\n\n"
        "```python\nprint((312 + 338 + 286) / 72)  # 13.0\n```\n\n1. Ask the parents by Friday.\n"
        "2. Book the coach: at most 78 seats.\n",
    ),
    "fr": (
        "Quelles classes partent en sortie, et combien cela coûte-t-il ?",
        "Trois classes vont à Annecy :\n\n| Classe | Élèves | Coût |\n|:--|--:|--:|\n| 6A | 24 | 312 € |\n"
        "| 6B | 26 | 338 € |\n| 5A | 22 | 286 € |\n\nSoit **936 €** pour 72 élèves, donc 13 € chacun :\n\n"
        "```python\nprint((312 + 338 + 286) / 72)  # 13.0\n```\n\n1. Demander l’accord des parents avant "
        "vendredi.\n2. Réserver le car : 78 places au plus.\n",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the pictures go."""
    return Path(os.environ.get("CORDEE_SCREENSHOTS", tmp_path)).resolve()


@pytest.mark.parametrize("size", ["desk", "phone"])
@pytest.mark.parametrize("language", SAID)
def test_the_chat(
    talk: tuple[Running, ScriptedService],
    visit: Callable[..., Page],
    folder: Path,
    language: str,
    size: str,
) -> None:
    (question, answer), t = SAID[language], words(language)
    talk[1].script = [f"[think]{question}[say]{answer}"]
    talk[0].services["example"] = talk[0].services.pop("scripted")
    talk[1].pause_seconds = 0.04
    theme = {"desk": "light", "phone": "dark"}[size]
    page = visit(f"http://127.0.0.1:{talk[0].port}", language=LOCALES[language], size=size, theme=theme)
    page.locator(".composer textarea").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name=t("chat.again"))).to_be_visible()
    expect(page.locator(".code .hljs-number").first).to_be_visible()
    kind = {"desk": "chat", "phone": "phone"}[size]
    page.screenshot(path=folder / f"page-{kind}.{language}.png")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("house"), starter_path, "--memory", MEMORY, "--scouting", "off")
    with closing(made):
        made.add("pc-1")
        for name in ("pc-2", "pc-3"):
            made.add(name, "--peer", f"127.0.0.1:{made.port}")
        made.nodes["pc-1"].do("deploy", "starter", *SERVED)
        until(lambda: made.nodes["pc-1"].model("starter")["state"] == "serving")
        yield made


@pytest.mark.parametrize("language", SAID)
def test_the_pages_of_the_machines(
    cluster: Cluster, visit: Callable[..., Page], folder: Path, language: str
) -> None:
    t, node = words(language), cluster.nodes["pc-1"]
    node.do("key", "add", f"marie-{language}", "--limit", "tokens=20000/min")
    page = visit(node.do("open").strip().rstrip("/"), "/admin", language=LOCALES[language])
    for name in ("admin", "models", "cluster"):
        page.get_by_role("link", name=t(f"shell.page.{name}"), exact=True).click()
        expect(page.locator("main h1, main h2").first).to_be_visible()
        page.wait_for_timeout(3000)  # until what is told once a second is there
        page.screenshot(path=folder / f"page-{name}.{language}.png")
