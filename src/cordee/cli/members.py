"""`cordee invite`, `join`, `leave`, `drain`, `remove`: who belongs to the cluster, and who works for it."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from cordee.cli import output
from cordee.errors import BadRequest, DoesNotFit, IdentityDamaged, NotRunning

POLL_SECONDS = 0.5
# A stage that fits nowhere else is given up after that long: other nodes may still be starting.
STUCK_SECONDS = 5.0
END_SECONDS = 30.0  # for the agent to end its stages and links


@click.command()
@click.option("--admin", is_flag=True, help="The new node can invite and remove, too.")
def invite(admin: bool) -> None:
    """Print a code with which one more machine joins.

    It works once, for 15 minutes, as long as this node runs. Whoever has it can join: hand it over in person
    or in a private message.
    """
    from cordee.agent import control

    click.echo(control.ask("POST", "/invite", control.Invite(admin))["code"])
    output.note("On the other machine: cordee join CODE, then cordee up")


@click.command()
@click.argument("code")
def join(code: str) -> None:
    """Make this machine a member of the cluster that CODE invites to."""
    from cordee.net import enrolment

    member = enrolment.join(code)
    output.note(f"This machine is node {member.node} of cluster {member.cluster}. Now: cordee up")


@click.command()
@click.option("--off", is_flag=True, help="Let the node take stages again.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the stages are gone.")
def drain(off: bool, no_wait: bool) -> None:
    """Move the stages of this node to others, without losing an answer, and take no new ones.

    The node stays a member, and answers clients by the others. It takes stages again after --off or when it
    is started anew. Exits 6 if a stage fits nowhere else: it stays, until another machine can take it.
    """
    from cordee.agent import control

    if off:
        control.ask("POST", "/drain", control.Drain(on=False))
    elif no_wait:
        control.ask("POST", "/drain", control.Drain())
    else:
        _drain()


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def leave(yes: bool) -> None:
    """Drain this node, and make this machine a member of no cluster.

    Its models stay in the store. Only a new code makes it a member again, as another node.
    """
    from cordee.agent import control
    from cordee.net import identity

    if not identity.exists():
        raise BadRequest("This machine belongs to no cluster.")
    if not yes:
        _confirm()
    try:
        with contextlib.suppress(DoesNotFit):  # then the cluster goes on without it
            _drain()
        control.ask("POST", "/leave")
    except NotRunning:
        identity.forget()
        output.note("This machine belongs to no cluster any more.")
        return
    _until_forgotten()


@click.command()
@click.argument("node")
def remove(node: str) -> None:
    """Remove NODE (its name or id) from the cluster for good.

    For a machine that was lost or stolen: nobody speaks to it any more. The others learn it as soon as they
    are reached.
    """
    from cordee.agent import control

    gone = control.ask("POST", "/remove", control.Remove(node))
    output.note(f"{gone['name']} ({gone['id']}) is removed for good.")
    if gone["admin"]:
        output.note(
            "It was an admin and still holds the authority's key: whoever has that machine can make members. "
            "If it is in wrong hands, found a new cluster: `cordee leave` on every node, then `cordee up`."
        )


def _drain() -> None:
    """Drain the agent's node, and tell what is still to go.

    Raises:
        DoesNotFit: what is left fits on no other node.
    """
    stuck_since = None
    with output.loading() as report:
        told = ""
        for stays in _stays():
            text = ", ".join(f"layers {s['layers'][0]}-{s['layers'][1] - 1} of {s['model']}" for s in stays)
            if text != told:
                report(f"still here: {text}")
            told = text
            reasons = {stage["why"] for stage in stays}
            if "" in reasons:
                stuck_since = None
            else:
                stuck_since = stuck_since or time.monotonic()
                if time.monotonic() - stuck_since > STUCK_SECONDS:
                    raise DoesNotFit(
                        f"Nowhere else to go for {text}. {' '.join(sorted(reasons))} They stay until another "
                        "machine can take them; `cordee drain --off` keeps them here."
                    )


def _stays() -> Iterator[list[dict[str, Any]]]:
    """Ask for draining again and again; what is still there, until nothing is."""
    from cordee.agent import control

    while stays := control.ask("POST", "/drain", control.Drain())["stays"]:
        yield stays
        time.sleep(POLL_SECONDS)


def _confirm() -> None:
    from cordee.net import identity

    if not sys.stdin.isatty():
        raise BadRequest("This ends the membership for good: say --yes.")
    with contextlib.suppress(IdentityDamaged):
        if identity.load().is_admin:
            output.note("If this is the only admin, nobody can invite or remove nodes any more.")
    click.confirm("Leave the cluster for good?", abort=True, err=True)


def _until_forgotten() -> None:
    """Wait for the agent to end: it forgets the identity last."""
    from cordee.net import identity

    ends = time.monotonic() + END_SECONDS
    while identity.exists():
        if time.monotonic() > ends:
            raise NotRunning("The agent does not end: end it, then `cordee leave` again.")
        time.sleep(POLL_SECONDS)
    output.note("This machine belongs to no cluster any more.")
