"""An embedding model as a service: texts in, vectors out, by a child process that may end.

The child starts at the first request and ends when nobody has asked for a while, so a model that is seldom
asked takes no memory. One text after the other is worked on: all cores are on each.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from cordee.engine.child import Child, Ended, Rested, rebuilt
from cordee.engine.embedding_messages import Embed, EmbeddingMessage, EncoderReady, Rank, Vector, decoder
from cordee.engine.vocabulary_messages import Failed
from cordee.errors import BadModelFile, BadRequest, CordeeError, DoesNotFit, Overloaded, StageFailed
from cordee.machine.memory import memory
from cordee.models.store import StoredModel

P = ParamSpec("P")
Result = TypeVar("Result")

MODULE = "cordee.engine.embedding_child"
LOAD_SECONDS = 120.0  # the largest in use has 16 GB, which a disk of 150 MB/s reads in this time
TEXT_SECONDS = 300.0  # 8,192 tokens through 8 billion weights on an old machine
WAITING_MAX = 256  # requests that wait for the child; each holds its texts
# What the child takes beside the weights: its process, and what it computes with.
BESIDE_BYTES = 200_000_000


class EmbeddingService:
    """Made on the event loop that uses it; `close` it."""

    def __init__(self, model: StoredModel) -> None:
        self.model = model
        self._child: Child[EmbeddingMessage] | None = None
        self._loaded: EncoderReady | None = None
        self._thread = ThreadPoolExecutor(1, "embeddings")
        self._waiting = 0
        self._closed = False

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.model.name

    async def embed(self, text: str | tuple[int, ...], truncate: bool = False) -> tuple[np.ndarray, int]:
        """The vector of a text, or of token ids: (dimension,) float32 of length 1; and its tokens' number.

        Raises:
            ContextExceeded: it is too long, and may not be truncated.
            BadRequest: it cannot be read, or the model gives no vectors.
            Overloaded: too much waits.
            CordeeError: the model cannot be loaded here.
        """
        if isinstance(text, str):
            return await self._asked(Embed(text, (), truncate))
        return await self._asked(Embed(None, text, truncate))

    async def rank(self, query: str, document: str) -> tuple[float, int]:
        """How well a document answers a query, the higher the better; and the tokens read.

        Raises as `embed` does.
        """
        values, count = await self._asked(Rank(query, document))
        return float(values[0]), count

    async def dimension(self) -> int:
        """The length of its vectors; 0 if it ranks. Raises as `embed` does."""
        return (await self._in_thread(self._ready))[1].dimension

    async def close(self) -> None:
        """End the child; closing twice is harmless."""
        self._closed = True
        if self._child is not None:
            self._child.end()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def _asked(self, request: Embed | Rank) -> tuple[np.ndarray, int]:
        if self._waiting >= WAITING_MAX:
            raise Overloaded(f"{WAITING_MAX} texts wait for {self.name}; try again in a moment")
        self._waiting += 1
        try:
            return await self._in_thread(self._answer, request)
        finally:
            self._waiting -= 1

    async def _in_thread(
        self, function: Callable[P, Result], *arguments: P.args, **options: P.kwargs
    ) -> Result:
        call = partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _answer(self, request: Embed | Rank) -> tuple[np.ndarray, int]:
        """What the child says; it is started again if it was idle for long. On the thread."""
        while True:
            child, loaded = self._ready()
            if isinstance(request, Embed) and not loaded.dimension:
                raise BadRequest(f"{self.name} ranks documents (/v1/rerank); it gives no vectors", "model")
            if isinstance(request, Rank) and loaded.dimension:
                raise BadRequest(f"{self.name} gives vectors (/v1/embeddings); it ranks nothing", "model")
            try:
                answer = child.ask(request, TEXT_SECONDS)
            except Rested:
                continue
            except Ended as error:
                raise self._failure(error, "read this text") from error
            break
        if isinstance(answer, Failed):
            raise rebuilt(answer.error, answer.message)
        if not isinstance(answer, Vector):
            raise StageFailed(f"{self.name}: the process of the model gave {type(answer).__name__}")
        return np.frombuffer(answer.values, np.float32), answer.tokens

    def _ready(self) -> tuple[Child[EmbeddingMessage], EncoderReady]:
        """The child, with the model loaded. On the thread."""
        if self._closed:
            raise StageFailed(f"{self.name} is no longer answered here")
        if self._child is None or self._loaded is None or self._child.ended:
            self._child, self._loaded = self._start()
        return self._child, self._loaded

    def _start(self) -> tuple[Child[EmbeddingMessage], EncoderReady]:
        needed, free = self.model.nbytes + BESIDE_BYTES, memory().available_bytes
        if needed > free:
            raise DoesNotFit(
                f"{self.name} takes {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free here"
            )
        child: Child[EmbeddingMessage] = Child(
            decoder, self.name, "model", MODULE, str(self.model.path.absolute()), self.name
        )
        try:
            answer = child.receive(LOAD_SECONDS)
        except (Ended, Rested) as error:
            raise self._failure(error, "load it") from error
        if isinstance(answer, EncoderReady):
            return child, answer
        child.end()
        if isinstance(answer, Failed):
            raise rebuilt(answer.error, answer.message)
        raise StageFailed(f"{self.name}: the process of the model gave {type(answer).__name__}")

    def _failure(self, error: Ended | Rested, work: str) -> CordeeError:
        if self._closed:
            return StageFailed(f"{self.name} is no longer answered here")
        if isinstance(error, Rested) or error.is_passing:
            return StageFailed(f"{self.name}: libllama could not {work} now ({error}): try again")
        return BadModelFile(f"{self.name}: libllama cannot {work} ({error}): fetch the file again")
