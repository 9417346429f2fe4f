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
Prompt = str | list[int | str]  # a text, token ids, or both by turns
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
    hidden, text = _rendered(service, chat_format, turn, now, param)
    return tuple(hidden.tokens(text))


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
    `chat_prompt`."""
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
) -> "tuple[_Hidden, str]":
    chat_template = service.template
    assert chat_template is not None, "`ApiCore` has looked"
    hidden = _Hidden(service.vocabulary, param)
    check_bytes(service, sum(map(_nbytes, turn.messages)), param)
    knows_developer = "developer" in chat_template.source
    messages = [_plain(message, hidden, knows_developer) for message in turn.messages]
    turn = replace(turn, messages=messages)
    try:
        text = chat_template.render(
            chat_format.messages(turn),
            add_generation_prompt=for_answer,
            now=now,
            **chat_format.variables(turn),
        )
    except BadRequest as error:
        raise BadRequest(error.message, param) from error
    return hidden, text


def split_prompts(request: CompletionRequest) -> list[Prompt]:
    """The prompts of a completion request, one or several.

    Raises:
        BadRequest: it has none of the accepted forms, or too many prompts.
    """
    prompt = request.prompt
    if isinstance(prompt, str) or any(isinstance(each, int) for each in prompt):
        prompt = [cast("Prompt", prompt)]
    if not 0 < len(prompt) <= CHOICES_MAX:
        raise BadRequest(f"prompt must hold 1 to {CHOICES_MAX} prompts, not {len(prompt)}", "prompt")
    return cast("list[Prompt]", prompt)


def completion_prompts(service: ModelService, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The token ids of prompts.

    Raises:
        BadRequest: one has none of the accepted forms, or is empty.
        ContextExceeded: one is too long, whatever tokens it becomes.
    """
    return [_tokens(service, each) for each in prompts]


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


def _nbytes(message: Message) -> int:
    return utf8_bytes(message.content)


def _tokens(service: ModelService, prompt: Prompt) -> tuple[int, ...]:
    pieces = [prompt] if isinstance(prompt, str) else prompt
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if any(isinstance(piece, list) for piece in pieces):
        raise BadRequest("a prompt must be a text, or a list of token ids and texts", "prompt")
    if len(texts) > CONTROL_TEXTS_MAX:
        raise BadRequest(f"a prompt may be made of {CONTROL_TEXTS_MAX} texts at most", "prompt")
    check_bytes(service, sum(map(utf8_bytes, texts)), "prompt")
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


def _message(message: ChatMessage, path: str) -> Message:
    refuse(message, path)
    return Message(message.role, _content(message, path), message.name)


def _plain(message: Message, hidden: "_Hidden", knows_developer: bool) -> Message:
    """A message whose texts cannot become control tokens."""
    role = "system" if message.role == "developer" and not knows_developer else message.role
    return replace(message, role=role, content=hidden.hide(message.content))


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

    def shown(self, text: str) -> str:
        """A rendered text with the names where they stood."""
        return re.sub(f"{self._mark}([0-9]+){PRIVATE}", lambda match: self._names[int(match[1])], text)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered text, where placeholders become the names as plain text."""
        pieces = re.split(f"{self._mark}([0-9]+){PRIVATE}", text)
        tokens = self._vocabulary.tokenize(pieces[0], special=True, add_bos=True)
        for name, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += self._vocabulary.tokenize(self._names[int(name)], special=False, add_bos=False)
            tokens += self._vocabulary.tokenize(literal, special=True, add_bos=False)
        return tokens
