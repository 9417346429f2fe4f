"""`cordee serve`: models behind the API, for programs on this machine, and with --lan on others."""

import asyncio
import json
import shlex
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options
from cordee.cli.keys import refuse_without_key
from cordee.cli.known import find
from cordee.cli.lan import lan_options
from cordee.cli.models import STARTER
from cordee.cli.open import PORT, page_of
from cordee.errors import BadRequest
from cordee.system import events
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.access.local_key import LocalKey
    from cordee.agent.logs import Form
    from cordee.api.authenticator import Authenticator
    from cordee.api.lan_server import LanChoice, LanServer
    from cordee.models.store import Store, StoredModel
    from cordee.serving.embedders import Embedders
    from cordee.serving.local_service import LocalService, ServiceConfig


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65_535),
    default=PORT,
    show_default=True,
    help="Port of the API; 0 takes a free one.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The loopback address to listen on.")
@options.local_key
@lan_options
@options.sequences
@options.serving
@options.logged
def serve(
    models: tuple[str, ...],
    port: int,
    host: str,
    wants_key: bool,
    stages: int,
    sequences: int | None,
    log_file: str | None,
    log_format: "Form",
    **more: Any,
) -> None:
    """Serve models to programs on this machine, with OpenAI's API; with --lan to other machines, too.

    Without a MODEL it serves the starter model. Ctrl-C ends it, and cuts off answers that are under way.
    Other accounts of this machine may ask, too, unless --local-key has the API want a key. Other machines
    always need one, which `cordee key add` makes.
    """
    from cordee.api.lan_server import LanChoice, LanServer

    address = _loopback(host)
    chosen = LanChoice.of(more)
    from cordee.access.keyring import Keyring
    from cordee.access.keys_file import KeysFile, folder
    from cordee.access.ledger import Ledger
    from cordee.access.local_key import LocalKey
    from cordee.agent import logs
    from cordee.api.authenticator import Authenticator
    from cordee.api.lan_server import LanChoice
    from cordee.models.store import Store
    from cordee.serving.local_service import ServiceConfig

    logs.begin(Path(log_file) if log_file else None, log_format)
    store = Store()
    keyring = Keyring(KeysFile(folder()).read)
    if chosen.needs_keys and keyring.is_empty:
        raise refuse_without_key()
    stored = [find(store, name) for name in dict.fromkeys(models or (STARTER,))]
    listener = listen(address, port)
    lan = None if chosen.lan is None else LanServer(chosen, socket.gethostname(), _say)
    opened = listener.getsockname()[1]
    config = ServiceConfig(sequences=sequences, port=opened, **options.configuration(more))
    key = LocalKey.made() if wants_key else None
    server = _Server(Authenticator(keyring, Ledger(), key), chosen, lan, listener)
    asyncio.run(_serve(stored, store, stages, config, server, key))


def _loopback(host: str) -> str:
    """The loopback address that `host` names."""
    from cordee.net import address

    try:
        found = address.resolve(host.strip("[]"))
    except BadRequest:
        found = []
    if not found or not all(each.is_loopback for each in found):
        raise BadRequest(
            f"--host {host} is not a loopback address, and there nobody needs a key: `--lan {host}` serves "
            "other machines, with keys and TLS.",
            "host",
        )
    return str(min(found, key=lambda each: each.version))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before any model is loaded, so that a port in use shows at once.

    Raises:
        BadRequest: the address or port cannot be used.
    """
    from cordee.net import address

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BadRequest(
            f"Port {port} of {host} cannot be used ({address.refusal(error, port)}): choose another with "
            "--port.",
            "port",
        ) from error


@dataclass(frozen=True)
class _Server:
    """The API's listeners, and who may ask."""

    authenticator: "Authenticator"
    chosen: "LanChoice"
    lan: "LanServer | None"
    listener: socket.socket

    async def certify(self) -> None:
        """Get a certificate for other machines, of an authority for this machine alone."""
        from cordee.files import home
        from cordee.net.server_certificates import OwnAuthority

        if self.lan is None or not self.lan.wants_certificate:
            return
        own = OwnAuthority(home() / "authority")

        async def sign(names: list[str]) -> bytes:
            return own.sign(names, time.time())

        await self.lan.certify(own.authority, own.folder, own.folder / "api.key", sign, is_admin=True)

    async def run(
        self, services: "dict[str, LocalService]", embedders: "Embedders", expected: list[str]
    ) -> None:
        """Answer until the task is cancelled; from the beginning on, also while models load."""
        from cordee.api.guard import Access, Through
        from cordee.api.server import serve as answer
        from cordee.console.console import Console
        from cordee.console.single_backend import SingleBackend
        from cordee.endpoints.app import create_app
        from cordee.machine.energy import Meter
        from cordee.models.store import Store
        from cordee.serving.local_service import samples

        app = create_app(
            services,
            embedders=embedders,
            expected=expected,
            authenticator=self.authenticator,
            origins=self.chosen.allow_origins,
            authority=b"" if self.lan is None else self.lan.authority_pem(),
            samples=samples(services),
            console=Console(SingleBackend(services, Store()), self.authenticator.ledger),
        )
        ledger = self.authenticator.ledger
        assert ledger is not None, "serve keeps one"
        async with asyncio.TaskGroup() as group:
            group.create_task(ledger.keep(Meter().watts, _say))
            group.create_task(answer(Through(app, Access(self.chosen.hosts)), self.listener))
            if self.lan is not None:
                group.create_task(self.lan.serve(app))


async def _serve(
    models: "list[StoredModel]",
    store: "Store",
    stages: int,
    config: "ServiceConfig",
    server: _Server,
    key: "LocalKey | None",
) -> None:
    """Load the models, answer until SIGINT or SIGTERM, close everything."""
    from cordee.models.architectures import is_encoder
    from cordee.serving.embedders import Embedders
    from cordee.serving.local_service import LocalService

    task = asyncio.current_task()
    assert task is not None, "asyncio.run() runs this in a task"
    events.on_interrupt(task.cancel)
    services: dict[str, LocalService] = {}
    await server.certify()
    # It answers from now on: a client that asks while a model loads is told so.
    writing = [model for model in models if not is_encoder(model.architecture)]
    embedders = Embedders(store, [model.name for model in models])
    serving = asyncio.create_task(server.run(services, embedders, [model.name for model in writing]))
    try:
        with output.loading() as report:
            for model in writing:
                own = replace(config, command=f"cordee serve {model.name}")
                services[model.name] = await LocalService.start(
                    model, store, stages=stages, config=own, report=report
                )
        for name, service in services.items():
            output.note(f"cordee: {name}: {output.asked(service.sequences, service.context)}")
            output.note_shortened(name, service.shortened)
        address, port = server.listener.getsockname()[:2]
        _greet(services, embedders.models(), address, port, key)
        for line in [] if server.lan is None else server.lan.greeting():
            _say(line)
        await serving
    except asyncio.CancelledError:
        output.note("closing")
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for service in services.values():
            await service.close()


def _say(text: str) -> None:
    output.note(f"cordee: {text}")


def key_note(key: "LocalKey | None") -> str:
    """What people are told of the API's key."""
    return "no API key needed" if key is None else f"its key is in {key.path}"


def _greet(
    services: Collection[str],
    embedding: "Collection[StoredModel]",
    address: str,
    port: int,
    key: "LocalKey | None",
) -> None:
    """Where the models are, and a line to try them with."""
    base = f"http://{f'[{address}]' if ':' in address else address}:{port}/v1"
    names = [*services, *(model.name for model in embedding)]
    question: dict[str, Any] = {"model": names[0], "messages": [{"role": "user", "content": "Hello"}]}
    path = "chat/completions"
    if not services:
        question, path = {"model": names[0], "input": "Hello"}, "embeddings"
    output.note(f"The page, in a browser of this machine: {page_of(base)}")
    output.note(f"Serving {', '.join(names)} at {base} ({key_note(key)}). Ctrl-C ends it. Try:")
    headers = "-H 'Content-Type: application/json'"
    if key is not None:  # not among curl's arguments, which every account may see
        headers += f' -H @<(echo "Authorization: Bearer $(cat {shlex.quote(str(key.path))})")'
    output.note(f"curl {base}/{path} {headers} -d '{json.dumps(question)}'")
