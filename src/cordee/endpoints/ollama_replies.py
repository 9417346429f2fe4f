"""Ollama's replies: JSON objects, one on a line where they are streamed, and the last with what it took."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from cordee.api.answers import AnswerPiece, Job, ParsedAnswers, WholeAnswer
from cordee.api.failures import ollama_error
from cordee.api.logprobs import chat_logprobs
from cordee.chat.events import ArgumentsDelta, CallBegun, Collected, Event
from cordee.chat.turn import ToolCall
from cordee.generation.request import Request


class Timed(ParsedAnswers):
    """Answers, and when they came: nanoseconds of `time.monotonic_ns`."""

    def __init__(self, answers: ParsedAnswers) -> None:
        self._answers = answers
        self.asked = self.first = self.last = time.monotonic_ns()

    async def generate(self, request: Request) -> AsyncGenerator[AnswerPiece]:
        """As the answers' `generate`."""
        has_begun = False
        async with aclosing(self._answers.generate(request)) as pieces:
            async for piece in pieces:
                self.last = time.monotonic_ns()
                if not has_begun:
                    has_begun, self.first = True, self.last
                yield piece


class OllamaReply(ABC):
    """What chat and generate have in common. `job` is the one to be answered: its times are taken."""

    media_type = "application/x-ndjson"
    # White space before a value, which JSON allows: a line of its own would break Ollama's own client.
    keep_alive = b" "

    def __init__(self, job: Job, begun: int, *, logprobs: bool) -> None:
        """`begun` is when the request came, in nanoseconds of `time.monotonic_ns`."""
        self._timed = Timed(job.answers)
        self.job = replace(job, answers=self._timed)
        self._begun = begun
        self._logprobs = logprobs
        self._calls = Calls()

    def begin(self) -> Iterable[bytes]:
        """Nothing comes before the first token."""
        return ()

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """A line for what is said, and one for the end."""
        said = Collected()
        said.add(event for event in piece.events if not isinstance(event, CallBegun | ArgumentsDelta))
        said.calls = self._calls.complete(piece.events, is_end=piece.finish_reason is not None)
        if said.text or said.thinking or said.calls or (self._logprobs and piece.choices):
            yield _line(self._frame(said, piece) | {"done": False})
        if piece.finish_reason is not None:
            yield _line(self._frame(Collected(), None) | self._end(piece))

    def end(self) -> Iterable[bytes]:
        """The last token's line said it all."""
        return ()

    def failure(self, error: Exception) -> Iterable[bytes]:
        """A line with the error; nothing follows it."""
        return (_line(ollama_error(error)),)

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        """The reply that is not streamed."""
        said = replace(answer.said, calls=[call for call in answer.said.calls if arguments(call) is not None])
        everything = replace(answer.last, choices=tuple(answer.choices))
        return self._frame(said, everything) | self._end(answer.last)

    def _frame(self, said: Collected, piece: AnswerPiece | None) -> dict[str, Any]:
        """The object around what is said."""
        frame: dict[str, Any] = {"model": self.job.model, "created_at": stamp(datetime.now(UTC))}
        frame |= self._said(said)
        if self._logprobs and piece is not None and piece.choices:
            frame["logprobs"] = chat_logprobs(self.job.vocabulary, piece.choices)["content"]
        return frame

    def _end(self, piece: AnswerPiece) -> dict[str, Any]:
        """Why the answer ended, and what it took. Waiting for a place in the queue counts as evaluation of
        the prompt."""
        timed = self._timed
        return {
            "done": True,
            "done_reason": "length" if piece.finish_reason == "length" else "stop",
            "total_duration": timed.last - self._begun,
            "load_duration": 0,
            "prompt_eval_count": piece.prompt_tokens,
            "prompt_eval_duration": timed.first - timed.asked,
            "eval_count": piece.completion_tokens,
            "eval_duration": timed.last - timed.first,
        }

    @abstractmethod
    def _said(self, said: Collected) -> dict[str, Any]:
        """What is said, as the endpoint has it."""


class OllamaChatReply(OllamaReply):
    """`/api/chat`"""

    def _said(self, said: Collected) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if said.thinking:
            message["thinking"] = said.thinking
        if said.calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": arguments(call)}}
                for call in said.calls
            ]
        return {"message": message}


class OllamaGenerateReply(OllamaReply):
    """`/api/generate`"""

    def _said(self, said: Collected) -> dict[str, Any]:
        return {"response": said.text} | ({"thinking": said.thinking} if said.thinking else {})


class Calls:
    """Calls as they come; each is given when it is whole, as Ollama's clients want it."""

    def __init__(self) -> None:
        self._open = Collected()

    def complete(self, events: Iterable[Event], *, is_end: bool) -> list[ToolCall]:
        """The calls that these events completed. One that the answer's limit cut off is left out."""
        done: list[ToolCall] = []
        for event in events:
            if not isinstance(event, ArgumentsDelta):
                done += self._open.calls
                self._open = Collected()
            self._open.add([event] if isinstance(event, CallBegun | ArgumentsDelta) else [])
        if is_end:
            done += self._open.calls
            self._open = Collected()
        return [call for call in done if arguments(call) is not None]


def arguments(call: ToolCall) -> dict[str, Any] | None:
    """A call's arguments; None if they are no whole object. A call without any has none to give."""
    try:
        return msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


def stamp(moment: datetime) -> str:
    """A time as Ollama writes it (RFC 3339, in UTC)."""
    return moment.isoformat().replace("+00:00", "Z")


def _line(value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"
