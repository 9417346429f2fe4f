"""How the verbs show things: results on standard output, everything else on standard error."""

import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

# Without a terminal a line of progress this often keeps a log readable.
PLAIN_PROGRESS_SECONDS = 5.0


def size(nbytes: float) -> str:
    """Bytes in decimal units, as hubs and disks state them: `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count(number: float) -> str:
    """A number of parameters: `135 M`, `1.7 B`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= factor:
            value = number / factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole // 60 % 60:02d} min"
    return f"{whole // 86_400} d {whole // 3600 % 24} h"


def note(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    click.echo(text, err=True)


def note_shortened(model: str, lacks: str) -> None:
    """Say what a model lacks because memory is short, if anything."""
    if lacks:
        note(f"cordee: memory is short: {model} has {lacks}")


def asked(sequences: int, context: int) -> str:
    """What a model is asked for: `8 answers at a time, of 4096 tokens each`."""
    if sequences == 1:
        return f"1 answer at a time, of {context} tokens"
    return f"{sequences} answers at a time, of {context} tokens each"


def print_json(value: Any) -> None:
    """A result for programs, indented, on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as they need to be, two spaces apart, for people and for awk."""
    from rich.cells import cell_len  # the width on a terminal, where letters of East Asia take two columns

    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """See `table`."""
    click.echo("\n".join(table(header, rows)))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Lines `name: value` with the values aligned."""
    width = max(len(name) for name, _ in facts) + 1
    for name, value in facts:
        click.echo(f"{f'{name}:':{width}} {value}".rstrip())


@contextmanager
def loading() -> Generator[Callable[[str], None]]:
    """A function that shows what is being done: one changing line on a terminal, else a line for each report.

    What is reported after the block, such as the loss of a stage, always gets a line of its own.
    """
    with ExitStack() as stack:
        status = None
        if sys.stderr.isatty():
            from rich.console import Console

            status = stack.enter_context(Console(stderr=True).status(""))
        ended = threading.Event()
        stack.callback(ended.set)

        def report(text: str) -> None:
            if status is None or ended.is_set():
                note(f"cordee: {text}")
            else:
                status.update(f"{text}…")

        yield report


@contextmanager
def progress(title: str) -> Generator[Callable[[int, int], None]]:
    """A function (bytes done, bytes in total) that shows percent, bytes, rate and time left."""
    if not sys.stderr.isatty():
        yield _PlainProgress(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class _PlainProgress:
    """Progress as lines: one every PLAIN_PROGRESS_SECONDS, and the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._shown = time.monotonic()
        self._first: int | None = None  # where a resumed download starts

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if done < total and now - self._shown < PLAIN_PROGRESS_SECONDS:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._began, 1e-6)
        line = f"{self._title}: {100 * done // max(total, 1)} % ({size(done)} of {size(total)})"
        if rate > 0:
            line += f", {size(rate)}/s"
        if rate > 0 and done < total:
            line += f", {duration((total - done) / rate)} left"
        note(line)
