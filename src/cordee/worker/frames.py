"""Frames on a stream socket: a message in msgpack and, after it, a payload of raw bytes.

A frame is two little-endian uint32, the lengths of message and payload, then both. Blocking functions for
workers, coroutines for their parent. Memory is committed as bytes arrive, not as the lengths announce them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cordee.worker.messages import Message

if TYPE_CHECKING:  # workers read with sockets alone and start 30 ms sooner without asyncio
    import asyncio

LENGTHS = struct.Struct("<II")
MESSAGE_BYTES_MAX = 64 << 20  # token logs of a batch: eight full contexts of a million tokens take 40 MB
# The first message of a link, a name and a wiring; until it has come anybody of the cluster may be there.
OPENING_BYTES_MAX = 16 << 10
PAYLOAD_BYTES_MAX = 1 << 30  # rows of a batch: 8,192 rows of width 16,384 are 512 MiB
SOCKET_SECONDS = (
    600.0  # until a frame is taken; the other side may have to finish a prefill on a slow machine
)
# Once a frame has begun to arrive: the poorest link, and a machine that swaps. A peer that sends a byte now
# and then would hold up a worker for ever.
FRAME_SECONDS = 5.0
FRAME_BYTES_PER_SECOND = 1_000_000
JOINED_BYTES_MAX = 64 << 10  # up to here copying is cheaper than a second system call

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class LinkClosed(Exception):
    """The other side closed the link, hangs, or sends what is no frame."""


class DoorClosed(LinkClosed):
    """A node cannot be reached from here: no address of it answers, or a certificate is not accepted."""


class FrameLate(LinkClosed):
    """A frame began to arrive, and takes too long."""


def send(link: socket.socket, message: Message, payload: bytes | memoryview = b"") -> None:
    """Send a frame.

    Raises:
        LinkClosed: it could not be sent whole.
    """
    try:
        for piece in _pieces(message, payload):
            link.sendall(piece)
    except OSError as error:
        raise LinkClosed(str(error)) from error


def receive(
    link: socket.socket,
    payload_bytes_max: int = PAYLOAD_BYTES_MAX,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
) -> tuple[Message, memoryview]:
    """The next frame; waits for it.

    Raises:
        FrameLate: it takes longer than FRAME_SECONDS, and its bytes at FRAME_BYTES_PER_SECOND, to arrive.
        LinkClosed: there is none, or not a whole one.
    """
    lengths = _receive_exactly(link, LENGTHS.size)
    message_bytes, payload_bytes = _lengths(lengths, payload_bytes_max, message_bytes_max)
    # In one call: each costs a hop some time.
    rest = _receive_exactly(link, message_bytes + payload_bytes, has_begun=True)
    return _decoded(rest[:message_bytes]), rest[message_bytes:]


def write(writer: asyncio.StreamWriter, message: Message, payload: bytes | memoryview = b"") -> None:
    """Queue a frame on a stream; how much may be queued is bounded by the micro-batches in flight."""
    for piece in _pieces(message, payload):
        writer.write(piece)


async def read(
    reader: asyncio.StreamReader,
    payload_bytes_max: int = PAYLOAD_BYTES_MAX,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
) -> tuple[Message, bytes]:
    """The next frame of a stream.

    Raises:
        FrameLate: as `receive`.
        LinkClosed: there is none, or not a whole one.
    """
    import asyncio  # here, because workers do without it

    try:
        lengths = await reader.readexactly(LENGTHS.size)
        message_bytes, payload_bytes = _lengths(lengths, payload_bytes_max, message_bytes_max)
        count = message_bytes + payload_bytes
        try:
            async with asyncio.timeout(_allowed_seconds(count)):
                message = _decoded(await reader.readexactly(message_bytes))
                return message, await reader.readexactly(payload_bytes)
        except TimeoutError as error:
            raise _late(count) from error
    except (EOFError, OSError) as error:  # asyncio.IncompleteReadError is an EOFError
        raise LinkClosed(str(error)) from error


def _pieces(message: Message, payload: bytes | memoryview) -> list[bytes | memoryview]:
    """What to send, one after the other; a small payload is joined to its message."""
    payload = memoryview(payload).cast("B")
    encoded = _encoder.encode(message)
    lengths = LENGTHS.pack(len(encoded), len(payload))
    if len(payload) <= JOINED_BYTES_MAX:
        return [b"".join((lengths, encoded, payload))]
    return [lengths + encoded, payload]


def _lengths(data: bytes | memoryview, payload_bytes_max: int, message_bytes_max: int) -> tuple[int, int]:
    message_bytes, payload_bytes = LENGTHS.unpack(data)
    if message_bytes > message_bytes_max or payload_bytes > payload_bytes_max:
        raise LinkClosed(f"a frame of {message_bytes} + {payload_bytes} bytes is too long to be one")
    return message_bytes, payload_bytes


def _decoded(data: bytes | memoryview) -> Message:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LinkClosed(f"not a message: {error}") from error


def _allowed_seconds(count: int) -> float:
    return FRAME_SECONDS + count / FRAME_BYTES_PER_SECOND


def _late(count: int) -> FrameLate:
    return FrameLate(f"a frame of {count} bytes has not come within {_allowed_seconds(count):.0f} s")


def _receive_exactly(link: socket.socket, count: int, has_begun: bool = False) -> memoryview:
    """So many bytes; once the first is there, or has `has_begun`, the rest has to come in time."""
    try:
        view = np.empty(count, np.uint8).data  # its pages become memory when they are filled
    except MemoryError as error:
        raise LinkClosed(f"no memory for {count} bytes") from error
    usual = link.gettimeout()
    until: float | None = None
    filled = 0
    try:
        while filled < count:
            if filled or has_begun:
                until = until or time.monotonic() + _allowed_seconds(count)
                link.settimeout(max(until - time.monotonic(), 0.001))
            read = link.recv_into(view[filled:])
            if read == 0:
                raise LinkClosed("the other side closed the link")
            filled += read
            if until is not None and filled < count and time.monotonic() >= until:
                raise _late(count)
    except TimeoutError as error:
        raise (LinkClosed(str(error)) if until is None else _late(count)) from error
    except OSError as error:
        raise LinkClosed(str(error)) from error
    finally:
        if until is not None:
            with contextlib.suppress(OSError):
                link.settimeout(usual)
    return view
