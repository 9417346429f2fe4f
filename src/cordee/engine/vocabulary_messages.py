"""What a process and the child that holds a vocabulary for it (vocabulary_child.py) say to each other."""

import msgspec

from cordee.errors import BadRequest

# Four times a prompt of a million tokens; keeps libllama's int32 lengths far from overflow.
TEXT_BYTES_MAX = 16 << 20
CONTROL, HIDDEN = 1, 2  # flags of a token: a control token; without text unless special tokens are shown


class Table(msgspec.Struct, frozen=True, tag=True):
    """All of a vocabulary but the way from text to tokens.

    `pieces` are the bytes of all tokens, one after the other, special ones by their names; `ends` says where
    each ends, as uint32; `flags` has CONTROL and HIDDEN for each. `control_starts` are the characters with
    which names of control tokens begin. `infill` are those of Infill that there are, by field.
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
    infill: dict[str, int] = {}


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

decoder = msgspec.msgpack.Decoder(Message)


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
