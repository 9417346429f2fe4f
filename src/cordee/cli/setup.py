"""`cordee setup`: a first run in questions, in English or French."""

import os
import sys

import click

from cordee.cli.catalog import models
from cordee.cli.models import STARTER, pull
from cordee.errors import BadRequest, CordeeError
from cordee.terminal import output

TEXTS = {
    "en": {
        "member": "This machine belongs to a cluster already.",
        "alone": "Is there a cluster in the house that this machine is to join?",
        "code": "The code that `cordee invite` printed on another machine",
        "first": "Then it is the first one: `cordee invite` here prints a code for the next.",
        "models": "These models fit here and speak English:",
        "model": "Which one do you want? (Its name; it comes from the internet. `starter` is here already.)",
        "service": "Start Cordée with this machine, as a service?",
        "no service": "Start it with: cordee up",
        "done": "Done. Ask something:",
    },
    "fr": {
        "member": "Cette machine appartient déjà à une grappe.",
        "alone": "Y a-t-il dans la maison une grappe que cette machine doit rejoindre ?",
        "code": "Le code affiché par `cordee invite` sur une autre machine",
        "first": "C’est donc la première : ici, `cordee invite` affiche un code pour la suivante.",
        "models": "Ces modèles tiennent ici et parlent français :",
        "model": "Lequel voulez-vous ? (Son nom ; il vient d’Internet. `starter` est déjà là, en anglais.)",
        "service": "Démarrer Cordée avec cette machine, comme service ?",
        "no service": "Pour le démarrer : cordee up",
        "done": "C’est fait. Posez une question :",
    },
}


@click.command()
@click.option("--language", type=click.Choice(sorted(TEXTS)), help="Of the questions; default: the system's.")
@click.pass_context
def setup(ctx: click.Context, language: str | None) -> None:
    """Set this machine up in a few questions: its cluster, a model, a service.

    Each answer does at once what a verb does: join, pull, service install. Ctrl-C ends it; what is done
    stays, and it can be started again.
    """
    if not sys.stdin.isatty():
        raise BadRequest(
            "Setup asks questions: run it in a terminal. (In a script: join, pull, service install.)"
        )
    language = language or _language()
    texts = TEXTS[language]
    _meet(texts)
    output.note(f"\n{texts['models']}")
    ctx.invoke(models, fits=True, language=language, max_bytes=None, as_json=False)
    _fetch(ctx, texts)
    _serve(texts)
    output.note(f'\n{texts["done"]}\n  cordee run {STARTER} "Hello"\n  cordee open')


def _language() -> str:
    """French where the system speaks it."""
    named = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "fr" if named.startswith("fr") else "en"


def _meet(texts: dict[str, str]) -> None:
    """Become a member of a cluster, if there is one."""
    from cordee.net import enrolment, identity

    if identity.exists():
        output.note(texts["member"])
        return
    while click.confirm(texts["alone"], default=False, err=True):
        try:
            enrolment.join(click.prompt(texts["code"], err=True))
        except CordeeError as error:  # a mistyped code, or one that is too old: ask again
            output.note(error.message)
            continue
        return
    output.note(texts["first"])


def _fetch(ctx: click.Context, texts: dict[str, str]) -> None:
    """Fetch a model, until one is here."""
    while True:
        name = click.prompt(texts["model"], default=STARTER, err=True)
        if name == STARTER:
            return  # comes with the program, and into the store at its first use
        try:
            ctx.invoke(pull, source=name, name=None, pre=None)
        except CordeeError as error:
            output.note(error.message)
            continue
        return


def _serve(texts: dict[str, str]) -> None:
    """Start with the machine, where systemd runs."""
    from cordee.install import service

    if not service.RUNNING.is_dir() or not click.confirm(texts["service"], default=True, err=True):
        output.note(texts["no service"])
        return
    mine = service.own()
    try:
        mine.install(mine.text((), None))
    except CordeeError as error:
        output.note(error.message)
        output.note(texts["no service"])
