"""The page's words, as its reader sees them."""

import json
from collections.abc import Callable
from typing import NamedTuple

from cordee.web.bundle import ROOT

LOCALES = {"en": "en-GB", "fr": "fr-FR"}


class Reader(NamedTuple):
    """Somebody who looks at the page: a `language`, `en` or `fr`, and a screen, `desk` or `phone`."""

    language: str
    size: str

    @property
    def t(self) -> Callable[..., str]:
        """The page's words in that language."""
        return words(self.language)

    @property
    def view(self) -> dict[str, str]:
        """How to `visit` the page: see tests/web/conftest.py."""
        return {"language": LOCALES[self.language], "size": self.size}


def words(language: str) -> Callable[..., str]:
    """`t(key, name=value, …)` in a language, `en` or `fr`."""
    known: dict[str, str] = {}
    for path in (ROOT / "i18n").glob(f"*.{language}.json"):
        known |= json.loads(path.read_text(encoding="utf-8"))

    def t(key: str, **values: object) -> str:
        text = known[key]
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        return text

    return t
