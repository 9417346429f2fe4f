"""A Jinja environment for untrusted templates: the library's sandbox, and a budget for what that leaves open.

Jinja's sandbox keeps a template away from Python's internals, and from changing what it is given. It does not
bound time or memory: 'a' * 10**9, nested loops, a list of lists of lists that is small until it is printed.
So a render has a budget in units of about one character copied, and each thing that takes time or makes
data pays for it first:

- turns of a loop, and bodies of macros, pay for their size (a statement put in front of the body);
- calls, operators, filters, tests, comparisons, slices, `~` and output pay for the size of what they are
  given, all that it contains counted again at each mention, and for what they will make of it;
- the few methods and filters that could make much of little take small numbers only, or are left out.

The measuring nodes are put into the syntax tree that Jinja's parser gives; Jinja's compiler does the rest.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, MappingView, Sized
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

from jinja2 import nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

WORK_MAX = 128 << 20  # 3 s and 512 MB at the very worst; a prompt of a million tokens takes a third
STEP = 250  # a loop turn, call or filter, in copied characters
ITEM = 64  # an item of a list or dict
NODE = 4  # a node of the syntax tree in a loop's body
NUMBER_MAX = 1000  # widths, counts and digits given to methods and filters
INTEGER_BITS_MAX = 4096

T = TypeVar("T")
Function = Callable[..., Any]  # a filter, test or method of a template

_left: ContextVar[int] = ContextVar("work left to the render under way", default=WORK_MAX)


class TooMuchWork(SecurityError):
    """The template asks for more work than a prompt can need."""


def start_budget() -> None:
    """Give the render that this context is about to do its budget."""
    _left.set(WORK_MAX)


def charge(cost: int) -> None:
    """Take from the budget.

    Raises:
        TooMuchWork: there is not that much left.
    """
    left = _left.get() - cost
    if left < 0:
        raise TooMuchWork("it takes more time or memory than a prompt can need")
    _left.set(left)


def measure(value: Any) -> Any:
    """Charge for all that a value contains, as often as it is mentioned in it; give the value.

    Raises:
        TooMuchWork: it contains more than is left.
        SecurityError: it holds a namespace, which has no text and may contain itself.
    """
    stack: list[object] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            charge(len(item))
        elif isinstance(item, list | tuple | set | frozenset | MappingView):
            items = cast("Collection[object]", item)
            charge(ITEM * (len(items) + 1))
            stack.extend(items)
        elif isinstance(item, dict):
            mapping = cast("dict[object, object]", item)
            charge(ITEM * (len(mapping) + 1))
            stack.extend(mapping)
            stack.extend(mapping.values())
        elif isinstance(item, range):
            charge(ITEM * len(item))
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace is used as a value")
    return value


def glance(value: T) -> T:
    """Charge for a value's own length, not for what it contains; give the value."""
    given: object = value
    if isinstance(given, str):
        charge(len(given))
    elif isinstance(given, list | tuple | dict | set | frozenset | range | MappingView):
        charge(ITEM * len(cast("Sized", given)))
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates use it (Hugging Face's settings), bounded. Compile with `compiled`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    filters: dict[str, Function]
    tests: dict[str, Function]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants would be computed while compiling, outside any budget
            finalize=_output,
            extensions=[loopcontrols, GenerationTag],
        )
        del self.globals["lipsum"]
        self.filters = {
            name: _charged(name, function)
            for name, function in self.filters.items()
            if name not in _NO_FILTERS
        }
        self.filters.update(tojson=_tojson, from_json=_from_json, measure=measure, glance=glance, turn=_turn)
        self.tests = {
            name: _charged_test(function) if name in _COMPARING_TESTS else function
            for name, function in self.tests.items()
        }

    def compiled(self, source: str) -> Template:
        """The template of a source.

        Raises:
            jinja2.TemplateError, RecursionError, SyntaxError, ValueError, ArithmeticError, MemoryError:
                it is not a template, or more than Python can compile.
        """
        tree = self.parse(source)
        _bound(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do one of `intercepted_binops`, paid for by what it makes."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("strings are formatted by %")
        if operator == "*":
            _charge_product(left, right)
        elif operator == "**":
            _charge_power(left, right)
        else:
            glance(left)
            glance(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template, paid for by its arguments and what it makes of them."""
        charge(STEP)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _text_method(owner, __obj.__name__, args)
        elif isinstance(owner, list | tuple | dict):
            glance(cast("object", owner))
        elif owner is not None and type(owner).__module__ == "builtins":
            raise SecurityError(f"a method of {type(owner).__name__} is used")
        for name, value in (*enumerate(args), *kwargs.items()):
            if not isinstance(value, Namespace) and not str(name).startswith("_"):  # _: the compiler's own
                measure(value)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Give the sandboxed str.format for a bound one, without widths that make much of little."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            pattern = value.__self__
            if re.search(r"\d{4}|:[^{}]*\{", pattern):
                raise SecurityError("str.format is used with a large or computed width")
            before = _left.get()
            measure([args, kwargs])
            charge(pattern.count("{") * (NUMBER_MAX + before - _left.get()))
            return inner(*args, **kwargs)

        return bounded

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe; a tuple as key is hashed, so it pays for what it contains."""
        key: object = argument
        if isinstance(key, tuple):
            measure(argument)
        return super().getitem(obj, argument)


class GenerationTag(Extension):
    """{% generation %}…{% endgeneration %}, which marks the answer for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bound(tree: nodes.Template) -> None:
    """Put the filters `turn`, `measure` and `glance` into a tree where time is spent or data made."""
    bodies = [(body, _body_cost(body)) for body in tree.find_all(_BODIES)]
    measured = [
        *((node, "expr", "measure") for node in tree.find_all((nodes.Compare, nodes.Operand))),
        *((node, "key", "measure") for node in tree.find_all(nodes.Pair)),
        *(
            (node, "node", "glance")
            for node in tree.find_all(nodes.Getitem)
            if isinstance(node.arg, nodes.Slice)
        ),
    ]
    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [_filter(operand, "measure") for operand in concat.nodes]
    for node, field, name in measured:
        setattr(node, field, _filter(getattr(node, field), name))
    for body, cost in bodies:
        body.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(cost), "turn"), lineno=body.lineno))
        if isinstance(body, nodes.For) and body.test is not None:  # items that it drops take time too
            body.test = nodes.And(_filter(nodes.Const(STEP), "turn"), body.test)


_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)  # what runs more than once


def _body_cost(node: nodes.Node) -> int:
    """What one run of a body costs, beside what its parts charge: its text and its nodes."""
    text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return STEP + text + NODE * sum(1 for _ in node.find_all(nodes.Node))


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _turn(cost: int) -> bool:
    """Charge for a turn of a loop or body; a template that names this filter itself can only lose by it."""
    if type(cost) is not int or cost < 0:
        raise SecurityError("the budget's own filter is used")
    charge(cost)
    return True


@pass_context  # with a context Jinja does not call it while compiling
def _output(_context: Context, value: Any) -> str:
    return str(measure(value))


def _charge_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            charge((1 if isinstance(one, str) else ITEM) * len(cast("Sized", one)) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _charge_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_bits(bits: int) -> None:
    if bits > INTEGER_BITS_MAX:
        raise TooMuchWork(f"it computes with integers of more than {INTEGER_BITS_MAX} bits")


_NO_FILTERS = {"format", "wordwrap", "urlize", "random"}  # much of little; `random`: no two renders are equal
_SIZED_FILTERS = {"batch", "center", "indent", "round", "slice", "truncate"}
_SIZED_METHODS = {"center", "ljust", "rjust", "zfill"}
_NO_METHODS = {"encode", "expandtabs", "maketrans", "translate"}
# Filters whose work does not grow with the value; and those that only walk over it, not into its items.
_CONSTANT = {"attr", "count", "d", "default", "first", "last", "length"}
_SHALLOW = {"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"}
_COMPARING_TESTS = {"==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt"} | {
    "lessthan",
    "<=",
    "le",
    "in",
    "lower",
    "upper",
}


def _charged(name: str, function: Function) -> Function:
    """A filter that pays for what it is given and what it gives."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the place of the value among the arguments

    @wraps(function)  # also copies the mark that Jinja reads
    def charged(*args: Any, **kwargs: Any) -> Any:
        charge(STEP)
        value, options = args[first], (*args[first + 1 :], *kwargs.values())
        if name in _SIZED_FILTERS:
            _check_small(options)
        if name in _GROWTH:
            value = list(value) if name == "join" else str(measure(value))
            args = (*args[:first], value, *args[first + 1 :])
            charge(_GROWTH[name](value, [str(measure(option)) for option in options]))
        elif name == "sum" and not all(isinstance(option, int | float | str) for option in options):
            raise SecurityError("lists are added by `sum`")
        if name in _CONSTANT:
            return function(*args, **kwargs)
        (glance if name in _SHALLOW else measure)(value)
        measure(options)
        return glance(function(*args, **kwargs))

    return charged


def _charged_test(function: Function) -> Function:
    @wraps(function)
    def charged(*args: Any) -> bool:
        measure(args)
        return function(*args)

    return charged


def _check_small(options: Iterable[Any]) -> None:
    if any(isinstance(option, int) and abs(option) > NUMBER_MAX for option in options):
        raise SecurityError(f"a number over {NUMBER_MAX} is given as a width, count or number of digits")


def _joined_length(items: list[Any], options: list[str]) -> int:
    return len(items) * max(map(len, options), default=0)


def _replaced_length(text: str, options: list[str]) -> int:
    return max(map(text.count, options), default=0) * max(map(len, options), default=0)


def _indented_length(text: str, options: list[str]) -> int:
    widths = [int(option) if option.isdecimal() else len(option) for option in options]
    return text.count("\n") * max(widths, default=4)


# What a filter may add to its value, given its options as text: a separator per item, say.
_GROWTH: dict[str, Callable[[Any, list[str]], int]] = {
    "join": _joined_length,
    "replace": _replaced_length,
    "indent": _indented_length,
}


def _text_method(text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge for a method of a string; give its arguments, an iterator among them made a list."""
    charge(len(text))
    if name in _NO_METHODS:
        raise SecurityError(f"str.{name} is used")
    if name in _SIZED_METHODS:
        _check_small(args)
    if name == "join" and args:
        args = (list(args[0]),)
        charge(len(args[0]) * len(text))
    if name == "replace" and all(isinstance(arg, str) for arg in args[:2]):
        charge(_replaced_length(text, list(args[:2])))
    return args


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's template environment does: no HTML escapes, characters as they are."""
    measure([value, separators])
    _check_small([indent])
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return glance(encoder.encode(value))
    return "".join(glance(piece) for piece in encoder.iterencode(value))


def _from_json(text: str) -> Any:
    return json.loads(measure(text))
