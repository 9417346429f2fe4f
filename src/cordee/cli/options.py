"""Options that several verbs have."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import click

from cordee.files import printable

P = ParamSpec("P")

stages = click.option(
    "--stages",
    metavar="N",
    type=click.IntRange(1, 64),  # more processes than this on one machine only wait for each other
    default=1,
    show_default=True,
    help="Cut the model into N stages, each a process of its own.",
)
context = click.option(
    "--context",
    metavar="N",
    type=click.IntRange(16),
    help="Context length: tokens of a prompt and its answer together; default: 8192, more where there is "
    "much memory, less where it is short.",
)
sequences = click.option(
    "--sequences",
    metavar="N",
    type=click.IntRange(1, 256),
    help="Answers at a time; default: 4, more where there is much memory, fewer where it is short.",
)
threads = click.option(
    "--threads", metavar="N", type=click.IntRange(1, 1024), help="Threads of each stage; default: all cores."
)
fast = click.option(
    "--fast",
    is_flag=True,
    help="Faster, but an answer may change when others run at the same time or a stage is replaced.",
)
speculate = click.option(
    "--speculate",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Guess tokens to come from the text so far, where that makes answers faster; it changes none.",
)
force_cut = click.option(
    "--force-cut", is_flag=True, help="Cut the model even if no test has certified cuts of its architecture."
)
device = click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    help="Compute on this device, as `cordee doctor` names it; may be repeated. Default: GPUs, else CPU.",
)


class Size(click.ParamType):  # pyright: ignore[reportMissingTypeArgument] - older clicks have no argument
    """An amount of memory, such as 16GB or "512 MiB"; in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from cordee.machine.described import SIZES

        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", str(value).strip())
        if not match or match[2] not in SIZES:
            self.fail(f"{value!r} is not a size like 16GB; the units are {', '.join(SIZES)}.", param, ctx)
        return int(float(match[1]) * SIZES[match[2]])


class Share(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A share of work, such as 1/200 or 0.005; off is 0."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?", str(value).strip())
        divisor = float(match[2] or 1) if match else 0.0
        share = float(match[1]) / divisor if match and divisor else math.inf
        if str(value) == "off":
            return 0.0
        if not 0 < share <= 1:
            self.fail(
                f"{value!r} is no share like 1/200, above 0 and at most 1; off checks nothing.", param, ctx
            )
        return share


class Text(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A name or a text, or a file that is there; its name alone may be other than UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            if not os.path.lexists(text):
                self.fail(f"{printable(text)} is not UTF-8 text.", param, ctx)
        return text


TEXT = Text()

pre = click.option(
    "--pre",
    metavar="NAME",
    help="GGUF's name for the pre-tokenizer, for a checkpoint whose own Cordée does not know.",
)
local_key = click.option(
    "--local-key",
    "wants_key",
    is_flag=True,
    help="Have the API want a key, which only this account can read (file local-key of the state folder).",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


log_file = click.option(
    "--log-file",
    metavar="PATH",
    type=click.Path(dir_okay=False),
    help="Write what the program does to this file, too; never a prompt or an answer.",
)
log_format = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines of text, or an object of JSON for each.",
)


def logged(command: Callable[P, None]) -> Callable[P, None]:
    """Options of verbs that run for long, for their log."""
    return log_file(log_format(command))


def serving(command: Callable[P, None]) -> Callable[P, None]:
    """Options of every verb that loads a model to answer with it."""
    for option in (speculate, force_cut, fast, device, threads, context, stages):
        command = option(command)
    return command


def configuration(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the options of `serving` say, except stages, as fields of a ServiceConfig."""
    return {
        "context": given["context"],
        "threads": given["threads"],
        "devices": given["devices"],
        "batch_invariant": not given["fast"],
        "force_cut": given["force_cut"],
        "speculates": given["speculate"] == "auto",
    }
