"""A house: a server with a second listener for other machines, over real TLS, and keys that come and go."""

import asyncio
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cordee.access.api_keys import ApiKey
from cordee.access.failed_keys import FailedKeys
from cordee.access.keyring import Keyring, new_key, revoked
from cordee.access.ledger import Ledger
from cordee.api.authenticator import Authenticator
from cordee.api.guard import Access, Through
from cordee.api.server import serve
from cordee.net.server_certificates import OwnAuthority
from cordee.serving.local_service import ServiceConfig
from serving import SECONDS, Reply, Running, running

NAME, ALLOWED = "pc-1.local", "host.docker.internal"


@dataclass
class House:
    """A server with a listener for other machines, over TLS; `keys` may change while it runs."""

    server: Running
    port: int
    authority: OwnAuthority
    keys: dict[str, ApiKey]
    ledger: Ledger
    failed: FailedKeys
    shown: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, **bounds: Any) -> str:
        self.keys[name], self.shown[name] = new_key(name, (), **bounds)
        return self.shown[name]

    def revoke(self, name: str) -> None:
        self.keys[name] = revoked(name, self.keys.values())

    def trusting(self, authority: Path | None = None) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=authority or self.authority.folder / "ca.pem")

    def open(self, context: ssl.SSLContext | None = None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=SECONDS, context=context or self.trusting()
        )

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> Reply:
        given = {} if body is None else {"Content-Type": "application/json"}
        if key is not None:
            given["Authorization"] = f"Bearer {key}"
        with closing(self.open()) as connection:
            connection.request(method, path, body if body is None else json.dumps(body), given | headers)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())


@contextmanager
def opened(model: Path, folder: Path, config: ServiceConfig) -> Iterator[House]:
    """A house that serves the model file as `starter`."""
    keys: dict[str, ApiKey] = {}
    ledger = Ledger(folder)
    authenticator = Authenticator(Keyring(lambda: tuple(keys.values())), ledger)
    own = OwnAuthority(folder / "authority")
    (folder / "api.pem").write_bytes(own.sign(["127.0.0.1", NAME], time.time()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "api.pem", own.folder / "api.key")
    with running(
        model,
        folder / "models",
        config=config,
        authenticator=authenticator,
        origins=["https://chat.example"],
    ) as server:
        listener = socket.create_server(("127.0.0.1", 0))
        app = Through(server.app, Access([NAME, ALLOWED], is_lan=True))
        serving = asyncio.run_coroutine_threadsafe(serve(app, listener, context, is_second=True), server.loop)
        yield House(server, listener.getsockname()[1], own, keys, ledger, authenticator._failed)
        serving.cancel()
