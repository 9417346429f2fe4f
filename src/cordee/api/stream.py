"""From the service's chunks to a client: several streams as one, keep-alives, an end when it leaves.

Theory of operation. A request asks for one or several answers; each is a stream of chunks of the service.
`Streams` runs a task for each and joins them in a short queue: a client that reads slowly holds back its own
streams and no others. What comes out is either collected to whole answers, or written as server-sent events
(`EventStream`), in three phases:

    accept:  wait until the service has accepted every stream or refused one. A refusal here still has its
             own HTTP status. During a long prefill neither shows, so the wait is short.
    stream:  send the headers, then events as chunks come; where none comes for a while, a keep-alive.
    end:     the adapter's last events; or, where the service failed, an event that holds the error.

In every phase the connection is watched: when the client leaves, the tasks are cancelled, and with them the
streams in the service.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cordee.api import callers
from cordee.api.answers import AnswerPiece, Job, ParsedAnswers, WholeAnswer
from cordee.api.failures import ClientGone
from cordee.errors import CordeeError, StageFailed
from cordee.generation.request import Request

QUEUED_CHUNKS = 16  # between the service and a client; enough to write several at once
SILENT_CLIENT_SECONDS = 60.0  # a client that reads nothing for this long is given up: it blocks a slot

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Waits that a test may want shorter. Clients and proxies give up on connections that are silent for
    10 to 60 s; half of the least of that leaves room for a busy machine."""

    keep_alive_seconds: float = 5.0
    accept_seconds: float = 1.0


class Adapter(Protocol):
    """Turns pieces into the events of one API. `keep_alive` may be sent at any time."""

    media_type: str
    keep_alive: bytes

    def begin(self) -> Iterable[bytes]:
        """The events before any token."""
        ...

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """The events for a chunk of the answer `index`; none if there is nothing to show."""
        ...

    def end(self) -> Iterable[bytes]:
        """The events after the last token of every answer."""
        ...

    def failure(self, error: Exception) -> Iterable[bytes]:
        """The events that end a stream that failed."""
        ...


class Streams:
    """The answers to several requests, chunk by chunk as they come; leaving the context ends them all."""

    def __init__(self, service: ParsedAnswers, requests: Sequence[Request]) -> None:
        self.open = len(requests)
        self._service = service
        self._requests = requests
        self._queue: asyncio.Queue[tuple[int, AnswerPiece | Exception]] = asyncio.Queue(QUEUED_CHUNKS)
        self._early: deque[tuple[int, AnswerPiece | Exception]] = deque()  # came while `accepted` waited
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._pump(*each)) for each in enumerate(self._requests)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def prompt_tokens(self, index: int) -> int:
        """How many tokens the prompt of a request has."""
        return len(self._requests[index].prompt)

    async def accepted(self, seconds: float) -> None:
        """Wait until every stream has given a chunk, but no longer than `seconds`.

        Raises:
            CordeeError: the service refused one of them.
        """
        started: set[int] = set()
        try:
            async with asyncio.timeout(seconds):
                while len(started) < len(self._requests):
                    item = await self._queue.get()
                    self._early.append(item)
                    started.add(item[0])
                    if isinstance(item[1], Exception):
                        raise item[1]
        except TimeoutError:
            return

    async def next(self, seconds: float | None = None) -> tuple[int, AnswerPiece] | None:
        """The next chunk and which request it answers; None where none comes for `seconds`.

        Raises:
            CordeeError: a stream failed.
        """
        if self._early:
            index, piece = self._early.popleft()
        else:
            try:
                async with asyncio.timeout(seconds):
                    index, piece = await self._queue.get()
            except TimeoutError:
                return None
        if isinstance(piece, Exception):
            raise piece
        if piece.finish_reason == "cancelled":
            raise StageFailed("the answer was cut off because the service is being stopped")
        if piece.finish_reason is not None:
            self.open -= 1
        return index, piece

    async def _pump(self, index: int, request: Request) -> None:
        """Move a stream's chunks into the queue, and the error that it fails with."""
        caller = callers.current()
        finished, counted = False, AnswerPiece()
        try:
            async with caller.while_valid(), aclosing(self._service.generate(request)) as pieces:
                async for piece in pieces:
                    if piece.progress is None:
                        caller.spend(
                            piece.prompt_tokens - counted.prompt_tokens,
                            piece.completion_tokens - counted.completion_tokens,
                        )
                        counted = piece
                    finished = piece.finish_reason is not None
                    await self._queue.put((index, piece))
            if not finished:
                raise RuntimeError("the service ended a stream without a reason")
        except Exception as error:
            await self._queue.put((index, error))


async def collect(job: Job) -> list[WholeAnswer]:
    """The whole answers to a job's requests."""
    answers = [WholeAnswer() for _ in job.requests]
    async with Streams(job.answers, job.requests) as streams:
        while streams.open:
            item = await streams.next()
            assert item is not None, "it waits without a bound"
            index, piece = item
            answers[index].add(piece)
    return answers


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work while the client is connected; the request's body must have been read.

    Raises:
        ClientGone: the client left first, and the work was cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that is written as the tokens come: server-sent events (WHATWG HTML, section 9.2), or lines.

    A refusal before the first event is raised, so that it gets its own status.
    """

    def __init__(self, job: Job, adapter: Adapter, timing: Timing) -> None:
        # Proxies must not buffer what is meant to be seen at once (nginx: X-Accel-Buffering).
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=adapter.media_type)
        del self.headers["content-length"]
        self._streams = Streams(job.answers, job.requests)
        self._adapter = adapter
        self._timing = timing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except ClientGone:
            return  # uvicorn closes what is left of the connection

    async def _run(self, send: Send) -> None:
        async with self._streams as streams:
            await streams.accepted(self._timing.accept_seconds)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await _write(send, self._adapter.begin())
                await self._answer(streams, send)
                last = self._adapter.end()
            except CordeeError as error:
                last = self._adapter.failure(error)
            except ClientGone:
                raise
            except Exception as error:
                await _write(send, self._adapter.failure(error), more=False)
                raise
        await _write(send, last, more=False)

    async def _answer(self, streams: Streams, send: Send) -> None:
        """Write the pieces, and keep-alives where for a while none comes, or none that is shown."""
        clock, patience = asyncio.get_running_loop().time, self._timing.keep_alive_seconds
        due = clock() + patience
        while streams.open:
            item = await streams.next(max(0.0, due - clock()))
            if item is not None and await _write(send, self._events(*item)):
                due = clock() + patience
            elif clock() >= due:
                await _write(send, [self._adapter.keep_alive])
                due = clock() + patience

    def _events(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """What to write for a piece: also how far its stream is before it begins, if the format has room."""
        if piece.progress is None:
            return self._adapter.push(index, piece)
        if self._adapter.media_type != "text/event-stream":
            return []
        place, read_tokens = piece.progress
        told = f"queue {place}" if place else f"read {read_tokens} of {self._streams.prompt_tokens(index)}"
        return [f": {told}\n\n".encode()]


async def _write(send: Send, events: Iterable[bytes], more: bool = True) -> bool:
    """Send events, if there are any, and say so; give up a client that reads nothing for
    SILENT_CLIENT_SECONDS."""
    data = b"".join(events)
    if not data and more:
        return False
    try:
        async with asyncio.timeout(SILENT_CLIENT_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": more})
            return True
    except TimeoutError:
        raise ClientGone from None
