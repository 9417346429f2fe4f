"""`cordee bench`: how fast a model is on this machine, on whichever engine runs it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.machine.bench_runs import Figure
    from cordee.models.gguf import Header

DIGITS = 4  # of a figure; more would be noise


@click.command()
@click.argument("model")
@options.threads
@options.device
@options.fast
@options.as_json
def bench(model: str, threads: int | None, devices: tuple[str, ...], fast: bool, as_json: bool) -> None:
    """Measure how fast MODEL is on this machine.

    MODEL is a model in the store, or a GGUF file. Measured are the time to load it, the speed of reading
    prompts (prefill) and of 1, 2, 4 and 8 answers at a time (decode), the share of this machine's memory
    bandwidth that one answer reaches (roof; a model that fits the processor's cache may exceed 100 %), and
    the processors' energy for each token, where the system can tell. With --json each line is an object.
    """
    from cordee.machine.bench_runs import StageOptions, figures
    from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, ENVIRONMENT

    # The same as in workers; libllama reads it when it is loaded.
    os.environ |= ENVIRONMENT | ({} if fast else BATCH_INVARIANT_ENVIRONMENT)
    header = _header(model)
    found: list[Figure] = []
    with output.loading() as report:
        for figure in figures(header, StageOptions(model, threads, devices, not fast), report):
            found.append(figure)
            if as_json:
                click.echo(json.dumps({"model": model} | _entry(figure)))
    if not as_json:
        output.print_table(("CASE", "FIGURE", "UNIT", "OF"), [_row(figure) for figure in found])


def _header(model: str) -> "Header":
    from cordee.cli.known import find
    from cordee.models.gguf import read_header
    from cordee.models.store import Store

    path = Path(model)
    return read_header(path if path.is_file() else find(Store(), model).path, name=model)


def _entry(figure: "Figure") -> dict[str, Any]:
    """In the form in which the programs in bench/ print theirs."""
    value = _rounded(figure.value)
    if figure.peer is None or figure.ratio is None:
        return {"case": figure.case, "value": value, "unit": figure.unit}
    return {
        "case": figure.case,
        "ours": value,
        "peer": _rounded(figure.peer),
        "peer_name": figure.peer_name,
        "unit": figure.unit,
        "ratio": _rounded(figure.ratio),
    }


def _row(figure: "Figure") -> tuple[str, str, str, str]:
    share = ""
    if figure.peer is not None and figure.ratio is not None:
        share = f"{100 * figure.ratio:.0f} % of {_rounded(figure.peer):g} by {figure.peer_name}"
    return figure.case, f"{_rounded(figure.value):g}", figure.unit, share


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
