"""Options that several verbs share."""

import click

stages = click.option(
    "--stages",
    metavar="N",
    type=click.IntRange(1, 64),  # more processes than this on one machine only wait for each other
    default=1,
    show_default=True,
    help="Cut the model into so many stages, each a process of its own.",
)
context = click.option(
    "--context", metavar="N", type=click.IntRange(16), help="Room for a prompt and its answer, in tokens."
)
threads = click.option(
    "--threads", metavar="N", type=click.IntRange(1, 1024), help="Threads of each stage; default: all cores."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
