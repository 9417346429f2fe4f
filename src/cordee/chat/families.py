"""The roster: how model families write thinking and calls of tools. Data; `formats.py` is what uses it.

A family is recognised by what its chat template's source contains. Calls and thinking are told apart, because
families share them in any combination: `<think>` comes with six ways of calling.

Sources: the templates that the families publish with their weights, and their model cards.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from jinja2.meta import find_undeclared_variables

from cordee.generation.sandbox import Sandbox


@dataclass(frozen=True)
class ThinkingMarks:
    """Marks around what a family's models think. Every one of `signs` stands in the template."""

    signs: tuple[str, ...]
    open: str
    close: str


@dataclass(frozen=True)
class JsonCalls:
    """Calls whose arguments are JSON: `open (head NAME middle ARGUMENTS tail) (between …)* close`.

    `between` None: one call in a section. `again` None: one section in an answer; else what stands before
    `open` in the second one and those that follow. `bare`: a section may also begin an answer without `open`.
    `id_mark`: behind NAME stand this mark and an id of the call.
    """

    open: str
    head: str
    middle: str
    tail: str = ""
    close: str = ""
    between: str | None = None
    again: str | None = None
    bare: bool = False
    id_mark: str = ""


@dataclass(frozen=True)
class MarkedCalls:
    """Calls whose arguments stand between marks of their own, each a JSON value, or, if the tool's schema
    says that it is a string, bare text: `open NAME middle (parameter_open KEY parameter_middle VALUE
    parameter_close)* close (between NAME …)* end`. `between` and `again` are as in JsonCalls. `json_middle`
    stands in the place of `parameter_middle` before JSON, if that is another one."""

    open: str
    middle: str
    parameter_open: str
    parameter_middle: str
    parameter_close: str
    close: str
    again: str | None = "\n"
    between: str | None = None
    end: str = ""
    json_middle: str = ""


@dataclass(frozen=True)
class NamedCalls:
    """Calls as programming languages have them: `open (NAME begin (KEY equals VALUE)* end)* close`, with
    `comma` between the arguments, and with `between` and `again` as in JsonCalls.

    Values are JSON. With `quote`, though, texts stand between two such marks, also within lists and objects,
    whose keys are bare; and arguments are in the order of the alphabet.
    """

    open: str
    begin: str
    equals: str
    comma: str
    end: str
    close: str
    between: str | None = None
    again: str | None = None
    quote: str = ""


@dataclass(frozen=True)
class HarmonyCalls:
    """gpt-oss: an answer is messages in channels, and a call is one with a recipient (harmony.py)."""


Calls = JsonCalls | MarkedCalls | NamedCalls | HarmonyCalls


@dataclass(frozen=True)
class Family:
    """How a family writes calls, and how its template takes those of the past.

    `text_arguments`: as JSON text, not as objects. `null_content`: a message is one of calls if it has no
    content. `single_calls`: a message has one call. `id_chars`: how long the id of a call is.
    `own_results`: what calls returned is part of the message that made them.
    """

    name: str
    signs: tuple[str, ...]
    calls: Calls
    text_arguments: bool = False
    null_content: bool = False
    single_calls: bool = False
    id_chars: int | None = None
    own_results: bool = False


# Qwen 2.5 and 3, Hermes, and whoever trained on their form; a template without tools is told to use it, too.
TAGGED = JsonCalls(
    open="<tool_call>",
    head='\n{"name": "',
    middle='", "arguments": ',
    tail="}",
    close="\n</tool_call>",
    again="\n",
)
BY_PROMPT = Family("by prompt", (), TAGGED)

# Llama 3 says both: <|python_tag|> before the call, and nothing.
_LLAMA = JsonCalls("<|python_tag|>", '{"name": "', '", "parameters": ', "}", bare=True)
_MISTRAL_ARGUMENTS = JsonCalls("[TOOL_CALLS]", "", "[ARGS]", again="")
_MISTRAL_IDS = replace(_MISTRAL_ARGUMENTS, id_mark="[CALL_ID]")
_MISTRAL_LIST = JsonCalls("[TOOL_CALLS][", '{"name": "', '", "arguments": ', "}", close="]", between=", ")
_MISTRAL_SPACED = replace(_MISTRAL_LIST, open="[TOOL_CALLS] [")

# The first whose signs all stand in the template counts; so the special come before the general.
FAMILIES = (
    Family("gpt-oss", ("<|channel|>", "<|message|>", "<|start|>"), HarmonyCalls(), single_calls=True),
    Family(
        "Apertus",
        ("<|tools_prefix|>", "<|tools_suffix|>"),
        JsonCalls("<|tools_prefix|>[", '{"', '": ', "}", close="]<|tools_suffix|>", between=", "),
    ),
    Family(
        "Gemma 4",
        ("<|tool_call>call:",),
        NamedCalls(
            *("<|tool_call>call:", "{", ":", ",", "}", "<tool_call|>"),
            again="",
            quote='<|"|>',
        ),
        own_results=True,
    ),
    Family("Mistral, ids", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), _MISTRAL_IDS, id_chars=9),
    Family("Mistral", ("[TOOL_CALLS]", "[ARGS]"), _MISTRAL_ARGUMENTS, id_chars=9),
    Family("Mistral, lists", ("[TOOL_CALLS] [",), _MISTRAL_SPACED, id_chars=9),
    Family("Mistral, lists", ("[TOOL_CALLS]",), _MISTRAL_LIST, id_chars=9),
    Family(
        "DeepSeek R1 and V3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        JsonCalls(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            close="<｜tool▁calls▁end｜>",
            between="\n",
        ),
        text_arguments=True,
        null_content=True,
    ),
    Family(
        "DeepSeek V3.2",
        ("｜DSML｜", "function_calls>"),
        MarkedCalls(
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="',
            '">\n',
            '<｜DSML｜parameter name="',
            '" string="true">',
            "</｜DSML｜parameter>\n",
            "</｜DSML｜invoke>\n",
            again=None,
            between='<｜DSML｜invoke name="',
            end="</｜DSML｜function_calls>",
            json_middle='" string="false">',
        ),
    ),
    Family(
        "DeepSeek V3.1",
        ("<｜tool▁calls▁begin｜>",),
        JsonCalls(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            close="<｜tool▁calls▁end｜>",
            between="",
        ),
        text_arguments=True,
        null_content=True,
    ),
    Family(
        "Command R",
        ("<|START_ACTION|>",),
        JsonCalls(
            "<|START_ACTION|>[\n",
            '    {"tool_call_id": "0", "tool_name": "',
            '", "parameters": ',
            "}",
            close="\n]<|END_ACTION|>",
            between=",\n",
        ),
    ),
    Family(
        "Phi 4 and Granite",
        ("<|tool_call|>",),
        JsonCalls("<|tool_call|>[", '{"name": "', '", "arguments": ', "}", close="]", between=", "),
    ),
    Family(
        "LFM 2, JSON",
        ("<|tool_call_start|>", '"arguments": '),
        JsonCalls(
            "<|tool_call_start|>[",
            '{"name": "',
            '", "arguments": ',
            "}",
            close="]<|tool_call_end|>",
            between=", ",
        ),
    ),
    Family(
        "LFM 2",
        ("<|tool_call_start|>",),
        NamedCalls(
            *("<|tool_call_start|>[", "(", "=", ", ", ")", "]<|tool_call_end|>"),
            between=", ",
        ),
    ),
    Family("Llama 3", ("<|start_header_id|>", '"parameters"'), _LLAMA, single_calls=True),
    Family("Llama 3", ("<|python_tag|>",), _LLAMA, single_calls=True),
    Family(
        "Qwen 3 Coder",
        ("<function=", "<parameter="),
        MarkedCalls(
            "<tool_call>\n<function=",
            ">\n",
            "<parameter=",
            ">\n",
            "\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
    ),
    Family(
        "GLM 4",
        ("<arg_key>", "<arg_value>"),
        MarkedCalls(
            "<tool_call>",
            "\n",
            "<arg_key>",
            "</arg_key>\n<arg_value>",
            "</arg_value>\n",
            "</tool_call>",
        ),
    ),
    Family(
        "MiniMax M2",
        ("<minimax:tool_call>", "<parameter name="),
        MarkedCalls(
            '<minimax:tool_call>\n<invoke name="',
            '">\n',
            '<parameter name="',
            '">',
            "</parameter>\n",
            "</invoke>\n</minimax:tool_call>",
        ),
    ),
    Family("Qwen and Hermes", ("<tool_call>", "arguments"), TAGGED),
)

THINKING = (
    ThinkingMarks(("<|inner_prefix|>",), "<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThinkingMarks(("<|channel>", "<channel|>"), "<|channel>thought\n", "<channel|>"),  # Gemma 4
    ThinkingMarks(("[THINK]",), "[THINK]", "[/THINK]"),  # Magistral and later ones of Mistral
    ThinkingMarks(("<seed:think>",), "<seed:think>", "</seed:think>"),
    ThinkingMarks(("<|START_THINKING|>",), "<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ThinkingMarks(("◁think▷",), "◁think▷", "◁/think▷"),  # Kimi
    ThinkingMarks(("<think>",), "<think>", "</think>"),  # DeepSeek, Qwen, GLM, and most others
    ThinkingMarks(("</think>",), "<think>", "</think>"),
)


@lru_cache(maxsize=32)  # of models that a machine serves
def _takes_tools(source: str) -> bool:
    """Whether a template, which has been compiled before, uses the variable `tools`."""
    return "tools" in find_undeclared_variables(Sandbox().parse(source))


def family_of(source: str) -> Family:
    """The family that a template is of; BY_PROMPT if it knows no tools, or writes calls in no known way."""
    if not _takes_tools(source):
        return BY_PROMPT
    return next((each for each in FAMILIES if all(sign in source for sign in each.signs)), BY_PROMPT)


def thinking_of(source: str) -> ThinkingMarks | None:
    """How thinking is marked in a template's family, if it is."""
    return next((each for each in THINKING if all(sign in source for sign in each.signs)), None)


def is_harmony(source: str) -> bool:
    """Whether a template is of gpt-oss' form, whether or not it knows tools."""
    return all(sign in source for sign in FAMILIES[0].signs)
