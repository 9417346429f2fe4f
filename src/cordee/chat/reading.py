"""Reading a text that comes in pieces, cut anywhere, as if it were whole.

A parser is a generator that reads in order, by the methods of `Reader`; where they need more text than there
is, they yield, and are taken up again when it came. So parsers look like what they parse, and a cut changes
nothing.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from cordee.chat.events import Event

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
Take = Callable[[str], None]


def nothing(_: str) -> None:
    """Drop a text."""


class Reader:
    """What came and is not read yet."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def until(self, marks: Sequence[str], take: Take) -> Reading[str | None]:
        """Give what stands before the first mark to `take`, as soon as it is certain; give the mark, which is
        read, too. None: the text ended. Of marks that begin together the shortest counts."""
        while True:
            found = min(
                ((at, len(mark), mark) for mark in marks if (at := self.text.find(mark)) >= 0), default=None
            )
            certain = len(self.text) if self.ended else len(self.text) - _possible(self.text, marks)
            if found is not None and found[0] <= certain:
                at, length, mark = found
                self._take(at, take)
                self.text = self.text[length:]
                return mark
            self._take(certain, take)
            if self.ended:
                return None
            yield

    def collected(self, marks: Sequence[str]) -> Reading[tuple[str, str | None]]:
        """As `until`, with what stands before the mark as one text."""
        parts: list[str] = []
        mark = yield from self.until(marks, parts.append)
        return "".join(parts), mark

    def begins(self, starts: Sequence[str]) -> Reading[str | None]:
        """Which of some texts comes next; it is read. None: none of them, and nothing is read."""
        while True:
            for start in starts:
                if self.text.startswith(start):
                    self.text = self.text[len(start) :]
                    return start
            if self.ended or not any(start.startswith(self.text) for start in starts):
                return None
            yield

    def skip_space(self) -> Reading[None]:
        """Read white space."""
        while True:
            self.text = self.text.lstrip()
            if self.text or self.ended:
                return
            yield

    def json_object(self, take: Take) -> Reading[None]:
        """Give a JSON object, up to the bracket that closes it, to `take`."""
        depth, in_string, escaped = 0, False, False
        while True:
            for at, character in enumerate(self.text):
                if in_string:
                    in_string, escaped = escaped or character != '"', not escaped and character == "\\"
                elif character == '"':
                    in_string = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                    if depth <= 0:
                        self._take(at + 1, take)
                        return
            self._take(len(self.text), take)
            if self.ended:
                return
            yield

    def json_value(self, take: Take, ends: str) -> Reading[None]:
        """Give a JSON value to `take`. A number, or a word, goes on to one of the characters `ends`."""
        yield from self.skip_space()
        if self.text.startswith(("{", "[")):
            yield from self.json_object(take)
        elif self.text.startswith('"'):
            yield from self._json_string(take)
        else:
            while True:
                at = next((at for at, each in enumerate(self.text) if each in ends), None)
                self._take(len(self.text) if at is None else at, take)
                if at is not None or self.ended:
                    return
                yield

    def _json_string(self, take: Take) -> Reading[None]:
        at, escaped = 1, False
        while True:
            while at < len(self.text):
                character, at = self.text[at], at + 1
                if character == '"' and not escaped:
                    self._take(at, take)
                    return
                escaped = not escaped and character == "\\"
            self._take(at, take)
            at = 0
            if self.ended:
                return
            yield

    def rest(self, take: Take) -> Reading[None]:
        """Give all that follows to `take`."""
        yield from self.until((), take)

    def _take(self, length: int, take: Take) -> None:
        if length:
            take(self.text[:length])
            self.text = self.text[length:]


class ReadingParser:
    """A `formats.Parser` made of a generator that reads, and events that it gives."""

    def __init__(self) -> None:
        self.reader = Reader()
        self._events: list[Event] = []
        self._reading = self.read()

    def read(self) -> Reading[None]:
        """Read a whole answer."""
        raise NotImplementedError

    def give(self, event: Event) -> None:
        """An event that is certain."""
        self._events.append(event)

    def push(self, text: str) -> Sequence[Event]:
        """See formats.Parser."""
        self.reader.text += text
        return self._go_on()

    def finish(self) -> Sequence[Event]:
        """See formats.Parser."""
        self.reader.ended = True
        return self._go_on()

    def _go_on(self) -> Sequence[Event]:
        next(self._reading, None)
        events, self._events = self._events, []
        return events


class Trimmed:
    """Passes a text on without the white space around it."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._begun = False
        self._held = ""

    def __call__(self, text: str) -> None:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._begun = True
            self._take(shown)


def _possible(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a mark begins that is not whole yet."""
    longest = max(map(len, marks), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
