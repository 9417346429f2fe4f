"""GBNF as llguidance's own syntax, a variant of Lark's, with exactly the texts that llama.cpp would accept.

GBNF has characters only. llguidance cuts the text into *lexemes* first, regular expressions that each match
as much as they can, and parses those. That makes it fast, and other texts would be accepted than the grammar
says: in `[a-z]+ "x"` the first lexeme takes the x as well, so the text can never be complete. So:

- A grammar without recursion is one regular expression, hence one lexeme.
- Else each regular part of a rule is a lexeme at first. A lexeme is *cut*, into the parts that it is written
  of, if it could match on where another one (or itself) may end and something else follow, until no two
  lexemes disturb each other. A single character never does. So numbers, strings and names remain lexemes,
  and only what is truly ambiguous is parsed by characters.

The question whether lexemes disturb each other is answered on the safe side: characters that share the first
byte of their UTF-8 are taken as equal, and x{m,n} as x+.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cordee.grammar.gbnf import (
    ROOT,
    Alternation,
    Chars,
    Concatenation,
    LiteralText,
    Node,
    Reference,
    Repetition,
    TokenMatch,
    children,
    settled,
)

LEXEME_CHARACTERS_MAX = 400  # a lexeme that is written with more is cut: the check compares them all ...
COMPARISONS_MAX = 100_000  # ... and takes a second for so many; beyond that all lexemes are cut
NON_EMPTY = "/(?s:.)+/"
TOKEN_BYTE = 0xFF  # how llguidance marks a token in its bytes, which no UTF-8 has


def to_lark(rules: Mapping[str, Node], ends: Sequence[int]) -> Iterator[str]:
    """The grammar that `gbnf.parse` gave, for llguidance: the better form first, where there are two.

    The second is for regular expressions that are too complex as such, like x? a thousand times. `ends` are
    the tokens that end an answer: "any token but" does not mean those.
    """
    grammar = _Rules(rules)
    if ROOT in grammar.regular:
        yield _Writer(grammar, ends).whole()
    cut: set[Node] = set()
    comparisons = COMPARISONS_MAX
    while True:
        lexemes = _Lexemes(grammar, cut)
        disturbing, comparisons = lexemes.disturbing(comparisons)
        if not disturbing:
            break
        cut |= disturbing
    yield _Writer(grammar, ends).parsed(lexemes)


class _Rules:
    """The rules, and what is known of each without regard to lexemes."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self.rules = rules
        self.regular = settled(rules, _is_regular)  # those that no recursion and no token is part of
        self._empty = settled(rules, _may_be_empty)
        self._visible = settled(rules, _has_characters)

    def is_regular(self, node: Node) -> bool:
        """Whether a node is a regular expression."""
        return _is_regular(node, self.regular)

    def may_be_empty(self, node: Node) -> bool:
        """Whether the empty text satisfies a node."""
        return _may_be_empty(node, self._empty)

    def has_characters(self, node: Node) -> bool:
        """Whether any other text does."""
        return _has_characters(node, self._visible)


def _is_regular(node: Node, regular: set[str]) -> bool:
    if isinstance(node, Reference):
        return node.name in regular
    return not isinstance(node, TokenMatch) and all(_is_regular(each, regular) for each in children(node))


def _may_be_empty(node: Node, empty: set[str]) -> bool:
    if isinstance(node, Reference):
        return node.name in empty
    if isinstance(node, Repetition):
        return node.least == 0 or _may_be_empty(node.item, empty)
    if isinstance(node, Alternation):
        return any(_may_be_empty(option, empty) for option in node.options)
    return isinstance(node, Concatenation) and all(_may_be_empty(item, empty) for item in node.items)


def _has_characters(node: Node, visible: set[str]) -> bool:
    if isinstance(node, Reference):
        return node.name in visible
    if isinstance(node, Chars | LiteralText | TokenMatch):
        return True
    cancelled = isinstance(node, Repetition) and node.most == 0
    return not cancelled and any(_has_characters(each, visible) for each in children(node))


class _TooLargeError(Exception):
    """A lexeme is written with more than LEXEME_CHARACTERS_MAX characters."""


class _Automaton:
    """Glushkov's automaton of a lexeme: a state for each character that it is written with.

    A state's mask has a bit for each byte with which its character may begin (UTF-8).
    """

    def __init__(self, grammar: _Rules, node: Node) -> None:
        """Raises _TooLargeError."""
        self._grammar = grammar
        self._visits = 0
        self.masks: list[int] = []
        self.successors: list[set[int]] = []
        _, self.first, self.last = self._add(node)
        self.first_mask = _union(self.masks[state] for state in self.first)
        self.is_single = not any(self.successors)

    def may_run_on(self, longer: "_Automaton", after: int) -> tuple[bool, int]:
        """Whether, where this one ends and a byte of `after` follows, `longer` could take that byte, too.

        Also how many pairs of states were compared.
        """
        pending = [(own, other) for own in self.first for other in longer.first]
        seen = set(pending)
        while pending:
            own, other = pending.pop()
            if not self.masks[own] & longer.masks[other]:
                continue
            if own in self.last and any(longer.masks[state] & after for state in longer.successors[other]):
                return True, len(seen)
            for pair in ((a, b) for a in self.successors[own] for b in longer.successors[other]):
                if pair not in seen:
                    seen.add(pair)
                    pending.append(pair)
        return False, len(seen)

    def _add(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """Add a part; whether it may be empty, and its first and last states."""
        self._visits += len(node.text) if isinstance(node, LiteralText) else 1
        if self._visits > LEXEME_CHARACTERS_MAX:
            raise _TooLargeError
        if isinstance(node, Chars):
            return self._add_state(_mask(node))
        if isinstance(node, LiteralText):
            return self._add_all(self._add_state(_mask(_character(each))) for each in node.text)
        if isinstance(node, Reference):
            return self._add(self._grammar.rules[node.name])
        if isinstance(node, Alternation):
            parts = [self._add(option) for option in node.options]
            empty, firsts, lasts = zip(*parts, strict=True)
            return any(empty), set[int]().union(*firsts), set[int]().union(*lasts)
        if isinstance(node, Repetition):
            empty, first, last = self._add(node.item)
            if node.most != 1:
                self._link(last, first)
            return empty or node.least == 0, first, last
        return self._add_all(map(self._add, children(node)))

    def _add_state(self, mask: int) -> tuple[bool, set[int], set[int]]:
        self.masks.append(mask)
        self.successors.append(set())
        return False, {len(self.masks) - 1}, {len(self.masks) - 1}

    def _add_all(self, parts: Iterable[tuple[bool, set[int], set[int]]]) -> tuple[bool, set[int], set[int]]:
        """Parts one after the other."""
        all_empty, firsts, lasts = True, set[int](), set[int]()
        for empty, first, last in parts:
            self._link(lasts, first)
            firsts = firsts | first if all_empty else firsts
            lasts = lasts | last if empty else last
            all_empty = all_empty and empty
        return all_empty, firsts, lasts

    def _link(self, last: set[int], first: set[int]) -> None:
        for state in last:
            self.successors[state] |= first


class _Lexemes:
    """Which nodes are lexemes, if those of `cut` are not, and which rules are parsed."""

    def __init__(self, grammar: _Rules, cut: set[Node]) -> None:
        self._grammar = grammar
        self._cut = cut
        self.parsed = {ROOT: 0}  # their names, each with a number
        self.nodes: dict[Node, int] = {}  # the lexemes, each with a number
        pending = [grammar.rules[ROOT]]
        while pending:
            node = pending.pop()
            if self.is_lexeme(node):
                self.nodes.setdefault(node, len(self.nodes))
            elif isinstance(node, Reference) and node.name not in self.parsed:
                self.parsed[node.name] = len(self.parsed)
                pending.append(grammar.rules[node.name])
            pending += self.parts(node)

    def is_lexeme(self, node: Node) -> bool:
        """Whether a node is a lexeme."""
        return node not in self._cut and self._grammar.is_regular(node) and self._grammar.has_characters(node)

    def parts(self, node: Node) -> tuple[Node, ...]:
        """What a node that is parsed consists of."""
        if self.is_lexeme(node):
            return ()
        return tuple(map(_character, node.text)) if isinstance(node, LiteralText) else children(node)

    def disturbing(self, comparisons: int) -> tuple[set[Node], int]:
        """The lexemes to be cut, and how many of the `comparisons` are left."""
        automata: dict[Node, _Automaton] = {}
        found: set[Node] = set()
        for node in self.nodes:
            try:
                automata[node] = _Automaton(self._grammar, node)
            except _TooLargeError:
                found.add(node)
        if found:
            return found, comparisons
        longer = {node: automaton for node, automaton in automata.items() if not automaton.is_single}
        after = _Following(self._grammar, self, automata).masks
        for node, automaton in automata.items():
            for other, candidate in longer.items():
                if other in found or not automaton.first_mask & candidate.first_mask:
                    continue
                if comparisons <= 0:
                    return set(longer), 0
                runs_on, compared = automaton.may_run_on(candidate, after[node])
                comparisons -= compared
                if runs_on:
                    found.add(other)
        return found, comparisons


class _Following:
    """With which bytes what follows each lexeme may begin: `masks`."""

    def __init__(self, grammar: _Rules, lexemes: _Lexemes, automata: Mapping[Node, _Automaton]) -> None:
        self._grammar = grammar
        self._lexemes = lexemes
        self._automata = automata
        self._first = dict.fromkeys(lexemes.parsed, 0)
        self._after = dict.fromkeys(lexemes.parsed, 0)
        self.masks = dict.fromkeys(lexemes.nodes, 0)
        while True:
            before = (dict(self._first), dict(self._after))
            for name in lexemes.parsed:
                self._first[name] |= self._begins(grammar.rules[name])
                self._spread(grammar.rules[name], self._after[name])
            if before == (self._first, self._after):
                break

    def _begins(self, node: Node) -> int:
        """With which bytes a node may begin."""
        if self._lexemes.is_lexeme(node):
            return self._automata[node].first_mask
        if isinstance(node, Reference):
            return self._first.get(node.name, 0)
        if isinstance(node, TokenMatch):
            return (1 << 256) - 1 if node.negated else 1 << TOKEN_BYTE
        if isinstance(node, Concatenation | LiteralText):
            mask = 0
            for part in self._lexemes.parts(node):
                mask |= self._begins(part)
                if not self._grammar.may_be_empty(part):
                    break
            return mask
        return _union(map(self._begins, children(node)))

    def _spread(self, node: Node, after: int) -> None:
        """Note for all within a node what follows, if `after` follows the node."""
        if self._lexemes.is_lexeme(node):
            self.masks[node] |= after
        elif isinstance(node, Reference):
            self._after[node.name] |= after
        elif isinstance(node, Repetition):
            again = self._begins(node.item) if node.most != 1 else 0
            self._spread(node.item, after | again)
        elif isinstance(node, Alternation):
            for option in node.options:
                self._spread(option, after)
        else:
            for part in reversed(self._lexemes.parts(node)):
                self._spread(part, after)
                empty = self._grammar.may_be_empty(part)
                after = self._begins(part) | (after if empty else 0)


class _Writer:
    """Writes the grammar. Rules have small names and terminals large ones, as Lark has it."""

    def __init__(self, grammar: _Rules, ends: Sequence[int]) -> None:
        self._grammar = grammar
        self._ends = ends
        self._lines: list[str] = []
        self._terminals: dict[str, str] = {}  # of regular rules: the rule's name -> the terminal's

    def whole(self) -> str:
        """All of it as one regular expression."""
        root = self._grammar.rules[ROOT]
        body = self._lexeme(root, 0) if self._grammar.has_characters(root) else '""'
        return "\n".join([f"start: {body}", *self._lines])

    def parsed(self, lexemes: _Lexemes) -> str:
        """Rules over lexemes."""
        bodies = {
            number: self._rule(self._grammar.rules[name], lexemes) for name, number in lexemes.parsed.items()
        }
        rules = [f"r{number}: {body}" for number, body in bodies.items()]
        return "\n".join(["start: r0", *rules, *self._lines])

    def _rule(self, node: Node, lexemes: _Lexemes) -> str:
        """A node that is parsed."""
        if lexemes.is_lexeme(node):
            return self._lexeme(node, lexemes.nodes[node])
        if isinstance(node, TokenMatch):
            tokens = ",".join(map(str, {node.token, *self._ends})) if node.negated else node.token
            return f"<[{'^' * node.negated}{tokens}]>"
        if not self._grammar.has_characters(node):
            return '""'
        if isinstance(node, Reference):
            return f"r{lexemes.parsed[node.name]}"
        return _joined(node, [self._rule(part, lexemes) for part in lexemes.parts(node)])

    def _lexeme(self, node: Node, number: int) -> str:
        """A lexeme's name, made optional where it may be empty: llguidance has no use for empty lexemes."""
        name, empty = f"L{number}", self._grammar.may_be_empty(node)
        line = f"{name}: {self._expression(node)}" + f" & {NON_EMPTY}" * empty
        if line not in self._lines:
            self._lines.append(line)
        return f"({name})?" if empty else name

    def _expression(self, node: Node) -> str:
        """A node as a regular expression."""
        if not self._grammar.has_characters(node):
            return '""'
        if isinstance(node, Chars):
            return f"/{_class(node)}/"
        if isinstance(node, LiteralText):
            return f"/{''.join(_escaped(ord(each)) for each in node.text)}/"
        if isinstance(node, Reference):
            return self._terminal(node.name)
        return _joined(node, [self._expression(part) for part in children(node)])

    def _terminal(self, name: str) -> str:
        """The terminal of a regular rule, written when it is first needed."""
        if name not in self._terminals:
            self._terminals[name] = f"T{len(self._terminals)}"
            self._lines.append(f"{self._terminals[name]}: {self._expression(self._grammar.rules[name])}")
        return self._terminals[name]


def _joined(node: Node, parts: list[str]) -> str:
    """A node from its parts, in a syntax that rules and terminals share."""
    if isinstance(node, Repetition):
        most = "" if node.most is None else node.most
        return f"({parts[0]}){{{node.least},{most}}}"
    return f"({(' | ' if isinstance(node, Alternation) else ' ').join(parts)})"


def _character(character: str) -> Chars:
    return Chars(((ord(character), ord(character)),))


def _class(node: Chars) -> str:
    if not node.ranges:
        return "(?s:.)"
    ranges = "".join(f"{_escaped(low)}-{_escaped(high)}" for low, high in node.ranges)
    return f"[{'^' * node.negated}{ranges}]"


def _escaped(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\x{{{code:x}}}"


def _mask(node: Chars) -> int:
    """A bit for each byte with which one of the characters may begin."""
    if not node.negated:
        return _union(_bits(chr(low).encode()[0], chr(high).encode()[0]) for low, high in node.ranges)
    ascii_excluded = _union(_bits(low, min(high, 0x7F)) for low, high in node.ranges if low <= 0x7F)
    return _bits(0, 0xF4) & ~ascii_excluded


def _bits(low: int, high: int) -> int:
    """The bits from `low` to `high`."""
    return (1 << high + 1) - (1 << low)


def _union(masks: Iterable[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
