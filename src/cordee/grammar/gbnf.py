"""Reading GBNF, llama.cpp's format of grammars: text in, a tree for each rule out.

The format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md, and in doubt what its
reader does (src/llama-grammar.cpp). Characters are Unicode code points; the text begins at the rule `root`.
Two things are refused that llama.cpp takes without a word, since nobody can mean them: an empty or reversed
class, and a rule that no finite text satisfies.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

ROOT = "root"
NESTING_MAX = 64  # parentheses within each other: each takes a few calls in Python
# From the root to a character, through parentheses, repetitions and rules. llguidance goes down all of them
# by calls, each of 2 kB, and a thread may have as little as 2 MB.
DEPTH_MAX = 300
REPEATS_MAX = 100_000  # in {m,n}: more characters than the longest context holds

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DIGITS = re.compile(r"[0-9]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")  # a comment ends before its line does
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN = re.compile(r"!?<(?:\[[0-9]+\]|[^>\r\n]+)>")
_CODES = {"x": 2, "u": 4, "U": 8}  # how many hexadecimal digits follow
_ESCAPED = {"t": "\t", "r": "\r", "n": "\n"} | {each: each for each in '\\"[]-'}


class GbnfError(ValueError):
    """A grammar that cannot be read; the sentence begins with line and column."""


@dataclass(frozen=True)
class Chars:
    """One character, of these inclusive ranges of code points, or of all others."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True)
class LiteralText:
    """Characters that follow one another, at least one."""

    text: str


@dataclass(frozen=True)
class Reference:
    """What a rule gives."""

    name: str


@dataclass(frozen=True)
class TokenMatch:
    """One token of the vocabulary, or any other."""

    token: int
    negated: bool


@dataclass(frozen=True)
class Concatenation:
    """One after the other; none is the empty text."""

    items: tuple["Node", ...]


@dataclass(frozen=True)
class Alternation:
    """One of these, at least two."""

    options: tuple["Node", ...]


@dataclass(frozen=True)
class Repetition:
    """The item `least` to `most` times; None is without end."""

    item: "Node"
    least: int
    most: int | None


Node = Chars | LiteralText | Reference | TokenMatch | Concatenation | Alternation | Repetition


def parse(text: str, token_id: Callable[[str], int | None]) -> dict[str, Node]:
    """The rules of a grammar, by name; `root` is among them and every reference has its rule.

    Of two rules with one name the later one counts, as in llama.cpp. `token_id` gives the id of a token that
    is written as `<text>` or `<[id]>`, None if the vocabulary does not have it.

    Raises:
        GbnfError: names line, column and remedy.
    """
    reader = _Reader(text, token_id)
    rules = reader.rules()
    if ROOT not in rules:
        reader.fail(0, f"there is no rule {ROOT}, where the text begins: add one, `{ROOT} ::= ...`")
    for name, at in reader.references.items():
        if name not in rules:
            remedy = f"define it, `{name} ::= ...`, or put it in quotes if it is text"
            reader.fail(at, f"there is no rule {name}: {remedy}")
    depths = _depths(rules)
    ending = settled(rules, _ends)
    endless = [name for name in depths if name not in ending]
    if endless:
        name = next((name for name in endless if name in references(rules[name])), endless[-1])
        remedy = "give it an alternative that does not"
        at = reader.definitions[name]
        reader.fail(at, f"rule {name} never ends, since it always needs itself again: {remedy}")
    deepest = max(depths, key=lambda name: depths[name])
    if depths[deepest] > DEPTH_MAX:
        remedy = "let fewer rules need one another"
        reader.fail(reader.definitions[deepest], f"rule {deepest} is nested too deeply in others: {remedy}")
    return rules


def children(node: Node) -> tuple[Node, ...]:
    """The parts of a node."""
    if isinstance(node, Concatenation):
        return node.items
    if isinstance(node, Alternation):
        return node.options
    return (node.item,) if isinstance(node, Repetition) else ()


def references(node: Node) -> Iterator[str]:
    """The rules that a node names."""
    pending = [node]
    while pending:
        each = pending.pop()
        if isinstance(each, Reference):
            yield each.name
        pending += children(each)


def settled(rules: Mapping[str, Node], holds: Callable[[Node, set[str]], bool]) -> set[str]:
    """The rules for which something holds that follows from rules for which it holds: the least such set."""
    users: dict[str, set[str]] = {name: set() for name in rules}
    for name, node in rules.items():
        for used in references(node):
            users[used].add(name)
    found: set[str] = set()
    pending = list(rules)
    while pending:
        name = pending.pop()
        if name not in found and holds(rules[name], found):
            found.add(name)
            pending += users[name] - found
    return found


def _ends(node: Node, ending: set[str]) -> bool:
    """Whether some finite text satisfies a node, given the rules for which that is known."""
    if isinstance(node, Reference):
        return node.name in ending
    if isinstance(node, Repetition):
        return node.least == 0 or _ends(node.item, ending)
    if isinstance(node, Alternation):
        return any(_ends(option, ending) for option in node.options)
    return all(_ends(item, ending) for item in children(node))


def _depths(rules: Mapping[str, Node]) -> dict[str, int]:
    """How deep what is in each rule lies, for those that the root needs: in the order of llguidance, which
    goes down into a rule where it first meets it."""
    found: dict[str, int] = {}
    pending: list[tuple[Node, int, str]] = [(Reference(ROOT), 0, ROOT)]
    while pending:
        node, depth, rule = pending.pop()
        if isinstance(node, Reference) and node.name not in found:
            rule = node.name
            found[rule] = depth
            pending.append((rules[rule], depth + 1, rule))
        found[rule] = max(found[rule], depth)
        pending += ((child, depth + 1, rule) for child in reversed(children(node)))
    return found


class _Reader:
    """A position in the text. Methods that read leave it behind what they read."""

    def __init__(self, text: str, token_id: Callable[[str], int | None]) -> None:
        self.references: dict[str, int] = {}  # where each rule is first named ...
        self.definitions: dict[str, int] = {}  # ... and where it is defined
        self._text = text
        self._token_id = token_id
        self._at = 0
        self._nesting = 0

    def rules(self) -> dict[str, Node]:
        """All rules."""
        found: dict[str, Node] = {}
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            at, name = self._at, self._take(_NAME)
            if not name:
                self._fail_at_rule()
            self._skip(_SPACE)
            if not self._text.startswith("::=", self._at):
                self.fail(self._at, f"`::=` is missing after the name {name}")
            self._at += 3
            self._skip(_SPACE_AND_LINES)
            found[name] = self._alternation()
            self.definitions[name] = at
            if self._next not in ("", "\r", "\n"):
                self._fail_in_rule()
            self._skip(_SPACE_AND_LINES)
        return found

    def fail(self, at: int, what: str) -> NoReturn:
        """Raise GbnfError for a position."""
        before = self._text[:at]
        line, column = before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1
        raise GbnfError(f"line {line}, column {column}: {what}")

    @property
    def _next(self) -> str:
        """The character at the position; empty at the end."""
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        """What matches here; empty if nothing does."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._take(pattern)

    def _skip_space(self) -> None:
        """White space within a rule: within parentheses, over line ends, too."""
        self._skip(_SPACE_AND_LINES if self._nesting else _SPACE)

    def _fail_at_rule(self) -> NoReturn:
        if self._next == "|":
            self.fail(self._at, "a rule has ended: put the | at the end of the line before")
        self.fail(self._at, f"a rule is expected, `name ::= ...`, not {self._next!r}")

    def _fail_in_rule(self) -> NoReturn:
        if self._next == ")":
            self.fail(self._at, "this ) closes nothing: leave it out, or put it in quotes")
        remedy = "text stands in quotes, names have letters, digits, - and _"
        self.fail(self._at, f"{self._next!r} cannot stand here: {remedy}")

    def _alternation(self) -> Node:
        options = [self._concatenation()]
        while self._next == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            options.append(self._concatenation())
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _concatenation(self) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            self._skip_space()
            repeated, at = 0, self._at
            while self._next in tuple("*+?{"):
                item = self._repetition(item)
                self._skip_space()
                repeated += 1
            if repeated > NESTING_MAX:
                self.fail(at, f"{repeated} repetitions of repetitions: at most {NESTING_MAX} are accepted")
            items.append(item)
        return items[0] if len(items) == 1 else Concatenation(tuple(items))

    def _item(self) -> Node | None:
        """What stands here; None if it is no item."""
        first, at = self._next, self._at
        if first == '"':
            return self._string()
        if first == "[":
            return self._class()
        if first == "(":
            return self._group()
        if first == ".":
            self._at += 1
            return Chars((), negated=True)
        if first in ("<", "!"):
            return self._token()
        if name := self._take(_NAME):
            self.references.setdefault(name, at)
            return Reference(name)
        if first in tuple("*+?{"):
            self.fail(
                at, f"{first} repeats what stands before it, and nothing does: put it in quotes if text"
            )
        return None

    def _token(self) -> TokenMatch:
        at, token = self._at, self._take(_TOKEN)
        if not token:
            self.fail(at, "a token is written <its text> or <[its id]>, after ! if it is excluded")
        written = token.removeprefix("!")
        found = self._token_id(written)
        if found is None:
            self.fail(at, f"{written} is no token of this model: put it in quotes if it is text")
        return TokenMatch(found, negated=token != written)

    def _string(self) -> Node:
        opened = self._at
        self._at += 1
        text = ""
        while self._next != '"':
            if not self._next:
                self.fail(opened, 'this " is not closed')
            text += self._character()
        self._at += 1
        return LiteralText(text) if text else Concatenation(())

    def _class(self) -> Chars:
        opened = self._at
        self._at += 1
        negated = self._next == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._next != "]":
            if not self._next:
                self.fail(opened, "this [ is not closed")
            at = self._at
            low = high = ord(self._character())
            if self._next == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = ord(self._character())
            if high < low:
                self.fail(at, f"the range {self._text[at : self._at]} is reversed: write the lower end first")
            ranges.append((low, high))
        self._at += 1
        if not ranges:
            self.fail(opened, "this class is empty: write . for any character, and \\] for a bracket")
        return Chars(tuple(ranges), negated)

    def _character(self) -> str:
        """One character of a string or a class, which may be escaped."""
        at = self._at
        if self._next != "\\":
            self._at += 1
            character = self._text[at]
        else:
            kind = self._text[at + 1 : at + 2]
            self._at += 2
            character = self._coded(at, kind) if kind in _CODES else _ESCAPED.get(kind, "")
        if not character:
            known = "\\n \\r \\t \\\\ \\\" \\[ \\] \\-, and \\x, \\u or \\U with a character's code"
            self.fail(at, f"{self._text[at : at + 2]} is no escape of GBNF: there are {known}")
        if 0xD800 <= ord(character) <= 0xDFFF:
            self.fail(
                at, "this is half of a surrogate pair: write \\U and the 8 digits of the whole character"
            )
        return character

    def _coded(self, at: int, kind: str) -> str:
        digits = self._text[self._at : self._at + _CODES[kind]]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{_CODES[kind]}}}", digits):
            self.fail(at, f"\\{kind} needs {_CODES[kind]} hexadecimal digits")
        self._at += len(digits)
        if int(digits, 16) > 0x10FFFF:
            self.fail(at, f"\\{kind}{digits} is beyond Unicode, which ends at \\U0010FFFF")
        return chr(int(digits, 16))

    def _group(self) -> Node:
        opened = self._at
        if self._nesting == NESTING_MAX:
            self.fail(opened, f"more than {NESTING_MAX} parentheses within each other: give parts a rule")
        self._at += 1
        self._nesting += 1
        self._skip(_SPACE_AND_LINES)
        node = self._alternation()
        self._nesting -= 1
        if not self._next or self._text.startswith("::=", self._at):
            self.fail(opened, "this ( is not closed")
        if self._next != ")":
            self._fail_in_rule()
        self._at += 1
        return node

    def _repetition(self, item: Node) -> Node:
        at, sign = self._at, self._next
        self._at += 1
        if sign != "{":
            return Repetition(item, int(sign == "+"), 1 if sign == "?" else None)
        least = self._count(at)
        most: int | None = least
        if self._next == ",":
            self._at += 1
            self._skip_space()
            most = self._count(at) if _DIGITS.match(self._text, self._at) else None
        if self._next != "}":
            self.fail(at, "repetitions are written {3}, {3,} or {3,5}")
        self._at += 1
        if most is not None and most < least:
            self.fail(at, f"{{{least},{most}}} ends below its beginning: write the smaller number first")
        return Repetition(item, least, most)

    def _count(self, at: int) -> int:
        self._skip_space()
        digits = self._take(_DIGITS)
        if not digits:
            self.fail(at, "repetitions are written {3}, {3,} or {3,5}")
        self._skip_space()
        if len(digits) > len(str(REPEATS_MAX)) or int(digits) > REPEATS_MAX:
            self.fail(at, f"{digits[:12]} repetitions are too many: at most {REPEATS_MAX} are accepted")
        return int(digits)
