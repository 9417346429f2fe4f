"""Writes docs/cli.md from the program itself: the help of every verb, and what each exit code means."""

import sys
from pathlib import Path

import click

from cordee.cli.main import cordee, exit_codes

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100


def help_of(command: click.Command, *groups: click.Group) -> str:
    """What `--help` prints, without trailing spaces; `groups` are those around the command."""
    context = click.Context(cordee, info_name="cordee", terminal_width=WIDTH, **cordee.context_settings)
    for each in (*groups, command):
        if each is not cordee:
            context = click.Context(each, context, each.name, terminal_width=WIDTH)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def reference() -> str:
    """The whole document."""
    parts = ["# The program", "Written by `make docs`; a test compares it with the program."]
    parts.append(f"```\n{help_of(cordee).partition('Exit codes:')[0].rstrip()}\n```")
    for name, command in cordee.commands.items():
        if command.hidden:  # an old name of a verb
            continue
        parts.append(f"## cordee {name}\n\n```\n{help_of(command)}\n```")
        if isinstance(command, click.Group):
            parts += [f"```\n{help_of(each, command)}\n```" for each in command.commands.values()]
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in exit_codes().items())
    parts.append(f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}", file=sys.stderr)
