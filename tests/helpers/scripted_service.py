"""A service that says what a test tells it to, with the starter model's vocabulary, behind a real server.

Tests of what clients do with calls of tools and with thinking need answers that hold some. Here a test writes
the text of an answer, which comes cut anywhere; marks in it, which no model has, become events. What clients
sent is kept as the turns that were rendered.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cordee.api import core
from cordee.api.answers import Job, ParsedAnswers
from cordee.api.core import ApiCore
from cordee.chat.events import ArgumentsDelta, CallBegun, Event, TextDelta, ThinkingDelta
from cordee.chat.turn import ChatTurn
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.generation.request import Request, TextChunk
from cordee.generation.template import ChatTemplate
from cordee.models.store import StoredModel
from cordee.serving.answers import template_of
from serving import Running, running

CONTEXT = 131_072  # as much as the longest conversation of an agent
MARK = re.compile(r"\[(think|call \w+|say)\]")
SIZE = 7  # characters of a chunk: marks and words are cut


class ScriptedParser:
    """Reads `[think]…`, `[say]…`, `[call NAME]…arguments`, each up to the next mark."""

    def __init__(self) -> None:
        self._text = ""
        self._calls = 0

    def push(self, text: str) -> Sequence[Event]:
        """Nothing is certain before the end of a part."""
        self._text += text
        *parts, self._text = re.split(r"(?=\[(?:think|call|say))", self._text)
        return [event for part in parts for event in self._read(part)]

    def finish(self) -> Sequence[Event]:
        """The last part."""
        return list(self._read(self._text))

    def _read(self, part: str) -> Iterator[Event]:
        mark = MARK.match(part)
        said = part[mark.end() :] if mark else part
        kind, _, name = (mark[1] if mark else "say").partition(" ")
        pieces = [said[at : at + SIZE] for at in range(0, len(said), SIZE)]
        if kind == "call":
            self._calls += 1
            yield CallBegun(f"call_{self._calls}", name)
            yield from map(ArgumentsDelta, pieces)
        else:
            yield from map(ThinkingDelta if kind == "think" else TextDelta, pieces)


class ScriptedService:
    """Says the next of `script` to each request, if there is one; an error of it is raised, behind the text
    before it."""

    context = CONTEXT
    health = "ready"
    ready = True

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.vocabulary = Vocabulary(path)
        self.template: ChatTemplate | None = template_of(self.vocabulary)
        self.script: list[str | tuple[str, CordeeError]] = []
        self.requests: list[Request] = []
        self.turns: list[ChatTurn] = []
        self.pause_seconds = 0.0  # before each chunk
        added = datetime(2026, 1, 1).astimezone().isoformat()
        self.model = StoredModel(
            name=name, digest="", path=path, nbytes=1, source="", added=added, architecture="", layers=1
        )

    async def generate(self, request: Request) -> AsyncGenerator[TextChunk]:
        """The next answer, cut into chunks, one token each."""
        self.requests.append(request)
        answer = self.script.pop(0) if self.script else "So it is."
        text, error = (answer, None) if isinstance(answer, str) else answer
        stop = next((each for each in request.stop if each in text), None)
        text = text.partition(stop)[0] if stop else text
        pieces = [text[at : at + SIZE] for at in range(0, len(text), SIZE)]
        limit = request.max_tokens or len(pieces)
        counts = {"prompt_tokens": len(request.prompt), "cached_tokens": 3}
        for number, piece in enumerate(pieces[:limit], 1):
            await asyncio.sleep(self.pause_seconds)
            yield TextChunk(text=piece, **counts, completion_tokens=number)
        if error is not None:
            raise error
        reason = "length" if limit < len(pieces) else "stop"
        done = min(limit, len(pieces))
        yield TextChunk(text="", finish_reason=reason, stop=stop, **counts, completion_tokens=done)

    def status(self) -> dict[str, Any]:
        """In the form of LocalService: it has no stages."""
        return {
            "model": self.name,
            "digest": "",
            "placement": "",
            "context": CONTEXT,
            "sequences": 1,
            "queue": 0,
            "active": 0,
            "tokens_per_second": 0.0,
            "stages": [],
        }

    async def close(self) -> None:
        """Free the vocabulary."""
        await asyncio.to_thread(self.vocabulary.close)


@contextmanager
def scripted(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "scripted", **options: Any
) -> Iterator[tuple[Running, ScriptedService]]:
    """A server whose one model is scripted."""
    service = ScriptedService(path, name)
    chat = ApiCore.chat

    def remembered(
        own: ApiCore, request: Any, of: ScriptedService, turn: ChatTurn, *rest: Any, **named: Any
    ) -> Awaitable[Job]:
        service.turns.append(turn)
        return chat(own, request, of, turn, *rest, **named)

    monkeypatch.setattr(ApiCore, "chat", remembered)
    monkeypatch.setattr(core, "ParsedAnswers", lambda of, *_: ParsedAnswers(of, ScriptedParser))
    with running(None, folder, **options) as server:
        server.services[name] = service
        yield server, service
