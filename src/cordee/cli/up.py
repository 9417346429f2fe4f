"""`cordee up`: this machine as a node of a cluster, until it is stopped."""

import asyncio
import contextlib
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options
from cordee.cli.keys import refuse_without_key
from cordee.cli.known import find
from cordee.cli.lan import lan_options
from cordee.cli.models import STARTER
from cordee.cli.open import PORT, page_of
from cordee.cli.options import Share, Size
from cordee.cli.serve import key_note, listen
from cordee.errors import CordeeError, JoinFailed
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.agent.agent import Agent, AgentOptions
    from cordee.agent.control import AgentSocket
    from cordee.agent.logs import Form
    from cordee.agent.settings import Settings
    from cordee.api.keys import LocalKey
    from cordee.api.lan_server import LanChoice, LanServer
    from cordee.net.identity import Identity

NAME_CHARS_MAX = 64
READY_SECONDS = 5.0  # to read the vocabularies of the models on this disk; seldom more than one takes
KEYS_SECONDS = 10.0  # for a member to hear of the keys that there are
POLL_SECONDS = 0.05
READ_BYTES = 4096  # at a time, of a standard input that nobody needs


@click.command()
@click.option("--name", metavar="NAME", help="Name of this node; default: the machine's.")
@click.option(
    "--listen",
    "address",
    metavar="ADDRESS",
    help="Listen for other nodes on HOST or HOST:PORT; default: all interfaces (0.0.0.0), port 7330, or if "
    "that is taken one of 7331 to 7360.",
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
@options.local_key
@lan_options
@click.option(
    "--spot-check",
    "spot_check",
    metavar="SHARE",
    type=Share(),
    default="1/200",
    show_default=True,
    help="Have this share of the work of other nodes computed again, for the models that this node hosts, to "
    "find stages that compute wrongly; off: none.",
)
@options.speculate
@options.logged
@click.option("--until-eof", is_flag=True, hidden=True, help="End when standard input ends, too.")
def up(
    name: str | None,
    address: str | None,
    peers: tuple[str, ...],
    port: int,
    scouting: str,
    lent_bytes: int | None,
    wants_key: bool,
    spot_check: float,
    log_file: str | None,
    log_format: "Form",
    until_eof: bool,
    **more: Any,
) -> None:
    """Run this machine as a node of its cluster, until Ctrl-C.

    The first time it creates a new cluster, unless `cordee join` made this machine a member of one. --name
    and --listen are remembered. Programs on this machine reach all models of the cluster at
    http://127.0.0.1:PORT/v1, with OpenAI's API; so do other accounts, unless --local-key has it want a key.
    Programs on other machines do with --lan, by the name or address of this one and a key (`cordee key add`).
    A member whose certificate ran out while it was off waits until an admin runs that renews it.
    """
    from cordee.agent import logs
    from cordee.agent.agent import AgentOptions
    from cordee.agent.control import AgentSocket
    from cordee.api.keys import LocalKey
    from cordee.api.lan_server import LanChoice, LanServer
    from cordee.net import identity
    from cordee.net.bus import BusOptions

    logs.begin(Path(log_file) if log_file else None, log_format)
    interface = "" if scouting == "off" else scouting
    BusOptions(address or "", peers, interface).check()  # before anything is made, or kept
    choice = LanChoice.of(more)
    is_new = not identity.exists()
    _check_keys(choice, is_new=is_new)
    listener = listen("127.0.0.1", port)
    lan = None if choice.lan is None else LanServer(choice, name or platform.node(), _say)
    member = identity.found(time.time()) if is_new else identity.load()
    running = None
    try:
        with contextlib.closing(AgentSocket(member.folder)) as agent_socket:
            chosen = _settings(member, name, address)
            api = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            bus = BusOptions(chosen.listen, peers, interface)
            page, guesses = lan.page if lan else "", more["speculate"] == "auto"
            agent_options = AgentOptions(chosen.name, api, bus, lent_bytes, spot_check, page, guesses)
            if is_new:
                _offer_starter()
            api_server = _ApiServer(listener, LocalKey.made() if wants_key else None, choice, lan)
            if lan is not None:
                lan.name = chosen.name
            running = _Running(member, agent_options, api_server, agent_socket, is_new=is_new)
            left = asyncio.run(running.run(until_eof=until_eof))
    finally:
        if is_new and not (running and running.has_run):
            identity.forget()  # the next attempt may be `cordee join`
    if left:
        identity.forget()
        output.note("cordee: this machine no longer belongs to a cluster")


def _check_keys(choice: "LanChoice", *, is_new: bool) -> None:
    """Refuse to open the API to other machines where nobody could have a key; a member may yet hear of some.

    Raises:
        BadRequest: that is so.
    """
    from cordee.access.keyring import Keyring
    from cordee.access.keys_file import KeysFile, folder
    from cordee.net import identity

    knows_all = is_new or (identity.place() / "ca.key").exists()
    if choice.needs_keys and knows_all and Keyring(KeysFile(folder()).read).is_empty:
        raise refuse_without_key()


def _settings(member: "Identity", name: str | None, address: str | None) -> "Settings":
    """What the options say, else what they said last time."""
    from cordee.agent import settings

    old = settings.load(member.folder)
    return settings.Settings(
        (name or old.name or platform.node() or member.node)[:NAME_CHARS_MAX],
        old.listen if address is None else address,
    )


def _offer_starter() -> None:
    """Let a new cluster have something to answer with: the model that came with the program, if it did."""
    from cordee.models.store import Store

    store = Store()
    if not store.list():
        with contextlib.suppress(CordeeError):  # it did not, or has no room: `_greet` says what to do
            find(store, STARTER)


@dataclass(frozen=True)
class _ApiServer:
    """How the API is served."""

    listener: socket.socket
    key: "LocalKey | None"
    choice: "LanChoice"
    lan: "LanServer | None"

    async def prepare(self, agent: "Agent", *, is_new: bool) -> None:
        """What other machines need: keys, of which a member may have to hear first, and a certificate.

        Raises:
            CordeeError: it cannot be had.
        """
        from cordee.access.keyring import Keyring
        from cordee.access.keys_file import KeysFile
        from cordee.files import home
        from cordee.net import enrolment

        if is_new:
            agent.api_keys.adopt(KeysFile(home()).read())
        member, keyring = agent.identity, Keyring(agent.api_keys.all)
        if self.choice.needs_keys:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEYS_SECONDS):
                    while keyring.is_empty:
                        await asyncio.sleep(POLL_SECONDS)
        if self.choice.needs_keys and keyring.is_empty:
            raise refuse_without_key()
        if self.lan is None or not self.lan.wants_certificate:
            return

        async def sign(names: list[str]) -> bytes:
            return await enrolment.server_certificate(agent.bus, member, names, time.time())

        key = member.folder / "node.key"
        await self.lan.certify(member.authority, member.folder, key, sign, member.is_admin)

    def servers(self, agent: "Agent") -> list[Coroutine[Any, Any, None]]:
        """What serves it until it is cancelled."""
        from cordee.access.keyring import Keyring
        from cordee.agent.samples import cluster_samples
        from cordee.api.authenticator import Authenticator
        from cordee.api.guard import Access, Through
        from cordee.api.server import serve
        from cordee.console.cluster_backend import ClusterBackend
        from cordee.console.console import Console
        from cordee.endpoints.app import create_app
        from cordee.models.store import Store
        from cordee.serving.embedders import Embedders
        from cordee.web.other_pages import other_pages

        app = create_app(
            agent.services,
            embedders=Embedders(Store()),
            expected=_Names(agent),
            authenticator=Authenticator(Keyring(agent.api_keys.all), agent.ledger, self.key),
            origins=self.choice.allow_origins,
            authority=b"" if self.lan is None else self.lan.authority_pem(),
            refusal=agent.services.refusal,
            samples=lambda: cluster_samples(agent),
            console=Console(ClusterBackend(agent, Store()), agent.ledger),
            others=lambda: other_pages(agent),
        )
        servers: list[Coroutine[Any, Any, None]] = [
            serve(Through(app, Access(self.choice.hosts)), self.listener)
        ]
        if self.lan is not None:
            servers.append(self.lan.serve(app, announce=bool(agent.options.bus.scouting)))
        return servers


class _Running:
    """The agent and its servers."""

    def __init__(
        self,
        member: "Identity",
        options: "AgentOptions",
        api_server: _ApiServer,
        agent_socket: "AgentSocket",
        *,
        is_new: bool,
    ) -> None:
        self.has_run = False
        self._is_new = is_new
        self._member = member
        self._options = options
        self._api_server = api_server
        self._agent_socket = agent_socket
        self._left = False

    async def run(self, *, until_eof: bool) -> bool:
        """Serve until a signal comes, or this node leaves the cluster or is removed from it.

        With `until_eof`, until the end of standard input at the latest: the process at the pipe's other end
        is gone. True if the node leaves.

        Raises:
            JoinFailed: it was removed, or another machine runs as this node.
        """
        from cordee.agent import settings
        from cordee.agent.agent import Agent
        from cordee.models.store import Store
        from cordee.net import renewal

        task = asyncio.current_task()
        assert task is not None, "asyncio.run() runs this in a task"
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        if until_eof:
            _at_eof(task.cancel)
        agent = None
        try:
            interface = self._options.bus.scouting
            await renewal.until_valid(self._member, interface, lambda text: output.note(f"cordee: {text}"))
            agent = await Agent.start(self._member, Store(), self._options)
            self.has_run = True
            works = settings.Settings(agent.options.name, agent.options.bus.listen)
            settings.save(self._member.folder, works)
            await self._api_server.prepare(agent, is_new=self._is_new)
            await _ready(agent)
            _greet(agent, self._api_server.key, is_new=self._is_new)
            lan = self._api_server.lan
            for line in [] if lan is None else lan.greeting():
                _say(line)
            await self._serve(agent, task.cancel)
        except asyncio.CancelledError:
            output.note("cordee: closing")
        finally:
            if agent is not None:
                await agent.close("leaves" if self._left else "stops")
        return self._left

    async def _serve(self, agent: "Agent", cancel: Callable[[], object]) -> None:
        from cordee.api.server import serve
        from cordee.console.control_server import Control
        from cordee.net.enrolment import REFUSALS

        def leave() -> None:
            self._left = True
            asyncio.get_running_loop().call_soon(cancel)

        control = serve(Control(agent, leave).app(), self._agent_socket.socket)
        servers = [*self._api_server.servers(agent), control]
        ends = [asyncio.create_task(event.wait()) for event in (agent.removed, agent.cloned)]
        tasks: list[asyncio.Task[Any]] = [
            *ends,
            *(asyncio.create_task(each) for each in (*servers, _warn(agent))),
        ]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if agent.removed.is_set():
                raise JoinFailed(REFUSALS["removed"])
            agent.note_clone()
            raise JoinFailed(REFUSALS["cloned"])
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


def _say(text: str) -> None:
    output.note(f"cordee: {text}")


def _at_eof(act: Callable[[], object]) -> None:
    """Call `act` when standard input, a pipe or a terminal, ends."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), READ_BYTES):
            loop.remove_reader(sys.stdin)
            act()

    try:
        loop.add_reader(sys.stdin, read)
    except PermissionError:  # a file, or /dev/null: there is nothing to wait for
        loop.call_soon(act)


async def _ready(agent: "Agent") -> None:
    """Wait a little until clients may ask for the models on this disk."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            while not {offer.name for offer in agent.local_models.offers} <= agent.services.keys():
                await asyncio.sleep(POLL_SECONDS)


def _greet(agent: "Agent", key: "LocalKey | None", *, is_new: bool) -> None:
    """Who this is, and what to do next."""
    if is_new:
        output.note(
            "cordee: this is a new cluster, with this machine as its first node; to be a member of an "
            "existing one instead: `cordee leave`, then `cordee join CODE`"
        )
    output.note(f"cordee: node {agent.options.name} ({agent.node}) of cluster {agent.identity.cluster}")
    output.note(f"cordee: API at {agent.options.api} ({key_note(key)}); Ctrl-C ends the node")
    output.note(f"cordee: the page, in a browser of this machine: {page_of(agent.options.api)}")
    if agent.identity.is_admin:
        output.note("cordee: `cordee invite` prints a code with which another machine can join")
    else:
        output.note("cordee: `cordee nodes` lists the nodes, `cordee status` what runs where")
    models = list(agent.services)
    if models == [STARTER]:
        output.note(f'cordee: to try it, in another terminal: cordee run {STARTER} "Hello"')
    elif not models and not agent.bus.remembered:
        output.note(
            "cordee: no model yet. `cordee deploy starter` serves the small one "
            "that comes with Cordée; `cordee pull MODEL`, then `cordee deploy MODEL`, any other"
        )


async def _warn(agent: "Agent") -> None:
    """Say what is wrong with how this node was started."""
    from cordee.agent import checks

    for finding in await checks.findings_at_start(agent):
        output.note(f"cordee: {' '.join(f'{finding.what} {finding.remedy}'.split())}")
