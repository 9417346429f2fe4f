"""Chat templates: the Jinja text in a model file turns messages into a prompt.

Model files are untrusted, so the template runs in Jinja's sandbox and against a budget: each loop turn,
call, filter and piece of output costs, and what would cost more than is left is refused before it is made.
"""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cordee.errors import BadRequest, UnsupportedModel

SOURCE_CHARS_MAX = 256 << 10  # the longest of llama.cpp's 70 collected templates has 17,000
OUTPUT_CHARS_MAX = 16 << 20  # as much text as a vocabulary tokenizes


class ChatTemplate:
    """A model's chat template; `bos` and `eos` are the texts of those tokens.

    Raises:
        UnsupportedModel: the template is no valid Jinja, or is absurdly long.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source) > SOURCE_CHARS_MAX:
            raise UnsupportedModel(f"the model's chat template has {len(source)} characters")
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as error:
            raise UnsupportedModel(f"the model's chat template is broken: {error}") from error

    def render(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = True,
        now: datetime,
        tools: list[dict] | None = None,
        **extra: Any,
    ) -> str:
        """Give the prompt for the messages. `extra` are variables of the model's own, `enable_thinking` say.

        Raises:
            BadRequest: the template refuses the messages; the text is its own.
            UnsupportedModel: the template is broken.
        """
        pieces = self._template.generate(
            extra
            | self._tokens
            | {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": now.strftime,
            }
        )
        try:
            return _joined(pieces)
        except jinja2.exceptions.SecurityError as error:
            raise UnsupportedModel(f"the model's chat template is not safe to run: {error}") from error
        except jinja2.TemplateError as error:
            raise BadRequest(
                f"the model's chat template refuses the messages: {error}", "messages"
            ) from error
        except (TypeError, ValueError, KeyError, RecursionError, OverflowError) as error:
            raise BadRequest(
                f"the model's chat template fails on the messages: {error}", "messages"
            ) from error


def _joined(pieces) -> str:
    text, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > OUTPUT_CHARS_MAX:
            raise BadRequest(f"the rendered prompt is longer than {OUTPUT_CHARS_MAX} characters", "messages")
        text.append(piece)
    return "".join(text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False) -> str:
    """As Hugging Face's template environment does: no HTML escapes, characters as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
