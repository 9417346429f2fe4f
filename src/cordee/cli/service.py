"""`cordee service`: Cordée as a service of this machine or account, with systemd."""

import click

from cordee.cli.up import up
from cordee.errors import NotRunning
from cordee.terminal import output

LINES = 100


@click.group()
def service() -> None:
    """Start Cordée with the machine: install, look at, and remove its service (Linux, systemd).

    With sudo it is a service of the machine, with an account of its own; without, one of your account that
    starts with the machine, too.
    """


@service.command(context_settings={"ignore_unknown_options": True})
@click.option("--print", "only_print", is_flag=True, help="Print the unit, and change nothing.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def install(only_print: bool, options: tuple[str, ...]) -> None:
    """Start `cordee up` now and at each boot, with these OPTIONS of it; again, to change them.

    With --memory SIZE among them, the system holds it to that and to what it needs besides. After a failure
    it is started again. What it says is in the journal: `cordee service logs`.
    """
    from cordee.install import service as services

    asked = up.make_context("cordee up", list(options))  # refuses what `up` would refuse
    mine = services.own()
    text = mine.text(options, asked.params["lent_bytes"])
    if only_print:
        click.echo(text, nl=False)
        return
    mine.install(text)
    who = f"of this machine, as account {services.ACCOUNT}" if mine.for_machine else "of this account"
    output.note(
        f"Cordée runs as a service {who}, and starts with the machine. `cordee service logs` shows its log."
    )
    if mine.for_machine:
        output.note(f"Its verbs: sudo -u {services.ACCOUNT} -H cordee status")


@service.command()
def status() -> None:
    """Say whether the service runs, since when, and with how much memory; exits 13 if it does not."""
    from cordee.install import service as services

    mine = services.own()
    mine.require()
    memory = mine.shown("MemoryCurrent")
    state, since = mine.shown("ActiveState"), mine.shown("ActiveEnterTimestamp")
    facts = [
        ("Service", f"{state} since {since}" if since else state),
        ("At boot", mine.shown("UnitFileState")),
        ("Restarts", mine.shown("NRestarts")),
        ("Memory", output.size(int(memory)) if memory.isdigit() else "not known"),
        ("Unit", str(mine.place)),
    ]
    output.print_facts(facts)
    if not mine.is_active:
        raise NotRunning("The service does not run: `cordee service logs` shows why.")


@service.command()
@click.option("--follow", is_flag=True, help="Go on with what it says from now on, until Ctrl-C.")
@click.option(
    "--lines", metavar="N", type=click.IntRange(1), default=LINES, show_default=True, help="How many."
)
@click.pass_context
def logs(ctx: click.Context, follow: bool, lines: int) -> None:
    """Show what the service said last, with times, from the system's journal."""
    from cordee.install import service as services

    mine = services.own()
    mine.require()
    ctx.exit(mine.journal(follow=follow, lines=lines))


@service.command()
def remove() -> None:
    """End the service, and do not start it any more. Models and identity stay."""
    from cordee.install import service as services

    services.own().remove()
    output.note("Cordée is no service any more.")
