"""The options of `serve` and `up` that are about other machines."""

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import click

P = ParamSpec("P")

_OPTIONS = (
    click.option(
        "--lan",
        "lan",
        metavar="[ADDRESS]",
        is_flag=False,
        flag_value="",
        help="Serve other machines, too: on all interfaces, or on ADDRESS (HOST, HOST:PORT or :PORT; port "
        "8322). They need a key (`cordee key add`), and speak TLS.",
    ),
    click.option(
        "--cert",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="With --lan: a certificate of the house's own, in PEM with its chain.",
    ),
    click.option(
        "--key-file",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="With --cert: its private key, in PEM.",
    ),
    click.option(
        "--plain", is_flag=True, help="With --lan: no TLS. Everybody on the network can read along."
    ),
    click.option(
        "--allow-host",
        "allow_hosts",
        metavar="NAME",
        multiple=True,
        help="Answer requests to this host name, too, with a key: that of a reverse proxy, or "
        "host.docker.internal. May be repeated.",
    ),
    click.option(
        "--allow-origin",
        "allow_origins",
        metavar="ORIGIN",
        multiple=True,
        help="Let pages of this origin, such as https://chat.example, use the API. May be repeated.",
    ),
)


def lan_options(command: Callable[P, None]) -> Callable[P, None]:
    """The options of `LanChoice`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
