"""What `cordee eval` and `cordee compress` take and show; the verbs themselves are in cli/compress.py."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.compress.evaluate import ModelSize, TextScore

Command = Callable[..., None]


def eval_options(command: Command) -> Command:
    """Options of `cordee eval`."""
    text = click.option(
        "--text", metavar="FILE", help="The text to read; default: some English and French prose."
    )
    against = click.option(
        "--against", metavar="MODEL", help="The model it was made from: adds how near it is to that."
    )
    picture = click.option(
        "--plot",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Draw quality against bits, a point for each MODEL, as .svg or .png.",
    )
    return against(text(picture(command)))


def compress_options(command: Command) -> Command:
    """Options of `cordee compress`, but for those that other verbs have, too."""
    for option in (*_INPUTS, *_QUALITY, _OUT):
        command = option(command)
    return command


_OUT = click.option(
    "-o", "out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
_QUALITY = (
    click.option(
        "--head",
        type=click.Choice(["int8", "int6", "int4"]),
        default="int8",
        show_default=True,
        help="Precision of the output head.",
    ),
    click.option(
        "--keep",
        metavar="PATTERN",
        multiple=True,
        help="Leave matrices at 8 bits: *.ffn_down, or blk.0.*; may be repeated.",
    ),
    click.option(
        "--rotate/--no-rotate",
        default=False,
        show_default=True,
        help="Spread outliers of inputs over many of them.",
    ),
    click.option(
        "--planes",
        type=click.IntRange(1, 3),
        default=1,
        show_default=True,
        help="Ternary matrices of which each matrix is the sum: better, and as many times as large.",
    ),
    click.option(
        "--group",
        type=click.Choice(["64", "128", "256", "row"]),
        default="128",
        show_default=True,
        help="Neighbouring inputs that share a scale: fewer are better and take more room.",
    ),
    click.option(
        "--method",
        type=click.Choice(["gptq", "fit", "absmean"]),
        default="gptq",
        show_default=True,
        help="Fit each matrix to the inputs it will have, or to itself: faster, and much worse.",
    ),
)
_INPUTS = (
    click.option(
        "--calibration",
        metavar="FILE",
        help="Text like what the model will read, 10,000 words or so; default: English and French prose.",
    ),
)


def show_evaluations(
    models: list[tuple[str, Path]], against: tuple[str, Path] | None, given: dict[str, Any]
) -> None:
    """Measure models, each a name and a path, and print what was found; `against` is the original."""
    from cordee.compress.plot import Point, plot, require_plotting

    picture: Path | None = given["plot"]
    if picture is not None:
        require_plotting(picture)
    points: list[Point] = []
    for name, path in models:
        if len(models) > 1 and not given["as_json"]:
            click.echo(f"{name}:")
        found, size = _evaluated(name, path, against, given)
        points.append(Point(name, size.bits_per_weight, found.perplexity, found.kl))
    if picture is not None:
        plot(points, picture)


def _evaluated(
    model: str, path: Path, against: tuple[str, Path] | None, given: dict[str, Any]
) -> "tuple[TextScore, ModelSize]":
    """Measure a model and print what was found."""
    from cordee.compress.evaluate import default_text, evaluate, read_text, size_of_model
    from cordee.models.gguf import read_header
    from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, ENVIRONMENT

    os.environ |= ENVIRONMENT | BATCH_INVARIANT_ENVIRONMENT  # as in workers; libllama reads it when loaded
    header = read_header(path, name=model)
    original = read_header(against[1], name=against[0]) if against else None
    text = default_text() if given["text"] is None else read_text(Path(given["text"]))
    with output.progress(f"reading with {model}") as progress:
        found = evaluate(header, text, original=original, threads=given["threads"], progress=progress)
    size = size_of_model(header)
    if given["as_json"]:
        facts = {"model": model, "original": against and against[0]} | asdict(found)
        facts |= {"bytes": size.nbytes, "bits_per_weight": size.bits_per_weight}
        click.echo(json.dumps(facts | {"bits_per_layer_weight": size.bits_per_layer_weight}))
    else:
        output.print_facts(_told(found, size))
    return found, size


def _told(found: "TextScore", size: "ModelSize") -> list[tuple[str, str]]:
    lines = [("perplexity", f"{found.perplexity:.2f}")]
    if found.perplexity_original is not None and found.kl is not None and found.same_top1 is not None:
        lines += [
            ("perplexity of the original", f"{found.perplexity_original:.2f}"),
            ("KL divergence", f"{found.kl:.4f}"),
            ("same top 1", f"{100 * found.same_top1:.1f} %"),
        ]
    lines += [
        ("scored tokens", str(found.tokens)),
        ("size", output.size(size.nbytes)),
        ("bits per weight", f"{size.bits_per_weight:.2f}, {size.bits_per_layer_weight:.2f} in the layers"),
    ]
    return lines


def run_compression(model: str, path: Path, given: dict[str, Any]) -> None:
    """Compress the model at `path`, with progress, and print where the file is."""
    from cordee.compress.compress import compress
    from cordee.compress.evaluate import read_text
    from cordee.compress.fitter import CompressOptions

    out: Path = given["out"]
    text = None if given["calibration"] is None else read_text(Path(given["calibration"]))
    settings = CompressOptions(
        method=given["method"],
        span=0 if given["group"] == "row" else int(given["group"]),
        planes=given["planes"],
        rotate=given["rotate"],
        keep=given["keep"],
        head=given["head"],
        calibration=text,
        memory_bytes=given["memory_bytes"],
        size_bytes=given["size_bytes"],
    )
    with output.progress(model) as progress:
        compress(path, out, settings, name=model, pre=given["pre"], progress=progress, report=output.note)
    click.echo(f"{out}  {output.size(out.stat().st_size)}")
