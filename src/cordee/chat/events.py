"""What an answer consists of, piece by piece in order: text, thinking, calls of tools."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cordee.chat.turn import ToolCall


@dataclass(frozen=True)
class TextDelta:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True)
class ThinkingDelta:
    """More of what the model thinks before it says something."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a tool begins; the argument pieces that follow are its own, up to the next such event."""

    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments of the call that began last: JSON text."""

    text: str


Event = TextDelta | ThinkingDelta | CallBegun | ArgumentsDelta


@dataclass
class Collected:
    """An answer as far as it has come."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list[ToolCall])

    def add(self, events: Iterable[Event]) -> None:
        """Add what came."""
        for event in events:
            match event:
                case TextDelta(text):
                    self.text += text
                case ThinkingDelta(text):
                    self.thinking += text
                case CallBegun(call_id, name):
                    self.calls.append(ToolCall(call_id, name, ""))
                case ArgumentsDelta(text):
                    last = self.calls.pop()
                    self.calls.append(ToolCall(last.id, last.name, last.arguments + text))
