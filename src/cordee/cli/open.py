"""`cordee open`: the page of the node or server of this machine, in a browser."""

import http.client
import os
import sys
import webbrowser
from typing import Any
from urllib.parse import urljoin, urlsplit

import click

from cordee.errors import NotRunning

PORT = 8321  # of the API, and so of the page, on this machine
ANSWER_SECONDS = 5.0  # a server on this machine that is busy loading a model answers in less


@click.command("open")
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(1, 65_535),
    help="Port of the API; default: that of the node that runs here, or 8321.",
)
def open_page(port: int | None) -> None:
    """Print the address of the page for people, and open it in this machine's browser.

    The page is served by `cordee up` and `cordee serve`. People on other machines use the address that these
    print with --lan, and a key of `cordee key add`.
    """
    page = _running(port)
    click.echo(page)
    # Without a screen, webbrowser might start a browser for terminals, in the place of what runs there.
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("darwin", "win32"):
        webbrowser.open(page)


def page_of(api: str) -> str:
    """The page's address, where the API's is `api`."""
    return urljoin(api, "/")


def _running(port: int | None) -> str:
    """The page's address.

    Raises:
        NotRunning: nobody serves it.
    """
    from cordee.agent import control

    if port is None:
        try:
            nodes: list[dict[str, Any]] = control.ask("GET", "/nodes", kind=dict[str, Any])["nodes"]
            return page_of(next(each["api"] for each in nodes if each["self"]))
        except NotRunning:
            port = PORT
    page = f"http://127.0.0.1:{port}/"
    connection = http.client.HTTPConnection(urlsplit(page).netloc, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/", headers={"Accept": "text/html"})
        if connection.getresponse().getheader("Content-Security-Policy") is not None:
            return page
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
    raise NotRunning(
        f"Nothing serves the page at {page}: start it with `cordee up` or `cordee serve` in another "
        "terminal, or name its port with --port."
    )
