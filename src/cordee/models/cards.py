"""Model cards: models known by a short name, as data (one file each in cards/ beside this file)."""

import sys
import tomllib
from functools import cache
from pathlib import Path

import msgspec

FOLDER = Path(__file__).with_name("cards")


class CardShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large a model is, as its header would say, so that it can be planned without the file.

    The fields are those of the cluster's `ModelShape`, averaged over the layers. `head_bytes` are read for
    every token, and with `tied` they are the embedding; of each `window_period` layers all but the last have
    a sliding window.
    """

    n_embd: int
    n_vocab: int
    layer_bytes: int
    active_bytes: int
    cell_bytes: int
    row_floats: int
    embedding_bytes: int
    head_bytes: int
    last_extra_bytes: int
    window_period: int = 1
    tied: bool = False

    @property
    def whole_extra_bytes(self) -> int:
        """Bytes beside the layers in the whole model."""
        return self.embedding_bytes + (0 if self.tied else self.head_bytes)


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known about a model without having it.

    `source` is what `pull` fetches from the hub: 'owner/name:QUANTIZATION'. For a model that comes with the
    program, `file` is its name beside the card, or `installed` its path in the Python environment, where
    set-up puts it; such a model need not be on the hub. `parameters` counts all weights, `active_parameters`
    those used for one token; `purpose` says in a few words what it is for. `languages` are ISO 639-1 codes;
    where a model has more than are listed, `language_count` says how many.
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
    purpose: str
    notes: str
    language_count: int = 0
    file: str = ""
    installed: str = ""
    shape: CardShape | None = None

    @property
    def path(self) -> Path | None:
        """The model file, if it came with the program and is still there."""
        path = FOLDER / self.file if self.file else Path(sys.prefix) / self.installed
        return path if path.is_file() else None


@cache
def cards() -> dict[str, Card]:
    """All cards by name."""
    read = [
        msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Card)
        for path in FOLDER.glob("*.toml")
    ]
    return {card.name: card for card in sorted(read, key=lambda card: card.name)}
