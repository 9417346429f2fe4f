"""From what a client sends to token ids: messages through the model's chat template, texts, token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from cordee.api.hidden import CONTROL_TEXTS_MAX, Hidden
from cordee.api.schemas import CHOICES_MAX, CompletionRequest
from cordee.chat.formats import ChatFormat
from cordee.chat.turn import ChatTurn
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, ContextExceeded
from cordee.serving.interface import ModelService

GivenPrompt = str | list[int | str]  # a text, token ids, or both by turns


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered prompt: its text, in which placeholders hide the names of control tokens, and its tokens."""

    text: str
    tokens: tuple[int, ...]


def rendered(
    service: ModelService, chat_format: ChatFormat, turn: ChatTurn, now: datetime, param: str
) -> RenderedPrompt:
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
    hidden, text = _rendered(service, chat_format, turn, now, param)
    return RenderedPrompt(text, tuple(hidden.tokens(text)))


def chat_text(
    service: ModelService,
    chat_format: ChatFormat,
    turn: ChatTurn,
    now: datetime,
    param: str,
    *,
    for_answer: bool = True,
) -> str:
    """The prompt of a turn as text; not `for_answer`: without the answer's beginning. Raises as
    `rendered`."""
    hidden, text = _rendered(service, chat_format, turn, now, param, for_answer=for_answer)
    return hidden.shown(text)


def _rendered(
    service: ModelService,
    chat_format: ChatFormat,
    turn: ChatTurn,
    now: datetime,
    param: str,
    *,
    for_answer: bool = True,
) -> tuple[Hidden, str]:
    chat_template = service.template
    assert chat_template is not None, "`ApiCore` has looked"
    hidden = Hidden(service.vocabulary, param, chat_format.role_marks)
    check_bytes(service, _turn_bytes(turn), param)
    turn = hidden.turn(turn, knows_developer="developer" in chat_template.source)
    variables, begins = chat_format.variables(turn), for_answer and not turn.continues
    try:
        text = chat_template.render(
            chat_format.messages(turn), now=now, add_generation_prompt=begins, **variables
        )
    except BadRequest as error:
        raise BadRequest(error.message, param) from error
    return hidden, hidden.before_end(text) if turn.continues else text


def split_prompts(request: CompletionRequest) -> list[GivenPrompt]:
    """The prompts of a completion request, one or several.

    Raises:
        BadRequest: it has none of the accepted forms, or too many prompts.
    """
    prompt = request.prompt
    if isinstance(prompt, str) or any(isinstance(each, int) for each in prompt):
        prompt = [cast("GivenPrompt", prompt)]
    if not 0 < len(prompt) <= CHOICES_MAX:
        raise BadRequest(f"prompt must hold 1 to {CHOICES_MAX} prompts, not {len(prompt)}", "prompt")
    return cast("list[GivenPrompt]", prompt)


def completion_prompts(service: ModelService, prompts: Sequence[GivenPrompt]) -> list[tuple[int, ...]]:
    """The token ids of prompts.

    Raises:
        BadRequest: one has none of the accepted forms, or is empty.
        ContextExceeded: one is too long, whatever tokens it becomes.
    """
    for each in prompts:
        _check_prompt(service, each)
    return [_tokens(service, each) for each in prompts]


def text_prompt(service: ModelService, text: str) -> tuple[int, ...]:
    """The prompt that a text is; control tokens in it are read as tokens.

    Raises:
        BadRequest: it is empty, and the model needs a token to begin with.
        ContextExceeded: it is too long, whatever tokens it becomes.
    """
    _check_prompt(service, text)
    return _tokens(service, text)


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


def check_bytes(service: ModelService, nbytes: int, param: str) -> None:
    """Refuse a text before it is tokenized: 16 MB take seconds, and a context holds a small part of them.

    Raises:
        ContextExceeded: it does not fit the context, whatever tokens it becomes.
    """
    least = service.vocabulary.least_tokens(nbytes)
    if least >= service.context:
        raise ContextExceeded(
            f"the prompt has {nbytes} bytes, which are {least} tokens or more; the context of {service.name} "
            f"holds {service.context}, the answer included: shorten it, or serve the model with a larger "
            "--context",
            param,
        )


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _turn_bytes(turn: ChatTurn) -> int:
    """What a turn's texts have at least; a template adds to them."""
    texts = [each.content for each in turn.messages] + [each.thinking for each in turn.messages]
    texts += [call.arguments for each in turn.messages for call in each.tool_calls]
    texts += [tool.description for tool in turn.tools]
    return sum(map(utf8_bytes, texts))


def _check_prompt(service: ModelService, prompt: GivenPrompt) -> None:
    """Refuse a prompt by what it is made of, before any is tokenized."""
    pieces = [prompt] if isinstance(prompt, str) else prompt
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if any(isinstance(piece, list) for piece in pieces):
        raise BadRequest("a prompt must be a text, or a list of token ids and texts", "prompt")
    if len(texts) > CONTROL_TEXTS_MAX:
        raise BadRequest(f"a prompt may be made of {CONTROL_TEXTS_MAX} texts at most", "prompt")
    check_bytes(service, sum(map(utf8_bytes, texts)), "prompt")


def _tokens(service: ModelService, prompt: GivenPrompt) -> tuple[int, ...]:
    pieces = [prompt] if isinstance(prompt, str) else prompt
    vocabulary = service.vocabulary
    tokens: list[int] = []
    for place, piece in enumerate(pieces):
        if isinstance(piece, str):
            tokens += vocabulary.tokenize(piece, special=True, add_bos=place == 0)
        else:
            tokens.append(piece)
    check_ids(vocabulary, tokens, "prompt")
    if not tokens:
        raise BadRequest("the prompt is empty: this model needs a token to begin with", "prompt")
    return tuple(tokens)


def check_ids(vocabulary: Vocabulary, tokens: Sequence[int], param: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        BadRequest: names the first of them.
    """
    for token in tokens:
        if not 0 <= token < vocabulary.size:
            raise BadRequest(f"{param} holds token {token}; the model has {vocabulary.size} tokens", param)
