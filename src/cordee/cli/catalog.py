"""`cordee models`: the models that are known by a short name, and which of them fit here."""

from typing import TYPE_CHECKING, Any

import click

from cordee.cli import known, options
from cordee.errors import BadRequest, NotRunning
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.cluster.demand import SizeRequest
    from cordee.cluster.facts import ModelShape
    from cordee.cluster.memory import Demand
    from cordee.models.cards import Card

LANGUAGES_SHOWN = 4
# A model of so many languages is listed for each of them, though a card cannot name them all.
LANGUAGES_MANY = 100


@click.command()
@click.option("--fits", is_flag=True, help="Only models that fit this machine, or its cluster.")
@click.option("--language", metavar="CODE", help="Only models for this language: en, fr, de ...")
@click.option("--size", "max_bytes", metavar="SIZE", type=options.Size(), help="Only models of at most SIZE.")
@options.as_json
def models(fits: bool, language: str | None, max_bytes: int | None, as_json: bool) -> None:
    """List the models that have a short name, and which fit here.

    FITS says whether this machine alone can serve a model in the memory that is free now: yes, or with fewer
    answers at a time or less context than usual; "cluster" means that the cluster whose node runs here can.
    `cordee plan` says more, also for machines that you do not have yet. HERE says whether the model is in
    this machine's store, or on which nodes it is. Models of 100 languages and more are listed for every
    --language; how well they know it, try out. Nothing is downloaded for this.
    """
    from cordee.models.cards import cards

    if language is not None and not (len(language) == 2 and language.isascii() and language.isalpha()):
        raise BadRequest(f"{language!r} is not a language code of two letters, such as en or fr.", "language")
    chosen = [card for card in cards().values() if language is None or _speaks(card, language.lower())]
    around = _Surroundings()
    listed = [_facts(card, around) for card in chosen]
    if max_bytes is not None:
        listed = [model for model in listed if model["bytes"] <= max_bytes]
    if fits:
        listed = [model for model in listed if model["fit"]["where"] != "nowhere"]
    listed.sort(key=lambda model: (model["bytes"], model["name"]))
    if as_json:
        output.print_json(listed)
    elif listed:
        header = ("NAME", "FOR", "LANGUAGES", "SIZE", "LICENCE", "FITS", "HERE")
        output.print_table(header, [_row(model, language or "") for model in listed])
    else:
        output.note("No model is like that. `cordee models` lists all that have a short name.")


class _Surroundings:
    """What decides which models fit and are here, looked up once."""

    def __init__(self) -> None:
        from cordee.machine import sizing
        from cordee.models.store import Store

        self.stored = {model.name: model for model in Store().list(output.note) if model.path.is_file()}
        self.room_bytes = sizing.usable_memory(sizing.chosen_devices(()))
        self.cluster = known.cluster_models()


def _speaks(card: "Card", language: str) -> bool:
    return language in card.languages or card.language_count >= LANGUAGES_MANY


def _facts(card: "Card", around: _Surroundings) -> dict[str, Any]:
    """A model as values for JSON. `fit` says where it fits, with what, and what that lacks."""
    from cordee.models.catalog import card_facts, place_of, shape_of

    path = place_of(card, around.stored)
    nodes = (around.cluster or {}).get(card.name, {}).get("offered_by", [])
    return card_facts(card, path, nodes) | {"fit": _fit(card, shape_of(card, path), around)}


def _fit(card: "Card", shape: "ModelShape", around: _Surroundings) -> dict[str, Any]:
    from cordee.cluster.demand import SizeRequest, usual_context
    from cordee.cluster.memory import stage_of
    from cordee.models.fit import verdict

    requested = SizeRequest(None, None, usual_context(card.context))
    alone = verdict([stage_of(shape, 0, shape.layers)], requested, around.room_bytes)
    where, demand = "here", alone.demand
    if not alone.fits:
        in_cluster = _planned(card.name, shape, requested) if around.cluster is not None else None
        where = "nowhere" if in_cluster is None else "cluster"
        demand = in_cluster or demand
    lacks = requested.shortened(demand) if where != "nowhere" else ""
    return {"where": where} | demand._asdict() | {"lacks": lacks}


def _planned(name: str, shape: "ModelShape", requested: "SizeRequest") -> "Demand | None":
    """What the cluster could serve a model with; None if it cannot."""
    from cordee.agent import control

    try:
        found = control.ask("POST", "/plan", control.PlanRequest(name, shape, requested), control.Planned)
    except NotRunning:  # it ended meanwhile
        return None
    return found.demand if found.plan.placement is not None else None


def _row(model: dict[str, Any], language: str) -> tuple[str, ...]:
    here = "yes" if model["here"] else ", ".join(model["nodes"]) or "-"
    about = (
        model["name"],
        model["purpose"],
        _languages(model, language.lower()),
        output.size(model["bytes"]),
        model["license"],
    )
    return (*about, _fit_words(model["fit"]), here)


def _languages(model: dict[str, Any], first: str) -> str:
    """Some of a model's languages, the one that was asked for first, and how many more there are."""
    shown = sorted(model["languages"], key=lambda code: code != first)[:LANGUAGES_SHOWN]
    more = model["language_count"] - len(shown)
    return " ".join([*shown, f"+{more}"] if more else shown)


def _fit_words(fit: dict[str, Any]) -> str:
    from cordee.cluster.demand import answers

    if fit["where"] != "here":
        return {"cluster": "cluster", "nowhere": "no"}[fit["where"]]
    if not fit["lacks"]:
        return "yes"
    context = f", {fit['context']} tokens" if "context" in fit["lacks"] else ""
    return answers(fit["sequences"]) + context
