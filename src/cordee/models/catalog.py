"""The models that have a short name, as values for JSON: `cordee models --json` and the page show these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cordee.cluster.facts import ModelShape
from cordee.errors import CordeeError
from cordee.models.cards import Card
from cordee.models.gguf import read_header
from cordee.models.shape import card_shape, model_shape
from cordee.models.store import StoredModel


def place_of(card: Card, stored: Mapping[str, StoredModel]) -> Path | None:
    """The file of a card's model on this machine, in the store (`stored`, by name) or beside the card."""
    return stored[card.name].path if card.name in stored else card.path


def shape_of(card: Card, path: Path | None) -> ModelShape:
    """From the header, if the file is here, else from the card."""
    try:
        shape = card_shape(card) if path is None else model_shape(read_header(path), card.name)
    except CordeeError:  # damaged: the other models are listed all the same
        shape = card_shape(card)
    assert shape is not None, "a card has a shape, or its file comes with the program"
    return shape


def card_facts(card: Card, path: Path | None, nodes: list[str]) -> dict[str, Any]:
    """What a card says of its model, its place on this machine (`path`), and which `nodes` have it whole."""
    shape = shape_of(card, path)
    return {
        "name": card.name,
        "title": card.title,
        "purpose": card.purpose,
        "languages": card.languages,
        "language_count": max(card.language_count, len(card.languages)),
        "bytes": path.stat().st_size if path else sum(shape.layer_bytes) + shape.whole_extra_bytes,
        "license": card.license,
        "parameters": card.parameters,
        "active_parameters": card.active_parameters,
        "context": card.context,
        "source": card.source or None,
        "notes": card.notes,
        "here": path is not None,
        "nodes": nodes,
    }
