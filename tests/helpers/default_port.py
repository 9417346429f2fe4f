"""The default port of nodes, held by a test. Others do the same at the same time, and let go of it again."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cordee.net.bus import PORT

WAIT_SECONDS = 30.0  # whoever holds it longer runs on this machine, and the port is taken all the same


@contextmanager
def default_port_taken() -> Iterator[None]:
    """Nobody else can listen there meanwhile."""
    ends = time.monotonic() + WAIT_SECONDS
    listener = None
    while listener is None and time.monotonic() < ends:
        try:
            listener = socket.create_server(("127.0.0.1", PORT))
        except OSError:
            time.sleep(0.1)
    try:
        yield
    finally:
        if listener is not None:
            listener.close()
