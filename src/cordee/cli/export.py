"""`cordee export`: a folder to copy to a machine that Cordée itself cannot run on."""

from pathlib import Path

import click

from cordee.cli.known import find
from cordee.terminal import output


@click.command()
@click.option(
    "--for",
    "target",
    type=click.Choice(["pentium2"]),
    required=True,
    help="The machine: a PC with a Pentium II or later, under Linux or Windows.",
)
@click.argument("model")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--any-size", is_flag=True, help="Write it even if a CD cannot hold it.")
@click.option(
    "--programs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Build folder of `make tiny`, which has the programs; default: that of this program.",
)
def export(target: str, model: str, folder: Path, any_size: bool, programs: Path | None) -> None:
    """Write a FOLDER with all that an old PC needs to run MODEL.

    MODEL is a file that `cordee convert --target pentium2` wrote, or the name of such a model in the store.
    FOLDER must be new or empty. It gets the programs, the model, instructions in French and English, and
    checksums.
    """
    from cordee.convert.export import CD_BYTES
    from cordee.convert.export import export as run
    from cordee.models.gguf import read_header
    from cordee.models.store import Store

    given = Path(model)
    header = read_header(given if given.is_file() else find(Store(), model).path, name=model)
    with output.progress(folder.name) as progress:
        nbytes = run(
            header,
            folder,
            title=given.stem if given.is_file() else model,
            programs=programs,
            limit_bytes=None if any_size else CD_BYTES,
            progress=progress,
        )
    click.echo(f"{folder}  {output.size(nbytes)} on a CD; its README.TXT says how to start")
