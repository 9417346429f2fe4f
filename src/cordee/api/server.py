"""The HTTP server: uvicorn on a socket that already listens, ended by cancellation."""

import asyncio
import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

# Clients keep idle connections for 5 s (httpx) to 60 s (browsers) and then believe them still open: a server
# that closes first breaks the next request.
IDLE_SECONDS = 75
# Answers that are under way at the end may last this long before they are cut off.
SHUTDOWN_SECONDS = 2
# A thousand clients at once need more than the 1,024 open files that many systems start with.
OPEN_FILES = 16_384


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer requests on `listener` until the task is cancelled, which is the way to end it.

    Then no connection is accepted any more, answers that are under way get SHUTDOWN_SECONDS, and the
    listener is closed. Signals are left to the caller; requests are not logged.
    """
    _allow_open_files()
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue] - it is a context manager, too
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


def _allow_open_files() -> None:
    """Raise the process's limit of open files to OPEN_FILES where the system lets it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
