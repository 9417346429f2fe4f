"""Texts of a client in a prompt: the names of control tokens in them stay text.

While a template is rendered, placeholders stand for such names, wherever a client can write them: in
messages, in what was thought, in calls and their arguments, in tools, in variables of the template.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from cordee.chat.turn import ChatTurn, Message, Tool, ToolCall
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest

# A conversation about chat templates may name some; each costs a few calls of the tokenizer.
CONTROL_TEXTS_MAX = 4096
# A private-use character around placeholders; what makes them unique is random. A template's `tojson` may
# write it as an escape, and an escape in a string that is written again as one more.
PRIVATE = "\U000f0000"
_WRITTEN = rf"(?:{PRIVATE}|\\+udb80\\+udc00)"
VALUES_MAX = 100_000  # in the tools and variables of one request


class Hidden:
    """The control tokens' names that stand in one conversation, hidden behind placeholders. `marks` are to be
    treated as such names."""

    def __init__(self, vocabulary: Vocabulary, param: str, marks: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._param = param
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._key = secrets.token_hex(8)
        self._names: dict[str, int] = {}  # to their numbers
        self._uses = 0
        self._values = 0

    def turn(self, turn: ChatTurn, *, knows_developer: bool) -> ChatTurn:
        """A turn whose texts cannot become control tokens. One that continues its last message is marked
        there.

        Raises:
            BadRequest: there are too many names, or values in values.
        """
        try:
            messages = [self._message(message, knows_developer) for message in turn.messages]
            tools = [self._tool(tool) for tool in turn.tools]
            variables = self.value(dict(turn.variables))
        except RecursionError:
            raise BadRequest("a tool, a call or a variable is nested too deeply", self._param) from None
        if turn.continues:
            messages[-1] = replace(messages[-1], content=messages[-1].content + self._end)
        return replace(turn, messages=messages, tools=tools, variables=variables)

    def text(self, text: str) -> str:
        """A text with placeholders."""
        spans = self._spans(text)
        self._uses += len(spans)
        if self._uses > CONTROL_TEXTS_MAX:
            raise BadRequest(f"more than {CONTROL_TEXTS_MAX} names of control tokens are used", self._param)
        shown, at = "", 0
        for start, end in spans:
            number = self._names.setdefault(text[start:end], len(self._names))
            shown += f"{text[at:start]}{PRIVATE}{self._key}{number}{PRIVATE}"
            at = end
        return shown + text[at:]

    def value(self, value: Any) -> Any:
        """A JSON value with placeholders in all its strings, keys among them."""
        self._values += 1
        if self._values > VALUES_MAX:
            raise BadRequest(f"the tools of a request hold more than {VALUES_MAX} values", self._param)
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {self.text(key): self.value(each) for key, each in items}
        if isinstance(value, list):
            return [self.value(each) for each in cast("list[Any]", value)]
        return value

    def before_end(self, text: str) -> str:
        """A rendered text up to the end of the message that is continued.

        Raises:
            BadRequest: the template does not show that message as it is.
        """
        before, mark, _ = text.rpartition(self._end)
        if not mark:
            raise BadRequest(
                "the last message cannot be continued: the model's chat template does not show it as it is",
                self._param,
            )
        return before

    def shown(self, text: str) -> str:
        """A rendered text with the names where they stood."""
        pattern, names = f"{_WRITTEN}{self._key}([0-9]+){_WRITTEN}", list(self._names)
        return re.sub(pattern, lambda match: names[int(match[1])], text)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered text, where placeholders become the names as plain text."""
        pieces = re.split(f"{_WRITTEN}{self._key}([0-9]+){_WRITTEN}", text)
        names = list(self._names)
        tokens = self._vocabulary.tokenize(pieces[0], special=True, add_bos=True)
        for name, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += self._plain(names[int(name)])
            tokens += self._vocabulary.tokenize(literal, special=True, add_bos=False)
        return tokens

    def _spans(self, text: str) -> list[tuple[int, int]]:
        spans = self._vocabulary.control_spans(text)
        marks = [found.span() for found in self._marks.finditer(text)]
        free = [mark for mark in marks if all(mark[1] <= start or end <= mark[0] for start, end in spans)]
        return sorted(spans + free)

    def _plain(self, name: str) -> list[int]:
        """A name as text; one that is a token in text, too, is cut."""
        parts = [name] if len(self._tokens(name)) > 1 else [name[:1], name[1:]]
        return [token for part in parts for token in self._tokens(part)]

    def _tokens(self, text: str) -> list[int]:
        return self._vocabulary.tokenize(text, special=False, add_bos=False)

    @property
    def _end(self) -> str:
        return f"{PRIVATE}{self._key}end{PRIVATE}"

    def _message(self, message: Message, knows_developer: bool) -> Message:
        role = "system" if message.role == "developer" and not knows_developer else message.role
        return replace(
            message,
            role=role,
            content=self.text(message.content),
            name=None if message.name is None else self.text(message.name),
            thinking=self.text(message.thinking),
            tool_calls=tuple(map(self._call, message.tool_calls)),
            tool_call_id=None if message.tool_call_id is None else self.text(message.tool_call_id),
        )

    def _call(self, call: ToolCall) -> ToolCall:
        """Arguments are decoded first, since an escape may hide a name."""
        try:
            decoded = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = self.text(call.arguments)
        else:
            arguments = json.dumps(self.value(decoded), ensure_ascii=False)
        return ToolCall(self.text(call.id), self.text(call.name), arguments)

    def _tool(self, tool: Tool) -> Tool:
        return replace(
            tool,
            name=self.text(tool.name),
            description=self.text(tool.description),
            parameters=self.value(dict(tool.parameters)),
        )
