"""From what a client sends to token ids: messages through the model's chat template, texts, token ids."""

import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from cordee.api.schemas import CHOICES_MAX, ChatRequest, CompletionRequest, Message, refuse
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, ContextExceeded
from cordee.generation import template
from cordee.serving.interface import ModelService

# A conversation about chat templates may name some; each costs a few calls of the tokenizer.
CONTROL_TEXTS_MAX = 4096
PRIVATE = "\U000f0000"  # a private-use character around placeholders; what makes them unique is random


def chat_prompt(service: ModelService, request: ChatRequest, now: datetime) -> tuple[int, ...]:
    """The prompt of a conversation, up to where the answer begins.

    The names of control tokens in a message, such as <|im_end|>, must not become those tokens, or the author
    of a message could speak in another role. So placeholders replace them while the template is rendered and
    the text between them is tokenized; then each name is tokenized as plain text. A conversation without any
    is tokenized in one piece, as a template's author expects.

    Raises:
        BadRequest: the messages cannot be used; `param` says which.
        ContextExceeded: they are too long, whatever tokens they become.
        UnsupportedModel: the model has no chat template, or a broken one.
    """
    if service.template is None:
        raise template.missing(service.name)
    hidden = _Hidden(service.vocabulary)
    knows_developer = "developer" in service.template.source
    _check_bytes(service, sum(map(_nbytes, request.messages)), "messages")
    messages = [_plain(message, place, hidden) for place, message in enumerate(request.messages)]
    for message in messages:
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
    extra: dict[str, Any] = (
        {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    )
    return tuple(hidden.tokens(service.template.render(messages, now=now, **extra)))


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
    content = message.content
    if content is None or isinstance(content, str):
        return _utf8_bytes(content or "")
    return sum(_utf8_bytes(part.text or "") for part in content)


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


def _plain(message: Message, place: int, hidden: "_Hidden") -> dict[str, str]:
    """A message as templates take it."""
    path = f"messages[{place}]."
    refuse(message, path)
    plain = {"role": message.role, "content": hidden.hide(_content(message, path))}
    return plain if message.name is None else plain | {"name": message.name}


def _content(message: Message, path: str) -> str:
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

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._mark = PRIVATE + secrets.token_hex(8)
        self._names: list[str] = []

    def hide(self, text: str) -> str:
        spans = self._vocabulary.control_spans(text)
        if len(self._names) + len(spans) > CONTROL_TEXTS_MAX:
            raise BadRequest(f"more than {CONTROL_TEXTS_MAX} names of control tokens are used", "messages")
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
