"""`cordee key` and `cordee usage`: who may ask at the API, and what each used."""

import contextlib
import re
import time
from collections.abc import Generator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options
from cordee.errors import BadRequest, NotRunning
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.agent.node_keys import NodeKeys

HOUR_SECONDS = 3600
SPANS = {"h": HOUR_SECONDS, "d": 24 * HOUR_SECONDS, "w": 7 * 24 * HOUR_SECONDS, "y": 365 * 24 * HOUR_SECONDS}
NO_LIMIT = "none"
KEY_HEADER = ("NAME", "STATE", "MAY", "LIMIT", "MADE", "EXPIRES")
USAGE_HEADER = ("KEY", "REQUESTS", "TOKENS IN", "TOKENS OUT", "LAST")


class Moment(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A moment to come, in seconds since 1970: a date (2027-06-30, its end), or a time from now (90d)."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        if match := re.fullmatch(r"(\d{1,5})([hdwy])", text):
            return time.time() + int(match[1]) * SPANS[match[2]]
        try:
            found = datetime.strptime(text, "%Y-%m-%d").astimezone().timestamp() + SPANS["d"]
        except (ValueError, OverflowError):
            self.fail(
                f"{text!r} is neither a date such as 2027-06-30 nor a time from now such as 90d.", param, ctx
            )
        if found <= time.time():
            self.fail(f"{text} is over already.", param, ctx)
        return found


@click.group()
def key() -> None:
    """Make, list, limit and revoke the keys with which other people and machines may ask.

    In a cluster all nodes know them, and admins make them; a machine that is in no cluster has its own.
    """


@key.command("add")
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key may see what all used, and change what is served.")
@click.option(
    "--limit",
    metavar="LIMIT",
    help="Its bounds, in the whole cluster: requests=4 at once, tokens=20000/min of prompts and answers, or "
    "both with a comma.",
)
@click.option(
    "--expires", metavar="WHEN", type=Moment(), help="A date (2027-06-30), or a time from now (12h, 90d)."
)
@options.as_json
def add_key(name: str, admin: bool, limit: str | None, expires: float | None, as_json: bool) -> None:
    """Make a key for NAME: a person, a class room or a program.

    It is shown this once and stored only as a hash: pass it on in person or in a private message. It is sent
    as `Authorization: Bearer KEY` or `x-api-key: KEY`, which programs do with what they call an API key.
    """
    from cordee.access import limits

    requests, tokens = limits.parse(limit) if limit else (0, 0)
    bounds = {"admin": admin, "requests": requests, "tokens": tokens, "expires": expires or 0.0}
    shown = _add(name, bounds)
    if as_json:
        output.print_json({"name": name, "key": shown})
        return
    click.echo(shown)
    output.note(f"This is the only time that the key of {name} is shown.")


@key.command("ls")
@options.as_json
def list_keys(as_json: bool) -> None:
    """List the keys: for whom, what they may, until when."""
    from cordee.access.keyring import described
    from cordee.access.keys_file import KeysFile, folder

    found = [described(each, time.time()) for each in KeysFile(folder()).read() if each.id]
    if as_json:
        output.print_json(found)
    elif not found:
        output.note("There is no key yet: cordee key add NAME")
    else:
        output.print_table(KEY_HEADER, [_row(each) for each in found])


@key.command("limit")
@click.argument("name")
@click.argument("limit")
def limit_key(name: str, limit: str) -> None:
    """Change the bounds of the key of NAME.

    LIMIT is requests=4 (at once), tokens=20000/min, both with a comma, or none.
    The key stays the same, and whoever has it goes on using it. All nodes know of it within a second.
    """
    from cordee.access import limits
    from cordee.agent import control

    requests, tokens = (0, 0) if limit == NO_LIMIT else limits.parse(limit)
    try:
        control.ask("POST", "/keys/limit", control.LimitKey(name, requests, tokens))
    except NotRunning:
        with _offline() as keys:
            keys.limit(name, requests, tokens)
    written = limits.written(requests, tokens)
    output.note(f"The key of {name} has {f'the limit {written}' if written else 'no limit of its own'}.")


@key.command("rm")
@click.argument("name")
def remove_key(name: str) -> None:
    """Revoke the key of NAME, on all nodes, within a second.

    Answers that are under way for it end, too. A node that is off now learns of it when it is back.
    """
    from cordee.agent import control

    try:
        control.ask("POST", "/keys/remove", control.RemoveKey(name))
    except NotRunning:
        with _offline() as keys:
            keys.remove(name)
    output.note(f"The key of {name} is revoked.")


@click.command()
@options.as_json
def usage(as_json: bool) -> None:
    """Show what each key used: requests and tokens, never what was asked.

    While `cordee up` runs here, it is what was counted at all machines of the cluster that are there; else
    what was counted at this one. What needed no key, as it came from a machine itself, is one line. Energy is
    that of the machines that were asked, while they answered, shared by tokens; where something measures it.
    """
    from cordee.access.ledger import Ledger
    from cordee.agent import control
    from cordee.api.usage import rows

    try:
        found = control.ask("GET", "/usage", kind=list[dict[str, Any]])
    except NotRunning:
        found = rows(Ledger().read())
    if as_json:
        output.print_json(found)
        return
    has_energy = any(each["joules"] is not None for each in found)
    lines = [
        (
            each["key"],
            str(each["requests"]),
            str(each["tokens_in"]),
            str(each["tokens_out"]),
            _day(each["last"]),
            *(["-" if each["joules"] is None else f"{each['joules'] / 3.6e6:.3f} kWh"] if has_energy else []),
        )
        for each in found
    ]
    output.print_table((*USAGE_HEADER, *(["ENERGY"] if has_energy else [])), lines)


def _add(name: str, bounds: Mapping[str, float | bool]) -> str:
    from cordee.agent import control

    try:
        asked = control.AddKey(name, **bounds)  # pyright: ignore[reportArgumentType] - by name
        return control.ask("POST", "/keys/add", asked, dict[str, str])["key"]
    except NotRunning:
        with _offline() as keys:
            return keys.add(name, bounds)


@contextlib.contextmanager
def _offline() -> "Generator[NodeKeys]":
    """This machine's keys where no agent has them; none starts meanwhile.

    Raises:
        NotRunning: it is in a cluster, and no admin of it.
    """
    from cordee.access.keys_file import NoCluster
    from cordee.agent.control import AgentSocket
    from cordee.agent.node_keys import NodeKeys
    from cordee.files import home
    from cordee.net import identity

    if not identity.exists():
        yield NodeKeys(NoCluster(), home())
        return
    member = identity.load()
    if not member.is_admin:
        raise NotRunning(
            "This node is no admin: type it on one. `cordee nodes` shows them while the node runs."
        )
    with contextlib.closing(AgentSocket(member.folder)):
        yield NodeKeys(member, member.folder)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["name"],
        found["state"],
        "ask, change" if found["admin"] else "ask",
        found["limit"] or "-",
        _day(found["created"]),
        _day(found["expires"] or 0),
    )


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def refuse_without_key() -> BadRequest:
    """Why the API is not opened to other machines."""
    return BadRequest(
        "Other machines would need a key, and there is none yet: `cordee key add NAME` makes one (on an "
        "admin, in a cluster), then start this again.",
        "lan",
    )
