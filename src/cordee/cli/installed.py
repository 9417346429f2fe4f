"""`cordee update` and `cordee uninstall`: what changes the program that is installed."""

import sys
import tempfile
from pathlib import Path

import click

from cordee.errors import BadRequest
from cordee.terminal import output


@click.command()
@click.argument("source")
def update(source: str) -> None:
    """Replace this version by the one in SOURCE.

    SOURCE is a folder (`make bundle`), or the address at which the house serves one (http://...). Only what
    the maker of the installed version has signed is taken. A node that runs as a service first hands its work
    to others, then starts as the new version; if it does not come up, the version before runs again. With
    several machines, update one after the other. For what install.sh installed.
    """
    from cordee.install import layout, update
    from cordee.install.bundle import MAKER, InstallBundle

    top = layout.required_prefix()

    def report(text: str) -> None:
        output.note(f"cordee: {text}")

    with tempfile.TemporaryDirectory(dir=top, prefix=".update-") as temporary:
        if source.startswith(("http://", "https://")):
            new = update.fetched(source, Path(temporary), InstallBundle(top / "bundle").small(MAKER), report)
        else:
            new = InstallBundle(Path(source).absolute())
        update.check(new, top)
        update.apply(new, top, report)
    output.note(f"This is Cordée {new.version} now. Start a node that runs in a terminal again there.")


@click.command()
@click.option("--models", "models_too", is_flag=True, help="Remove models, keys and identity, too.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall(models_too: bool, yes: bool) -> None:
    """Remove the service and the program from this machine. For what install.sh installed.

    `cordee leave` before it takes the machine out of its cluster. Models stay, unless --models is given.
    """
    from cordee.install import layout, removal

    top = layout.required_prefix()
    if not yes:
        if not sys.stdin.isatty():
            raise BadRequest("Uninstalling cannot be undone: confirm with --yes.")
        what = f"Remove {top}" + (" and all models, keys and this machine's identity" if models_too else "")
        click.confirm(f"{what}?", abort=True, err=True)
    kept = removal.uninstall(models_too=models_too)
    output.note("Cordée is removed.")
    for folder in kept:
        output.note(f"What it kept is still there: {folder}")
