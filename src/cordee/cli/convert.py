"""The verb `convert`: a ternary model becomes a file for the ternary engine."""

from pathlib import Path

import click

from cordee.cli import output


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option(
    "--layout",
    type=click.Choice(["trit2", "trit5"]),
    default="trit2",
    show_default=True,
    help="2 bits a weight, or 5 weights a byte (smaller; faster where AVX-512 is).",
)
@click.option(
    "--head",
    type=click.Choice(["int8", "int6", "int4"]),
    default="int8",
    show_default=True,
    help="Precision of the head, which is rounded; the ternary weights never are.",
)
def convert(source: Path, path: Path, layout: str, head: str) -> None:
    """Turn a ternary model into a file for the ternary engine.

    SOURCE is a GGUF file whose layers hold nothing but -s, 0 and s: TQ1_0, TQ2_0, or F16 and others of such
    values.
    """
    from cordee.models.convert import convert as run
    from cordee.models.gguf import read_header

    with output.progress(source.name) as progress:
        model = run(read_header(source), path, layout=layout, head=head, progress=progress)
    click.echo(f"{path}  {model.architecture}, {model.layers} layers  {output.size(path.stat().st_size)}")
