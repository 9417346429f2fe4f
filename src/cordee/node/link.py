"""Frames on a stream socket: a message in msgpack and, after it, a payload of raw bytes.

A frame is two little-endian uint32, the lengths of message and payload, then both. Blocking functions for
workers, coroutines for the service.
"""

import asyncio
import socket
import struct

import msgspec

from cordee.node.messages import Message

LENGTHS = struct.Struct("<II")
MESSAGE_BYTES_MAX = 64 << 20  # token logs of a batch: eight full contexts of a million tokens take 40 MB
PAYLOAD_BYTES_MAX = 1 << 30  # rows of a batch: 8,192 rows of width 16,384 are 512 MiB
SOCKET_SECONDS = 60.0  # for one frame; the peer is a process of this machine, so longer means that it hangs

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class LinkClosed(Exception):
    """The other side closed the link, hangs, or sends what is no frame."""


def send(link: socket.socket, message: Message, payload: bytes | memoryview = b"") -> None:
    """Send a frame.

    Raises:
        LinkClosed: it could not be sent whole.
    """
    try:
        link.sendall(_packed(message, payload))
        if len(payload):
            link.sendall(payload)
    except OSError as error:
        raise LinkClosed(str(error)) from error


def receive(link: socket.socket) -> tuple[Message, memoryview]:
    """The next frame; waits for it.

    Raises:
        LinkClosed: there is none, or not a whole one.
    """
    message_bytes, payload_bytes = _lengths(_receive_exactly(link, LENGTHS.size))
    message = _decoded(_receive_exactly(link, message_bytes))
    return message, _receive_exactly(link, payload_bytes)


def write(writer: asyncio.StreamWriter, message: Message, payload: bytes | memoryview = b"") -> None:
    """Queue a frame on a stream; how much may be queued is bounded by the micro-batches in flight."""
    writer.write(_packed(message, payload))
    if len(payload):
        writer.write(payload)


async def read(reader: asyncio.StreamReader) -> tuple[Message, bytes]:
    """The next frame of a stream.

    Raises:
        LinkClosed: there is none, or not a whole one.
    """
    try:
        message_bytes, payload_bytes = _lengths(await reader.readexactly(LENGTHS.size))
        message = _decoded(await reader.readexactly(message_bytes))
        return message, await reader.readexactly(payload_bytes)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise LinkClosed(str(error)) from error


def _packed(message: Message, payload: bytes | memoryview) -> bytes:
    encoded = _encoder.encode(message)
    return LENGTHS.pack(len(encoded), memoryview(payload).nbytes) + encoded


def _lengths(data: bytes | memoryview) -> tuple[int, int]:
    message_bytes, payload_bytes = LENGTHS.unpack(data)
    if message_bytes > MESSAGE_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise LinkClosed(f"a frame of {message_bytes} + {payload_bytes} bytes is too long to be one")
    return message_bytes, payload_bytes


def _decoded(data: bytes | memoryview) -> Message:
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise LinkClosed(f"not a message: {error}") from error


def _receive_exactly(link: socket.socket, count: int) -> memoryview:
    view = memoryview(bytearray(count))
    filled = 0
    while filled < count:
        try:
            read = link.recv_into(view[filled:])
        except OSError as error:
            raise LinkClosed(str(error)) from error
        if read == 0:
            raise LinkClosed("the other side closed the link")
        filled += read
    return view
