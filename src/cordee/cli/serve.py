"""`cordee serve`: models behind the OpenAI endpoints, for programs on this machine."""

import asyncio
import json
import shlex
import signal
import socket
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options, output
from cordee.cli.known import find
from cordee.cli.models import STARTER
from cordee.errors import BadRequest

if TYPE_CHECKING:
    from cordee.api.keys import LocalKey
    from cordee.models.store import Store, StoredModel
    from cordee.serving.local_service import ServiceConfig

PORT = 8321


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
@options.sequences
@options.serving
def serve(
    models: tuple[str, ...],
    port: int,
    host: str,
    wants_key: bool,
    stages: int,
    sequences: int | None,
    **loading: Any,
) -> None:
    """Serve models to programs on this machine, with OpenAI's API.

    Without a MODEL it serves the starter model. Ctrl-C ends it, and cuts off answers that are under way.
    Other accounts of this machine may ask, too, unless --local-key has the API want a key.
    """
    address = _loopback(host)
    from cordee.api.keys import LocalKey
    from cordee.models.store import Store
    from cordee.serving.local_service import ServiceConfig

    store = Store()
    stored = [find(store, name) for name in dict.fromkeys(models or (STARTER,))]
    listener = listen(address, port)
    opened = listener.getsockname()[1]
    config = ServiceConfig(sequences=sequences, port=opened, **options.configuration(loading))
    key = LocalKey.made() if wants_key else None
    asyncio.run(_serve(stored, store, stages, config, listener, key))


def _loopback(host: str) -> str:
    """The loopback address that `host` names."""
    from cordee.net import address

    try:
        found = address.resolve(host.strip("[]"))
    except BadRequest:
        found = []
    if not found or not all(each.is_loopback for each in found):
        raise BadRequest(
            f"--host {host} is not a loopback address. There are no API keys for other machines yet: on "
            "another address, anybody could use the models. Use 127.0.0.1, and a tunnel (ssh -L) from other "
            "machines.",
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


async def _serve(
    models: "list[StoredModel]",
    store: "Store",
    stages: int,
    config: "ServiceConfig",
    listener: socket.socket,
    key: "LocalKey | None",
) -> None:
    """Load the models, answer until SIGINT or SIGTERM, close everything."""
    from cordee.api.app import create_app
    from cordee.api.server import serve as answer
    from cordee.models.architectures import is_encoder
    from cordee.serving.embedders import Embedders
    from cordee.serving.local_service import LocalService

    task = asyncio.current_task()
    assert task is not None, "asyncio.run() runs this in a task"
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    services: dict[str, LocalService] = {}
    # It answers from now on: a client that asks while a model loads is told so.
    writing = [model for model in models if not is_encoder(model.architecture)]
    embedders = Embedders(store, [model.name for model in models])
    app = create_app(services, embedders=embedders, expected=[model.name for model in writing], key=key)
    serving = asyncio.create_task(answer(app, listener))
    try:
        with output.loading() as report:
            for model in writing:
                own = replace(config, command=f"cordee serve {model.name}")
                services[model.name] = await LocalService.start(
                    model, store, stages=stages, config=own, report=report
                )
        for name, service in services.items():
            output.note_shortened(name, service.shortened)
        address, port = listener.getsockname()[:2]
        _greet(services, embedders.models(), address, port, key)
        await serving
    except asyncio.CancelledError:
        output.note("closing")
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for service in services.values():
            await service.close()


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
    output.note(f"Serving {', '.join(names)} at {base} ({key_note(key)}). Ctrl-C ends it. Try:")
    headers = "-H 'Content-Type: application/json'"
    if key is not None:  # not among curl's arguments, which every account may see
        headers += f' -H @<(echo "Authorization: Bearer $(cat {shlex.quote(str(key.path))})")'
    output.note(f"curl {base}/{path} {headers} -d '{json.dumps(question)}'")
