"""The page's words, as its reader sees them."""

import json
from collections.abc import Callable

from cordee.web.bundle import ROOT

LOCALES = {"en": "en-GB", "fr": "fr-FR"}


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
