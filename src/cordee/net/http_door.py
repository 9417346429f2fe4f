"""HTTP behind a door (doors.py): uvicorn's protocol, with deadlines for headers and body of each request.

uvicorn by itself waits for ever for the first byte, for the rest of a header or of a body; and once it has
answered, for the rest of a body that nobody reads. Here a connection is admitted once it has sent a whole
request, and until that is answered. So those that send slowly lose their places to those that do not.
"""

import socket
import ssl
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from cordee.net.doors import Connection, Door, Places

BODY_SECONDS = 75.0  # from the headers' end; api/bodies.py gives up before, with a status
# What comes to a port of HTTPS without TLS is answered so, in plain HTTP.
PLAIN_TEXT = b"This port wants HTTPS: write https:// instead of http:// in the address.\n"
PLAIN_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%s" % (len(PLAIN_TEXT), PLAIN_TEXT)
)
# Data that a client does not read for so long ends the connection, also while it is being closed.
UNREAD_SECONDS = 60


class HttpProtocol(H11Protocol):
    """A connection of HTTP/1.1."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, app_state: dict[str, Any], connection: Connection
    ) -> None:
        super().__init__(config, state, app_state)
        self._connection = connection
        if connection.address and hasattr(socket, "TCP_USER_TIMEOUT"):  # not by a Unix socket; Linux
            connection.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)

    def _should_upgrade(self) -> bool:
        """Never: an offer of another protocol is declined by an answer in this one (RFC 9110, section 7.8).

        uvicorn would log each of them, and Java's client makes one with each first request.
        """
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.leave()

    def data_received(self, data: bytes) -> None:
        request = self.cycle
        if self._connection.step == "resting":
            self._connection.reopen()
        super().data_received(data)
        self._follow(is_new=self.cycle is not request)

    def on_response_complete(self) -> None:
        request = self.cycle
        self._connection.rest()
        super().on_response_complete()
        if self.cycle is not request:  # the next one had come already
            self._connection.reopen()
            self._follow(is_new=True)

    def _follow(self, *, is_new: bool) -> None:
        """Something of a request came."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        if cycle is None or cycle.response_complete:
            return
        if not cycle.more_body:
            self._connection.admit()
        elif is_new:
            self._connection.due(BODY_SECONDS)


class HttpServer(uvicorn.Server):
    """uvicorn's server, with a door for its listener."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        places: Places,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(config)
        self._listener = listener
        self._places = places
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        door = Door(
            self._listener,
            lambda connection: HttpProtocol(self.config, self.server_state, self.lifespan.state, connection),
            self._places,
            self._tls,
            PLAIN_ANSWER,
        )
        self.servers = [door]  # pyright: ignore[reportAttributeAccessIssue] - it closes them, and no more


def open_http(config: uvicorn.Config, listener: socket.socket, places: Places, tls: ssl.SSLContext) -> Door:
    """A door for HTTP over TLS, for an application without start or end."""
    config.load()
    state = ServerState()
    return Door(listener, lambda connection: HttpProtocol(config, state, {}, connection), places, tls)
