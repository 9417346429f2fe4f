"""Parsers of answers: thinking between marks, calls of tools, and text that is all the rest."""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from cordee.chat.events import ArgumentsDelta, CallBegun, TextDelta, ThinkingDelta
from cordee.chat.families import JsonCalls, MarkedCalls, NamedCalls, ThinkingMarks
from cordee.chat.reading import Reading, ReadingParser, Trimmed, nothing

NewId = Callable[[], str]
BoundCalls = JsonCalls | MarkedCalls | NamedCalls

# Of a string's schema; what has one of these is written as JSON, which can be bound to it.
_BINDING = frozenset(
    ("const", "pattern", "format", "minLength", "maxLength", "$ref", "anyOf", "oneOf", "allOf")
)


class MarkedParser(ReadingParser):
    """Reads answers of families with marks around thinking and calls.

    What does not go on as a call must, once it began as one, is text: nothing is lost. `opened`: the prompt
    ended in the mark that opens thinking. `texts` has, by tool, its parameters that are bare text
    (MarkedCalls).
    """

    def __init__(
        self,
        thinking: ThinkingMarks | None,
        calls: BoundCalls | None,
        new_id: NewId,
        *,
        opened: bool = False,
        texts: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        self._thinking, self._calls = thinking, calls
        self._new_id = new_id
        self._opened = opened
        self._texts = texts or {}
        self._space = ""  # white space that is text, unless a call follows
        self._unfinished = ""  # the head of a call that is not more than that

    def read(self) -> Reading[None]:
        """Thinking, then text and calls."""
        reader = self.reader
        if self._thinking is not None:
            yield from self._think(self._thinking)
        if self._calls is None:
            yield from reader.rest(self._say)
            return
        if isinstance(self._calls, JsonCalls) and self._calls.bare:
            yield from self._bare(self._calls)
        while (yield from reader.until((_trigger(self._calls),), self._say_later)) is not None:
            self._space = ""
            rest_of_open = self._calls.open[len(_trigger(self._calls)) :]
            if isinstance(self._calls, JsonCalls):
                yield from self._section(self._calls, rest_of_open)
            elif isinstance(self._calls, MarkedCalls):
                yield from self._marked(self._calls, rest_of_open)
            else:
                yield from self._named(self._calls, rest_of_open)
        self._say("")

    def _think(self, marks: ThinkingMarks) -> Reading[None]:
        """Thinking, if the answer begins with it."""
        reader = self.reader
        if not self._opened:
            space: list[str] = []
            yield from self._leading(space)
            if (yield from reader.begins((marks.open,))) is None:
                self._space = "".join(space)
                return
        yield from reader.until((marks.close,), Trimmed(lambda text: self.give(ThinkingDelta(text))))
        yield from reader.skip_space()

    def _leading(self, space: list[str]) -> Reading[None]:
        reader = self.reader
        while True:
            stripped = reader.text.lstrip()
            space.append(reader.text[: len(reader.text) - len(stripped)])
            reader.text = stripped
            if stripped or reader.ended:
                return
            yield

    def _bare(self, calls: JsonCalls) -> Reading[None]:
        """A call without the mark before it, if the answer begins with one."""
        space: list[str] = []
        yield from self._leading(space)
        if (yield from self.reader.begins((calls.head,))) is None:
            self._space += "".join(space)
            return
        yield from self._call(calls)
        self._say(self._unfinished)  # it was JSON that begins as a call does

    def _section(self, calls: JsonCalls, rest_of_open: str) -> Reading[None]:
        if (yield from self._expect(rest_of_open + calls.head)) is None:
            return
        between = [] if calls.between is None else [calls.between + calls.head]
        while (yield from self._call(calls)):
            if (yield from self._expect(*between, calls.close)) not in between:
                return

    def _call(self, calls: JsonCalls) -> Reading[bool]:
        """A call behind its `head`; whether it is whole."""
        name, mark = yield from self.reader.collected((calls.id_mark or calls.middle,))
        if mark == calls.id_mark:
            _, mark = yield from self.reader.collected((calls.middle,))
        if mark is None:
            self._unfinished = calls.head + name
            return False
        self.give(CallBegun(self._new_id(), name))
        yield from self.reader.json_object(self._argue)
        return (yield from self._expect(calls.tail)) is not None

    def _marked(self, calls: MarkedCalls, rest_of_open: str) -> Reading[None]:
        if (yield from self._expect(rest_of_open)) is None:
            return
        between = [] if calls.between is None else [calls.between]
        while (yield from self._marked_call(calls)):
            if (yield from self._expect(*between, calls.end)) not in between:
                return

    def _marked_call(self, calls: MarkedCalls) -> Reading[bool]:
        """A call from its name on; whether it is whole."""
        reader = self.reader
        name, mark = yield from reader.collected((calls.middle,))
        if mark is None:
            return False
        self.give(CallBegun(self._new_id(), name))
        before = "{"
        next_mark = calls.parameter_open, calls.close
        middles = [calls.parameter_middle, *filter(None, [calls.json_middle])]
        while (mark := (yield from reader.until(next_mark, nothing))) == calls.parameter_open:
            key, middle = yield from reader.collected(middles)
            if middle is None:
                return False
            self._argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            is_text = key in self._texts.get(name, ()) if not calls.json_middle else middle == middles[0]
            self._argue('"' if is_text else "")
            take = self._argue_text if is_text else self._argue
            if (yield from reader.until((calls.parameter_close,), take)) is None:
                return False  # it is cut off: not made to look whole
            self._argue('"' if is_text else "")
        if mark is not None:
            self._argue("{}" if before == "{" else "}")
        return mark is not None

    def _named(self, calls: NamedCalls, rest_of_open: str) -> Reading[None]:
        if (yield from self._expect(rest_of_open)) is None:
            return
        between = [] if calls.between is None else [calls.between]
        while (yield from self._named_call(calls)):
            if (yield from self._expect(*between, calls.close)) not in between:
                return

    def _named_call(self, calls: NamedCalls) -> Reading[bool]:
        """A call from its name on; whether it is whole."""
        name, mark = yield from self.reader.collected((calls.begin,))
        if mark is None:
            return False
        self.give(CallBegun(self._new_id(), name))
        return (yield from self._members(calls, calls.equals, calls.comma, calls.end))

    def _members(self, calls: NamedCalls, equals: str, comma: str, end: str) -> Reading[bool]:
        """The arguments of a call, or the members of an object, up to the end of that; whether it came."""
        reader = self.reader
        before = "{"
        while (yield from reader.begins((end,))) is None:
            if before != "{":
                yield from reader.begins((comma,))
            key, mark = yield from reader.collected((equals,))
            if mark is None:
                return False
            self._argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._value(calls, comma[0] + end)):
                return False
        self._argue("{}" if before == "{" else "}")
        return True

    def _value(self, calls: NamedCalls, ends: str) -> Reading[bool]:
        """A value, which becomes JSON; whether it is whole."""
        reader, quote = self.reader, calls.quote
        if not quote:
            yield from reader.json_value(self._argue, ends)
        elif (yield from reader.begins((quote,))) is not None:
            self._argue('"')
            if (yield from reader.until((quote,), self._argue_text)) is None:
                return False
            self._argue('"')
        elif (yield from reader.begins(("{",))) is not None:
            if (yield from reader.begins(('"',))) is None:
                return (yield from self._members(calls, ":", ",", "}"))
            reader.text = '{"' + reader.text
            yield from reader.json_object(self._argue)
        elif (yield from reader.begins(("[",))) is not None:
            return (yield from self._items(calls))
        else:
            yield from reader.json_value(self._argue, ends)
        return not reader.ended or bool(reader.text)

    def _items(self, calls: NamedCalls) -> Reading[bool]:
        reader = self.reader
        before = "["
        while (yield from reader.begins(("]",))) is None:
            if before != "[":
                yield from reader.begins((",",))
            self._argue(before)
            before = ", "
            if not (yield from self._value(calls, ",]")):
                return False
        self._argue("[]" if before == "[" else "]")
        return True

    def _expect(self, *expected: str) -> Reading[str | None]:
        """Read what must come now, and give which it was. If it does not, all that follows is text, unless
        the answer was cut off within it."""
        reader = self.reader
        found = yield from reader.begins(expected)
        if found is None:
            if reader.ended and any(each.startswith(reader.text) for each in expected):
                reader.text = ""
            yield from reader.rest(self._say)
        return found

    def _say(self, text: str) -> None:
        text, self._space = self._space + text, ""
        if text:
            self.give(TextDelta(text))

    def _say_later(self, text: str) -> None:
        """As `_say`, but white space at the end waits."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self.give(TextDelta(shown))

    def _argue(self, text: str) -> None:
        if text:
            self.give(ArgumentsDelta(text))

    def _argue_text(self, text: str) -> None:
        self._argue(json.dumps(text, ensure_ascii=False)[1:-1])


def _trigger(calls: BoundCalls) -> str:
    """What a call is first known by: the mark itself, without what stands behind it in `open`."""
    return trigger(calls.open)


def trigger(mark: str) -> str:
    """The tag or token that a mark begins with."""
    if mark.startswith("["):
        return mark[: mark.index("]") + 1]
    return mark[: mark.index(">") + 1]


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The properties of a schema, which a client wrote."""
    properties = schema.get("properties")
    return cast("dict[str, Any]", properties) if isinstance(properties, dict) else {}


def text_parameters(schema: Mapping[str, Any]) -> frozenset[str]:
    """The properties of a schema that are written as bare text."""
    return frozenset(key for key, value in properties_of(schema).items() if is_text(value))


def is_text(schema: Any) -> bool:
    """Whether a property is written as bare text, not as JSON: a string, any or one of some."""
    if not isinstance(schema, dict):
        return False
    read = cast("dict[str, Any]", schema)
    choices = read.get("enum", [""])
    texts = isinstance(choices, list) and all(isinstance(each, str) for each in cast("list[Any]", choices))
    return read.get("type") == "string" and texts and choices != [] and not _BINDING & read.keys()
