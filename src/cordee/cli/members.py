"""`cordee invite`, `join`, `drain`, `leave`, `remove`, `admin`: who is a member, an admin, takes stages."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from cordee.errors import BadRequest, DoesNotFit, IdentityDamaged, NotRunning
from cordee.terminal import output

POLL_SECONDS = 0.5
# How long a stage may fit nowhere else before that is an error: other nodes may still be starting.
STUCK_SECONDS = 5.0
END_SECONDS = 30.0  # for the agent to end its stages and links


@click.command()
@click.option(
    "--admin", is_flag=True, help="Invite an admin: a machine that can invite and remove nodes, too."
)
def invite(admin: bool) -> None:
    """Print a code with which one more machine can join the cluster.

    It works once, for 15 minutes, while this node runs. Anybody who has it can join: pass it on in person or
    in a private message. Only admins can invite; the machine that created the cluster is one.
    """
    from cordee.agent import control
    from cordee.net import address, enrolment

    found = control.ask("POST", "/invite", control.Invite(admin), dict[str, str])
    code = found["code"]
    click.echo(code)
    output.note("On the other machine: cordee join CODE, then cordee up")
    if found["advice"]:
        output.note(f"Advice: {found['advice']}")
    if all(map(address.is_loopback, enrolment.read_code(code).addresses)):
        output.note(
            "But this node listens on 127.0.0.1, so no other machine can reach it, and only another node on "
            "this machine can use the code: `cordee doctor` says what to do."
        )


@click.command()
@click.argument("code")
def join(code: str) -> None:
    """Make this machine a member of a cluster; CODE is what `cordee invite` printed there."""
    from cordee.net import enrolment
    from cordee.net.members import Members, advice

    member = enrolment.join(code)
    output.note(f"This machine is node {member.node} of cluster {member.cluster}. Now: cordee up")
    members = Members(member)
    admins = [admin.name for admin in members.admins]
    if not member.is_admin and (said := advice(admins, len(members.known) + 1)):
        output.note(f"Advice: {said}")


@click.command()
@click.option("--off", is_flag=True, help="Let this node run models again.")
@click.option("--no-wait", is_flag=True, help="Do not wait until nothing runs here any more.")
def drain(off: bool, no_wait: bool) -> None:
    """Move what runs on this node to other nodes, without losing an answer.

    The node stays a member and answers clients through the others, but runs no part of a model until --off
    or its next start. Exits 6 if something fits on no other node: it stays until a machine can take it.
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
    """Drain this node, and take this machine out of the cluster.

    Its models stay in the store. With a new code it can join again, as a new node.
    """
    from cordee.agent import control
    from cordee.net import identity

    if not identity.exists():
        raise BadRequest("This machine does not belong to a cluster.")
    if not yes:
        _confirm()
    try:
        with contextlib.suppress(DoesNotFit):  # then the cluster goes on without it
            _drain()
        control.ask("POST", "/leave")
    except NotRunning:
        identity.forget()
        output.note("This machine no longer belongs to a cluster.")
        return
    _until_forgotten()


@click.command()
@click.argument("node")
def remove(node: str) -> None:
    """Remove NODE (its name or id) from the cluster for good.

    For a machine that was lost or stolen, for example: the other nodes no longer talk to it. A node that is
    off now learns of it when it is back. Only admins can remove nodes.
    """
    from cordee.agent import control

    removed = control.ask("POST", "/remove", control.Remove(node), dict[str, Any])
    output.note(f"{removed['name']} ({removed['id']}) is removed for good.")
    if removed["admin"]:
        output.note(
            "It was an admin and still holds the cluster's key: with it, that machine can add members. If it "
            "is in the wrong hands, create a new cluster: `cordee leave` on every node, then `cordee up`."
        )


@click.group()
def admin() -> None:
    """Make admins of members: machines that can invite, renew and remove others."""


@admin.command()
@click.argument("node")
def add(node: str) -> None:
    """Make an admin of NODE (its name or id), a member that is running now.

    It gets the cluster's key, which cannot be taken back: with it, that machine can add and remove members.
    So choose one that is behind a locked door. Have two admins, in case one is lost. Only admins can do this.
    """
    from cordee.agent import control

    added = control.ask("POST", "/admin", control.AddAdmin(node), dict[str, Any])
    output.note(f"{added['name']} ({added['id']}) confirms that it is an admin now.")


def _drain() -> None:
    """Drain the agent's node, and show what is still to move.

    Raises:
        DoesNotFit: what is left fits on no other node.
    """
    stuck_since = None
    with output.loading() as report:
        reported = ""
        for stays in _stays():
            text = ", ".join(f"layers {s['layers'][0]}-{s['layers'][1] - 1} of {s['model']}" for s in stays)
            if text != reported:
                report(f"still here: {text}")
            reported = text
            reasons = {stage["why"] for stage in stays}
            if "" in reasons:
                stuck_since = None
            else:
                stuck_since = stuck_since or time.monotonic()
                if time.monotonic() - stuck_since > STUCK_SECONDS:
                    raise DoesNotFit(
                        f"No other node can take {text}. {' '.join(sorted(reasons))} They stay until one "
                        "can; `cordee drain --off` keeps them here."
                    )


def _stays() -> Iterator[list[dict[str, Any]]]:
    """Ask the agent to drain, again and again; yield the stages still there, until there are none."""
    from cordee.agent import control

    while stays := control.ask("POST", "/drain", control.Drain(), dict[str, Any])["stays"]:
        yield stays
        time.sleep(POLL_SECONDS)


def _confirm() -> None:
    from cordee.net import identity

    if not sys.stdin.isatty():
        raise BadRequest("Leaving cannot be undone: confirm with --yes.")
    with contextlib.suppress(IdentityDamaged):
        if identity.load().is_admin:
            output.note("This node is an admin. Without another one, nobody can invite or remove nodes.")
    click.confirm("Leave the cluster for good?", abort=True, err=True)


def _until_forgotten() -> None:
    """Wait for the agent to end: it forgets the identity last."""
    from cordee.net import identity

    ends = time.monotonic() + END_SECONDS
    while identity.exists():
        if time.monotonic() > ends:
            raise NotRunning("The node is still running: stop `cordee up`, then try `cordee leave` again.")
        time.sleep(POLL_SECONDS)
    output.note("This machine no longer belongs to a cluster.")
