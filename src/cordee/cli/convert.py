"""`cordee convert`: a ternary model becomes a file for the ternary engine."""

from pathlib import Path
from typing import Literal

import click

from cordee.cli import options
from cordee.errors import UnsupportedModel
from cordee.terminal import output


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o", "path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option(
    "--layout",
    type=click.Choice(["trit2", "trit5"]),
    default="trit2",
    show_default=True,
    help="2 bits per weight, or 5 weights per byte (smaller; faster on processors with AVX-512).",
)
@click.option(
    "--head",
    type=click.Choice(["int8", "int6", "int4"]),
    default="int8",
    show_default=True,
    help="Precision of the output head, which is rounded unless it is ternary, too.",
)
@click.option(
    "--target",
    type=click.Choice(["pentium2"]),
    help="For an old PC: five weights per byte, multiplied by look-up; embedding and head ternary, too.",
)
@options.pre
def convert(
    source: Path,
    path: Path,
    layout: Literal["trit2", "trit5"],
    head: str,
    target: str | None,
    pre: str | None,
) -> None:
    """Turn a ternary model into a file for the ternary engine.

    SOURCE is a GGUF file whose layers hold only the values -s, 0 and s, with one s for each row or for each
    64, 128 or 256 weights of it (TQ1_0, TQ2_0, Q2_0, PQ2_0, PTQ1_0, Q1_0, I2_S, or F16 and others with such
    values), or a checkpoint from the hub: a folder with config.json, safetensors and tokenizer, whose
    matrices are packed, ternary floats, or the master weights of a b1.58 model. No ternary weight and no
    scale is changed; a model that is not ternary is refused.
    """
    from cordee.convert.convert import convert as run

    with output.progress(source.name) as progress:
        model = run(
            source,
            path,
            layout=layout,
            head=head,
            for_pentium2=target == "pentium2",
            pre=pre,
            progress=progress,
        )
    click.echo(f"{path}  {model.architecture}, {model.layers} layers  {output.size(path.stat().st_size)}")
    if ends := _ends(path):
        click.echo(f"Answers end with {', '.join(ends)}.")


def _ends(path: Path) -> list[str]:
    """The tokens that end an answer, as the engine will read them from the file; none without a tokenizer."""
    from cordee.engine.vocabulary import Vocabulary

    try:
        vocabulary = Vocabulary(path)
    except UnsupportedModel:
        return []
    pieces = [vocabulary.piece(token, special=True) for token in sorted(vocabulary.end_of_generation)]
    vocabulary.close()
    return [piece.decode(errors="replace") for piece in pieces]
