"""HTTP behind a door (doors.py): uvicorn's protocol, with a deadline for the headers of each request.

uvicorn by itself waits for ever for the first byte, and for the rest of a header; and once it has answered,
for the rest of a body that nobody reads. Here a connection is admitted for as long as a request of it is being
answered, and no longer.
"""

import socket
import ssl
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from cordee.net.doors import Caller, Door, Places

# Data that a client does not read for so long ends the connection, also while it is being closed.
UNREAD_SECONDS = 60


class HttpProtocol(H11Protocol):
    """A connection of HTTP/1.1."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, app_state: dict[str, Any], caller: Caller
    ) -> None:
        super().__init__(config, state, app_state)
        self._caller = caller
        if caller.address and hasattr(socket, "TCP_USER_TIMEOUT"):  # not by a Unix socket; Linux
            caller.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._caller.leave()

    def data_received(self, data: bytes) -> None:
        request = self.cycle
        if self._caller.is_resting:
            self._caller.reopen()
        super().data_received(data)
        if self.cycle is not request:
            self._caller.admit()

    def on_response_complete(self) -> None:
        request = self.cycle
        self._caller.rest()
        super().on_response_complete()
        if self.cycle is not request:  # the next one had come already
            self._caller.admit()


class HttpServer(uvicorn.Server):
    """uvicorn's server, with a door for its listener."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, places: Places) -> None:
        super().__init__(config)
        self._listener = listener
        self._places = places

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        door = Door(
            self._listener,
            lambda caller: HttpProtocol(self.config, self.server_state, self.lifespan.state, caller),
            self._places,
        )
        self.servers = [door]  # pyright: ignore[reportAttributeAccessIssue] - it closes them, and no more


def open_http(
    config: uvicorn.Config, listener: socket.socket, places: Places, tls: ssl.SSLContext
) -> Door:
    """A door for HTTP over TLS, for an application without start or end."""
    config.load()
    state = ServerState()
    return Door(listener, lambda caller: HttpProtocol(config, state, {}, caller), places, tls)
