"""From what a client sends to token ids: messages through the model's chat template, texts, token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from cordee.api.hidden import Hidden
from cordee.api.schemas import CHOICES_MAX, CompletionRequest
from cordee.chat.formats import ChatFormat
from cordee.chat.turn import ChatTurn
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, ContextExceeded
from cordee.serving.interface import ModelService


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: its text, in which placeholders hide the names of control tokens, and its tokens."""

    text: str
    tokens: tuple[int, ...]


def chat_prompt(
    service: ModelService, chat_format: ChatFormat, turn: ChatTurn, now: datetime, param: str
) -> tuple[int, ...]:
    """The tokens of a turn's prompt; see `rendered`."""
    return rendered(service, chat_format, turn, now, param).tokens


def rendered(
    service: ModelService, chat_format: ChatFormat, turn: ChatTurn, now: datetime, param: str
) -> Prompt:
    """The prompt of a turn, up to where the answer begins.

    The names of control tokens in a message, such as <|im_end|>, must not become those tokens, or the author
    of a message could speak in another role. So placeholders replace them while the template is rendered and
    the text between them is tokenized; then each name is tokenized as plain text. The same holds for what
    stands in tools, in calls, and in variables. A conversation without any is tokenized in one piece, as a
    template's author expects.

    Raises:
        BadRequest: the turn cannot be used; its `param` is the one that is given here.
        ContextExceeded: it is too long, whatever tokens it becomes.
        UnsupportedModel: the model has a broken chat template.
    """
    chat_template = service.template
    assert chat_template is not None, "`ApiCore.chat` has looked"
    hidden = Hidden(service.vocabulary, param, chat_format.role_marks)
    _check_bytes(service, _turn_bytes(turn), param)
    turn = hidden.turn(turn, knows_developer="developer" in chat_template.source)
    variables = chat_format.variables(turn)
    try:
        text = chat_template.render(
            chat_format.messages(turn), now=now, add_generation_prompt=not turn.continues, **variables
        )
    except BadRequest as error:
        raise BadRequest(error.message, param) from error
    if turn.continues:
        text = hidden.before_end(text)
    return Prompt(text, tuple(hidden.tokens(text)))


def completion_prompts(service: ModelService, request: CompletionRequest) -> list[tuple[int, ...]]:
    """The prompts of a completion request, one or several.

    Raises:
        BadRequest: it has none of the accepted forms, or is empty.
        ContextExceeded: one is too long, whatever tokens it becomes.
    """
    prompt = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not 0 < len(prompt) <= CHOICES_MAX:
        raise BadRequest(f"prompt must hold 1 to {CHOICES_MAX} prompts, not {len(prompt)}", "prompt")
    if len({isinstance(each, str) for each in prompt}) > 1:
        raise BadRequest("prompt must be a text, a list of token ids, or a list of either", "prompt")
    for each in prompt:
        if isinstance(each, str):
            _check_bytes(service, _utf8_bytes(each), "prompt")
    return [_tokens(service.vocabulary, each) for each in prompt]


def check_length(service: ModelService, prompt: Sequence[int], param: str) -> None:
    """Refuse a prompt that leaves no room for an answer; the error names its field in the request.

    Raises:
        ContextExceeded: it does.
    """
    if len(prompt) >= service.context:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens; the context of {service.name} holds "
            f"{service.context}, the answer included: shorten it, or serve the model with a larger --context",
            param,
        )


def _check_bytes(service: ModelService, nbytes: int, param: str) -> None:
    """Refuse a text before it is tokenized: 16 MB take seconds, and a context holds a small part of them."""
    least = service.vocabulary.least_tokens(nbytes)
    if least >= service.context:
        raise ContextExceeded(
            f"the prompt has {nbytes} bytes, which are {least} tokens or more; the context of {service.name} "
            f"holds {service.context}, the answer included: shorten it, or serve the model with a larger "
            "--context",
            param,
        )


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _turn_bytes(turn: ChatTurn) -> int:
    """What a turn's texts have at least; a template adds to them."""
    texts = [each.content for each in turn.messages] + [each.thinking for each in turn.messages]
    texts += [call.arguments for each in turn.messages for call in each.tool_calls]
    texts += [tool.description for tool in turn.tools]
    return sum(map(_utf8_bytes, texts))


def _tokens(vocabulary: Vocabulary, prompt: str | Sequence[int | str | list[int]] | int) -> tuple[int, ...]:
    if isinstance(prompt, str):
        tokens = vocabulary.tokenize(prompt, special=True, add_bos=True)
    elif isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        tokens = cast("list[int]", prompt)
    else:
        raise BadRequest("prompt must be a text, a list of token ids, or a list of either", "prompt")
    for token in tokens:
        if not 0 <= token < vocabulary.size:
            raise BadRequest(f"prompt holds token {token}; the model has {vocabulary.size} tokens", "prompt")
    if not tokens:
        raise BadRequest("the prompt is empty: this model needs a token to begin with", "prompt")
    return tuple(tokens)
