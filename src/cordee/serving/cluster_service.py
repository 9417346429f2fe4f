"""The gateway of a node: answers of models that run anywhere in the cluster, for clients of this node.

`ClusterGateway` gives the pure gateway (generation/gateway.py) a clock and a way to send; there is one on
each node. `ClusterService` is a model of the cluster as the API sees it (`ModelService`): the
scheduler and the stages may be on other nodes. All methods on one event loop.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from cordee.cluster.facts import stream_key
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError, StageFailed
from cordee.generation import streams
from cordee.generation.gateway import TICK_SECONDS, Gateway, News
from cordee.generation.request import Request, TextChunk
from cordee.generation.streams import Said
from cordee.models.store import StoredModel
from cordee.serving.answers import Answer, Checks, Rate, template_of
from cordee.serving.interface import Health

# Where messages are function calls: how often a gateway says which tokens have come. A host keeps 1,024
# tokens of a stream until then, and a small model's pipeline on one machine makes thousands a second.
CALL_ASSERT_SECONDS = 0.1

log = logging.getLogger(__name__)


class ClusterGateway:
    """The streams of this node's clients.

    `send` takes a node's id and the bytes of a message; it must not wait, and may lose them. `by_call`: it
    calls the host, so a message costs little, and the host may learn of a cancelled stream at once.
    """

    def __init__(self, send: Callable[[str, bytes], None], *, by_call: bool = False) -> None:
        number = secrets.randbits(63)
        self._gateway = Gateway(number, CALL_ASSERT_SECONDS, 0.0) if by_call else Gateway(number)
        self._send = send
        self._by_call = by_call
        self._flushing = False
        self._open: dict[str, tuple[Answer, Callable[[int], None]]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def routes(self) -> Mapping[str, str]:
        """The node that hosts a model now, by stream key; where none does, the model is not there."""
        return self._gateway.routes

    def receive(self, node: str, said: Said) -> None:
        """Handle what the host on a node sent to this one."""
        self._gateway.receive(node, said)
        self._flush()

    def follow(self, routes: Mapping[str, str]) -> None:
        """These nodes host models now, by stream key, and no others do."""
        self._gateway.follow(routes)
        self._flush()

    def open(self, request: Request, key: str, answer: Answer, count: Callable[[int], None]) -> None:
        """Begin a stream for what the stream key names; `count` hears how many tokens came.

        Raises:
            BadRequest: a stream of that id is open.
            Overloaded: too many are.
            StageFailed: the node is being stopped.
        """
        if self._closed:
            raise StageFailed("this node is being stopped: ask another")
        self._gateway.open(request, key)
        self._open[request.id] = (answer, count)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.get_running_loop().create_task(self._tick())
        self._flush()

    def leave(self, *left: tuple[str, Answer]) -> None:
        """Clients need no more of these streams; harmless where they have ended."""
        for stream_id, answer in left:
            if self._open.get(stream_id, (None,))[0] is answer:  # not a later one's of the same id
                del self._open[stream_id]
                self._gateway.cancel(stream_id)
        if self._by_call:
            self._gateway.tick(time.monotonic())
            self._flush()

    async def close(self) -> None:
        """End every stream, and tell the hosts so; closing twice is harmless."""
        self._closed = True
        for stream_id in list(self._open):
            self._fail(stream_id, StageFailed("the node that this answer came through is being stopped"))
        if not self._by_call:
            await asyncio.sleep(2 * TICK_SECONDS)  # for the last messages to the hosts
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)

    async def _tick(self) -> None:
        while self._gateway.busy:
            try:
                self._gateway.tick(time.monotonic())
                self._flush()
            except Exception:  # a fault must not stop all streams
                log.exception("the gateway's tick failed")
            await asyncio.sleep(TICK_SECONDS)

    def _flush(self) -> None:
        """Give clients what is new, and hosts their messages.

        A host that is called may answer within the call: what that makes is flushed after what came first.
        """
        if self._flushing:
            return
        self._flushing = True
        try:
            while any(drained := self._gateway.drain()):
                messages, news = drained
                for each in news:
                    self._try_to_tell(each)
                for node, message in messages:
                    self._send(node, streams.encode(message))
        finally:
            self._flushing = False

    def _try_to_tell(self, news: News) -> None:
        try:
            self._tell(news)
        except Exception:  # a fault at one stream must not stop the others
            log.exception("an answer could not be made")
            self._fail(news.stream, StageFailed("the answer could not be turned into text"))

    def _tell(self, news: News) -> None:
        if news.stream not in self._open:
            return  # a stop string ended it
        answer, count = self._open[news.stream]
        if news.error is not None:
            self._fail(news.stream, news.error)
            return
        if news.progress is not None:
            answer.tell_progress(news.progress)
            return
        answer.cached_tokens, answer.guesses = news.cached_tokens, news.guesses
        if news.prompt_choices:
            answer.add_prompt(news.prompt_choices)
        count(len(news.choices))
        for choice in news.choices[:-1]:
            answer.add(choice, None)
            if answer.stopped:
                break
        else:
            answer.add(news.choices[-1] if news.choices else None, news.finish_reason)
        if answer.stopped:
            self.leave((news.stream, answer))

    def _fail(self, stream_id: str, error: CordeeError) -> None:
        self._gateway.cancel(stream_id)
        answer, _ = self._open.pop(stream_id, (None, None))
        if answer is not None:
            answer.fail(error)


class ClusterService:
    """A model of the cluster; its `vocabulary` is closed with it.

    `context` is in tokens for each stream, as in the model's deployment. `wanted` is called at each request,
    which it may refuse by raising an error.
    """

    def __init__(
        self,
        model: StoredModel,
        vocabulary: Vocabulary,
        context: int,
        gateway: ClusterGateway,
        wanted: Callable[[], None] = lambda: None,
        only: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.name = model.name
        self.vocabulary = vocabulary
        self.template = template_of(self.vocabulary)
        self.context = context
        self.key = stream_key(model.digest, context, only)
        self.batch_invariant: bool | None = None
        self.port: int | None = None
        self.is_deployed = False  # whether the cluster is to serve it, whoever asks
        self._gateway = gateway
        self._wanted = wanted
        self._checks = Checks(self.vocabulary)
        self._rate = Rate()
        self._started = time.monotonic()
        self._answers: dict[str, Answer] = {}

    @property
    def ready(self) -> bool:
        """Whether a host is known that would work on a request now."""
        return self.key in self._gateway.routes

    @property
    def health(self) -> Health:
        """See `ModelService.health`."""
        if self.ready:
            return "ready"
        return "recovering" if self.is_deployed else "idle"

    async def generate(self, request: Request) -> AsyncGenerator[TextChunk]:
        """Answer a request: chunks as they come, the last with a finish reason.

        Closing the generator cancels the stream. Losing any machine but this one is a pause.

        Raises:
            BadRequest, ContextExceeded, Overloaded: before the first chunk.
            StageFailed: no machine could answer for long, or this request keeps breaking the stages.
        """
        await self._checks.check(request)
        self._wanted()
        answer = Answer(request, self.vocabulary)
        self._gateway.open(request, self.key, answer, self._rate.count)
        self._answers[request.id] = answer
        try:
            while True:
                chunk = await answer.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._answers.get(request.id) is answer:  # not a later one's of the same id
                del self._answers[request.id]
            self._gateway.leave((request.id, answer))

    def status(self) -> dict[str, Any]:
        """What is answered through this node, as values for JSON."""
        return {
            "model": self.name,
            "digest": self.model.digest,
            "state": "ready" if self.ready else "replacing",
            "host": self._gateway.routes.get(self.key),
            "port": self.port,
            "context": self.context,
            "active": len(self._answers),
            "tokens_per_second": self._rate.per_second(),
            "batch_invariant": self.batch_invariant,
            "uptime": time.monotonic() - self._started,
        }

    def fail_all(self, reason: str) -> None:
        """End every stream of this model."""
        self._gateway.leave(*self._answers.items())
        for answer in self._answers.values():
            answer.fail(StageFailed(reason))

    async def close(self) -> None:
        """End every stream of this model, take no more; closing twice is harmless."""
        self.fail_all(f"{self.name} is no longer answered by this node")
        await self._checks.close()
