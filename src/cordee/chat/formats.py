"""How model families write conversations: what their templates are given, and what their answers mean.

A template's source tells the family (families.py). With the rendered prompt and the vocabulary it follows
what binds the answer (binding.py) and how it is read (parsers.py, harmony.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

from cordee.chat import binding, families, harmony, history
from cordee.chat.binding import ControlTokens, Marks
from cordee.chat.events import Event, TextDelta
from cordee.chat.families import BY_PROMPT, TAGGED, Calls, HarmonyCalls, JsonCalls, MarkedCalls, NamedCalls
from cordee.chat.harmony import HarmonyParser
from cordee.chat.parsers import MarkedParser, NewId, text_parameters
from cordee.chat.turn import ChatTurn, Message, Tool, ToolCall
from cordee.errors import CordeeError
from cordee.generation.request import Grammar
from cordee.generation.template import ChatTemplate

# Variables by which templates switch thinking: Qwen, GLM and Gemma; DeepSeek, Granite and Kimi.
THINKING_SWITCHES = ("enable_thinking", "thinking")

PROBE_TIME = datetime(2026, 1, 1)  # for templates that show the date


class Parser(Protocol):
    """Turns the text of one answer, cut anywhere, into events that never have to be taken back."""

    def push(self, text: str) -> Sequence[Event]:
        """The events that are certain now; text that may still begin a mark is held back."""
        ...

    def finish(self) -> Sequence[Event]:
        """What was held back, now that nothing follows."""
        ...


class PlainParser:
    """All is text."""

    def push(self, text: str) -> Sequence[Event]:
        """The text as it is."""
        return [TextDelta(text)] if text else []

    def finish(self) -> Sequence[Event]:
        """Nothing was held back."""
        return []


@dataclass(frozen=True)
class AnswerFormat:
    """How the answer to one prompt is made and read.

    `shown_tokens` are control tokens whose names the parser must see in the text. `ignored` are keywords of
    the tools' schemas that bind nothing.
    """

    grammar: Grammar | None
    parser: Callable[[NewId], Parser]
    shown_tokens: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


PLAIN = AnswerFormat(None, lambda _: PlainParser())


class ChatFormat:
    """The format of one family, as far as a template takes part in it."""

    def __init__(self, source: str) -> None:
        self.family = families.family_of(source)
        self.thinking = families.thinking_of(source)
        self._is_harmony = families.is_harmony(source)
        self._shows_rounds = self.family is not BY_PROMPT and shows_rounds(source)
        self._knows_system = "system" in source and "System role not supported" not in source

    @property
    def name(self) -> str:
        """The family's."""
        return self.family.name

    @property
    def role_marks(self) -> Sequence[str]:
        """Marks by which roles are told apart, beside the vocabulary's control tokens: libllama does not take
        those of gpt-oss for such."""
        return harmony.MARKS if self._is_harmony else ()

    def messages(self, turn: ChatTurn) -> list[dict[str, Any]]:
        """The turn's messages as the family's templates take them."""
        if self.family is BY_PROMPT:
            return history.by_prompt(turn, offered(turn), knows_system=self._knows_system)
        if not self._shows_rounds:
            form = self.family.calls if isinstance(self.family.calls, JsonCalls) else TAGGED
            return history.by_prompt(turn, (), form, knows_system=True)
        return history.native(turn, self.family)

    def variables(self, turn: ChatTurn) -> Mapping[str, Any]:
        """Further variables of the template: those of thinking, the client's own, and the tools if it knows
        them."""
        given: dict[str, Any] = {}
        wanted = turn.thinking
        if wanted.enabled is not None:
            given.update(dict.fromkeys(THINKING_SWITCHES, wanted.enabled))
        effort = "low" if wanted.enabled is False and self._is_harmony else wanted.effort
        if effort is not None:
            given["reasoning_effort"] = effort
        given.update(turn.variables)
        if self.family is not BY_PROMPT and (tools := offered(turn)):
            given["tools"] = [history.described(tool) for tool in tools]
        return given

    def answer(
        self, turn: ChatTurn, prompt: str, constraint: Grammar | None, vocabulary: ControlTokens
    ) -> AnswerFormat:
        """The format of the answer to a turn whose rendered prompt is given. `constraint` is what the client
        itself binds the text to."""
        turn = replace(turn, tools=offered(turn))
        if constraint is not None and constraint.kind not in ("json_object", "json_schema"):
            return AnswerFormat(constraint, lambda _: PlainParser())
        marks = Marks(vocabulary)
        if self._is_harmony:
            return self._harmony(turn, prompt, constraint, marks)
        calls = self.family.calls if turn.tools else None
        assert not isinstance(calls, HarmonyCalls), "that is another form"
        opened = self._opened(turn, prompt)
        bound = binding.bound(turn, calls, self.thinking, constraint, marks, opened=opened)
        for mark in self._marks(calls):
            marks.pieces(mark)  # those of thinking are to be seen, whatever is bound
        texts = {tool.name: text_parameters(tool.parameters) for tool in turn.tools}
        thinking = self.thinking if opened or not turn.continues else None

        def parser(new_id: NewId) -> Parser:
            if thinking is None and calls is None:
                return PlainParser()
            return MarkedParser(thinking, calls, new_id, opened=opened, texts=texts)

        return AnswerFormat(bound.grammar, parser, tuple(sorted(marks.tokens)), bound.ignored)

    def _marks(self, calls: Calls | None) -> list[str]:
        marks = [] if self.thinking is None else [self.thinking.open, self.thinking.close]
        if isinstance(calls, JsonCalls):
            marks += [calls.open, calls.head, calls.middle, calls.tail, calls.between or "", calls.close]
            marks += [calls.id_mark]
        elif isinstance(calls, MarkedCalls):
            marks += [calls.open, calls.middle, calls.close]
            marks += [calls.parameter_open, calls.parameter_middle, calls.parameter_close]
            marks += [calls.between or "", calls.end, calls.json_middle]
        elif isinstance(calls, NamedCalls):
            marks += [calls.open, calls.begin, calls.equals, calls.comma, calls.end, calls.close]
            marks += [calls.between or "", calls.quote]
        return marks

    def _opened(self, turn: ChatTurn, prompt: str) -> bool:
        """Whether the answer begins within thinking."""
        if self.thinking is None:
            return False
        if turn.continues:
            said = turn.messages[-1].content
            return said.rfind(self.thinking.open) > said.rfind(self.thinking.close)
        return prompt.rstrip().endswith(self.thinking.open.rstrip())

    def _harmony(self, turn: ChatTurn, prompt: str, constraint: Grammar | None, marks: Marks) -> AnswerFormat:
        """A message that the prompt has begun is read before the answer."""
        begun = prompt.rpartition(harmony.START)[2] if harmony.START in prompt else ""
        bound = binding.Bound(constraint)
        if harmony.MESSAGE not in begun:
            bound = binding.bound(turn, HarmonyCalls(), None, constraint, marks, opened=False)
        for mark in harmony.MARKS:
            marks.pieces(mark)

        def parser(new_id: NewId) -> Parser:
            made = HarmonyParser(new_id, calls=bool(turn.tools))
            made.push(begun)
            return made

        return AnswerFormat(bound.grammar, parser, tuple(sorted(marks.tokens)), bound.ignored)


@lru_cache(maxsize=32)  # of models that a machine serves
def shows_rounds(source: str) -> bool:
    """Whether a template shows calls of the past and what they returned. Some take tools, and would leave
    these out silently."""
    probe = ChatTurn(
        messages=[
            Message("user", "probe"),
            Message("assistant", tool_calls=(ToolCall("probe12345", "probe", '{"key": "probe-called"}'),)),
            Message("tool", "probe-returned", tool_call_id="probe12345"),
        ],
        tools=[Tool("probe")],
    )
    messages, tools = history.native(probe, families.family_of(source)), [history.described(Tool("probe"))]
    try:
        shown = ChatTemplate(source).render(messages, tools=tools, now=PROBE_TIME)
    except CordeeError:
        return False
    return "probe-called" in shown and "probe-returned" in shown


def offered(turn: ChatTurn) -> Sequence[Tool]:
    """The tools that the answer may call. With `tool_choice` none the model is not told of any."""
    return () if turn.tool_choice.mode == "none" else turn.tools


def format_of(template: ChatTemplate) -> ChatFormat:
    """The format that a template is written for."""
    return ChatFormat(template.source)
