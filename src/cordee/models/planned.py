"""A model to plan for, which need not be here: one in the store, or one that is only known by its card."""

from dataclasses import dataclass
from pathlib import Path

from cordee.cluster.facts import ModelShape
from cordee.errors import ModelNotFound
from cordee.models.cards import cards
from cordee.models.fit import own_context
from cordee.models.gguf import read_header
from cordee.models.shape import card_shape, model_shape
from cordee.models.store import Store


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for; `context` is the longest it was made for, `stored` whether this machine has it."""

    shape: ModelShape
    context: int | None
    stored: bool = False


def of_file(path: Path, name: str) -> PlannedModel:
    """A GGUF file, or just its header; `name` is what it is called.

    Raises:
        BadModelFile, UnsupportedModel: it is no model, or none that runs here.
    """
    header = read_header(path, weights=False)
    return PlannedModel(model_shape(header, name), own_context(header))


def of_name(store: Store, name: str) -> PlannedModel | None:
    """A model in the store, or a card; None if there is neither. Nothing is downloaded for it.

    Raises:
        BadModelFile, UnsupportedModel: the stored file is damaged, or none that runs here.
    """
    card = cards().get(name)
    try:
        stored = store.get(name)
        path, digest = stored.path, stored.digest
    except ModelNotFound:
        path, digest = card.path if card else None, name
    if path is not None:
        header = read_header(path, name=name)
        return PlannedModel(model_shape(header, digest), own_context(header), stored=True)
    shape = card_shape(card) if card else None
    return None if card is None or shape is None else PlannedModel(shape, card.context)
