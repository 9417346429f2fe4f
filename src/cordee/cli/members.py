"""`cordee invite`, `join`, `leave`, `drain`, `remove`: who belongs to the cluster."""

import click

from cordee.cli import output

DRAIN_POLL_SECONDS = 0.5
ENDED_POLL_SECONDS = 0.1


@click.command()
@click.option("--keeper", is_flag=True, help="The new node can invite and remove, too.")
def invite(keeper: bool) -> None:
    """Print a code with which one more machine joins.

    It works once, for 15 minutes, as long as this node runs. Whoever has it can join: hand it over in person
    or in a private message.
    """
    from cordee.node import control

    click.echo(control.ask("POST", "/invite", control.Invite(keeper))["code"])
    output.note("On the other machine: cordee join CODE, then cordee up")


@click.command()
@click.argument("code")
def join(code: str) -> None:
    """Make this machine a member of the cluster that CODE invites to."""
    from cordee.node import enrolment

    member = enrolment.join(code)
    output.note(f"This machine is node {member.node} of cluster {member.cluster}. Now: cordee up")
