"""A service on an event loop in a thread of its own, for a program that waits at the keyboard.

The main thread reads lines and prints; Ctrl-C reaches it alone, so it ends the answer that is being
generated and leaves the service as it is.
"""

import asyncio
import queue
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from datetime import datetime
from typing import Any, Self, TypeVar

import msgspec

from cordee.api.prompts import rendered
from cordee.chat.events import TextDelta
from cordee.chat.formats import PLAIN, AnswerFormat, Parser, format_of
from cordee.chat.turn import ChatTurn, Message
from cordee.cli.conversation import GenerationOptions
from cordee.generation.request import Request, SamplingParams, TextChunk
from cordee.models.store import Store, StoredModel
from cordee.serving.local_service import LocalService, ServiceConfig
from cordee.system import events

Result = TypeVar("Result")

# Within this time an interrupted load is cleaned up; else that ends with the process.
CANCEL_SECONDS = 10.0


class Session:
    """A running service, used from the main thread; a context manager that closes it."""

    def __init__(
        self,
        model: StoredModel,
        store: Store,
        stages: int,
        config: ServiceConfig,
        report: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)
        self._thread.start()
        try:
            starting = LocalService.start(model, store, stages=stages, config=config, report=report)
            self.service: LocalService = self._run(starting)
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self.service.close())
        finally:
            self._stop()

    def generate(self, request: Request) -> Generator[TextChunk]:
        """The chunks of an answer. Closing the iterator cancels the stream.

        Ctrl-C does so too, and raises KeyboardInterrupt when the stream has ended: while it is under way the
        signal only cancels, so that it cannot strike in the middle of something.
        """
        # Bounded by the answer: no more chunks than the context has tokens.
        chunks: queue.SimpleQueue[TextChunk | Exception | None] = queue.SimpleQueue()
        task = self._run(_pour(self.service.generate(request), chunks))
        interrupted = threading.Event()

        def interrupt(*_: object) -> None:
            interrupted.set()
            self._loop.call_soon_threadsafe(task.cancel)

        before = signal.signal(signal.SIGINT, interrupt)
        item: TextChunk | Exception | None = None
        try:
            while (item := events.take(chunks)) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
            if interrupted.is_set():
                raise KeyboardInterrupt
        finally:
            self._loop.call_soon_threadsafe(task.cancel)
            while item is not None:
                item = events.take(chunks)
            signal.signal(signal.SIGINT, before)

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        ended = threading.Event()

        async def watched() -> Result:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(CANCEL_SECONDS)
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class LocalModel:
    """A model that this process loaded, for a conversation."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def answer(
        self, messages: Sequence[Mapping[str, str]], generation: GenerationOptions
    ) -> Generator[TextChunk]:
        """See ConversationModel.answer."""
        prompt, form = self._prompt(messages)
        request = Request(
            id="run",
            prompt=prompt,
            sampling=SamplingParams(**generation.sampling()),
            max_tokens=generation.max_tokens,
            shown_tokens=form.shown_tokens,
        )
        return _said(self._session.generate(request), form.parser(str))

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[tuple[int, ...], AnswerFormat]:
        service = self._session.service
        if service.template is None:  # a base model continues the text
            text = "\n".join(message["content"] for message in messages)
            return tuple(service.vocabulary.tokenize(text, add_bos=True)), PLAIN
        turn = ChatTurn(messages=[Message(message["role"], message["content"]) for message in messages])
        chat_format = format_of(service.template)
        prompt = rendered(service, chat_format, turn, datetime.now(), "messages")
        return prompt.tokens, chat_format.answer(turn, prompt.text, None, service.vocabulary)


def _said(chunks: Generator[TextChunk], parser: Parser) -> Generator[TextChunk]:
    """The chunks with what is said to the user; those of thinking have no text."""
    with closing(chunks):
        for chunk in chunks:
            events = [*parser.push(chunk.text), *(parser.finish() if chunk.finish_reason else ())]
            if events or chunk.finish_reason:
                said = "".join(event.text for event in events if isinstance(event, TextDelta))
                yield msgspec.structs.replace(chunk, text=said)


async def _pour(
    stream: AsyncGenerator[TextChunk], chunks: "queue.SimpleQueue[TextChunk | Exception | None]"
) -> asyncio.Task[None]:
    """Start moving a stream's chunks, or the error that ends it, to a queue; None comes last."""

    async def pour() -> None:
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    chunks.put(chunk)
        except Exception as error:
            chunks.put(error)

    task = asyncio.create_task(pour())
    task.add_done_callback(lambda _: chunks.put(None))
    return task
