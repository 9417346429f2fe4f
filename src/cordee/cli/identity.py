"""`cordee identity`: a copy of this machine's place in its cluster, for the day when its disk dies."""

import contextlib
import sys
from pathlib import Path

import click

from cordee.errors import BadRequest
from cordee.terminal import output

PHRASE_BYTES_MAX = 4096
SHORT_CHARS = 12  # so few can be guessed from a stolen file, whatever the encryption

phrase_file = click.option(
    "--passphrase-file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read the pass phrase from FILE (its first line) instead of asking; - is standard input.",
)


@click.group()
def identity() -> None:
    """Back up this machine's identity, or restore it.

    The identity is what makes this machine that very node of its cluster: its key and certificate, and on an
    admin the cluster's key. Its models are not part of it.
    """


@identity.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@phrase_file
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
def backup(file: Path, passphrase_file: Path | None, overwrite: bool) -> None:
    """Write this machine's identity to FILE, encrypted with a pass phrase.

    Keep FILE elsewhere, and the pass phrase apart from it: nobody can open FILE without it. On an admin both
    together let anybody add machines to the cluster.
    """
    from cordee.net import backup as backups
    from cordee.net import identity as identities

    if not identities.exists():
        raise BadRequest("This machine does not belong to a cluster: there is nothing to back up.")
    if file.exists() and not overwrite:
        raise BadRequest(f"{file} exists already: name another file, or add --overwrite.")
    member = identities.load()
    backups.write(member, file, _phrase(passphrase_file, new=True))
    kept = "its key and the cluster's key" if member.is_admin else "its key; it is no admin"
    output.note(f"{file} holds the identity of node {member.node} ({kept}).")


@identity.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@phrase_file
@click.option("--overwrite", is_flag=True, help="Give up the identity that this machine has now.")
def restore(file: Path, passphrase_file: Path | None, overwrite: bool) -> None:
    """Make this machine the node whose identity is in FILE.

    Never let two machines run with one identity: the one that FILE was made on must be gone for good.
    """
    from cordee.agent import control
    from cordee.net import backup as backups
    from cordee.net import identity as identities

    with contextlib.ExitStack() as held:
        if identities.exists():
            if not overwrite:
                raise BadRequest(
                    f"This machine has an identity already, in {identities.place()}. With --overwrite it is "
                    "given up for the one in the file; nothing can bring it back."
                )
            no_node = control.AgentSocket(identities.place())  # refuses where a node runs or starts
            held.enter_context(contextlib.closing(no_node))
        member = backups.restore(file, _phrase(passphrase_file, new=False))
    output.note(f"This machine is node {member.node} of cluster {member.cluster} again. Now: cordee up")


def _phrase(path: Path | None, *, new: bool) -> str:
    """The pass phrase: from a file, from standard input where nobody types there, or from the keyboard.

    Raises:
        BadRequest: there is none.
    """
    if path is not None and str(path) != "-":
        try:
            with path.open("rb") as file:
                data = file.read(PHRASE_BYTES_MAX + 1)
        except OSError as error:
            raise BadRequest(f"{path} cannot be read ({error.strerror}).", "passphrase-file") from error
    elif path is not None or not sys.stdin.isatty():
        data = sys.stdin.buffer.readline(PHRASE_BYTES_MAX + 1)
    else:
        data = click.prompt("Pass phrase", hide_input=True, confirmation_prompt=new, err=True).encode()
    lines = data.decode("utf-8", errors="replace").splitlines()
    if not lines or not lines[0].strip() or len(data) > PHRASE_BYTES_MAX:
        raise BadRequest("There is no pass phrase: type one, or give it with --passphrase-file.")
    if new and len(lines[0]) < SHORT_CHARS:
        output.note("Advice: this pass phrase is short. Four or five random words are much harder to guess.")
    return lines[0]
