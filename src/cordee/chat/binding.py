"""What binds an answer while it is generated: a grammar in which calls follow their tools' schemas.

llguidance's Lark, with the JSON schemas beside it (grammar/grammar.py, kinds "tools" and "thinking"). Text
is free until the mark that opens a call: where that is a control token no text can have it, else a lazy
lexeme ends when it is written. From there on there is only what the family writes, and JSON by the schema.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from cordee.chat import harmony
from cordee.chat.families import Calls, HarmonyCalls, JsonCalls, MarkedCalls, NamedCalls, ThinkingMarks
from cordee.chat.parsers import BoundCalls, is_text, properties_of, trigger
from cordee.chat.turn import ChatTurn, Tool
from cordee.generation.request import Grammar
from cordee.grammar.json_schema import loosened

CALLS_MAX = 16  # of one answer; agents make a handful at once, and small models repeat themselves
OBJECT: Mapping[str, Any] = {"type": "object"}
# Keywords that bind what rules of a family's own do not.
_COUNTED = frozenset(
    ("minItems", "maxItems", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const", "$ref")
)
DEPTH_MAX = 8  # of lists and objects that are written in a family's own way; what is deeper is JSON
TERMINALS = """\
ANY: /(?s:.*)/
GAP: /[ \\n]{1,4}/
CALL_ID: /[a-zA-Z0-9]{9}/"""


class ControlTokens(Protocol):
    """What is asked of a vocabulary; `engine.vocabulary.Vocabulary` is one."""

    end_of_generation: frozenset[int]

    def control_spans(self, text: str) -> list[tuple[int, int]]: ...
    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]: ...


@dataclass
class Marks:
    """Marks as a vocabulary has them: what in them is a control token, and what is text."""

    vocabulary: ControlTokens
    tokens: set[int] = field(default_factory=set[int])  # the control tokens that were met

    def pieces(self, mark: str) -> list[str | int]:
        """Texts and control tokens. A token that ends the answer, and what follows it, is left out."""
        pieces: list[str | int] = []
        at = 0
        for start, end in self.vocabulary.control_spans(mark):
            [token] = self.vocabulary.tokenize(mark[start:end], special=True, add_bos=False)
            if start > at:
                pieces.append(mark[at:start])
            at = end
            if token in self.vocabulary.end_of_generation:
                return pieces
            pieces.append(token)
            self.tokens.add(token)
        return [*pieces, mark[at:]] if mark[at:] else pieces

    def lark(self, *marks: str) -> str:
        """Marks, one behind the other, in a rule."""
        return " ".join(map(_lark, self.pieces("".join(marks))))


def _lark(piece: str | int) -> str:
    return f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece, ensure_ascii=False)


class _Rules:
    """A grammar that is being written."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.ignored: set[str] = set()  # keywords of schemas that bind nothing
        self._rules: list[str] = []
        self._schemas: dict[str, Mapping[str, Any]] = {}
        self._loose: list[str] = []  # schemas that are done without if they cannot be compiled
        self._budget: dict[str, Any] | None = None

    def rule(self, name: str, *alternatives: str, options: str = "") -> str:
        """Add a rule; its name."""
        self._rules.append(f"{name}{options}: " + " | ".join(alternatives))
        return name

    def schema(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """A reference to JSON that follows a schema."""
        name = f"schema_{len(self._schemas)}"
        self._schemas[name], ignored = loosened(schema, strict=strict)
        self.ignored.update(ignored)
        if not strict:
            self._loose.append(name)
        return f"@{name}"

    def free_until(self, mark: str, name: str, free: str = "ANY") -> str:
        """Text of the terminal `free`, then a mark."""
        first, *rest = self.marks.pieces(mark)
        if isinstance(first, int):
            head = f"{free} {_lark(first)}"
        else:
            head = self.rule(name, f"{free} {_lark(first)}", options="[lazy]")
        return " ".join([head, *map(_lark, rest)])

    def limit_thinking(self, tokens: int, before: str, close: str) -> None:
        """Let thinking, which begins behind the mark `before`, end in `close` after so many tokens."""
        tokenize = self.marks.vocabulary.tokenize
        self._budget = {
            "tokens": tokens,
            "opening": len(tokenize(before, special=True, add_bos=False)) if before else 0,
            "mark": close,
            "close": tokenize(close, special=True, add_bos=False),
        }

    def grammar(self, kind: Literal["tools", "thinking"], *alternatives: str) -> Grammar:
        """The grammar whose answers are these alternatives."""
        lark = "\n".join(["start: " + " | ".join(alternatives), *self._rules, TERMINALS])
        parts = {"lark": lark, "schemas": self._schemas, "loose": self._loose, "budget": self._budget}
        return Grammar(kind, json.dumps(parts, ensure_ascii=False))


@dataclass(frozen=True)
class Bound:
    """What binds an answer; and what of tools' schemas does not, by name."""

    grammar: Grammar | None
    ignored: tuple[str, ...] = ()


def bound(
    turn: ChatTurn,
    calls: Calls | None,
    thinking: ThinkingMarks | None,
    constraint: Grammar | None,
    marks: Marks,
    *,
    opened: bool,
) -> Bound:
    """What binds the answer to a turn. `calls` None: it makes none. `opened`: the prompt ended in
    thinking."""
    rules = _Rules(marks)
    is_harmony = isinstance(calls, HarmonyCalls)
    thinks = None if thinking is None else _thought(rules, turn, thinking, opened=opened)
    capped = turn.thinking.tokens_max is not None and (thinks is not None or is_harmony)
    schema = None if constraint is None else _schema_of(constraint)
    if constraint is not None and schema is None:
        return Bound(constraint)  # a grammar of the client's own is for the whole answer
    if not turn.tools and not capped and (schema is None or (thinks is None and not is_harmony)):
        return Bound(constraint)
    json_text = None if schema is None else rules.schema(schema, strict=True)
    if isinstance(calls, HarmonyCalls):
        alternatives = _harmony(rules, turn, json_text)
    else:
        alternatives = _marked(rules, turn, calls if turn.tools else None, json_text, thinks)
    grammar = rules.grammar("tools" if turn.tools else "thinking", *alternatives)
    return Bound(grammar, tuple(f"tools.{keyword}" for keyword in sorted(rules.ignored)))


def _schema_of(constraint: Grammar) -> Mapping[str, Any] | None:
    if constraint.kind == "json_object":
        return OBJECT
    if constraint.kind != "json_schema":
        return None
    try:
        schema = json.loads(constraint.text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", schema) if isinstance(schema, dict) else None


@dataclass(frozen=True)
class _Thought:
    """How thinking stands in the grammar. `free`: the terminal of text that does not begin with thinking."""

    rule: str
    must: bool
    free: str


def _thought(rules: _Rules, turn: ChatTurn, marks: ThinkingMarks, *, opened: bool) -> _Thought | None:
    """Thinking as the answer's beginning; None: there is none."""
    wanted = turn.thinking
    if not opened and (wanted.enabled is False or turn.continues):
        return None
    body = rules.free_until(marks.close, "thought")
    if wanted.tokens_max is not None:
        rules.limit_thinking(wanted.tokens_max, "" if opened else marks.open, marks.close)
    if opened:
        return _Thought(rules.rule("thinking", body), True, "ANY")
    rule = rules.rule("thinking", f"{rules.marks.lark(marks.open)} {body}")
    if rules.marks.lark(marks.open).startswith("<["):
        return _Thought(rule, wanted.tokens_max is not None, "ANY")
    rules.rule("THINKS", f"/[ \\n]*/ {rules.marks.lark(marks.open)} ANY")
    rules.rule("SAID", "ANY & ~THINKS")
    return _Thought(rule, wanted.tokens_max is not None, "SAID")


def _marked(
    rules: _Rules,
    turn: ChatTurn,
    calls: BoundCalls | None,
    json_text: str | None,
    thought: _Thought | None,
) -> list[str]:
    free = "ANY" if thought is None else thought.free
    if isinstance(calls, JsonCalls) and calls.bare:
        free = _unbraced(rules, calls, free)
    ways: list[str] = []
    required = turn.tool_choice.mode == "required" and calls is not None
    if not required:
        ways.append(json_text or free)
    if calls is not None:
        section = _section(rules, turn, calls)
        if required or json_text is not None:
            ways.append(f"{rules.marks.lark(trigger(calls.open))} {section}")
        else:
            ways.append(f"{rules.free_until(trigger(calls.open), 'said', free)} {section}")
        if isinstance(calls, JsonCalls) and calls.bare:
            ways.append(f"{rules.marks.lark(calls.head)} call")
    if thought is None:
        return ways
    rules.rule("rest", *ways)
    return [f"{thought.rule} GAP? rest", *([] if thought.must else ["rest"])]


def _unbraced(rules: _Rules, calls: JsonCalls, free: str) -> str:
    """Text that does not begin with a bracket, where a call may stand bare."""
    rules.rule("BARE", "/[ \\n]*/ " + json.dumps(calls.head[0]) + " ANY")
    return rules.rule("UNBRACED", f"{free} & ~BARE")


def _section(rules: _Rules, turn: ChatTurn, calls: BoundCalls) -> str:
    """What follows the mark that opens the first call, up to the end of the answer."""
    tools = _callable(turn)
    rules.rule("call", *[_call(rules, number, tool, calls) for number, tool in enumerate(tools)])
    lark, opening = rules.marks.lark, calls.open[len(trigger(calls.open)) :]
    head = calls.head if isinstance(calls, JsonCalls) else ""
    close = calls.end if isinstance(calls, MarkedCalls) else calls.close
    calls_of_section = f"{lark(opening, head)} call"
    if calls.between is not None and turn.parallel_tool_calls:
        calls_of_section += " " + _more(f"{lark(calls.between, head)} call")
    section = rules.rule("section", f"{calls_of_section} {lark(close)}")
    if calls.again is None or not turn.parallel_tool_calls:
        return section
    return f"{section} {_more(f'{lark(calls.again, trigger(calls.open))} {section}')}"


def _call(rules: _Rules, number: int, tool: Tool, calls: BoundCalls) -> str:
    if isinstance(calls, JsonCalls):
        return _json_call(rules, tool, calls)
    if isinstance(calls, MarkedCalls):
        return _marked_call(rules, number, tool, calls)
    return _named_call(rules, number, tool, calls)


def _more(again: str) -> str:
    return f"({again}){{0,{CALLS_MAX - 1}}}"


def _callable(turn: ChatTurn) -> list[Tool]:
    named = turn.tool_choice.tool
    return [tool for tool in turn.tools if named is None or tool.name == named]


def _arguments(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments; they are an object, whatever it says."""
    return {**tool.parameters, "type": "object"}


def _name(tool: Tool) -> str:
    """A tool's name. It is a client's, so it is text, whatever it says."""
    return _lark(tool.name)


def _json_call(rules: _Rules, tool: Tool, calls: JsonCalls) -> str:
    lark = rules.marks.lark
    arguments = rules.schema(_arguments(tool), strict=tool.strict)
    ident = f"{lark(calls.id_mark)} CALL_ID" if calls.id_mark else ""
    return f"{_name(tool)} {ident} {lark(calls.middle)} {arguments} {lark(calls.tail)}"


def _needed(schema: Mapping[str, Any]) -> list[object]:
    """The keys that an object must have."""
    required = schema.get("required")
    return cast("list[object]", required) if isinstance(required, list) else []


def _shared(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the schemas of properties may refer to."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _marked_call(rules: _Rules, number: int, tool: Tool, calls: MarkedCalls) -> str:
    schema, lark = _arguments(tool), rules.marks.lark
    needed, shared = _needed(schema), _shared(schema)
    parts = [_name(tool), lark(calls.middle)]
    for place, (key, value) in enumerate(properties_of(schema).items()):
        of = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        middle = calls.parameter_middle
        if is_text(value) and "enum" in of:
            written = f"({' | '.join(map(_lark, of['enum']))}) {lark(calls.parameter_close)}"
        elif is_text(value):
            written = rules.free_until(calls.parameter_close, f"value_{number}_{place}")
        else:
            middle = calls.json_middle or middle
            bound_value = rules.schema({**shared, **of}, strict=tool.strict)
            written = f"{bound_value} {lark(calls.parameter_close)}"
        opening = f"{lark(calls.parameter_open)} {_lark(key)} {lark(middle)}"
        parts.append(f"({opening} {written})" + ("" if key in needed else "?"))
    return " ".join([*parts, lark(calls.close)])


def _named_call(rules: _Rules, number: int, tool: Tool, calls: NamedCalls) -> str:
    schema, lark = _arguments(tool), rules.marks.lark
    writer = _NamedValues(rules, calls, _shared(schema), strict=tool.strict)
    members = writer.members(schema, f"args_{number}", calls.equals, calls.comma, 0)
    return f"{_name(tool)} {lark(calls.begin)} {members} {lark(calls.end)}"


@dataclass(frozen=True)
class _NamedValues:
    """Writes the rules for the arguments of one tool in a family's own way (NamedCalls)."""

    rules: _Rules
    calls: NamedCalls
    shared: Mapping[str, Any]
    strict: bool

    def members(self, schema: Mapping[str, Any], name: str, equals: str, comma: str, depth: int) -> str:
        """The members of an object in their order, where some may be left out: `begin_N` has those from the
        Nth on where none came before, `more_N` where one did."""
        lark, rule, needed = self.rules.marks.lark, self.rules.rule, _needed(schema)
        properties = list(properties_of(schema).items())
        if self.calls.quote:
            properties.sort()
        last = len(properties)
        rule(f"{name}_begin_{last}", '""')
        rule(f"{name}_more_{last}", '""')
        for place, (key, value) in reversed(list(enumerate(properties))):
            written = self._value(value, f"{name}_{place}", depth)
            pair = rule(f"{name}_pair_{place}", f"{_lark(key)} {lark(equals)} {written}")
            more, begin = f"{name}_more_{place + 1}", f"{name}_begin_{place + 1}"
            must = key in needed
            rule(f"{name}_more_{place}", f"({lark(comma)} {pair}){'' if must else '?'} {more}")
            rule(f"{name}_begin_{place}", f"{pair} {more}", *([] if must else [begin]))
        return f"{name}_begin_0"

    def _value(self, schema: Any, name: str, depth: int) -> str:
        """A value; JSON where the family has no way of its own, or none that can be bound."""
        of = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}
        quote = self.calls.quote and self.rules.marks.lark(self.calls.quote)
        if quote and is_text(of):
            if "enum" in of:
                return f"{quote} ({' | '.join(map(_lark, of['enum']))}) {quote}"
            return f"{quote} {self.rules.free_until(self.calls.quote, name)}"
        is_plain = quote and depth < DEPTH_MAX and not _COUNTED & of.keys()
        if is_plain and of.get("type") == "array" and isinstance(of.get("items"), dict):
            item = self.rules.rule(f"{name}_item", self._value(of["items"], f"{name}_of", depth + 1))
            return f'"[" ({item} ("," {item})*)? "]"'
        if is_plain and of.get("type") == "object" and properties_of(of):
            return f'"{{" {self.members(of, f"{name}_in", ":", ",", depth + 1)} "}}"'
        return self.rules.schema({**self.shared, **of}, strict=self.strict)


def _harmony(rules: _Rules, turn: ChatTurn, json_text: str | None) -> list[str]:
    lark, tokens_max = rules.marks.lark, turn.thinking.tokens_max
    next_message = lark(harmony.START, harmony.ROLE)
    channel, message = harmony.CHANNEL, harmony.MESSAGE
    thought = rules.free_until(harmony.END, "thought") + " " + next_message
    rules.rule("thinking", f"{lark(channel, 'analysis', message)} {thought}")
    if tokens_max is not None:
        rules.limit_thinking(tokens_max, f"{channel}analysis{message}", harmony.END)
    ways: list[str] = []
    if turn.tool_choice.mode != "required" or not turn.tools:
        ways.append(f"{lark(channel, 'final', message)} {json_text or 'ANY'}")
    if turn.tools:
        before = rules.free_until(harmony.END, "announced") + " " + next_message
        rules.rule("announcing", f"{lark(channel, 'commentary', message)} {before}")
        for tool in _callable(turn):
            recipient = f"{lark(channel, 'commentary to=functions.')} {_name(tool)}"
            header = f"{recipient} {lark(' ', harmony.CONSTRAIN, 'json', message)}"
            arguments = rules.schema(_arguments(tool), strict=tool.strict)
            ways.append(f"{header} {arguments}")
    rules.rule("last", *ways)
    announcing = " announcing?" if turn.tools and turn.tool_choice.mode == "auto" else ""
    if tokens_max is not None:
        return [f"thinking{announcing} last"]
    return [f"thinking*{announcing} last"]
