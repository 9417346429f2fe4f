"""`cordee up`: this machine as a node of a cluster, until it is stopped."""

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
READ_BYTES = 4096  # at a time, of a standard input that nobody needs


class Settings(msgspec.Struct, frozen=True):
    """What `cordee up` remembers for the next time; in `cluster/settings`."""

    name: str = ""
    listen: str = ""


@click.command()
@click.option("--name", metavar="NAME", help="Name of this node; default: the machine's.")
@click.option(
    "--listen",
    "address",
    metavar="ADDRESS",
    help="Listen for other nodes on HOST or HOST:PORT; default: all interfaces, port 7330 if it is free.",
)
@click.option(
    "--peer",
    "peers",
    metavar="ADDRESS",
    multiple=True,
    help="Look for a node at this address, too; for networks without multicast. May be repeated.",
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
    help="Find nodes by multicast on this network interface; off: without multicast.",
)
@click.option(
    "--memory",
    "lent_bytes",
    metavar="SIZE",
    type=Size(),
    help="Memory of each device that models may use, such as 16GB; default: what is free now.",
)
@click.option("--until-eof", is_flag=True, hidden=True, help="End when standard input ends, too.")
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

    The first time it creates a new cluster, unless `cordee join` made this machine a member of one. --name
    and --listen are remembered. Programs on this machine reach all models of the cluster at
    http://127.0.0.1:PORT/v1, with OpenAI's API.
    """
    from cordee.agent.agent import AgentOptions
    from cordee.agent.control import AgentSocket
    from cordee.net import identity
    from cordee.net.bus import BusOptions

    listener = listen("127.0.0.1", port)
    member = identity.load() if identity.exists() else identity.found(time.time())
    agent_socket = AgentSocket(member.folder)
    try:
        settings = _settings(member, name, address)
        api = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        interface = "" if scouting == "off" else scouting
        options = AgentOptions(settings.name, api, BusOptions(settings.listen, peers, interface), lent_bytes)
        left = asyncio.run(_Running(member, options, listener, agent_socket).run(until_eof=until_eof))
    finally:
        agent_socket.close()
    if left:
        identity.forget()
        output.note("cordee: this machine no longer belongs to a cluster")


def _settings(member: "Identity", name: str | None, address: str | None) -> Settings:
    """What the options say, else what they said last time; saved for the next time."""
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
        self,
        member: "Identity",
        options: "AgentOptions",
        listener: socket.socket,
        agent_socket: "AgentSocket",
    ) -> None:
        self._member = member
        self._options = options
        self._listener = listener
        self._agent_socket = agent_socket
        self._left = False

    async def run(self, *, until_eof: bool) -> bool:
        """Serve until a signal comes, or this node leaves the cluster or is removed from it.

        With `until_eof`, until the end of standard input at the latest: the process at the pipe's other end
        is gone. True if the node leaves.

        Raises:
            JoinFailed: it was removed.
        """
        from cordee.agent.agent import Agent
        from cordee.models.store import Store

        task = asyncio.current_task()
        assert task is not None, "asyncio.run() runs this in a task"
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
            serve(
                create_app(agent.services, expected=_Names(agent), refusal=agent.services.refusal),
                self._listener,
            ),
            serve(Control(agent, leave).app(), self._agent_socket.socket),
        ]
        tasks = [asyncio.create_task(server) for server in servers]
        try:
            await agent.removed.wait()
            raise JoinFailed(REFUSALS["removed"])
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Names(Collection[str]):
    """The models that there is a service for, or will be."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        agent = self._agent
        return [name for name in agent.models() if agent.services.refusal(name) is None]


def _at_eof(act: Callable[[], object]) -> None:
    """Call `act` when standard input, a pipe or a terminal, ends."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), READ_BYTES):
            loop.remove_reader(sys.stdin)
            act()

    loop.add_reader(sys.stdin, read)


def _greet(agent: "Agent") -> None:
    """Who this is, and what to do next."""
    output.note(f"cordee: node {agent.options.name} ({agent.node}) of cluster {agent.identity.cluster}")
    output.note(f"cordee: API at {agent.options.api} (no API key needed); Ctrl-C ends the node")
    if agent.identity.is_admin:
        output.note("cordee: `cordee invite` prints a code with which another machine can join")
    else:
        output.note("cordee: `cordee nodes` lists the nodes, `cordee status` what runs where")
