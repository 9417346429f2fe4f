"""Tables that `--watch` repeats: printed once, or again and again on a live screen."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from cordee.terminal import output

WATCH_SECONDS = 1.0  # as often as nodes send heartbeats

watch = click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")


def show(
    read: Callable[[], Any], lines: Callable[[Any], Sequence[str]], *, as_json: bool, watch: bool
) -> None:
    """Print what `read` returns: as JSON (with `watch`, a line each time), or as `lines` for people."""
    if not watch:
        value = read()
        if as_json:
            output.print_json(value)
        else:
            click.echo("\n".join(lines(value)))
        return
    with suppress(KeyboardInterrupt):
        if as_json:
            _stream(read)
        else:
            _screen(read, lines)


def warnings(found: dict[str, Any]) -> list[str]:
    """The warnings that belong to what an agent said of its cluster, as lines below it."""
    return [line for said in found["warnings"] for line in ("", f"Warning: {said}")]


def _stream(read: Callable[[], Any]) -> None:
    while True:
        click.echo(json.dumps(read(), ensure_ascii=False))
        time.sleep(WATCH_SECONDS)


def _screen(read: Callable[[], Any], lines: Callable[[Any], Sequence[str]]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, screen=Console().is_terminal) as live:
        while True:
            live.update(Text("\n".join(lines(read())), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(WATCH_SECONDS)
