"""`cordee up`: this machine as a node of a cluster, until it is told to end."""

import asyncio
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from cordee.cli import output
from cordee.cli.options import Size
from cordee.cli.serve import PORT, listen
from cordee.errors import JoinFailed

if TYPE_CHECKING:
    from cordee.agent.agent import Agent, AgentOptions
    from cordee.agent.control import AgentSocket
    from cordee.net.identity import Identity

NAME_CHARS_MAX = 64
READ_BYTES = 4096  # of a standard input that nobody needs, at once


class Settings(msgspec.Struct, frozen=True):
    """What is remembered of the last `cordee up`; in `cluster/settings`."""

    name: str = ""
    listen: str = ""


@click.command()
@click.option("--name", metavar="NAME", help="What people call this node; default: the machine's name.")
@click.option(
    "--listen",
    "address",
    metavar="ADDRESS",
    help="Meet other nodes at this HOST or HOST:PORT; default: all interfaces, port 7330 if it is free.",
)
@click.option(
    "--peer",
    "peers",
    metavar="ADDRESS",
    multiple=True,
    help="Look for a node at this address too; for networks without multicast. May be repeated.",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65_535),
    default=PORT,
    show_default=True,
    help="Port of the API on 127.0.0.1; 0 takes a free one.",
)
@click.option(
    "--scouting",
    metavar="INTERFACE",
    default="auto",
    show_default=True,
    help="Look for nodes by multicast on this interface; off: do not.",
)
@click.option(
    "--memory",
    "lent_bytes",
    metavar="SIZE",
    type=Size(),
    help="Lend stages at most so much memory of each device, such as 16GB; default: what is free now.",
)
@click.option("--until-eof", is_flag=True, hidden=True, help="End with standard input, too.")
def up(
    name: str | None,
    address: str | None,
    peers: tuple[str, ...],
    port: int,
    scouting: str,
    lent_bytes: int | None,
    until_eof: bool,
) -> None:
    """Run this machine as a node of its cluster, until Ctrl-C.

    The first time it makes a new cluster, unless `cordee join` made this machine a member of one. --name and
    --listen are remembered. Programs on this machine reach every model of the cluster at the API.
    """
    from cordee.agent.agent import AgentOptions
    from cordee.agent.control import AgentSocket
    from cordee.net import identity
    from cordee.net.bus import BusOptions

    listener = listen("127.0.0.1", port)
    member = identity.load() if identity.exists() else identity.found(time.time())
    place = AgentSocket(member.folder)
    try:
        settings = _settings(member, name, address)
        api = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        interface = "" if scouting == "off" else scouting
        options = AgentOptions(settings.name, api, BusOptions(settings.listen, peers, interface), lent_bytes)
        left = asyncio.run(_Running(member, options, listener, place).run(until_eof=until_eof))
    finally:
        place.close()
    if left:
        identity.forget()
        output.note("cordee: this machine belongs to no cluster any more")


def _settings(member: "Identity", name: str | None, address: str | None) -> Settings:
    """What the options say, else what they said last time; remembered from now on."""
    from cordee.files import atomic_file, write_all

    path = member.folder / "settings"
    try:
        old = msgspec.json.decode(path.read_bytes(), type=Settings)
    except (OSError, msgspec.MsgspecError):
        old = Settings()
    chosen = Settings(
        (name or old.name or platform.node() or member.node)[:NAME_CHARS_MAX],
        old.listen if address is None else address,
    )
    if chosen != old:
        with atomic_file(path) as file:
            write_all(file, msgspec.json.encode(chosen))
    return chosen


class _Running:
    """The agent and its two servers."""

    def __init__(
        self, member: "Identity", options: "AgentOptions", listener: socket.socket, place: "AgentSocket"
    ) -> None:
        self._member = member
        self._options = options
        self._listener = listener
        self._place = place
        self._left = False

    async def run(self, *, until_eof: bool) -> bool:
        """Serve until a signal comes, or somebody says that this node leaves or was removed.

        With `until_eof`, until the end of standard input at the latest: whoever holds its other end is gone.
        True if it leaves. Raises JoinFailed if it was removed.
        """
        from cordee.agent.agent import Agent
        from cordee.models.store import Store

        task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        if until_eof:
            _at_eof(task.cancel)
        agent = None
        try:
            agent = await Agent.start(self._member, Store(), self._options)
            _greet(agent)
            await self._serve(agent, task.cancel)
        except asyncio.CancelledError:
            output.note("cordee: closing")
        finally:
            if agent is not None:
                await agent.close("leaves" if self._left else "stops")
        return self._left

    async def _serve(self, agent: "Agent", cancel: Callable[[], object]) -> None:
        from cordee.agent.control_server import Control
        from cordee.api.app import create_app
        from cordee.api.server import serve
        from cordee.net.enrolment import REFUSALS

        def leave() -> None:
            self._left = True
            asyncio.get_running_loop().call_soon(cancel)

        servers = [
            serve(create_app(agent.services, expected=_Names(agent)), self._listener),
            serve(Control(agent, leave).app(), self._place.socket),
        ]
        tasks = [asyncio.create_task(server) for server in servers]
        try:
            await agent.removed.wait()
            raise JoinFailed(REFUSALS["removed"])
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Names(Collection):
    """The models that there will be a service for."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent

    def __contains__(self, name: object) -> bool:
        return name in self._agent.models()

    def __iter__(self) -> Iterator[str]:
        return iter(self._agent.models())

    def __len__(self) -> int:
        return len(self._agent.models())


def _at_eof(act: Callable[[], object]) -> None:
    """Call it when standard input, a pipe or a terminal, ends."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), READ_BYTES):
            loop.remove_reader(sys.stdin)
            act()

    loop.add_reader(sys.stdin, read)


def _greet(agent: "Agent") -> None:
    """Who this is, and what to do next."""
    output.note(f"cordee: node {agent.options.name} ({agent.node}) of cluster {agent.identity.cluster}")
    output.note(f"cordee: API at {agent.options.api} (no API key); Ctrl-C ends the node")
    if agent.identity.is_admin:
        output.note("cordee: `cordee invite` prints a code that lets another machine join")
    else:
        output.note("cordee: `cordee nodes` lists who is there, `cordee status` what runs where")
