"""What a process and the child that holds a vocabulary for it (vocabulary_child.py) say to each other.

A frame is a little-endian uint32, the length, then a message in msgpack.
"""

import socket
import struct
import time

import msgspec

from cordee.errors import BadRequest

# Four times a prompt of a million tokens; keeps libllama's int32 lengths far from overflow.
TEXT_BYTES_MAX = 16 << 20
# The longest are a table and the tokens of a text of 16 MB; a table's pieces have 64 MB, its template too.
FRAME_BYTES_MAX = 192 << 20
CONTROL, HIDDEN = 1, 2  # flags of a token: a control token; without text unless special tokens are shown

_LENGTH = struct.Struct("<I")


class Table(msgspec.Struct, frozen=True, tag=True):
    """All of a vocabulary but the way from text to tokens.

    `pieces` are the bytes of all tokens, one after the other, special ones by their names; `ends` says where
    each ends, as uint32; `flags` has CONTROL and HIDDEN for each. `control_starts` are the characters with
    which names of control tokens begin.
    """

    bos: int | None
    eos: int | None
    bos_text: str
    eos_text: str
    wants_bos: bool
    end_of_generation: tuple[int, ...]
    chat_template: str | None
    pieces: bytes
    ends: bytes
    flags: bytes
    control_starts: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary is loaded; its table was given before."""


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Give the tokens of a text; see `Vocabulary.tokenize`."""

    text: str
    special: bool


class FindControls(msgspec.Struct, frozen=True, tag=True):
    """Give where the names of control tokens stand in a text."""

    text: str


class Numbers(msgspec.Struct, frozen=True, tag=True):
    """Token ids, or starts and ends by turns: int32 in the machine's order."""

    numbers: bytes


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It cannot be done. `error` is the name of a class in cordee.errors."""

    error: str
    message: str


Message = Table | Ready | Tokenize | FindControls | Numbers | Failed

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def text_bytes(text: str) -> int:
    """The length of a text in UTF-8.

    Raises:
        BadRequest: it is longer than TEXT_BYTES_MAX, or is not valid Unicode.
    """
    try:
        length = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise BadRequest("the text has half of a surrogate pair, which is not valid Unicode") from None
    if length > TEXT_BYTES_MAX:
        raise BadRequest(f"the text has {length} bytes; at most {TEXT_BYTES_MAX} are accepted")
    return length


def send(link: socket.socket, message: Message) -> None:
    """Send a message, within the time that the socket allows.

    Raises:
        OSError: the other side is gone, or (TimeoutError) does not take it.
    """
    data = _encoder.encode(message)
    link.sendall(_LENGTH.pack(len(data)) + data)


def receive(link: socket.socket, seconds: float) -> Message:
    """The next message, whole within so many seconds.

    Raises:
        EOFError: the other side ended, or sent what is no message.
        OSError: the connection broke, or (TimeoutError) nothing whole came in time.
    """
    until = time.monotonic() + seconds
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size, until))
    if length > FRAME_BYTES_MAX:
        raise EOFError(f"a message of {length} bytes is too long to be one")
    try:
        return _decoder.decode(_exactly(link, length, until))
    except (msgspec.MsgspecError, ValueError) as error:
        raise EOFError(f"not a message: {error}") from error


def _exactly(link: socket.socket, count: int, until: float) -> bytearray:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link.settimeout(left)
        read = link.recv_into(view[filled:])
        if not read:
            raise EOFError("the other side ended")
        filled += read
    return data
