"""The answers that endpoints translate: a service's text as events (cordee.chat), piece by piece or whole.

Every endpoint is a translation around this: a request's body becomes a `Job` (core.py), and its reply is
made of `AnswerPiece`s.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from cordee.api.timings import Timings, Watch
from cordee.chat.events import CallBegun, Collected, Event, TextDelta, ThinkingDelta
from cordee.chat.formats import Parser, PlainParser
from cordee.engine.vocabulary import Vocabulary
from cordee.generation.request import NO_GUESSES, Choice, GuessCounts, PromptProgress, Request, TextChunk
from cordee.serving.interface import Generator

Ending = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class AnswerPiece:
    """A chunk of an answer as events. The last one, and no other, has a `finish_reason`; it has `timings`.

    A piece with `progress` has nothing else.
    """

    events: Sequence[Event] = ()
    choices: tuple[Choice, ...] = ()  # the tokens behind them, where log-probabilities were asked for
    prompt_choices: tuple[Choice, ...] = ()  # of a scored prompt, with the first tokens
    progress: PromptProgress | None = None
    timings: Timings | None = None
    finish_reason: Ending | None = None
    stop: str | None = None  # the stop string that ended it, if one did
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    completion_tokens: int = 0  # so far
    thinking_tokens: int = 0  # of those, until the last thought
    guesses: GuessCounts = NO_GUESSES

    @property
    def text(self) -> str:
        """What it says to the user."""
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))


@dataclass
class WholeAnswer:
    """An answer as far as it has come."""

    events: list[Event] = field(default_factory=list[Event])
    choices: list[Choice] = field(default_factory=list[Choice])
    prompt_choices: tuple[Choice, ...] = ()
    last: AnswerPiece = field(default_factory=AnswerPiece)

    @property
    def said(self) -> Collected:
        """The events, put together."""
        collected = Collected()
        collected.add(self.events)
        return collected

    def add(self, piece: AnswerPiece) -> None:
        """Add what came."""
        self.events += piece.events
        self.choices += piece.choices
        self.prompt_choices = self.prompt_choices or piece.prompt_choices
        self.last = piece


class ParsedAnswers:
    """A service whose text is read by `parser_of()`, one for each answer. `watch` counts what comes."""

    def __init__(self, service: Generator, parser_of: Callable[[], Parser] = PlainParser) -> None:
        self.watch: Callable[[], Watch] = Watch
        self._service = service
        self._parser_of = parser_of

    async def generate(self, request: Request) -> AsyncGenerator[AnswerPiece]:
        """As the service's `generate`; a chunk in which nothing is certain yet gives no piece."""
        parser = self._parser_of()
        has_called, thinking_tokens = False, 0
        with self.watch() as watch:
            async with aclosing(self._service.generate(request)) as chunks:
                async for chunk in chunks:
                    watch.saw(chunk)
                    if chunk.progress is not None:
                        yield AnswerPiece(progress=chunk.progress)
                        continue
                    events = [*parser.push(chunk.text), *(parser.finish() if chunk.finish_reason else ())]
                    has_called = has_called or any(isinstance(event, CallBegun) for event in events)
                    if any(isinstance(event, ThinkingDelta) for event in events):
                        thinking_tokens = chunk.completion_tokens
                    if events or chunk.choices or chunk.prompt_choices or chunk.finish_reason:
                        timings = watch.timings(chunk) if chunk.finish_reason else None
                        yield _piece(chunk, events, has_called, thinking_tokens, timings)


class ReadPrompts(ParsedAnswers):
    """Answers without any token: the prompt is read, scored where that was asked for, and that is all."""

    async def generate(self, request: Request) -> AsyncGenerator[AnswerPiece]:
        """As the service's `generate`, of a request for one token, which is not given."""
        async with aclosing(super().generate(request)) as pieces:
            async for piece in pieces:
                ending = piece.finish_reason and "length"
                shown = replace(piece, events=(), choices=(), finish_reason=ending, completion_tokens=0)
                if shown.progress is not None or shown.prompt_choices or ending:
                    yield shown


def _piece(
    chunk: TextChunk,
    events: Sequence[Event],
    has_called: bool,
    thinking_tokens: int,
    timings: Timings | None,
) -> AnswerPiece:
    ending: Ending | None = chunk.finish_reason
    return AnswerPiece(
        events=events,
        choices=chunk.choices,
        prompt_choices=chunk.prompt_choices,
        timings=timings,
        finish_reason="tool_calls" if ending == "stop" and has_called else ending,
        stop=chunk.stop,
        prompt_tokens=chunk.prompt_tokens,
        cached_tokens=chunk.cached_tokens,
        completion_tokens=chunk.completion_tokens,
        thinking_tokens=thinking_tokens,
        guesses=chunk.guesses,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an HTTP request asks a service for. `requests` holds `n` for each prompt, in order."""

    id: str  # random; endpoints put their own prefix before it
    created: int  # seconds since 1970
    model: str
    vocabulary: Vocabulary
    answers: ParsedAnswers
    requests: Sequence[Request]
    fingerprint: str  # of the program and the model
    n: int = 1
