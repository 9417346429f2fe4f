"""The HTTP server: uvicorn on a socket that is open already, behind a door; ended by cancellation."""

import asyncio
import contextlib
import socket
import ssl

import uvicorn
from starlette.types import ASGIApp

from cordee.net.doors import Places, allow_descriptors
from cordee.net.http_door import HttpServer

# Clients keep idle connections for 5 s (httpx) to 60 s (browsers) and then believe them still open: a server
# that closes first breaks the next request.
IDLE_SECONDS = 75
# Answers that are under way at the end may last this long before they are cut off.
SHUTDOWN_SECONDS = 2
SILENT_MAX = 2048  # connections before their first request: a thousand clients may begin at once
ARRIVING_MAX = 1024  # requests of which something is still to come; the oldest go, if there are more
# Connections with a request at work; those above guard.REQUESTS_MAX are told at once to come again.
ANSWERED_MAX = 4096
IDLE_MAX = 2048  # connections that wait for their next request; the oldest go, if there are more


async def serve(
    app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None = None, *, is_second: bool = False
) -> None:
    """Answer requests on `listener` until the task is cancelled, which is the way to end it.

    Then no connection is accepted any more, answers that are under way get SHUTDOWN_SECONDS, and the
    listener is closed. Signals are left to the caller; requests are not logged. An application that another
    server begins and ends has this one as its second.
    """
    allow_descriptors()
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off" if is_second else "on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    places = Places(
        opening=(ARRIVING_MAX, ARRIVING_MAX),
        admitted=(ANSWERED_MAX, ANSWERED_MAX),
        silent=SILENT_MAX,
        resting=IDLE_MAX,
        resting_seconds=IDLE_SECONDS,
    )
    server = HttpServer(config, listener, places, tls)
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue] - it is a context manager, too
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise
