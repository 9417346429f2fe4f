"""What `cordee distill` takes and shows; the verb itself is in cli/compress.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cordee.terminal import output

_TRAINING = (
    click.option(
        "--from", "original", metavar="MODEL", required=True, help="The model that OUT was compressed from."
    ),
    click.option(
        "--text",
        metavar="FILE",
        help="Text like what the model will read; default: English and French prose.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(1, 100_000),
        default=100,
        show_default=True,
        help="Training steps of each layer: more are better, and take as much longer.",
    ),
    click.option(
        "--end-to-end",
        type=click.IntRange(0, 1_000_000),
        default=0,
        metavar="STEPS",
        help="Then so many steps for all layers together, which takes memory for all of them.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="What is read in which step.",
    ),
)


def distill_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `cordee distill`, but for those that other verbs have, too."""
    for option in reversed(_TRAINING):
        command = option(command)
    return command


def run_distillation(model: str, original: tuple[str, Path], given: dict[str, Any]) -> None:
    """Train the file `model` towards `original` (name, path), with progress, and say where it is."""
    from cordee.compress.evaluate import read_text
    from cordee.distill.distill import DistillOptions, distill

    settings = DistillOptions(
        text=None if given["text"] is None else read_text(Path(given["text"])),
        steps=given["steps"],
        end_to_end=given["end_to_end"],
        seed=given["seed"],
        memory_bytes=given["memory_bytes"],
    )
    name, path = original
    with output.progress(model) as progress:
        distill(
            Path(model),
            path,
            settings,
            names=(model, name),
            pre=given["pre"],
            progress=progress,
            report=output.note,
        )
    click.echo(model)
