"""One small template and one answer for each family of the roster, in the form that the family's own have.

Written for these tests: they have the marks, the loops and the demands of what the families publish (ids of
nine characters, arguments as text, roles that alternate), and none of its prose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cordee.chat.events import Collected
from cordee.chat.turn import ToolCall

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = ToolCall("1", "weather", '{"city": "Bern \\"<Altstadt>\\" }", "days": 3}')
SECOND = ToolCall("2", "weather", '{"city": "Genève"}')

_CHATML_LOOP = """\
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- "<|im_start|>user\\n<tool_response>\\n" + message.content + "\\n</tool_response><|im_end|>\\n" }}
{%- else %}
{{- "<|im_start|>" + message.role + "\\n" + message.content }}
{%- for call in message.tool_calls or [] %}{{ CALL }}{% endfor %}
{{- "<|im_end|>\\n" }}
{%- endif %}
{%- endfor %}
"""
_QWEN_CALL = (
    '{{- "\\n<tool_call>\\n{\\"name\\": \\"" + call.function.name + "\\", \\"arguments\\": " '
    '+ call.function.arguments | tojson + "}\\n</tool_call>" }}'
)
_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
QWEN = (
    _TOOLS
    + '{#- answers: <tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call> -#}'
    + _CHATML_LOOP.replace("{{ CALL }}", _QWEN_CALL)
    + '{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}'
    + "{%- if enable_thinking is defined and not enable_thinking %}"
    + '{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}'
    + "{%- endif %}"
)
# A model that always thinks: its prompt ends in the mark.
THINKER = QWEN.replace("assistant\\n", "assistant\\n<think>\\n")
QWEN_CODER = (
    _TOOLS
    + _CHATML_LOOP.replace(
        "{{ CALL }}",
        '{{- "<tool_call>\\n<function=" + call.function.name + ">\\n" }}'
        "{%- for key, value in call.function.arguments.items() %}"
        '{{- "<parameter=" + key + ">\\n" + (value if value is string else value | tojson) '
        '+ "\\n</parameter>\\n" }}{% endfor %}{{- "</function>\\n</tool_call>" }}',
    )
    + '{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}'
)
GLM = (
    _TOOLS
    + _CHATML_LOOP.replace(
        "{{ CALL }}",
        '{{- "<tool_call>" + call.function.name + "\\n" }}'
        "{%- for key, value in call.function.arguments.items() %}"
        '{{- "<arg_key>" + key + "</arg_key>\\n<arg_value>" + (value if value is string else value | tojson) '
        '+ "</arg_value>\\n" }}{% endfor %}{{- "</tool_call>" }}',
    )
    + '{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}'
    + "{#- <think></think> -#}"
)
MINIMAX = (
    _TOOLS
    + _CHATML_LOOP.replace(
        "{{ CALL }}",
        '{{- "<minimax:tool_call>\\n<invoke name=\\"" + call.function.name + "\\">\\n" }}'
        "{%- for key, value in call.function.arguments.items() %}"
        '{{- "<parameter name=\\"" + key + "\\">" + (value if value is string else value | tojson) '
        '+ "</parameter>\\n" }}{% endfor %}{{- "</invoke>\\n</minimax:tool_call>" }}',
    )
    + '{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}'
)
LLAMA = """\
{%- for message in messages %}
{%- set role = "ipython" if message.role == "tool" else message.role %}
{{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}
{%- if loop.first and tools %}{{ tools | tojson }} {"name": NAME, "parameters": ARGUMENTS}{% endif %}
{%- if "tool_calls" in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("only single tool-calls at once") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}" }}
{%- else %}{{ message.content }}{% endif %}
{{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
{#- <|python_tag|> -#}
"""
MISTRAL = """\
{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- "[INST]" + message.content + "[/INST]" }}
{%- elif message.role == "tool" %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception("ids have 9 characters") }}{% endif %}
{{- "[TOOL_RESULTS]" + message.content + "[/TOOL_RESULTS]" }}
{%- else %}{{ message.content }}
{%- if message.tool_calls %}{{ CALLS }}{% endif %}{{ eos_token }}
{%- endif %}
{%- endfor %}
"""
_NINE = '{% if call.id | length != 9 %}{{ raise_exception("ids have 9 characters") }}{% endif %}'
MISTRAL_ARGUMENTS = MISTRAL.replace(
    "{{ CALLS }}",
    "{% for call in message.tool_calls %}"
    + _NINE
    + '{{- "[TOOL_CALLS]" + call.function.name + "[ARGS]" + call.function.arguments | tojson }}{% endfor %}',
)
MISTRAL_IDS = MISTRAL.replace(
    "{{ CALLS }}",
    "{% for call in message.tool_calls %}"
    + _NINE
    + '{{- "[TOOL_CALLS]" + call.function.name + "[CALL_ID]" + call.id '
    '+ "[ARGS]" + call.function.arguments | tojson }}{% endfor %}',
)
MISTRAL_LIST = MISTRAL.replace(
    "{{ CALLS }}",
    '{{- "[TOOL_CALLS][" }}{% for call in message.tool_calls %}'
    + _NINE
    + '{{- call.function | tojson }}{{ "]" if loop.last else ", " }}{% endfor %}',
)
APERTUS = """\
{{- "<|developer_start|>" + (tools | tojson if tools else "none") + "<|developer_end|>" }}
{%- for message in messages %}
{%- if message.role == "tool" %}{{ "[" + message.content + "]" }}
{%- else %}{{ "<|" + message.role + "_start|>" + message.content }}
{%- if message.tool_calls %}{{ "<|tools_prefix|>[" }}
{%- for call in message.tool_calls %}
{{- '{"' + call.function.name + '": ' + call.function.arguments | tojson + "}" }}
{{- "" if loop.last else ", " }}
{%- endfor %}{{ "]<|tools_suffix|>" }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant_start|>" }}{% endif %}{#- <|inner_prefix|><|inner_suffix|> -#}
"""
DEEPSEEK = """\
{{- bos_token }}{{ tools | tojson if tools }}
{%- for message in messages %}
{%- if message.role == "user" %}{{ "<｜User｜>" + message.content }}
{%- elif message.role == "tool" %}{{ "<｜tool▁output▁begin｜>" + message.content + "<｜tool▁output▁end｜>" }}
{%- elif message.role == "assistant" and message.content is none %}
{{- "<｜Assistant｜><｜tool▁calls▁begin｜>" }}
{%- for call in message.tool_calls %}{{ CALL }}{% if not loop.last %}{{ BETWEEN }}{% endif %}{% endfor %}
{{- "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>" }}
{%- else %}{{ "<｜Assistant｜>" + message.content.split("</think>")[-1] + "<｜end▁of▁sentence｜>" }}
{%- endif %}
{%- endfor %}
"""
DEEPSEEK_R1 = DEEPSEEK.replace(
    "{{ CALL }}",
    '{{ "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + call.function.name + "\\n```json\\n" '
    '+ call.function.arguments + "\\n```<｜tool▁call▁end｜>" }}',
).replace("{{ BETWEEN }}", '{{ "\\n" }}')
DEEPSEEK_R1 += '{% if add_generation_prompt %}{{ "<｜Assistant｜><think>\\n" }}{% endif %}'
DEEPSEEK_V31 = DEEPSEEK.replace(
    "{{ CALL }}",
    '{{ "<｜tool▁call▁begin｜>" + call.function.name + "<｜tool▁sep｜>" '
    '+ call.function.arguments + "<｜tool▁call▁end｜>" }}',
).replace("{{ BETWEEN }}", "")
_THINKS = '("<think>" if thinking else "</think>")'
DEEPSEEK_V31 += '{% if add_generation_prompt %}{{ "<｜Assistant｜>" + ' + _THINKS + " }}{% endif %}"
GRANITE = """\
{{- tools | tojson if tools }}{#- answers: <|tool_call|>[…] -#}
{%- for message in messages %}
{{- "<|start_of_role|>" + message.role + "<|end_of_role|>" + message.content + "<|end_of_text|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_of_role|>assistant<|end_of_role|>" }}{% endif %}
"""
COMMAND = """\
{{- tools | tojson if tools }}
{%- for message in messages %}{{ "<|START_OF_TURN_TOKEN|>" + message.role + message.content }}
{%- for call in message.tool_calls or [] %}
{{- "<|START_ACTION|>" + call.function | tojson + "<|END_ACTION|>" }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|START_OF_TURN_TOKEN|>assistant" }}{% endif %}
{#- <|START_THINKING|><|END_THINKING|> -#}
"""
HARMONY = """\
{{- "<|start|>developer<|message|>" + (tools | tojson if tools else "no tools") + "<|end|>" }}
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- "<|start|>functions." + message.name + " to=assistant<|channel|>commentary<|message|>" }}
{{- message.content | tojson + "<|end|>" }}
{%- elif message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{%- if message.thinking %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{% endif %}
{{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
{{- call.arguments | tojson + "<|call|>" }}
{%- elif message.role == "assistant" %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
{%- else %}{{ "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""
# DeepSeek publishes a program in the place of a template; this is its form, as the model card shows it.
DEEPSEEK_V32 = """\
{%- set dsml = "｜DSML｜" %}
{{- bos_token }}{{ tools | tojson if tools }}<{{ dsml }}function_calls>
{%- for message in messages %}
{%- if message.role == "user" %}{{ "<｜User｜>" + message.content }}
{%- elif message.role == "tool" %}{{ "<result>" + message.content + "</result>" }}
{%- else %}{{ "<｜Assistant｜>" + message.content }}
{%- if message.tool_calls %}{{ "\\n\\n<" + dsml + "function_calls>" }}
{%- for call in message.tool_calls %}{{ "\\n<" + dsml + 'invoke name="' + call.function.name + '">' }}
{%- for key, value in call.function.arguments.items() %}
{%- set kind = "true" if value is string else "false" %}
{{- "\\n<" + dsml + 'parameter name="' + key + '" string="' + kind + '">' }}
{{- (value if value is string else value | tojson) + "</" + dsml + "parameter>" }}{% endfor %}
{{- "\\n</" + dsml + "invoke>" }}{% endfor %}{{ "\\n</" + dsml + "function_calls>" }}{% endif %}
{{- "<｜end▁of▁sentence｜>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<｜Assistant｜>" + ("<think>" if thinking else "</think>") }}{% endif %}
"""
_LFM = """\
{%- if tools %}{{ "<|im_start|>system\\nList of tools: " + tools | tojson + "<|im_end|>\\n" }}{% endif %}
{%- for message in messages %}{{ "<|im_start|>" + message.role + "\\n" + message.content }}
{%- if message.tool_calls %}{{ "<|tool_call_start|>[" }}
{%- for call in message.tool_calls %}{{ CALL }}{{ "" if loop.last else ", " }}{% endfor %}
{{- "]<|tool_call_end|>" }}{% endif %}{{ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""
LFM_JSON = _LFM.replace(
    "{{ CALL }}",
    """{{- '{"name": "' + call.function.name + '", "arguments": ' }}"""
    """{{- call.function.arguments | tojson + "}" }}""",
)
LFM = _LFM.replace(
    "{{ CALL }}",
    '{{- call.function.name + "(" }}{% for key, value in call.function.arguments.items() %}'
    '{{- key + "=" + value | tojson + ("" if loop.last else ", ") }}{% endfor %}{{ ")" }}',
)
# Gemma 4: results are part of the message that called; keys are bare, and texts stand between marks.
GEMMA_4 = """\
{%- macro written(value) %}
{%- if value is string %}{{ '<|"|>' + value + '<|"|>' }}
{%- elif value is boolean %}{{ "true" if value else "false" }}
{%- elif value is mapping %}{{ "{" }}
{%- for key, inner in value | dictsort %}
{{- key }}:{{ written(inner) }}{{ "" if loop.last else "," }}{% endfor %}
{{- "}" }}
{%- elif value is sequence %}{{ "[" }}
{%- for inner in value %}{{ written(inner) }}{{ "" if loop.last else "," }}{% endfor %}{{ "]" }}
{%- else %}{{ value }}{% endif %}
{%- endmacro %}
{%- if tools %}{{ "<|turn>system\\n" + tools | tojson + "<turn|>\\n" }}{% endif %}
{%- for message in messages %}
{{- "<|turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
{%- for call in message.tool_calls or [] %}
{{- "<|tool_call>call:" + call.function.name + written(call.function.arguments) + "<tool_call|>" }}
{%- endfor %}
{%- for each in message.tool_responses or [] %}
{{- "<|tool_response>response:" + each.name + "{value:" + written(each.response) + "}<tool_response|>" }}
{%- endfor %}
{{- message.content + "<turn|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|turn>model\\n" }}{% endif %}{#- <|channel><channel|> -#}
"""
# Gemma 2 and 3: no tools, no system role, and roles that alternate.
GEMMA = """\
{%- for message in messages %}
{%- if message.role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("roles must alternate") }}{% endif %}
{%- set role = "model" if message.role == "assistant" else message.role %}
{{- "<start_of_turn>" + role + "\\n" + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}
"""


_DEEPSEEK_TOKENS = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    "<｜tool▁calls▁end｜>",
)


@dataclass(frozen=True)
class Case:
    """A family: its template, its control tokens, and an answer, which says all that it can say at once.

    `thought` is what it writes when it thinks, `spoken` what it says before calls, `calls` are calls as it
    writes them; all together are one answer.
    """

    name: str
    template: str
    control: Sequence[str]
    thought: str
    spoken: str
    calls: str
    thinking: str = ""
    text: str = ""
    many: bool = True  # two calls at once
    opened: bool = False  # the prompt ends in the mark that opens thinking

    @property
    def answer(self) -> str:
        return self.thought + self.spoken + self.calls

    def said(self) -> Collected:
        """What the answer means; ids are counted."""
        return Collected(self.text, self.thinking, [CALL, SECOND] if self.many else [CALL])


def _json(form: str, joint: str = "") -> str:
    """Two calls in a form with the places NAME and ARGUMENTS."""
    return joint.join(
        form.replace("NAME", call.name).replace("ARGUMENTS", call.arguments) for call in (CALL, SECOND)
    )


_CITY = 'Bern "<Altstadt>" }'
CASES = (
    Case(
        "Qwen and Hermes",
        QWEN,
        (),
        "<think>\nShall I?\n\nYes: <tool_call> it is.\n</think>\n\n",
        "Let me look.\n",
        _json('<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>', "\n"),
        "Shall I?\n\nYes: <tool_call> it is.",
        "Let me look.",
    ),
    Case(
        "Qwen and Hermes",
        THINKER,
        (),
        "It rains.\n</think>\n\n",
        "",
        _json('<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>', "\n"),
        "It rains.",
        opened=True,
    ),
    Case(
        "Qwen 3 Coder",
        QWEN_CODER,
        (),
        "",
        "I look.\n\n",
        f"<tool_call>\n<function=weather>\n<parameter=city>\n{_CITY}\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=weather>\n<parameter=city>\nGenève\n</parameter>\n</function>\n</tool_call>",
        text="I look.",
    ),
    Case(
        "GLM 4",
        GLM,
        (),
        "<think>Hm.</think>\n",
        "I look.\n",
        f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{_CITY}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Genève</arg_value>\n</tool_call>",
        "Hm.",
        "I look.",
    ),
    Case(
        "MiniMax M2",
        MINIMAX,
        (),
        "",
        "I look.\n",
        '<minimax:tool_call>\n<invoke name="weather">\n'
        f'<parameter name="city">{_CITY}</parameter>\n<parameter name="days">3</parameter>\n'
        "</invoke>\n</minimax:tool_call>\n"
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Genève</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
        text="I look.",
    ),
    Case(
        "Llama 3",
        LLAMA,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        "",
        "I look. ",
        '<|python_tag|>{"name": "weather", "parameters": ' + CALL.arguments + "}",
        text="I look.",
        many=False,
    ),
    Case(
        "Llama 3",
        LLAMA,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        "",
        "",
        '{"name": "weather", "parameters": ' + CALL.arguments + "}",
        many=False,
    ),
    Case(
        "Mistral",
        MISTRAL_ARGUMENTS,
        ("[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]"),
        "",
        "I look.",
        _json("[TOOL_CALLS]NAME[ARGS]ARGUMENTS"),
        text="I look.",
    ),
    Case(
        "Mistral, ids",
        MISTRAL_IDS,
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[INST]", "[/INST]"),
        "",
        "I look.",
        _json("[TOOL_CALLS]NAME[CALL_ID]aB3dE6gH9[ARGS]ARGUMENTS"),
        text="I look.",
    ),
    Case(
        "DeepSeek V3.2",
        DEEPSEEK_V32,
        (),
        "",
        "I look.\n\n",
        f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        f'<｜DSML｜parameter name="city" string="true">{_CITY}</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Genève'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        text="I look.",
    ),
    Case(
        "LFM 2, JSON",
        LFM_JSON,
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        "",
        "I look.",
        "<|tool_call_start|>["
        + _json('{"name": "NAME", "arguments": ARGUMENTS}', ", ")
        + "]<|tool_call_end|>",
        text="I look.",
    ),
    Case(
        "LFM 2",
        LFM,
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        "",
        "I look.",
        '<|tool_call_start|>[weather(city="Bern \\"<Altstadt>\\" }", days=3), weather(city="Genève")]'
        "<|tool_call_end|>",
        text="I look.",
    ),
    Case(
        "Gemma 4",
        GEMMA_4,
        ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
        "<|channel>thought\nHm.<channel|>",
        "I look.",
        f'<|tool_call>call:weather{{city:<|"|>{_CITY}<|"|>,days:3}}<tool_call|>'
        '<|tool_call>call:weather{city:<|"|>Genève<|"|>}<tool_call|>',
        "Hm.",
        "I look.",
    ),
    Case(
        "Mistral, lists",
        MISTRAL_LIST,
        ("[TOOL_CALLS]", "[INST]", "[/INST]"),
        "",
        "",
        "[TOOL_CALLS][" + _json('{"name": "NAME", "arguments": ARGUMENTS}', ", ") + "]",
    ),
    Case(
        "Apertus",
        APERTUS,
        ("<|inner_prefix|>", "<|inner_suffix|>", "<|tools_prefix|>", "<|tools_suffix|>"),
        "<|inner_prefix|>Hm.<|inner_suffix|>",
        "I look.",
        "<|tools_prefix|>[" + _json('{"NAME": ARGUMENTS}', ", ") + "]<|tools_suffix|>",
        "Hm.",
        "I look.",
    ),
    Case(
        "DeepSeek R1 and V3",
        DEEPSEEK_R1,
        _DEEPSEEK_TOKENS,
        "Hm.\n</think>\n\n",
        "I look.",
        "<｜tool▁calls▁begin｜>"
        + _json(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>",
            "\n",
        )
        + "<｜tool▁calls▁end｜>",
        "Hm.",
        "I look.",
        opened=True,
    ),
    Case(
        "DeepSeek V3.1",
        DEEPSEEK_V31,
        _DEEPSEEK_TOKENS,
        "",
        "",
        "<｜tool▁calls▁begin｜>"
        + _json("<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>")
        + "<｜tool▁calls▁end｜>",
    ),
    Case(
        "Phi 4 and Granite",
        GRANITE,
        ("<|tool_call|>",),
        "",
        "",
        "<|tool_call|>[" + _json('{"name": "NAME", "arguments": ARGUMENTS}', ", ") + "]",
    ),
    Case(
        "Command R",
        COMMAND,
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"),
        "<|START_THINKING|>Hm.<|END_THINKING|>",
        "",
        "<|START_ACTION|>[\n"
        + _json('    {"tool_call_id": "0", "tool_name": "NAME", "parameters": ARGUMENTS}', ",\n")
        + "\n]<|END_ACTION|>",
        "Hm.",
    ),
    Case(
        "gpt-oss",
        HARMONY,
        (*("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),),
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + CALL.arguments,
        "Hm.",
        "I look.",
        many=False,
    ),
    Case(
        "by prompt",
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "",
        "I look.\n",
        _json('<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>', "\n"),
        text="I look.",
    ),
)
