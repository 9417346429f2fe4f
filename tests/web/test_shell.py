"""The frame around all pages, in a real browser."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from scripted_service import ScriptedService
from serving import Running

Talk = tuple[Running, ScriptedService]
TITLES = {
    "en-GB": {"/": "Chat", "/cluster": "Machines", "/models": "Models", "/admin": "Administration"},
    "fr-FR": {"/": "Discussion", "/cluster": "Machines", "/models": "Modèles", "/admin": "Administration"},
}


@pytest.mark.parametrize("language", TITLES)
def test_every_page_opens_in_the_browsers_language(
    talk: Talk, visit: Callable[..., Page], language: str
) -> None:
    base = f"http://127.0.0.1:{talk[0].port}"
    page = visit(base, "/", language=language)
    for path, title in TITLES[language].items():
        page.get_by_role("navigation").get_by_role("link", name=title, exact=True).click()
        expect(page).to_have_title(f"{title} · Cordée")
        assert page.url == base + path
