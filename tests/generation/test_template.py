"""Chat templates: what real templates use works; what a hostile one tries does not."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, UnsupportedModel
from cordee.generation import template as template_module
from cordee.generation.sandbox import WORK_MAX
from cordee.generation.template import SOURCE_CHARS_MAX, ChatTemplate, missing

NOW = datetime(2025, 3, 9, 14, 30)
HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "You climb."},
    {"role": "user", "content": "Rope?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"ort": {"type": "string"}}}},
    }
]


def rendered(source: str, messages: list[dict] = HELLO, **options) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, now=NOW, **options)


# What real templates use


def test_the_starter_model_s_own_template(starter_path: Path) -> None:
    vocabulary = Vocabulary(starter_path)
    template = ChatTemplate(vocabulary.chat_template, vocabulary.bos_text, vocabulary.eos_text)
    vocabulary.close()
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert template.render(HELLO, now=NOW) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(TALK[:2], now=NOW, add_generation_prompt=False) == (
        "<|im_start|>system\nYou climb.<|im_end|>\n<|im_start|>user\nRope?<|im_end|>\n"
    )


LLAMA_STYLE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|h|>system<|/h|>Today: " + date_string + "\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|h|>' + message['role'] + '<|/h|>' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|h|>assistant<|/h|>' }}
{%- endif %}
"""

QWEN_STYLE = """\
{%- set ns = namespace(last=0, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'assistant' %}{% continue %}{% endif %}
    {%- set ns.last = loop.revindex0 %}
    {%- set ns.seen = true %}
    {%- if ns.seen %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<' ~ message.role ~ '>' ~ content ~ '\\n' }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think></think>' }}
{%- endif %}
"""

GPT_OSS_STYLE = """\
{%- macro typed(spec) -%}
    {%- if spec.type == "object" -%}
        { {%- for name, inner in spec.properties.items() -%}
            {{ name }}: {{ typed(inner) }}{{ ", " if not loop.last }}
        {%- endfor -%} }
    {%- elif spec.type is string -%}
        {{ spec.type|upper }}
    {%- else -%}
        any
    {%- endif -%}
{%- endmacro -%}
{%- if not model_identity -%}{%- set model_identity = "Cordée" -%}{%- endif -%}
{{- "<|system|>" + model_identity + " " + strftime_now("%Y-%m-%d") }}
{%- if tools -%}
    {%- for tool in tools -%}
        {{ "\\n" + tool.function.name + "(" + typed(dict(type="object", **tool.function.parameters)) + ")" }}
    {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.tool_calls is defined and message.tool_calls|length > 1 -%}
        {{ raise_exception("one tool at a time") }}
    {%- endif -%}
    {{- "\\n" + message.role + ": " + message.content }}
{%- endfor -%}
"""


def test_llama_style_dates_slices_and_reassignment() -> None:
    assert rendered(LLAMA_STYLE, TALK[:2]) == (
        "<s><|h|>system<|/h|>Today: 09 Mar 2025\nYou climb.<|eot|>"
        "<|h|>user<|/h|>Rope?<|eot|><|h|>assistant<|/h|>"
    )
    assert "Today: 1 May 1786\n" in rendered(LLAMA_STYLE, date_string="1 May 1786")


def test_qwen_style_namespaces_and_loop_controls() -> None:
    plain = "<system>You climb.\n<user>Rope?\n<assistant>Yes.\n<user>Why?\n"
    assert rendered(QWEN_STYLE, TALK) == plain
    assert rendered(QWEN_STYLE, TALK, enable_thinking=False) == plain + "<think></think>"
    assert "<think>" in rendered(QWEN_STYLE, TALK[:3])  # nothing after it: kept


def test_gpt_oss_style_macros_and_tools() -> None:
    assert rendered(GPT_OSS_STYLE, tools=TOOLS) == (
        "<|system|>Cordée 2025-03-09\nweather({ort: STRING})\nuser: Hello"
    )
    with pytest.raises(BadRequest, match="one tool at a time"):
        rendered(GPT_OSS_STYLE, [{"role": "assistant", "content": "", "tool_calls": [1, 2]}])


def test_blocks_are_trimmed_as_hugging_face_does() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend"
    assert rendered(source) == "Hello\nend"


def test_tojson_leaves_characters_as_they_are() -> None:
    value = {"ü": "<b> & 'q'", "list": [1, None, True]}
    assert rendered("{{ x|tojson }}", x=value) == '{"ü": "<b> & \'q\'", "list": [1, null, true]}'
    assert rendered("{{ x|tojson(indent=2) }}", x=value) == json.dumps(value, indent=2, ensure_ascii=False)
    assert (
        rendered("{{ x|tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2})
        == '{"a":2,"b":1}'
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '%s{}|'.format(3) ~ '{0}-{b}'.format('a', b='c') ~ '{:>3}'.format(7) }}", "%s3|a-c  7"),
        ("{{ ['a', 'b']|join(', ') ~ '-'.join(['x', 'y']) }}", "a, bx-y"),
        ("{{ 'aXbX'|replace('X', 'yy') ~ 'aXbX'.replace('X', '') }}", "ayybyyab"),
        ("{{ 'a\nb'|indent(2) ~ 'a\nb'|indent(width=2, first=true) }}", "a\n  b  a\n  b"),
        ("{{ ([1, 2] + [3])|map('string')|list|join + '=' * 3 ~ 2 ** 5 ~ 7 % 4 }}", "123===323"),
        (
            "{{ {'b': 1, 'a': 2}|dictsort }}{{ messages|map(attribute='role')|list }}",
            "[('a', 2), ('b', 1)]['user']",
        ),
        ("{{ '[1, {\"a\": 2}]'|from_json }}{{ [3, 1]|sort|first }}{{ [1.5, 2]|sum }}", "[1, {'a': 2}]13.5"),
        ("{% generation %}{{ 'kept' }}{% endgeneration %}", "kept"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|length }}{% filter upper %}b{% endfilter %}", "2B"),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{% else %}none{% endfor %}", "13"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        (
            "{% macro m(a, b='z') %}{{ a ~ b ~ (caller() if caller else '') }}{% endmacro %}"
            "{{ m(1) }}{% call m(2, b=3) %}!{% endcall %}",
            "1z23!",
        ),
        ("{{ nothing }}{{ nothing is defined }}{{ nothing|default('d') }}{{ none }}", "FalsedNone"),
        ("{{ bos_token ~ eos_token ~ (tools is none) }}", "<s></s>True"),
    ],
)
def test_the_language_works_under_the_budget(source: str, text: str) -> None:
    assert rendered(source) == text


def test_a_long_conversation_fits_the_budget() -> None:
    turns = [{"role": role, "content": "word " * 800} for role in ("user", "assistant")] * 500
    for source in (LLAMA_STYLE, QWEN_STYLE, GPT_OSS_STYLE):  # 4 million characters, a million tokens
        assert len(rendered(source, turns)) > 3_990_000


# Which error is raised


def test_the_template_s_own_objection_reaches_the_client() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok"
    )
    assert rendered(source) == "ok"
    with pytest.raises(BadRequest, match="System role not supported") as refused:
        rendered(source, TALK)
    assert refused.value.param == "messages"


def test_messages_that_the_template_cannot_take_are_the_client_s_fault() -> None:
    with pytest.raises(BadRequest, match="cannot take these messages") as refused:
        rendered("{{ messages[0].content + '!' }}", [{"role": "user", "content": ["a part"]}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'a",
        "{% endfor %}",
        "{{ x|no_such_filter }}",
        "{% include 'other' %}",
        "{{ missing_one.x }}",
        "{{ 1 / 0 }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "a" * (SOURCE_CHARS_MAX + 1),
    ],
    ids=range(10),
)
def test_a_broken_template_is_the_model_s_fault(source: str) -> None:
    with pytest.raises(UnsupportedModel, match="chat template"):
        rendered(source)


def test_a_model_without_template_says_what_to_do() -> None:
    error = missing("tiny-base")
    assert isinstance(error, UnsupportedModel)
    assert "tiny-base" in error.message and "/v1/completions" in error.message


def test_the_prompt_s_length_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "OUTPUT_CHARS_MAX", 100)
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": "a" * 100}])
    with pytest.raises(BadRequest, match="longer than 100"):
        rendered("{{ messages[0].content }}", [{"role": "user", "content": "a" * 101}])


# What a hostile template tries

DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}"
LAUGHS = (
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(90) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
MILLION = "{% set s = 'x' * 1000000 %}{% for i in range(200) %}STEP{% endfor %}"
TEXT = "y" * 9000

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') ~ [].x.y }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['measure'] }}",
    "{{ strftime_now._now.year }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ dict.mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
]
MUCH_OF_LITTLE = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ ['a'] * 10**9 }}",
    "{{ 2 ** (10 ** 9) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.rjust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'x'.translate({120: 'y' * 1000}) }}",
    "{{ 'x'.encode().center(10**9) }}",
    "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ 1.5|round(10**9) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ range(10**9)|list }}",
    "{{ lipsum(10**6) }}",
    "{{ ('\n' * 1000000)|indent('x' * 1000000) }}",
    "{{ ('a' * 1000000)|list|join('x' * 1000000) }}",
    "{{ ('x' * 1000000).join('a' * 1000000) }}",
    "{{ ('a' * 1000000)|replace('', 'x' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'x' * 1000000) }}",
    "{{ ('{}' * 100000).format(*(['x' * 100000] * 100000)) }}",
    "{{ ([[1] * 1000] * 4000)|sum(start=[]) }}",
    "{{ strftime_now('%Y' * 1000000) }}",
    *(
        DOUBLING.replace("STEP", step)
        for step in (
            "ns.s ~ ns.s",
            "ns.s + ns.s",
            "ns.s * 2",
            "ns.s.replace('x', 'xx')",
            "ns.s|replace('x', 'xx')",
            "[ns.s, ns.s]|join",
            "''.join([ns.s, ns.s])",
            "'{}{}'.format(ns.s, ns.s)",
            "[ns.s, ns.s]|string",
        )
    ),
    DOUBLING.replace("{% set ns.s = STEP", "{% set x %}{{ ns.s ~ ns.s }}{% endset %}{% set ns.s = x"),
]
SHARED_LISTS = [
    LAUGHS + use
    for use in (
        "{{ ns.a }}",
        "{{ ns.a|string }}",
        "{{ ns.a|tojson }}",
        "{{ ns.a|join }}",
        "{{ ns.a ~ '' }}",
        "{{ ns }}",
        "{{ '{}'.format(ns.a) }}",
        "{{ raise_exception(ns.a) }}",
        "{{ raise_exception(ns) }}",
        "{{ ns.a == ns.b }}",
        "{{ ns.a is eq(ns.b) }}",
        "{{ ns.a in [ns.b] }}",
        "{{ [ns.b].index(ns.a) }}",
        "{{ [ns.a, ns.b]|sort }}",
        "{{ {}.get(ns.t) }}",
        "{{ {}[ns.t] }}",
        "{{ {ns.t: 1} }}",
        "{{ [ns.t]|unique|list }}",
        "{{ dict([(ns.t, 1)]) }}",
    )
]
MUCH_TIME = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999)|select('odd')|list|length }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(99999) %}" + TEXT + "{% endfor %}",
    "{% for i in range(2000) %}{% set x = self.b() %}{% endfor %}{% block b %}" + TEXT + "{% endblock %}",
    "{% macro m() %}" + TEXT + "{% endmacro %}{% for i in range(2000) %}{% set x = m() %}{% endfor %}",
    "{% macro m() %}{% for i in range(2000) %}{% set x = caller() %}{% endfor %}{% endmacro %}"
    "{% call m() %}" + TEXT + "{% endcall %}",
    *(
        MILLION.replace("STEP", step)
        for step in (
            "{% set x = s[1:] %}",
            "{% set x = s|upper %}",
            "{% set x = s.upper() %}",
            "{% set x = s + 'y' %}",
            "{% set x = s ~ 'y' %}",
            "{% if s == 'y' %}{% endif %}",
            "{% if 'y' in s %}{% endif %}",
            "{% if s is lower %}{% endif %}",
            "{% set x = s.count('y') %}",
            "{% set x %}{{ s }}{% endset %}",
        )
    ),
]
OWN_FILTERS = ["{{ -99999999999|turn }}", "{{ 'nan'|float|turn }}", "{{ [-5]|map('turn')|list }}"]


@pytest.mark.parametrize("source", ESCAPES, ids=range(len(ESCAPES)))
def test_a_template_stays_in_the_sandbox(source: str) -> None:
    with pytest.raises(UnsupportedModel, match="broken"):
        rendered(source)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception.__globals__ }}", "{{ ''.__class__ }}", "{{ strftime_now._now }}"]
)
def test_private_things_have_no_text(source: str) -> None:
    assert rendered(source) == ""


HUNGRY = MUCH_OF_LITTLE + SHARED_LISTS + MUCH_TIME + OWN_FILTERS


@pytest.mark.parametrize("source", HUNGRY, ids=range(len(HUNGRY)))
def test_a_template_cannot_take_memory_or_time_without_bound(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small part of the budget, to be quick; without one, none would end or fit."""
    monkeypatch.setattr("cordee.generation.sandbox.WORK_MAX", WORK_MAX // 16)
    with pytest.raises(UnsupportedModel, match="broken"):
        rendered(source)
