"""Model cards: models known by a short name, as data (one file each in cards/ beside this file)."""

import tomllib
from functools import cache
from importlib.resources import files

import msgspec


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a model without having it.

    `source` is what `pull` fetches from the hub: 'owner/name:QUANTIZATION'. `installed` is where set-up puts
    the model under the environment's folder, for one that comes with the program. `parameters` counts all
    weights, `active_parameters` those that work on one token; `languages` are ISO 639-1 codes, and where a
    model has too many to list, the notes say how many.
    """

    name: str
    title: str
    source: str
    architecture: str
    license: str
    parameters: int
    active_parameters: int
    layers: int
    context: int
    languages: list[str]
    notes: str
    installed: str = ""


@cache
def cards() -> dict[str, Card]:
    """All cards by name."""
    folder = files("cordee.models") / "cards"
    read = [
        msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Card)
        for path in folder.iterdir()
        if path.name.endswith(".toml")
    ]
    return {card.name: card for card in sorted(read, key=lambda card: card.name)}
