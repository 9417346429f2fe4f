"""A service on an event loop in a thread of its own, for a program that waits at the keyboard.

The main thread reads lines and prints; Ctrl-C reaches it alone, so it ends the answer that is being
generated and leaves the service as it is.
"""

import asyncio
import queue
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Self, TypeVar

from cordee.api.prompts import chat_prompt
from cordee.chat.formats import format_of
from cordee.chat.turn import ChatTurn, Message
from cordee.cli.conversation import GenerationOptions
from cordee.generation.request import Request, SamplingParams, TextChunk
from cordee.models.store import Store, StoredModel
from cordee.serving.local_service import LocalService, ServiceConfig

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
            while (item := chunks.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
            if interrupted.is_set():
                raise KeyboardInterrupt
        finally:
            self._loop.call_soon_threadsafe(task.cancel)
            while item is not None:
                item = chunks.get()
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
        sampling = SamplingParams(**generation.sampling())
        prompt = self._prompt(messages)
        return self._session.generate(
            Request(id="run", prompt=prompt, sampling=sampling, max_tokens=generation.max_tokens)
        )

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        service = self._session.service
        if service.template is None:  # a base model continues the text
            text = "\n".join(message["content"] for message in messages)
            return tuple(service.vocabulary.tokenize(text, add_bos=True))
        turn = ChatTurn(messages=[Message(message["role"], message["content"]) for message in messages])
        return chat_prompt(service, format_of(service.template), turn, datetime.now(), "messages")


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
