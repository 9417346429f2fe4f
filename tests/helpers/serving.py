"""A real service behind a real HTTP server on a free loopback port, for tests that are clients of it."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Collection, Coroutine, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from cordee.access.local_key import LocalKey
from cordee.api.authenticator import Authenticator
from cordee.api.server import serve
from cordee.api.stream import Timing
from cordee.console.console import Console
from cordee.console.single_backend import SingleBackend
from cordee.endpoints.app import create_app
from cordee.models.store import Store
from cordee.serving.embedders import Embedders
from cordee.serving.local_service import LocalService, ServiceConfig, samples

SECONDS = 60  # no answer of the starter model takes nearly as long, however busy the machine is
BACKLOG = 2048  # connections that arrive at once
SEND_BYTES = 32 << 10  # the system's buffer for each connection: a client that reads nothing shows soon

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "starter", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
FRANCE = {"model": "starter", "prompt": "The capital of France is", "temperature": 0}


def user(content: Any) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


class Running:
    """A server in a thread of its own, at `port`. `services` are those it serves."""

    def __init__(self, services: dict[str, LocalService], listener: socket.socket) -> None:
        self.services = services
        self.port: int = listener.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}/v1"
        self.loop = asyncio.new_event_loop()
        self.app: ASGIApp | None = None
        self.embedders: Embedders

    @property
    def service(self) -> LocalService:
        [service] = self.services.values()
        return service

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SECONDS)

    def status(self) -> dict[str, Any]:
        async def read() -> dict[str, Any]:
            return self.service.status()

        return self.run(read())

    def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the service's status is as wanted."""
        settled = threading.Event()
        for _ in range(SECONDS * 50):
            if true(self.status()):
                return
            settled.wait(0.02)
        raise AssertionError(f"still {self.status()}")

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> "Reply":
        """Send one request, a JSON body unless it is bytes, on a connection of its own."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            given = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, body, given | (headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()


class Reply:
    """A response that was read to its end."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; its shape is the same for every error."""
        assert set(self.json) == {"error"}
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("invalid_request_error" if self.status < 500 else "server_error")
        assert error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of each server-sent event, decoded; '[DONE]' stays what it is."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


@contextmanager
def running(
    path: Path | None,
    folder: Path,
    *,
    config: ServiceConfig | None = None,
    stages: int = 1,
    key: LocalKey | None = None,
    authenticator: Authenticator | None = None,
    origins: Collection[str] = (),
    expected: Collection[str] = (),
    embedding: Sequence[Path] = (),
    timing: Timing | None = None,
) -> Generator[Running]:
    """Serve the model file `path` as `starter` from a store in `folder`; without a path, nothing yet.

    `embedding` are files of models for vectors, each called by its file's name.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    server = Running({}, listener)
    thread = threading.Thread(target=server.loop.run_forever, name="server")
    thread.start()
    serving = None
    try:
        store = Store(folder)
        for each in embedding:
            store.add_file(each, each.stem, take="link")
        if path is not None:
            model = store.add_file(path, "starter", take="link")
            config = config or ServiceConfig(context=2048)
            server.services["starter"] = server.run(
                LocalService.start(model, store, stages=stages, config=config, report=lambda _: None)
            )
        server.embedders = Embedders(store)
        server.app = app = create_app(
            server.services,
            embedders=server.embedders,
            expected=expected,
            authenticator=authenticator or Authenticator(local_key=key),
            origins=origins,
            timing=timing or Timing(),
            samples=samples(server.services),
            console=Console(
                SingleBackend(server.services, store), authenticator.ledger if authenticator else None
            ),
        )
        serving = asyncio.run_coroutine_threadsafe(serve(app, listener), server.loop)
        yield server
    finally:
        if serving is not None:
            serving.cancel()
        server.run(_close(server))
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join()
        server.loop.close()
        listener.close()


async def _close(server: Running) -> None:
    """Close the services, and wait for what still runs on the loop, such as the HTTP server's end."""
    for service in server.services.values():
        await service.close()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        await asyncio.wait(rest, timeout=SECONDS)
