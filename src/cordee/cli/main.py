"""The program `cordee`: its verbs, and how an error or a signal becomes an exit code."""

import copy
import signal
import sys
from typing import Any, NoReturn

import click

from cordee import __version__, privacy
from cordee.cli import options
from cordee.cli.bench import bench
from cordee.cli.catalog import models
from cordee.cli.compress import compress, distill, evaluate
from cordee.cli.convert import convert
from cordee.cli.demo import demo
from cordee.cli.doctor import doctor
from cordee.cli.export import export
from cordee.cli.identity import identity
from cordee.cli.installed import uninstall, update
from cordee.cli.keys import key, usage
from cordee.cli.members import admin, drain, invite, join, leave, remove
from cordee.cli.models import ls, pull, rm
from cordee.cli.nodes import nodes
from cordee.cli.open import open_page
from cordee.cli.plan import plan
from cordee.cli.ps import ps
from cordee.cli.run import run
from cordee.cli.serve import serve
from cordee.cli.service import service
from cordee.cli.setup import setup
from cordee.cli.show import show
from cordee.cli.status import deploy, status, undeploy
from cordee.cli.up import up
from cordee.errors import CordeeError
from cordee.files import STORAGE_FAULTS, storage_failed
from cordee.terminal import streams

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TERMINATED = 143  # 128 + SIGTERM


def subclasses(kind: type[CordeeError]) -> list[type[CordeeError]]:
    """All kinds of an error, those nearest to the base first."""
    direct = kind.__subclasses__()
    return direct + [deeper for each in direct for deeper in subclasses(each)]


def exit_codes() -> dict[int, str]:
    """What each exit code of the program means."""
    codes = {0: "All went well.", 1: "Something must be fixed (`doctor`), or the program itself has a fault."}
    for kind in subclasses(CordeeError):
        meaning = (kind.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")
        codes.setdefault(kind.exit_code, f"{meaning}.")
    codes[INTERRUPTED] = "Interrupted with Ctrl-C."
    codes[streams.BROKEN_PIPE] = "The program that read the output has ended."
    codes[TERMINATED] = "Ended by SIGTERM; `serve` and `up` close and end with 0."
    return dict(sorted(codes.items()))


class Program(click.Group):
    """The group of verbs; the one place where an expected error becomes a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [(str(code), meaning.replace("`", "")) for code, meaning in exit_codes().items()]
            )

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except CordeeError as error:
            _fail(error)
        except OSError as error:
            if error.errno not in STORAGE_FAULTS or not error.filename:
                raise
            _fail(storage_failed(error.filename, error, "cannot be used"))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        return result


def _fail(error: CordeeError) -> NoReturn:
    click.echo(f"cordee: {' '.join(error.message.split())}", err=True)
    sys.exit(error.exit_code)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cordee", message="%(prog)s %(version)s")
def cordee() -> None:
    """Run open language models on the machines you already have: on one, or on several as one cluster.

    Try: cordee run starter "Why do climbers rope together?"
    """


VERBS = (
    *(run, serve, models, pull, ls, show, rm, convert, compress, distill, export, plan),
    *(up, invite, join, nodes, status, deploy, undeploy, drain, leave, remove, admin, identity),
    *(key, usage),
    *(open_page, ps, doctor, bench, evaluate, demo),
    *(setup, service, update, uninstall),
)
LOOKED_AT = ("source", "prompt")  # by their verb, which knows more of what they may be
for verb in VERBS:
    for parameter in verb.params:
        if isinstance(parameter.type, click.types.StringParamType) and parameter.name not in LOOKED_AT:
            parameter.type = options.TEXT
    cordee.add_command(verb)
for alias, verb in {"share": deploy, "unshare": undeploy}.items():  # the verbs' names before 0.2
    hidden = copy.copy(verb)
    hidden.hidden = True
    cordee.add_command(hidden, alias)


def main() -> None:
    """Entry point of the program."""
    privacy.no_core_dumps()
    streams.prepare()
    signal.signal(signal.SIGTERM, _terminated)
    cordee(prog_name="cordee")


def _terminated(*_: object) -> NoReturn:
    """SIGTERM as an exception, so that what was begun is cleaned up."""
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
