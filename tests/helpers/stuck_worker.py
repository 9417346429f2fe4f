"""A stage worker that sends rows and tokens byte by byte, as `stuck_node` has it."""

import socket
import time

from cordee.worker import frames, worker
from cordee.worker.messages import Message, Rows, Tokens

PAUSE_SECONDS = 0.4

_send = frames.send


def trickle(link: socket.socket, message: Message, payload: bytes | memoryview = b"") -> None:
    if not isinstance(message, Rows | Tokens):
        _send(link, message, payload)
        return
    try:
        for piece in frames._pieces(message, payload):
            for byte in bytes(piece):
                link.sendall(bytes([byte]))
                time.sleep(PAUSE_SECONDS)
    except OSError as error:
        raise frames.LinkClosed(str(error)) from error


if __name__ == "__main__":
    frames.send = trickle
    worker.main()
