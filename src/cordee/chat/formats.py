"""How model families write conversations: what their templates are given, and what their answers mean."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cordee.chat.events import Event, TextDelta
from cordee.chat.turn import ChatTurn
from cordee.generation.request import Grammar
from cordee.generation.template import ChatTemplate


class Parser(Protocol):
    """Turns the text of one answer, cut anywhere, into events that never have to be taken back."""

    def push(self, text: str) -> Sequence[Event]:
        """The events that are certain now; text that may still begin a mark is held back."""
        ...

    def finish(self) -> Sequence[Event]:
        """What was held back, now that nothing follows."""
        ...


class ChatFormat(Protocol):
    """The format of one family.

    `shows_control_tokens`: its answers have marks that are control tokens, so these must be in the text that
    its parser is given.
    """

    name: str
    shows_control_tokens: bool

    def messages(self, turn: ChatTurn) -> list[dict[str, Any]]:
        """The turn's messages as the family's templates take them."""
        ...

    def variables(self, turn: ChatTurn) -> Mapping[str, Any]:
        """Further variables of the template, `tools` among them where it knows them."""
        ...

    def grammar(self, turn: ChatTurn, constraint: Grammar | None) -> Grammar | None:
        """What binds the answer: calls by their tools' schemas, the text by `constraint`; None: nothing."""
        ...

    def parser(self, turn: ChatTurn) -> Parser:
        """A parser for one answer."""
        ...


class PlainParser:
    """All is text."""

    def push(self, text: str) -> Sequence[Event]:
        """The text as it is."""
        return [TextDelta(text)] if text else []

    def finish(self) -> Sequence[Event]:
        """Nothing was held back."""
        return []


class PlainFormat:
    """A family without tools and thinking."""

    name = "plain"
    shows_control_tokens = False

    def messages(self, turn: ChatTurn) -> list[dict[str, Any]]:
        """Role, content and name."""
        plain = [{"role": each.role, "content": each.content} for each in turn.messages]
        return [
            each | ({"name": message.name} if message.name is not None else {})
            for each, message in zip(plain, turn.messages, strict=True)
        ]

    def variables(self, turn: ChatTurn) -> Mapping[str, Any]:
        """The client's own, and the effort."""
        effort = turn.thinking.effort
        return {**turn.variables, **({} if effort is None else {"reasoning_effort": effort})}

    def grammar(self, turn: ChatTurn, constraint: Grammar | None) -> Grammar | None:
        """The constraint alone."""
        return constraint

    def parser(self, turn: ChatTurn) -> Parser:
        """One that finds nothing but text."""
        return PlainParser()


def format_of(template: ChatTemplate) -> ChatFormat:
    """The format that a template is written for."""
    return PlainFormat()
