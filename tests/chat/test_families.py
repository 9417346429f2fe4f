"""Each family of the roster with a template of its form: prompts with tools, and answers that call them."""

import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_families import CALL, CASES, SECOND, WEATHER, Case
from cordee.chat.events import Collected
from cordee.chat.families import FAMILIES, thinking_of
from cordee.chat.formats import AnswerFormat, ChatFormat, Parser, format_of
from cordee.chat.turn import ChatTurn, Message, Thinking, Tool, ToolChoice
from cordee.engine.vocabulary import Vocabulary
from cordee.generation.request import Grammar
from cordee.generation.template import ChatTemplate
from cordee.grammar.grammar import GrammarState, GrammarTokenizer
from tiny import make_tiny

NOW = datetime(2026, 11, 30)
TOOL = Tool("weather", "Tells the weather.", WEATHER)
OTHER = Tool("weather_of_the_past", "Tells what it was.", WEATHER)
ASKED = ChatTurn(messages=[Message("user", "How is the weather?")], tools=[TOOL, OTHER])
BOTH = ToolChoice("required", "weather")

each_family = pytest.mark.parametrize(
    "case", CASES, ids=[f"{place}-{case.name}" for place, case in enumerate(CASES)]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def vocabularies(folder: Path) -> Iterator[dict[str, Vocabulary]]:
    """By template; each is opened when it is asked for."""
    made: dict[str, Vocabulary] = {}
    yield made
    for vocabulary in made.values():
        vocabulary.close()


def vocabulary_of(case: Case, made: dict[str, Vocabulary], folder: Path) -> Vocabulary:
    if case.template not in made:
        path = folder / f"{len(made)}.gguf"
        make_tiny("llama", path, layers=1, tokenizer="bytes", template=case.template, control=case.control)
        made[case.template] = Vocabulary(path)
    return made[case.template]


def prompt_of(case: Case, turn: ChatTurn) -> str:
    template = ChatTemplate(case.template)
    chat_format = format_of(template)
    return template.render(chat_format.messages(turn), now=NOW, **chat_format.variables(turn))


def answer_format(case: Case, vocabulary: Vocabulary, turn: ChatTurn = ASKED) -> AnswerFormat:
    return format_of(ChatTemplate(case.template)).answer(turn, prompt_of(case, turn), None, vocabulary)


class NoControlTokens:
    """A vocabulary without any, for what does not depend on them."""

    end_of_generation = frozenset[int]()

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        return []

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]:
        raise AssertionError("nothing is to be tokenized")


@cache
def parsers(template: str) -> AnswerFormat:
    chat_format = ChatFormat(template)
    rendered = ChatTemplate(template).render(
        chat_format.messages(ASKED), now=NOW, **chat_format.variables(ASKED)
    )
    return chat_format.answer(ASKED, rendered, None, NoControlTokens())


def parser_of(case: Case) -> Parser:
    numbers = itertools.count(1)
    return parsers(case.template).parser(lambda: str(next(numbers)))


def read(parser: Parser, pieces: Sequence[str]) -> Collected:
    said = Collected()
    for piece in pieces:
        said.add(parser.push(piece))
    said.add(parser.finish())
    return said


# The roster


def test_every_family_has_a_case() -> None:
    assert {family.name for family in FAMILIES} | {"by prompt"} == {case.name for case in CASES}


@each_family
def test_a_family_is_known_by_its_template(case: Case) -> None:
    assert format_of(ChatTemplate(case.template)).name == case.name


def test_a_template_that_only_speaks_of_tools_is_told_of_them_by_prompt() -> None:
    """Some take them by another name, or show what a call looks like and no tools."""
    for source in (
        "{# <tool_call> arguments #}{{ messages[0].content }} tools",
        "{{ xml_tools }}<tool_call>{{ messages[0].content }}arguments",
        "{{ tools }}{{ messages[0].content }} in no form that is known",
    ):
        assert format_of(ChatTemplate(source)).name == "by prompt"


# Prompts


@each_family
def test_tools_are_in_the_prompt_unless_none_may_be_called(case: Case) -> None:
    assert "Tells the weather." in prompt_of(case, ASKED)
    forbidden = ChatTurn(messages=ASKED.messages, tools=[TOOL], tool_choice=ToolChoice("none"))
    assert "Tells the weather." not in prompt_of(case, forbidden)


@each_family
def test_calls_and_results_are_in_the_prompt(case: Case) -> None:
    """As an agent sends them back: two calls at once, without text, then their results, then more."""
    turn = ChatTurn(
        messages=[
            *ASKED.messages,
            Message("assistant", tool_calls=(CALL, SECOND)),
            Message("tool", "cloudy", tool_call_id="1"),
            Message("tool", "sunny", tool_call_id="2"),
            Message("assistant", "Here sun, there clouds."),
            Message("user", "And tomorrow?"),
        ],
        tools=[TOOL],
    )
    prompt = prompt_of(case, turn)
    assert prompt.index("How is the weather?") < prompt.index("Altstadt") < prompt.index("cloudy")
    assert prompt.index("Genève") < prompt.index("sunny") < prompt.index("there clouds")
    assert "None" not in prompt
    assert '\\\\"<Altstadt>' not in prompt, "arguments are not JSON in JSON"


@each_family
def test_a_call_without_sensible_arguments_still_renders(case: Case) -> None:
    for arguments in ("", "{", "[1]", '"text"'):
        call = CALL.__class__("x", "weather", arguments)
        messages = [
            *ASKED.messages,
            Message("assistant", tool_calls=(call,)),
            Message("tool", "none", tool_call_id="x"),
        ]
        assert "weather" in prompt_of(case, ChatTurn(messages=messages, tools=[TOOL]))


# Answers


@each_family
def test_an_answer_is_read(case: Case) -> None:
    assert read(parser_of(case), [case.answer]) == case.said()


@each_family
@given(data=st.data())
def test_an_answer_may_be_cut_anywhere(case: Case, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(case.answer)))))
    pieces = [case.answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(case.answer)])]
    assert read(parser_of(case), pieces) == case.said()


@each_family
def test_an_answer_may_come_letter_by_letter_and_end_anywhere(case: Case) -> None:
    """What is cut off means the beginning of what the whole means: no mark is shown, nothing taken back."""
    whole = case.said()
    for end in range(len(case.answer)):
        said = read(parser_of(case), list(case.answer[:end]))
        assert whole.thinking.startswith(without_mark(said.thinking))
        assert whole.text.startswith(without_mark(said.text))
        assert len(said.calls) <= len(whole.calls)
        for call, of_whole in zip(said.calls, whole.calls, strict=False):
            assert (call.id, call.name) == (of_whole.id, of_whole.name)
            begun = (call.arguments, call.arguments.rpartition("<")[0])  # with a mark that is not whole?
            assert any(of_whole.arguments.startswith(each.removesuffix("\\n").rstrip()) for each in begun)


def without_mark(text: str) -> str:
    """A text without the beginning of a mark, within which an answer may have been cut off."""
    start = max(text.rfind("<"), text.rfind("["), text.rfind("{"))
    return (text if start < 0 else text[:start]).rstrip()


@each_family
@given(answer=st.text(alphabet='<|>{}[]"\\ toul_caname:weather/think\n', max_size=60))
def test_any_text_is_read_without_loss_of_words(case: Case, answer: str) -> None:
    """Text that is no call, whatever it looks like: a cut changes nothing, and nothing fails."""
    assert read(parser_of(case), list(answer)) == read(parser_of(case), [answer])


def test_plain_text_is_given_at_once() -> None:
    parser = parser_of(CASES[0])
    said = Collected()
    said.add(parser.push("Hello"))
    assert said.text == "Hello"
    said.add(parser.push(" <to"))
    assert said.text == "Hello", "it may become a call"
    said.add(parser.push("ast>"))
    assert said.text == "Hello <toast>"


# What binds an answer


def follows(answer: AnswerFormat, vocabulary: Vocabulary, text: str) -> tuple[bool, bool]:
    """Whether a text follows the grammar, and whether it may end there."""
    assert answer.grammar is not None
    state = GrammarState(answer.grammar, GrammarTokenizer(vocabulary))
    for token in vocabulary.tokenize(text, special=True, add_bos=False):
        if not state.allowed()[token]:
            return False, False
        state.accept(token)
    return True, bool(state.allowed()[list(vocabulary.end_of_generation)].any())


@each_family
def test_what_a_family_writes_follows_the_grammar(
    case: Case, vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    vocabulary = vocabulary_of(case, vocabularies, folder)
    answer = answer_format(case, vocabulary)
    assert follows(answer, vocabulary, case.answer) == (True, True)
    assert follows(answer, vocabulary, case.thought + "And so on.")[0] == (case.name != "gpt-oss")


@each_family
def test_arguments_are_bound_by_the_schema(
    case: Case, vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    vocabulary = vocabulary_of(case, vocabularies, folder)
    answer = answer_format(case, vocabulary)
    for wrong in (
        case.answer.replace("3", "30"),
        case.answer.replace("days", "hours"),
        case.answer.replace("weather", "whether"),
    ):
        assert wrong != case.answer
        assert follows(answer, vocabulary, wrong) == (False, False), wrong


@each_family
def test_calls_can_be_required_and_be_one_at_most(
    case: Case, vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    vocabulary = vocabulary_of(case, vocabularies, folder)
    required = answer_format(
        case, vocabulary, ChatTurn(messages=ASKED.messages, tools=[TOOL, OTHER], tool_choice=BOTH)
    )
    assert follows(required, vocabulary, case.thought + case.calls) == (True, True)
    assert not follows(required, vocabulary, case.thought + "And so on.")[0]
    past = case.calls.replace("weather", "weather_of_the_past", 1)
    assert not follows(required, vocabulary, case.thought + past)[0], "another tool was named"
    single = answer_format(
        case, vocabulary, ChatTurn(messages=ASKED.messages, tools=[TOOL], parallel_tool_calls=False)
    )
    assert follows(single, vocabulary, case.answer)[0] == (not case.many)


@pytest.mark.parametrize("case", [case for case in CASES if case.thinking], ids=lambda case: case.name)
def test_thinking_ends_when_its_budget_is_spent(
    case: Case, vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    vocabulary = vocabulary_of(case, vocabularies, folder)
    turn = ChatTurn(messages=ASKED.messages, thinking=Thinking(tokens_max=8))
    answer = answer_format(case, vocabulary, turn)
    assert answer.grammar is not None
    opening = case.thought[: case.thought.index(case.thinking)]
    marks = thinking_of(case.template)
    opening = opening if marks is not None and opening.endswith(marks.open) else opening.rstrip()
    state = GrammarState(answer.grammar, GrammarTokenizer(vocabulary))
    closed = case.thought[case.thought.index(case.thinking) + len(case.thinking) :].strip()
    budgeted = vocabulary.tokenize(opening + "a" * 8, special=True, add_bos=False)
    for token in budgeted:
        assert state.allowed()[token]
        state.accept(token)
    [closing, *_] = vocabulary.tokenize(closed, special=True, add_bos=False)
    assert state.allowed().nonzero()[0].tolist() == [closing]


def test_a_schema_that_cannot_be_compiled_is_left_unbound_unless_it_is_strict(
    vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    case = CASES[0]
    vocabulary = vocabulary_of(case, vocabularies, folder)
    hopeless = {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"type": "number"}]}}}
    hopeless["required"] = ["a"]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", hopeless)])
    assert follows(answer_format(case, vocabulary, turn), vocabulary, text) == (True, True)


def test_the_tools_of_a_coding_agent_are_bound(vocabularies: dict[str, Vocabulary], folder: Path) -> None:
    """Twenty-four tools with 90 kB of schemas, as they send them with each request."""
    prose = "Says at length what this is for, and what it is not. " * 5
    inner = {
        "type": "object",
        "properties": {"content": {"type": "string", "description": prose}, "done": {"type": "boolean"}},
        "required": ["content"],
    }
    tools = []
    for number in range(24):
        properties = {
            "path": {"type": "string", "description": prose},
            "mode": {"type": "string", "enum": [f"mode {place}" for place in range(20)]},
            "items": {"type": "array", "items": inner, "description": prose},
            "limits": {"type": "object", "additionalProperties": {"type": "integer"}, "description": prose},
            **{f"option_{place}": {"type": "string", "description": prose} for place in range(8)},
        }
        schema = {"type": "object", "properties": properties, "required": ["path", "items"]}
        tools.append(Tool(f"mcp__server__tool_{number}", prose, schema))
    vocabulary = vocabulary_of(CASES[0], vocabularies, folder)
    answer = answer_format(CASES[0], vocabulary, ChatTurn(messages=ASKED.messages, tools=tools))
    assert len(answer.grammar.text) > 90_000
    arguments = '{"path": "/a", "items": [{"content": "b", "done": true}], "limits": {"c": 1}}'
    text = f'<tool_call>\n{{"name": "mcp__server__tool_11", "arguments": {arguments}}}\n</tool_call>'
    assert follows(answer, vocabulary, text) == (True, True)
    assert follows(answer, vocabulary, text.replace('"content"', '"contents"')) == (False, False)


@pytest.mark.parametrize("case", [case for case in CASES if case.thinking], ids=lambda case: case.name)
def test_a_format_of_the_answer_leaves_room_for_thinking(
    case: Case, vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    vocabulary = vocabulary_of(case, vocabularies, folder)
    turn = ChatTurn(messages=ASKED.messages)
    constraint = Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
    form = format_of(ChatTemplate(case.template))
    answer = form.answer(turn, prompt_of(case, turn), constraint, vocabulary)
    final = "<|channel|>final<|message|>" if case.name == "gpt-oss" else ""
    assert follows(answer, vocabulary, case.thought + final + '{"a": 1}') == (True, True)
    assert follows(answer, vocabulary, case.thought + final + "A: 1") == (False, False)


@pytest.mark.parametrize("case", [CASES[0], *(case for case in CASES if "Coder" in case.name)])
def test_a_schema_may_be_anything(case: Case, vocabularies: dict[str, Vocabulary], folder: Path) -> None:
    """Whatever a client takes for a schema, there is an answer."""
    vocabulary = vocabulary_of(case, vocabularies, folder)
    for schema in (
        {"properties": ["a"]},
        {"properties": {"a": 5, "b": None}, "required": True},
        {"type": "string"},
        {"type": ["object", "null"], "properties": {"a": {"enum": []}}},
        {"properties": {"a": {"type": "string", "enum": 7}}},
        {"properties": {"a": {"type": "string", "enum": ["x", 7]}, "b": {"enum": ["y"], "type": "string"}}},
    ):
        turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", schema)])
        assert follows(answer_format(case, vocabulary, turn), vocabulary, "Hello") == (True, True)


def test_one_of_some_texts_is_bound_where_arguments_are_bare(
    vocabularies: dict[str, Vocabulary], folder: Path
) -> None:
    [case] = [case for case in CASES if "Coder" in case.name]
    vocabulary = vocabulary_of(case, vocabularies, folder)
    schema = {"properties": {"unit": {"type": "string", "enum": ["K", "°C"]}}, "required": ["unit"]}
    turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", schema)])
    answer = answer_format(case, vocabulary, turn)
    for unit, is_one in (("K", True), ("°C", True), ("F", False)):
        text = f"<tool_call>\n<function=f>\n<parameter=unit>\n{unit}\n</parameter>\n</function>\n</tool_call>"
        assert follows(answer, vocabulary, text) == (is_one, is_one)
        if is_one:
            [call] = read(answer.parser(str), [text]).calls
            assert json.loads(call.arguments) == {"unit": unit}


NESTED = {
    "type": "object",
    "properties": {
        "zones": {"type": "array", "items": {"type": "string"}},
        "at": {
            "type": "object",
            "properties": {
                "note": {"type": "string"},
                "deep": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["note"],
        },
        "unit": {"type": "string", "enum": ["K", "C"]},
        "few": {"type": "array", "items": {"type": "string"}, "maxItems": 1},
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "is": {"type": "boolean"},
    },
    "required": ["at"],
}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('at:{note:<|"|>a"b<|"|>}', {"at": {"note": 'a"b'}}),
        ('at:{deep:[1,2.5],note:<|"|><|"|>}', {"at": {"deep": [1, 2.5], "note": ""}}),
        (
            'at:{deep:[],note:<|"|>x<|"|>},is:true,unit:<|"|>K<|"|>',
            {"at": {"deep": [], "note": "x"}, "is": True, "unit": "K"},
        ),
        (
            'any:null,at:{note:<|"|>,}<|"|>},few:["a"],zones:[<|"|>a<|"|>,<|"|>b]<|"|>]',
            {"any": None, "at": {"note": ",}"}, "few": ["a"], "zones": ["a", "b]"]},
        ),
        ('any:"x",at:{note:<|"|>é\n<|"|>}', {"any": "x", "at": {"note": "é\n"}}),
        ("at:{note:1}", None),
        ("at:{}", None),
        ("is:true", None),
        ('at:{note:<|"|>x<|"|>},unit:<|"|>F<|"|>', None),
        ('at:{note:<|"|>x<|"|>},few:["a","b"]', None),
        ('zones:[<|"|>a<|"|>],at:{note:<|"|>x<|"|>}', None),
    ],
)
def test_lists_and_objects_in_the_form_of_gemma(
    vocabularies: dict[str, Vocabulary], folder: Path, written: str, meant: Any
) -> None:
    [case] = [case for case in CASES if case.name == "Gemma 4"]
    vocabulary = vocabulary_of(case, vocabularies, folder)
    turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", NESTED)])
    answer = answer_format(case, vocabulary, turn)
    text = f"<|tool_call>call:f{{{written}}}<tool_call|>"
    assert follows(answer, vocabulary, text) == (meant is not None, meant is not None)
    if meant is None:
        return
    for pieces in ([text], list(text)):
        [call] = read(answer.parser(str), pieces).calls
        assert json.loads(call.arguments) == meant


@pytest.mark.parametrize("family", ["LFM 2", "Gemma 4", "DeepSeek V3.2"])
def test_a_call_may_have_no_arguments_and_schemas_any_depth(
    vocabularies: dict[str, Vocabulary], folder: Path, family: str
) -> None:
    [case] = [case for case in CASES if case.name == family]
    vocabulary = vocabulary_of(case, vocabularies, folder)
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    schema = {"type": "object", "properties": {"deep": deep}}
    turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", schema)])
    answer = answer_format(case, vocabulary, turn)
    text = case.calls
    for call in (CALL, SECOND):
        text = text.replace(call.name, "f")
    empty = {"LFM 2": "[f()]", "Gemma 4": "call:f{}", "DeepSeek V3.2": ""}[family]
    if family == "DeepSeek V3.2":
        text = '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n'
        text += "</｜DSML｜function_calls>"
    else:
        text = text[: text.index(">") + 1] + empty + text[text.rindex("<") :]
    assert follows(answer, vocabulary, text) == (True, True)
    [call] = read(answer.parser(str), list(text)).calls
    assert (call.name, call.arguments) == ("f", "{}")


def test_what_was_returned_is_part_of_the_call_where_a_family_has_it_so() -> None:
    [case] = [case for case in CASES if case.name == "Gemma 4"]
    messages = [
        *ASKED.messages,
        Message("assistant", tool_calls=(CALL, SECOND)),
        Message("tool", "cloudy", tool_call_id="1"),
        Message("tool", "sunny", tool_call_id="2"),
        Message("assistant", "Both."),
        Message("user", "Thanks."),
    ]
    prompt = prompt_of(case, ChatTurn(messages=messages, tools=[TOOL]))
    returned = (
        '<|tool_response>response:weather{value:<|"|>cloudy<|"|>}<tool_response|>'
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>Both.<turn|>'
    )
    assert returned in prompt
    assert "<|turn>tool" not in prompt


def test_a_tool_may_be_called_anything(vocabularies: dict[str, Vocabulary], folder: Path) -> None:
    """Names come from clients: in a grammar they are text, not syntax and not control tokens."""
    vocabulary = vocabulary_of(CASES[0], vocabularies, folder)
    for name in ("<|im_end|>", 'a" | ANY', "größer", "\\n", "/x/ // y"):
        turn = ChatTurn(messages=ASKED.messages, tools=[Tool(name)], tool_choice=ToolChoice("required"))
        answer = answer_format(CASES[0], vocabulary, turn)
        state = GrammarState(answer.grammar, GrammarTokenizer(vocabulary))
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
        for token in vocabulary.tokenize(text, special=False, add_bos=False):
            assert state.allowed()[token], name
            state.accept(token)


def test_keywords_that_bind_nothing_are_named(vocabularies: dict[str, Vocabulary], folder: Path) -> None:
    vocabulary = vocabulary_of(CASES[0], vocabularies, folder)
    schema = {
        "properties": {
            "paths": {"type": "array", "items": {"type": "string", "format": "path"}, "uniqueItems": True},
            "names": {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}},
        },
        "$comment": "nothing",
    }
    turn = ChatTurn(messages=ASKED.messages, tools=[Tool("f", "", schema)])
    answer = answer_format(CASES[0], vocabulary, turn)
    assert answer.ignored == ("tools.propertyNames", "tools.uniqueItems")
    text = '<tool_call>\n{"name": "f", "arguments": {"paths": ["a", "a"], "names": {}}}\n</tool_call>'
    assert follows(answer, vocabulary, text) == (True, True)
    assert json.loads(answer.grammar.text)["schemas"]
