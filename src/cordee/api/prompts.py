"""From what a client sends to token ids: messages through the model's chat template, texts, token ids."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import cast

from cordee.api.schemas import CHOICES_MAX, ChatMessage, ChatRequest, CompletionRequest, refuse
from cordee.chat.formats import ChatFormat
from cordee.chat.turn import ChatTurn, Message, Thinking
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, ContextExceeded
from cordee.serving.interface import ModelService

# A conversation about chat templates may name some; each costs a few calls of the tokenizer.
CONTROL_TEXTS_MAX = 4096
PRIVATE = "\U000f0000"  # a private-use character around placeholders; what makes them unique is random


def chat_turn(request: ChatRequest) -> ChatTurn:
    """The turn that a chat completion asks for.

    Raises:
        BadRequest: a message cannot be used; `param` says which.
    """
    messages = [_message(message, f"messages[{place}].") for place, message in enumerate(request.messages)]
    return ChatTurn(messages=messages, thinking=Thinking(effort=request.reasoning_effort))


def chat_prompt(
    service: ModelService, chat_format: ChatFormat, turn: ChatTurn, now: datetime, param: str
) -> tuple[int, ...]:
    """The prompt of a turn, up to where the answer begins.

    The names of control tokens in a message, such as <|im_end|>, must not become those tokens, or the author
    of a message could speak in another role. So placeholders replace them while the template is rendered and
    the text between them is tokenized; then each name is tokenized as plain text. A conversation without any
    is tokenized in one piece, as a template's author expects.

    Raises:
        BadRequest: the turn cannot be used; its `param` is the one that is given here.
        ContextExceeded: it is too long, whatever tokens it becomes.
        UnsupportedModel: the model has a broken chat template.
    """
    chat_template = service.template
    assert chat_template is not None, "`ApiCore.chat` has looked"
    hidden = _Hidden(service.vocabulary, param)
    _check_bytes(service, sum(map(_nbytes, turn.messages)), param)
    knows_developer = "developer" in chat_template.source
    messages = [_plain(message, hidden, knows_developer) for message in turn.messages]
    turn = replace(turn, messages=messages)
    try:
        text = chat_template.render(chat_format.messages(turn), now=now, **chat_format.variables(turn))
    except BadRequest as error:
        raise BadRequest(error.message, param) from error
    return tuple(hidden.tokens(text))


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


def text_prompt(service: ModelService, text: str) -> tuple[int, ...]:
    """The prompt that a text is; control tokens in it are read as tokens.

    Raises:
        BadRequest: it is empty, and the model needs a token to begin with.
        ContextExceeded: it is too long, whatever tokens it becomes.
    """
    _check_bytes(service, _utf8_bytes(text), "prompt")
    return _tokens(service.vocabulary, text)


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


def _nbytes(message: Message) -> int:
    return _utf8_bytes(message.content)


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


def _message(message: ChatMessage, path: str) -> Message:
    refuse(message, path)
    return Message(message.role, _content(message, path), message.name or None)


def _plain(message: Message, hidden: "_Hidden", knows_developer: bool) -> Message:
    """A message whose texts cannot become control tokens."""
    role = "system" if message.role == "developer" and not knows_developer else message.role
    name = None if message.name is None else hidden.hide(message.name)
    return replace(message, role=role, content=hidden.hide(message.content), name=name)


def _content(message: ChatMessage, path: str) -> str:
    if message.content is None:
        raise BadRequest(f"{path}content is missing", f"{path}content")
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for place, part in enumerate(message.content):
        at = f"{path}content[{place}]."
        if part.type != "text":
            raise BadRequest(
                f"{at}type: {part.type[:40]} is not supported: models here read and write text only",
                f"{at}type",
            )
        refuse(part, at)
        if part.text is None:
            raise BadRequest(f"{at}text is missing", f"{at}text")
        texts.append(part.text)
    return "\n".join(texts)


class _Hidden:
    """The control tokens' names that stand in a conversation, hidden behind placeholders."""

    def __init__(self, vocabulary: Vocabulary, param: str) -> None:
        self._vocabulary = vocabulary
        self._param = param
        self._mark = PRIVATE + secrets.token_hex(8)
        self._names: list[str] = []

    def hide(self, text: str) -> str:
        spans = self._vocabulary.control_spans(text)
        if len(self._names) + len(spans) > CONTROL_TEXTS_MAX:
            raise BadRequest(f"more than {CONTROL_TEXTS_MAX} names of control tokens are used", self._param)
        shown, at = "", 0
        for start, end in spans:
            shown += f"{text[at:start]}{self._mark}{len(self._names)}{PRIVATE}"
            self._names.append(text[start:end])
            at = end
        return shown + text[at:]

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered text, where placeholders become the names as plain text."""
        pieces = re.split(f"{self._mark}([0-9]+){PRIVATE}", text)
        tokens = self._vocabulary.tokenize(pieces[0], special=True, add_bos=True)
        for name, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += self._vocabulary.tokenize(self._names[int(name)], special=False, add_bos=False)
            tokens += self._vocabulary.tokenize(literal, special=True, add_bos=False)
        return tokens
