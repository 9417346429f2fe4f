"""gpt-oss' form of an answer, "harmony": messages, each in a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

`analysis` is thinking, `final` is text. A message with a recipient, `to=functions.NAME`, which stands before
or behind the channel, is a call; one in `commentary` without a recipient is text before calls. Source:
OpenAI's "harmony response format", and the template that comes with gpt-oss.
"""

import re

from cordee.chat.events import ArgumentsDelta, CallBegun, TextDelta, ThinkingDelta
from cordee.chat.parsers import NewId
from cordee.chat.reading import Reading, ReadingParser, Take, Trimmed, nothing

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
ROLE = "assistant"
_HEADER_STARTS = (CHANNEL, CONSTRAIN, MESSAGE, "to=", ROLE)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class HarmonyParser(ReadingParser):
    """Reads the channels. `calls`: whether there are tools; without any, a call can only be thinking."""

    def __init__(self, new_id: NewId, *, calls: bool) -> None:
        super().__init__()
        self._new_id = new_id
        self._calls = calls

    def read(self) -> Reading[None]:
        """Message by message."""
        reader = self.reader
        yield from reader.skip_space()
        header = yield from reader.begins(_HEADER_STARTS)
        if header is None:  # no message, but bare text
            header = yield from reader.until((START, CHANNEL), self._say)
        while header is not None:
            rest, mark = yield from reader.collected((MESSAGE,))
            if mark is None:
                return
            mark = yield from reader.until((END, CALL, RETURN, START, CHANNEL), self._body(header + rest))
            if mark in (END, CALL, RETURN):
                mark = yield from reader.until((START, CHANNEL), nothing)
            header = mark

    def _body(self, header: str) -> Take:
        """What the text of a message is."""
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self._calls:
            self.give(CallBegun(self._new_id(), recipient[1]))
            return Trimmed(lambda text: self.give(ArgumentsDelta(text)))
        channel = _CHANNEL.search(header)
        if recipient is not None or (channel is not None and channel[1] == "analysis"):
            return Trimmed(lambda text: self.give(ThinkingDelta(text)))
        return self._say

    def _say(self, text: str) -> None:
        self.give(TextDelta(text))
