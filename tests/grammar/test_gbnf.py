"""GBNF means here what it means in llama.cpp: by a plain matcher, by libllama itself, and in its errors."""

import ctypes
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cordee.engine.llama import libllama
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.grammar.gbnf import DEPTH_MAX, NESTING_MAX, REPEATS_MAX
from cordee.grammar.grammar import GBNF_CHARS_MAX, GrammarState, GrammarTokenizer, check
from small_stack import outcome

END = 256
CONTROLS = {END: "<|end|>", 257: "<think>", 258: "</think>", 259: "<|tool|>"}


@dataclass(frozen=True)
class Bytes:
    """A vocabulary of the 256 bytes, an end of generation, two plain tokens and a control token."""

    size: int = 260
    bos: int | None = None
    end_of_generation: frozenset[int] = field(default_factory=lambda: frozenset({END}))

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]:
        return [token for token, name in CONTROLS.items() if name == text and special] or list(text.encode())

    def piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else CONTROLS[token].encode()

    def is_control(self, token: int) -> bool:
        return token == 259


BYTES = GrammarTokenizer(Bytes())


def follows(grammar: str, tokens: Sequence[int]) -> bool:
    """Whether the grammar lets a stream write these tokens and end then."""
    state = GrammarState(Grammar("gbnf", grammar), BYTES)
    for token in tokens:
        if not state.allowed()[token]:
            return False
        state.accept(token)
    return bool(state.allowed()[END])


def accepts(grammar: str, text: str) -> bool:
    return follows(grammar, text.encode())


# The grammars are of our own writing; their constructs are those of llama.cpp's guide and published grammars.
JSON = r"""
# a value may hold others
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
SUMS = r"""
root  ::= (sum "=" ws term "\n")+
sum   ::= term ([-+*/] ws term)*
term  ::= name | num | "(" ws sum ")" ws
name  ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
PROGRAM = r"""
root      ::= (declaration)*
declaration ::= type name "(" parameter? ")" "{" statement* "}"
type      ::= "int" ws | "float" ws
name      ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter ::= type name
statement ::= type name ws "=" ws sum ";" | name ws "=" ws sum ";" |
              "if" ws "(" sum ")" "{" statement* "}" | "//" [^\n]* "\n"
sum       ::= term (ws "+" ws term)*
term      ::= name | [0-9]+ | "(" sum ")"
ws        ::= ([ \t\n]+)
"""
GAME = r"""
root ::= (
    # two moves in the first line, and more lines
    "1. " move " " move "\n"
    ([1-9] [0-9]? ". " move " " move "\n")+
)
move ::= (pawn | piece | castle) [+#]?
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
piece ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
castle ::= "O-O" "-O"?
"""
PHRASES = r"""
root  ::= line+ ([ \t\n] line+)*
line  ::= kana | mark | [\u00e0-\u00ff] | [^a-z\u3040-\u30ff\u00e0-\u00ff \t\n.]{2}
kana  ::= [ぁ-ゟ] | [ァ-ヿ]
mark  ::= "、" | [\u2014\U0001F600]
"""
LIST = """
root ::= item+
item ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ "\\n"
"""
PUBLISHED = {
    "json": JSON,
    "sums": SUMS,
    "program": PROGRAM,
    "game": GAME,
    "phrases": PHRASES,
    "list": LIST,
    "brackets": 'root ::= "(" root ")" root | [a-z]* "x"',
    "any": 'root ::= "<" ( . | root ){1,6} ">"',
}

WHOLE = [
    (r'root ::= "d\u00e9ca"', ["déca"], ["deca", "dĀca", r"d\u00e9ca"]),
    (r'root ::= "\xe9" "\U0001F600"', ["é😀"], ["é", "😀"]),
    (r"root ::= [\u00e0-\u00ff]+", ["é", "àÿ"], ["", "e", "à!", "\u0100"]),
    (r"root ::= [\x41-\x43\-\]] [^\u0041-\U0010FFFF]", ["A@", "-@", "]@"], ["D@", "AA"]),
    ("root ::= ([0-9]{3}){2}", ["123456"], ["123", "12345", "123456789"]),
    ('root ::= ("a"*)*', ["", "a", "aaaa"], ["b", "ab"]),
    ('root ::= ("a"*)+ ("b"?){2,}', ["", "ab", "bbb"], ["ba"]),
    ('root ::= "a"{2}{3}', ["aaaaaa"], ["aaaa", "aaaaa"]),
    ('root ::= "ab"+ "c"{0}', ["abab"], ["abb", "abc"]),
    ('root ::= start\nstart ::= "x"', ["x"], ["start", ""]),
    ('root ::= foo-bar foo_bar FOO-BAR\nfoo-bar ::= "1"\nfoo_bar ::= "2"\nFOO-BAR ::= "3"', ["123"], ["111"]),
    ('root ::= "a" | root "b"', ["a", "abb"], ["b", "ba"]),
    ('root ::= "a" root "b" | ""', ["", "aabb"], ["aab", "abb"]),
    ('root ::= "x"\nroot ::= "y"', ["y"], ["x"]),  # the later one counts
    ("root ::=\r\n  .  # any\r\n", ["a", "\n", "😀"], ["", "ab"]),
    ('root ::= "a" |\n "b" ( # more\n "c"\n | "d" )', ["a", "bc", "bd"], ["b", "c"]),
    ("root ::= ", [""], ["a"]),
    ('root ::= "\n"', ["\n"], [""]),
    (JSON, ['{"a": [1, -2.5e3, {"é\\u00e9": null }], "b":"\\n"}'], ["{", '{"a": }', '{"a":01}', "[]"]),
    # The blank line at the end is of the last rule `ws` or of the root: only both together make sense.
    (SUMS, ["a = b\n", "(x1+2)*3=y\n\na=1\n"], ["a = b", "a = \n", "1a=2\n"]),
    (PROGRAM, ["int main(){int a = b + 1;inty = (2);// é\n}"], ["int main()", "intmain(){}", "int f(){a b}"]),
    (GAME, ["1. e4 e5\n2. Nf3 O-O\n"], ["1. e4 e5\n", "1. e9 e5\n2. e4 e5\n"]),
    (PHRASES, ["ぁ、ァ é—", "AB"], ["a", "A", "é "]),
]


@pytest.mark.parametrize(("grammar", "texts", "others"), WHOLE)
def test_a_grammar_takes_these_texts_and_no_others(grammar: str, texts: list[str], others: list[str]) -> None:
    assert [text for text in texts if not accepts(grammar, text)] == []
    assert [text for text in others if accepts(grammar, text)] == []


# By a plain matcher

# é and è begin with the same byte, so they show what is cut within a character.
ALPHABET = "abéè\n"
ESCAPES = {"\n": "\\n", "é": "\\u00e9", "è": "\\xe8"}
NAMES = ("root", "x", "start")

Rule = tuple  # (kind, ...)


def rules() -> st.SearchStrategy[dict[str, Rule]]:
    leaves = (
        st.tuples(st.just("text"), st.text(ALPHABET, max_size=3))
        | st.tuples(st.just("class"), st.text(ALPHABET, min_size=1, max_size=3), st.booleans())
        | st.tuples(st.just("rule"), st.sampled_from(NAMES))
    )

    def larger(inner: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
        counts = st.tuples(st.integers(0, 2), st.none() | st.integers(0, 2))
        return (
            st.tuples(st.just("all"), st.lists(inner, max_size=3))
            | st.tuples(st.just("any"), st.lists(inner, min_size=2, max_size=3))
            | st.tuples(st.just("times"), inner, counts)
        )

    return st.fixed_dictionaries({name: st.recursive(leaves, larger, max_leaves=6) for name in NAMES})


def written(rule: Rule) -> str:
    kind, what, *more = rule
    if kind == "text":
        return '"' + "".join(ESCAPES.get(each, each) for each in what) + '"'
    if kind == "class":
        return "[" + "^" * more[0] + "".join(ESCAPES.get(each, each) for each in what) + "]"
    if kind == "rule":
        return what
    if kind == "times":
        least, extra = more[0]
        return written(what) + f"{{{least},{'' if extra is None else least + extra}}}"
    return "(" + (" " if kind == "all" else " | ").join(map(written, what)) + ")"


def matches(grammar: dict[str, Rule], text: str) -> bool:
    """Whether a text satisfies `root`: where each rule may end from each place, until nothing is added."""
    table: dict[tuple[str, int], set[int]] = {}

    def ends_of_all(rule: Rule, places: set[int]) -> set[int]:
        return set().union(*(ends(rule, place) for place in places))

    def ends(rule: Rule, at: int) -> set[int]:
        kind, what, *more = rule
        if kind == "text":
            return {at + len(what)} if text.startswith(what, at) else set()
        if kind == "class":
            return {at + 1} if at < len(text) and (text[at] in what) != more[0] else set()
        if kind == "rule":
            return table.get((what, at), set())
        if kind == "any":
            return set().union(*(ends(each, at) for each in what))
        places = {at}
        if kind == "all":
            for each in what:
                places = ends_of_all(each, places)
            return places
        least, extra = more[0]
        for _ in range(least):
            places = ends_of_all(what, places)
        found = set(places)
        for _ in range(len(text) + 1 if extra is None else extra):
            places = ends_of_all(what, places)
            found |= places
        return found

    before = -1
    while before != (before := sum(map(len, table.values()))):
        for name, rule in grammar.items():
            for at in range(len(text) + 1):
                table.setdefault((name, at), set()).update(ends(rule, at))
    return len(text) in table["root", 0]


SHORT = ["".join(each) for count in range(4) for each in itertools.product("ab", repeat=count)]


@given(rules(), st.lists(st.text(ALPHABET, max_size=6), max_size=6), st.booleans())
def test_a_random_grammar_takes_what_a_plain_matcher_takes(
    grammar: dict, texts: list[str], recursive: bool
) -> None:
    """With the recursion, which no text needs, it is parsed; without it may be one regular expression."""
    bodies = {name: written(rule) for name, rule in grammar.items()}
    if recursive:
        bodies["root"] = f'"(" root ")" | {bodies["root"]}'
    source = "\n".join(f"{name} ::= {body}" for name, body in bodies.items())
    try:
        GrammarState(Grammar("gbnf", source), BYTES)
    except BadRequest as error:
        assume("never ends" not in error.message and "no text" not in error.message)
        raise
    for text in (*SHORT, *texts):
        assert accepts(source, text) == matches(grammar, text), (source, text)


# By libllama


@pytest.fixture(scope="module")
def starter(starter_path: Path) -> Iterator[LlamaVocabulary]:
    loaded = LlamaVocabulary(starter_path)
    yield loaded
    loaded.close()


class OfLibllama:
    """libllama's own sampler for a grammar: which tokens it leaves."""

    def __init__(self, vocabulary: LlamaVocabulary, grammar: str) -> None:
        self._library = libllama.load()
        self._candidates = (self._library.llama_token_data * vocabulary.size)()
        self._sampler = self._library.llama_sampler_init_grammar(vocabulary.handle, grammar.encode(), b"root")
        assert self._sampler, "libllama does not read it"

    def allowed(self) -> np.ndarray:
        for token, each in enumerate(self._candidates):
            each.id, each.logit = token, 0.0
        array = self._library.llama_token_data_array(
            data=self._candidates, size=len(self._candidates), selected=-1, sorted=False
        )
        self._library.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return np.array([each.logit == 0.0 for each in self._candidates])

    def accept(self, token: int) -> None:
        self._library.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        self._library.llama_sampler_free(self._sampler)


def is_plain(vocabulary: LlamaVocabulary, token: int) -> bool:
    """Whether a token is of whole characters, none of them U+0000.

    libllama takes pieces as C strings, and refuses a part of a character where [^...] names another one that
    begins so.
    """
    piece = vocabulary.piece(token)
    try:
        return bool(piece.decode()) and b"\0" not in piece and not vocabulary.is_control(token)
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokens_that_may_come_next_are_libllama_s(name: str, starter: LlamaVocabulary) -> None:
    plain = np.array([is_plain(starter, token) for token in range(starter.size)])
    ends = np.isin(np.arange(starter.size), list(starter.end_of_generation))
    tokenizer, draw = GrammarTokenizer(starter), np.random.default_rng(7)
    theirs = OfLibllama(starter, PUBLISHED[name])
    ours = GrammarState(Grammar("gbnf", PUBLISHED[name]), tokenizer)
    try:
        for _ in range(25):
            allowed, expected = ours.allowed(), theirs.allowed()
            differing = np.flatnonzero((allowed != expected) & plain & ~ends)
            assert [starter.piece(token) for token in differing] == []
            assert allowed[ends].any() == expected[ends].any()
            possible = np.flatnonzero(expected & plain & ~ends)
            if not len(possible):
                break
            token = int(draw.choice(possible))
            ours.accept(token)
            theirs.accept(token)
    finally:
        theirs.close()


def test_long_strings_in_a_recursive_grammar_stay_within_the_limits(starter: LlamaVocabulary) -> None:
    """They are one lexeme each: by characters, a large vocabulary is refused within a few tokens."""
    state = GrammarState(Grammar("gbnf", JSON), GrammarTokenizer(starter))
    text = '{"a": ["' + "many words in one string, " * 200 + '", {"b": "' + "and more of them " * 100 + '"}]}'
    for token in starter.tokenize(text, special=False, add_bos=False):
        assert state.allowed()[token]
        state.accept(token)
    assert state.allowed()[sorted(starter.end_of_generation)[0]]


# Tokens


def test_tokens_are_matched_by_name_and_by_id() -> None:
    think = 'root ::= <think> !</think>* </think> "a"+'
    assert follows(think, [257, *b"so", 259, 258, *b"aa"])
    assert follows(think.replace("</think>", "<[258]>"), [257, *b"so", 258, *b"a"])
    assert not follows(think, b"<think>so</think>a")
    assert not follows(think, [257, *b"so"])
    assert not follows("root ::= <think> !</think>*", [257, 258])
    assert follows('root ::= "(" root ")" | <|tool|> "x"', [*b"(", 259, *b"x)"])


# What is refused, and how

REFUSED = [
    ('other ::= "a"', "line 1, column 1: there is no rule root"),
    ('root ::= "a"\n  | "b"', "line 2, column 3: a rule has ended: put the | at the end"),
    ('root ::= "a" other', "line 1, column 14: there is no rule other: define it"),
    ('root = "a"', "line 1, column 6: `::=` is missing"),
    ('"a"', "line 1, column 1: a rule is expected"),
    ('root ::= "a" $', "line 1, column 14: '$' cannot stand here"),
    ('root ::= "a', 'line 1, column 10: this " is not closed'),
    ("root ::= [a", "line 1, column 10: this [ is not closed"),
    ('root ::= ("a"\nb ::= "c"', "line 1, column 10: this ( is not closed"),
    ('root ::= "a")', "line 1, column 13: this ) closes nothing"),
    ("root ::= []", "line 1, column 10: this class is empty"),
    ("root ::= [z-a]", "line 1, column 11: the range z-a is reversed"),
    ("root ::= *", "line 1, column 10: * repeats what stands before it"),
    ('root ::= "a"{2', "line 1, column 13: repetitions are written"),
    ('root ::= "a"{,2}', "line 1, column 13: repetitions are written"),
    ('root ::= "a"{3,2}', "line 1, column 13: {3,2} ends below its beginning"),
    (f'root ::= "a"{{{REPEATS_MAX + 1}}}', "repetitions are too many"),
    (r'root ::= "\d"', r"line 1, column 11: \d is no escape"),
    (r'root ::= "\u12"', r"line 1, column 11: \u needs 4"),
    (r'root ::= "\U00110000"', "beyond Unicode"),
    (r'root ::= "\ud83d\ude00"', "line 1, column 11: this is half of a surrogate pair"),
    ("root ::= <|nope|>", "line 1, column 10: <|nope|> is no token of this model"),
    ("root ::= <[260]>", "line 1, column 10: <[260]> is no token of this model"),
    ("root ::= <a", "line 1, column 10: a token is written"),
    ('root ::= "a" x\nx ::= "b" x', "line 2, column 1: rule x never ends"),
    (r"root ::= [^\x00-\U0010FFFF]", "no text can satisfy it"),
    (
        "root ::= " + "(" * (NESTING_MAX + 1),
        f"column {NESTING_MAX + 10}: more than {NESTING_MAX} parentheses",
    ),
    ('root ::= "a"' + "*" * 5000, "repetitions of repetitions"),
    ('root ::= "' + "a" * GBNF_CHARS_MAX, "characters; at most"),
]


@pytest.mark.parametrize(("grammar", "reason"), REFUSED)
def test_what_is_refused_is_named_with_its_place(grammar: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(reason)) as refused:
        check_bytes(grammar)
    assert refused.value.param == "grammar"
    assert len(refused.value.message) < 400


def check_bytes(grammar: str) -> None:
    check(Grammar("gbnf", grammar), BYTES)


def chain(count: int, body: str, end: str) -> str:
    links = "\n".join(f"r{number} ::= {body.format(number + 1)}" for number in range(count))
    return f"root ::= r0\n{links}\nr{count} ::= {end}"


BOMBS = {
    "a chain": chain(1200, "r{}", '"x"'),
    "a chain of loops": chain(900, '"b" r{}', '"x" | root'),
    "a chain of nested loops": chain(400, '("b" (("c" r{})* "d")* | "e")', '"x" | root'),
    "doubling": chain(60, "r{0} r{0}", '"x"'),
    "doubling in a loop": chain(60, "r{0} r{0}", '"x"? | "(" root ")"'),
    "repeated repetitions": 'root ::= ((([a-z]{1000} "x"){1000}){1000}){1000}',
    "optional parts": "root ::= " + "a? " * 9000 + '\na ::= "a"',
    "nested as far as is allowed": f'root ::= {"(" * NESTING_MAX}root? "a"{")" * NESTING_MAX}',
}


@pytest.mark.parametrize("grammar", BOMBS.values(), ids=BOMBS)
def test_no_grammar_ends_the_process(grammar: str) -> None:
    """In a thread with the smallest stack that systems give: llguidance would go down too deep by calls."""
    assert outcome(lambda: check_bytes(grammar), 1 << 20)


def test_rules_may_need_one_another_as_deep_as_real_grammars_do() -> None:
    assert accepts(chain(DEPTH_MAX // 4, '"b" r{}', '"x" | root'), "b" * (DEPTH_MAX // 4) + "x")
    with pytest.raises(BadRequest, match="rule r400 is nested too deeply"):
        check_bytes(chain(400, '"b" r{}', '"x" | root'))
