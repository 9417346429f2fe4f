"""OpenAI's replies: chat completions and completions, whole or as events, from the same chunks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from cordee.api.answers import AnswerPiece, Job, WholeAnswer
from cordee.api.failures import error_body
from cordee.api.logprobs import Echo, LegacyLogprobs, chat_logprobs
from cordee.chat.events import ArgumentsDelta, CallBegun, Event, TextDelta, ThinkingDelta
from cordee.chat.turn import ToolCall
from cordee.generation.request import Choice

DONE = b"data: [DONE]\n\n"


class Reply(ABC):
    """What both endpoints have in common: the frame around choices, and the usage."""

    prefix: str  # of the reply's id
    object: str
    event_object: str
    media_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"

    def __init__(self, job: Job, *, logprobs: bool, usage_event: bool, usage_always: bool = False) -> None:
        self.job = job
        self._logprobs_wanted = logprobs
        self._usage_event = usage_event
        self._usage_always = usage_event and usage_always
        self._last: dict[int, AnswerPiece] = {}

    def begin(self) -> Iterable[bytes]:
        """Nothing comes before the first token."""
        return ()

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """A chunk's event, and one more for the reason why the answer ended."""
        self._last[index] = piece
        for choice in self._pieces(index, piece):
            yield self._event([choice])
        if piece.finish_reason is not None:
            yield self._event([self._finish(index, piece.finish_reason)], extra=self._timings(piece))

    def end(self) -> Iterable[bytes]:
        """The usage, where it was asked for, and the end mark."""
        if self._usage_event:
            yield self._event([], self._usage(self._last))
        yield DONE

    def failure(self, error: Exception) -> Iterable[bytes]:
        """An event with the error; nothing follows it."""
        return (_data(error_body(error)),)

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        """The reply that is not streamed."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        used = self._usage({index: answer.last for index, answer in enumerate(answers)})
        extra = self._timings(answers[0].last)
        return self._frame(self.object) | {"choices": choices, "usage": used} | extra

    def _frame(self, kind: str) -> dict[str, Any]:
        job = self.job
        return {
            "id": self.prefix + job.id,
            "object": kind,
            "created": job.created,
            "model": job.model,
            "system_fingerprint": job.fingerprint,
        }

    def _timings(self, piece: AnswerPiece) -> dict[str, Any]:
        """How long the answer took that ends with this piece, if it is the only one."""
        return {"timings": piece.timings} if piece.timings and len(self.job.requests) == 1 else {}

    def _event(
        self,
        choices: list[dict[str, Any]],
        used: dict[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        """An event; where usage is asked for it stands in each, and is null but in the last, unless it is
        always wanted."""
        used = self._usage(self._last) if used is None and self._usage_always else used
        frame = self._frame(self.event_object) | {"choices": choices, **(extra or {})}
        return _data(frame | {"usage": used} if self._usage_event else frame)

    def _usage(self, last: dict[int, AnswerPiece]) -> dict[str, Any]:
        """Tokens by the last chunk of each answer. A prompt counts once, however many answers it got."""
        prompts = {index // self.job.n: piece for index, piece in last.items()}.values()
        prompt = sum(piece.prompt_tokens for piece in prompts)
        completion = sum(piece.completion_tokens for piece in last.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(piece.cached_tokens for piece in prompts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(piece.guesses.accepted for piece in last.values()),
                "rejected_prediction_tokens": sum(piece.guesses.rejected for piece in last.values()),
            },
        }

    @abstractmethod
    def _pieces(self, index: int, piece: AnswerPiece) -> Iterable[dict[str, Any]]:
        """The choices in the events of a chunk, none if it shows nothing."""

    @abstractmethod
    def _finish(self, index: int, reason: str) -> dict[str, Any]:
        """The choice in the event of an answer's end."""

    @abstractmethod
    def _choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        """The choice of a reply that is not streamed."""


class ChatReply(Reply):
    """`/v1/chat/completions`: the role comes first, the reason last, each in an event of its own."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    event_object = "chat.completion.chunk"

    def __init__(self, job: Job, *, logprobs: bool, usage_event: bool, usage_always: bool = False) -> None:
        super().__init__(job, logprobs=logprobs, usage_event=usage_event, usage_always=usage_always)
        self._calls: dict[int, int] = {}  # by answer, the number of the call that began last

    def begin(self) -> Iterable[bytes]:
        """The role, for every answer."""
        for index in range(len(self.job.requests)):
            yield self._event([_chat_delta(index, {"role": "assistant", "content": ""})])

    def _pieces(self, index: int, piece: AnswerPiece) -> Iterable[dict[str, Any]]:
        """One event for each change between text, thinking and calls; the tokens are with the first."""
        deltas = [self._delta(index, event) for event in piece.events]
        if not deltas and piece.choices:
            deltas = [{"content": ""}]
        choices = piece.choices
        for delta in deltas:
            yield _chat_delta(index, delta, self._logprobs(choices) if choices else None)
            choices = ()

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        match event:
            case TextDelta(text):
                return {"content": text}
            case ThinkingDelta(text):
                return {"reasoning_content": text}
            case CallBegun(call_id, name):
                number = self._calls[index] = self._calls.get(index, -1) + 1
                return {"tool_calls": [{"index": number, **_call(ToolCall(call_id, name, ""))}]}
            case ArgumentsDelta(text):
                return {"tool_calls": [{"index": self._calls[index], "function": {"arguments": text}}]}

    def _finish(self, index: int, reason: str) -> dict[str, Any]:
        return _chat_delta(index, {}, reason=reason)

    def _choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        said = answer.said
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.thinking:
            message["reasoning_content"] = said.thinking
        if said.calls:
            message["content"] = said.text or None
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.choices),
            "finish_reason": answer.last.finish_reason,
        }

    def _usage(self, last: dict[int, AnswerPiece]) -> dict[str, Any]:
        used = super()._usage(last)
        used["completion_tokens_details"]["reasoning_tokens"] = sum(
            piece.thinking_tokens for piece in last.values()
        )
        return used

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        return chat_logprobs(self.job.vocabulary, choices) if self._logprobs_wanted else None


class CompletionReply(Reply):
    """`/v1/completions`: text alone. `echoes` are the prompts, where the text begins with them."""

    prefix = "cmpl-"
    object = event_object = "text_completion"

    def __init__(
        self,
        job: Job,
        *,
        logprobs: bool,
        usage_event: bool,
        usage_always: bool = False,
        echoes: Sequence[Echo] | None = None,
    ) -> None:
        super().__init__(job, logprobs=logprobs, usage_event=usage_event, usage_always=usage_always)
        self._logprobs = [LegacyLogprobs(job.vocabulary) for _ in job.requests] if logprobs else None
        self._echoes = echoes

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """As the other replies, after the prompt where it is repeated."""
        if self._echoes and index not in self._last:
            yield self._event([self._echoed(index, piece.prompt_choices)])
        yield from super().push(index, piece)

    def _pieces(self, index: int, piece: AnswerPiece) -> Iterable[dict[str, Any]]:
        if piece.text or piece.choices:
            yield self._text(index, piece.text, piece.choices)

    def _finish(self, index: int, reason: str) -> dict[str, Any]:
        return self._text(index, "", (), reason)

    def _choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        echoed = self._echoed(index, answer.prompt_choices) if self._echoes else None
        choice = self._text(index, answer.said.text, answer.choices, answer.last.finish_reason)
        if echoed is None:
            return choice
        lists: dict[str, list[Any]] | None = choice["logprobs"]
        logprobs: dict[str, list[Any]] | None = echoed["logprobs"]
        if logprobs is not None and lists is not None:
            logprobs = {name: values + lists[name] for name, values in logprobs.items()}
        return choice | {"text": echoed["text"] + choice["text"], "logprobs": logprobs}

    def _echoed(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """The choice that repeats the prompt."""
        assert self._echoes is not None, "the prompt is to be repeated"
        echo = self._echoes[index // self.job.n]
        logprobs = self._logprobs[index].echoed(echo, choices) if self._logprobs else None
        return {"index": index, "text": echo.text, "logprobs": logprobs, "finish_reason": None}

    def _text(
        self, index: int, text: str, choices: Sequence[Choice], reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs[index].append(choices) if self._logprobs and (choices or text) else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _chat_delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _data(value: Any) -> bytes:
    """A server-sent event. JSON on one line needs no more framing than this."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
