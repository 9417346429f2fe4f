"""Debian's Chromium, driven by playwright: pages of a real server, and what they asked for."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from page_words import Reader
from scripted_service import ScriptedService, scripted
from serving import Running

SIZES = {"desk": (1280, 800), "phone": (390, 844)}
CHROMIUM = shutil.which("chromium")
HANGS_MS = 120_000  # what takes longer hangs, however busy the machine is

expect.set_options(timeout=HANGS_MS)

if CHROMIUM is None:

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Tests that need a browser say what is missing."""
        here = Path(__file__).parent
        for item in items:
            if item.path.parent == here and "browser" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="needs Debian's package chromium"))


@pytest.fixture(
    params=[
        Reader("en", "desk"),
        pytest.param(Reader("fr", "phone"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def reader(request: pytest.FixtureRequest) -> Reader:
    """Each of the languages and screens; a test that takes it shows what it shows to both."""
    return request.param


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a file; each page has a profile of its own. As root, Chromium has no sandbox.

    While it is open an event loop runs in this thread, and tests of other files could not have theirs.
    """
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture
def talk(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, ScriptedService]]:
    """A server whose model says what a test tells it to."""
    with scripted(starter_path, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a path of a server, as a reader of a `language`, at a screen of a `size`, with a `theme`.

    When the test ends, the page must have asked no host but that one, and met no error of its own.
    """
    asked: list[str] = []
    faults: list[str] = []
    bases: set[str] = set()

    with ExitStack() as stack:

        def visited(
            base: str,
            path: str = "/",
            *,
            language: str = "en-GB",
            size: str = "desk",
            theme: str = "light",
            **more: Any,
        ) -> Page:
            width, height = SIZES[size]
            context = browser.new_context(
                locale=language, viewport={"width": width, "height": height}, color_scheme=theme, **more
            )
            context.set_default_timeout(HANGS_MS)
            stack.callback(context.close)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
            bases.add(base)
            page.goto(base + path)
            return page

        visited.faults = faults
        yield visited
    allowed = tuple(f"{base}/" for base in bases)
    assert [url for url in asked if not url.startswith((*allowed, "blob:", "data:"))] == []
    assert faults == []
