"""Reading the body of a request: bounded in size, time and memory, and decoded by a schema."""

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from cordee.api import ignored
from cordee.api.failures import ClientGone, RequestTimeout, RequestTooLarge, WrongContentType
from cordee.api.schemas import Shape
from cordee.errors import BadRequest, Overloaded

BODY_BYTES_MAX = 16 << 20  # as much text as a vocabulary tokenizes: four times a million-token prompt
# Of all requests together while they are read; a decoded body takes several times its size.
BODIES_BYTES_MAX = 64 << 20
BODY_SECONDS = 60.0  # a client on this machine sends the largest body in less than one

# msgspec's messages: what is wrong, and where it is.
PLACE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?\Z", re.DOTALL)
FIELD = re.compile(r"Object missing required field `(?P<field>.*)`\Z", re.DOTALL)

Body = TypeVar("Body")


class Bodies:
    """Reads request bodies, and counts how many bytes of them are in memory."""

    def __init__(self) -> None:
        self._held_bytes = 0

    async def read(
        self, request: Request, decoder: msgspec.json.Decoder[Body], *, declared: bool = True
    ) -> Body:
        """A request's body, decoded; fields that have no effect are noted (ignored.py).

        Raises:
            BadRequest: it is not declared as JSON (where it must be `declared`), too large, too slow,
                malformed, or not as the schema says.
            Overloaded: the bodies of other requests fill the memory that there is for them.
            ClientGone: the client left before it had sent all.
        """
        _check_headers(request, declared)
        held = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    self._hold(held, piece)
            body = decode(held, decoder)
            kind = decoder.type
            if isinstance(kind, type) and issubclass(kind, Shape):
                ignored.note(request, *ignored.unknown_fields(held, kind))
            return body
        except TimeoutError:
            raise RequestTimeout(f"the request's body took more than {BODY_SECONDS:.0f} s") from None
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._held_bytes -= len(held)

    def _hold(self, held: bytearray, piece: bytes) -> None:
        _check_size(len(held) + len(piece))
        if self._held_bytes + len(piece) > BODIES_BYTES_MAX:
            raise Overloaded("too much is being sent at once; try again in a moment")
        held += piece
        self._held_bytes += len(piece)


def decode(body: bytes | bytearray, decoder: msgspec.json.Decoder[Body], place: str = "") -> Body:
    """Decode a JSON body, or the part of one at `place`.

    Raises:
        BadRequest: with msgspec's reason, and the path of the field as `param`.
    """
    try:
        body.decode()  # msgspec validates only the strings that it keeps
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} is wrong") from None
    except msgspec.ValidationError as error:
        raise _refusal(str(error), place) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _refusal(message: str, place: str) -> BadRequest:
    match = PLACE.match(message)
    assert match is not None, "it matches any text"
    what, path = match.group("what", "path")
    path = ".".join(filter(None, (place, path))) or None
    field = FIELD.match(what)
    if field is None:
        return BadRequest(f"{path or 'the body'}: {what[0].lower()}{what[1:]}", path)
    param = f"{path}.{field['field']}" if path else field["field"]
    return BadRequest(f"{param} is missing", param)


def _check_headers(request: Request, declared: bool) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared and kind != "application/json":
        raise WrongContentType(
            f"the body is declared as {kind or 'nothing'}: send JSON with 'Content-Type: application/json'"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise WrongContentType(f"a body with Content-Encoding {encoding} is not read: send plain JSON")
    length = request.headers.get("content-length", "0")
    _check_size(int(length) if length.isdecimal() else 0)


def _check_size(length: int) -> None:
    if length > BODY_BYTES_MAX:
        raise RequestTooLarge(f"the body is larger than {BODY_BYTES_MAX} bytes")
