"""From the bytes of tokens to text that a client may see: whole characters, nothing of a stop string."""

import codecs
from collections.abc import Sequence

from cordee.errors import BadRequest

STOPS_MAX = 16  # OpenAI allows 4; each costs a search per token
STOP_CHARS_MAX = 256  # text that may become a stop string is held back: longer ones would stall the stream


def check(stop: Sequence[str]) -> None:
    """Refuse stop strings that a `TextStream` would not take.

    Raises:
        BadRequest: there are too many, one is too long, or one is empty.
    """
    if len(stop) > STOPS_MAX:
        raise BadRequest(f"{len(stop)} stop strings were given; at most {STOPS_MAX} are accepted", "stop")
    for text in stop:
        if not 0 < len(text) <= STOP_CHARS_MAX:
            raise BadRequest(f"a stop string must have 1 to {STOP_CHARS_MAX} characters", "stop")


class TextStream:
    """Turns the bytes of tokens, split anywhere, into text that never has to be taken back.

    Bytes that do not yet make a character, and characters that may become a stop string, are held back.
    Of several stop strings the one that completes first in the stream counts; of those that complete
    together, the one that begins first. What stands before it is given; it and all that follows is not:
    `stopped` is then that string. Invalid UTF-8 becomes U+FFFD.

    Raises:
        BadRequest: as `check` does.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        check(stop)
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add the bytes of one token; gives what can be sent now, perhaps nothing."""
        return self._append(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, now that nothing follows; an incomplete character becomes U+FFFD."""
        text = self._append(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _append(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        text = self._held + text
        found = self._first_stop(text)
        if found is not None:
            at, self.stopped = found
            self._held = ""
            return text[:at]
        cut = len(text) - self._possible_stop(text)
        self._held = text[cut:]
        return text[:cut]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        matches = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(matches)[1:] if matches else None

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
