"""Chat templates: the Jinja text in a model's file turns messages into a prompt.

Model files are untrusted; `generation.sandbox` keeps a template from doing harm. When a render fails, the
messages are blamed, unless the template fails on the plainest message too.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from cordee.errors import BadRequest, UnsupportedModel
from cordee.generation.sandbox import Sandbox, measure, start_budget

SOURCE_CHARS_MAX = 64 << 10  # the longest of the 71 templates in llama.cpp's collection has 17,000
OUTPUT_CHARS_MAX = 8 << 20  # as much text as a vocabulary tokenizes
MESSAGE_CHARS_MAX = 500  # of an error text that comes from the template
DATE_FORMAT_CHARS_MAX = 100  # strftime takes up to 256 bytes for each

PLAINEST = [{"role": "user", "content": "Hello"}]

COMPILE_ERRORS = (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, ArithmeticError, MemoryError)
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Refused(jinja2.TemplateError):
    """The template called raise_exception: it refuses these messages, and says why."""


def missing(model: str) -> UnsupportedModel:
    """The error for a chat with a model that has no template, so no known way to tell who speaks."""
    return UnsupportedModel(
        f"{model} has no chat template: it is a base model, which continues text. "
        "Use /v1/completions, or take an instruct or chat variant of the model"
    )


class ChatTemplate:
    """A model's chat template; `bos` and `eos` are the texts of those tokens.

    Raises:
        UnsupportedModel: the template is not valid Jinja, or absurdly long.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source) > SOURCE_CHARS_MAX:
            raise UnsupportedModel(
                f"the model's chat template has {len(source)} characters; the limit is {SOURCE_CHARS_MAX}"
            )
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = Sandbox().compiled(source)
        except COMPILE_ERRORS as error:
            raise UnsupportedModel(f"the model's chat template is broken: {_text(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        now: datetime,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for the messages. `extra` are variables of the template, such as `enable_thinking`.

        Raises:
            BadRequest: the template refuses these messages (in the template's own words), or the prompt is
                too long.
            UnsupportedModel: the template fails on the plainest message too.
        """
        variables = {"add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            return self._render(extra | variables | {"messages": messages}, now)
        except Refused as error:
            raise BadRequest(f"the model's chat template says: {_text(error)}", "messages") from error
        except RENDER_ERRORS as error:
            self._fail_if_broken(now)
            raise BadRequest(
                f"the model's chat template cannot take these messages: {_text(error)}", "messages"
            ) from error

    def _fail_if_broken(self, now: datetime) -> None:
        try:
            self._render({"messages": PLAINEST, "tools": None, "add_generation_prompt": True}, now)
        except Refused:
            return
        except RENDER_ERRORS as error:
            raise UnsupportedModel(f"the model's chat template is broken: {_text(error)}") from error

    def _render(self, variables: dict[str, Any], now: datetime) -> str:
        start_budget()
        functions = {"raise_exception": _raise_exception, "strftime_now": _Clock(now)}
        return _joined(self._template.generate(variables | self._tokens | functions))


class _Clock:
    """`strftime_now` of a fixed time."""

    def __init__(self, now: datetime) -> None:
        self._now = now

    def __call__(self, form: str) -> str:
        if len(form) > DATE_FORMAT_CHARS_MAX:
            raise ValueError(f"strftime_now is given a format of {len(form)} characters")
        return self._now.strftime(form)


def _raise_exception(message: Any) -> None:
    raise Refused(str(measure(message)))


def _joined(pieces: Iterable[str]) -> str:
    text: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > OUTPUT_CHARS_MAX:
            raise ValueError(f"the prompt is longer than {OUTPUT_CHARS_MAX} characters")
        text.append(piece)
    return "".join(text)


def _text(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:MESSAGE_CHARS_MAX]
