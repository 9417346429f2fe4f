"""A model served by worker processes of this machine: requests in, chunks of text out.

The service owns the scheduler (which decides), the pipeline (which computes) and the vocabulary (which turns
tokens into text), and connects the three. The token logs are here, in the scheduler, so the loss of any stage
costs a pause and nothing else. Everything runs on one event loop; nothing here blocks it for longer than a
tokenization.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cordee.engine.stage import StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError, StageFailed, StorageFailed
from cordee.generation.request import Request, TextChunk
from cordee.generation.scheduler import Event, Limits, Scheduler
from cordee.generation.suspects import Suspects
from cordee.machine import sizing
from cordee.models.gguf import Header, engine_of, read_header
from cordee.models.slices import SliceFile, even_cuts
from cordee.models.store import Store, StoredModel
from cordee.serving import batch_invariance, registry
from cordee.serving.answers import Answer, Checks, Rate, template_of
from cordee.serving.interface import Health
from cordee.serving.local_pipeline import Pipeline, SlicedModel
from cordee.worker.messages import Rows, Run, Tokens, rows_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceConfig:
    """How a model is served.

    `context` is tokens per stream, answer included; None takes the model's own, bounded by
    `sizing.CELLS_DEFAULT` and by memory. `queue` bounds the streams that wait while `sequences` are answered.
    `in_flight` micro-batches travel the pipeline at once: on one machine more than one only makes batches
    smaller, since the stages share its cores. `batch_invariant` asks for the same bits alone, batched and
    replayed. `force_cut` cuts architectures that no test has certified. `devices` are as
    `sizing.stage_config` takes them. `port` is only shown by `ps`.
    """

    context: int | None = None
    sequences: int = 8
    threads: int | None = None
    queue: int = 256
    in_flight: int = 1
    batch_invariant: bool = True
    force_cut: bool = False
    devices: tuple[str, ...] = ()
    port: int | None = None


class LocalService:
    """A model being served. Made by `LocalService.start`; all methods on one event loop."""

    def __init__(self, model: StoredModel, config: StageConfig, limits: Limits) -> None:
        self.model = model
        self.name = model.name
        self.vocabulary = Vocabulary(model.path)
        self.template = template_of(self.vocabulary)
        self.context = limits.context
        self.batch_invariant: bool | None = None
        self.port: int | None = None
        self._config = config
        self._checks = Checks(self.vocabulary)
        self._scheduler = Scheduler(limits, self.vocabulary.end_of_generation)
        self._pipeline: Pipeline | None = None
        self._answers: dict[str, Answer] = {}
        self._measured: dict[int, asyncio.Future[dict[int, str]]] = {}  # by negative batch number
        self._suspects = Suspects()
        self._failure: str | None = None  # why nothing can be answered now
        self._recent = Rate()
        self._started = time.monotonic()
        self._entry: Path | None = None

    @classmethod
    async def start(
        cls,
        model: StoredModel,
        store: Store,
        *,
        stages: int = 1,
        config: ServiceConfig | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> "LocalService":
        """Cut the model if need be, load its stages, measure whether it is batch-invariant.

        `report` gets lines about the progress.

        Raises:
            CordeeError: the model cannot be read, cut or loaded, or does not fit.
        """
        config = config or ServiceConfig()
        header = read_header(model.path)
        stage_config = sizing.stage_config(
            header,
            stages=stages,
            sequences=config.sequences,
            context=config.context,
            threads=config.threads,
            devices=config.devices,
            batch_invariant=config.batch_invariant,
        )
        limits = Limits(
            sequences=config.sequences,
            context=stage_config.context,
            batch_rows=stage_config.batch_rows,
            queue=config.queue,
            in_flight=config.in_flight,
        )
        service = cls(model, stage_config, limits)
        try:
            slices = await asyncio.to_thread(_slices, header, model, store, stages, config.force_cut, report)
            ends = tuple(service.vocabulary.end_of_generation)
            source = SlicedModel(header.path, engine_of(header), ends)
            service._pipeline = await Pipeline.start(slices, stage_config, source, service, report)
            service.batch_invariant = await service._batch_invariance(store, report)
            service.port = config.port
            service._publish()
        except BaseException:
            await service.close()
            raise
        return service

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now; False while a stage is being replaced."""
        return self._pipeline is not None and self._pipeline.state == "ready"

    @property
    def health(self) -> Health:
        """See `ModelService.health`."""
        return "ready" if self.ready else "recovering"

    async def generate(self, request: Request) -> AsyncGenerator[TextChunk]:
        """Answer a request: chunks as they come, the last with a finish reason.

        Closing the generator cancels the stream.

        Raises:
            BadRequest, ContextExceeded, Overloaded: before the first chunk.
            StageFailed: the stages cannot be replaced, or this stream keeps breaking them.
        """
        await self._checks.check(request)
        if self._failure is not None:
            raise StageFailed(self._failure)
        self._scheduler.submit(request)
        answer = self._answers[request.id] = Answer(request, self.vocabulary)
        try:
            self._pump()
            while True:
                chunk = await answer.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._answers.get(request.id) is answer:  # not a later one's of the same id
                del self._answers[request.id]
                self._cancel(request.id)
                self._pump()

    def status(self) -> dict[str, Any]:
        """What the service is doing, as values for JSON."""
        pipeline = self._pipeline
        stages = [] if pipeline is None else pipeline.stages
        return {
            "model": self.name,
            "digest": self.model.digest,
            "state": "loading" if pipeline is None else pipeline.state,
            "placement": "" if pipeline is None else pipeline.wiring,
            "port": self.port,
            "context": self.context,
            "sequences": self._config.sequences,
            "queue": self._scheduler.waiting,
            "active": self._scheduler.active,
            "tokens_per_second": self._recent.per_second(),
            "batch_invariant": self.batch_invariant,
            "uptime": time.monotonic() - self._started,
            "stages": [
                {
                    "index": index,
                    "layers": [stage.slice.first, stage.slice.last],
                    "pid": stage.pid,
                    "state": "ready" if stage.pid is not None else "replacing",
                    "rss_bytes": registry.resident_bytes(stage.pid),
                    "restarts": stage.restarts,
                }
                for index, stage in enumerate(stages)
            ],
        }

    async def close(self) -> None:
        """End the stages and every stream; closing twice is harmless."""
        self._failure = f"the service of {self.name} is closed"
        self._fail_all(self._failure)
        if self._pipeline is not None:
            await self._pipeline.close()
        await self._checks.close()
        if self._entry is not None:
            registry.withdraw(self._entry)

    def on_tokens(self, tokens: Tokens) -> None:
        """Pipeline's listener: a result of a micro-batch."""
        measured = self._measured.pop(tokens.batch, None)
        if measured is not None:
            if not measured.done():
                measured.set_result(tokens.digests)
            return
        events: list[Event] = []
        for choices in tokens.earlier:
            events += self._scheduler.complete(tokens.batch, choices, {}, last=False)
        events += self._scheduler.complete(tokens.batch, tokens.choices, tokens.failures, last=tokens.last)
        self._suspects.result(tokens.batch, [event.stream for event in events], last=tokens.last)
        self._pump()  # first, so that the stages compute while the text is made
        for event in events:
            try:
                self._tell(event)
            except Exception:  # a fault at one stream must not stop the others
                log.exception("an answer could not be made")
                self._fail(event.stream, "the answer could not be turned into text")
        self._pump()  # what a stop string or a fault made room for

    def on_lost(self) -> None:
        """Pipeline's listener: replay everything, once it is ready again."""
        self._scheduler.lost()
        for future in self._measured.values():
            if not future.done():
                future.set_exception(StageFailed("a stage was lost while batch invariance was measured"))
        self._measured.clear()
        apart, ended = self._suspects.lost()
        for name in apart:
            self._scheduler.set_apart(name)
        for name in ended:
            self._fail(name, "the stages fail again and again at this request")

    def on_ready(self) -> None:
        """Pipeline's listener: go on."""
        self._failure = None
        self._pump()
        if self._entry is not None:
            self._publish()

    def on_failed(self, error: CordeeError) -> None:
        """Pipeline's listener: nothing can be answered for now."""
        self._failure = f"{self.name} cannot answer: {error.message}"
        self._fail_all(self._failure)

    def _pump(self) -> None:
        """Send what the scheduler wants sent."""
        if self._pipeline is None:
            return
        while self.ready and (batch := self._scheduler.next_batch()) is not None:
            self._suspects.sent(batch)
            self._pipeline.send(*rows_of(self._pipeline.wiring, batch))
        if self.ready:
            for batch in self._scheduler.halts():
                self._pipeline.halt(batch)

    async def _batch_invariance(self, store: Store, report: Callable[[str], None]) -> bool | None:
        assert self._pipeline is not None
        descriptions = [stage.description for stage in self._pipeline.stages if stage.description is not None]
        name = batch_invariance.key(descriptions, self._config)
        known = store.note(self.model.digest, name)
        if known is not None:
            return known
        report("measuring whether batches change the model's arithmetic (once for each model)")
        try:
            found = await batch_invariance.measure(self._measure, self.vocabulary.size, self._config)
        except StageFailed:
            return None
        try:
            if found is not None:
                store.set_note(self.model.digest, name, found)
        except StorageFailed as error:
            report(f"the result is not stored: {error.message}")
        return found

    async def _measure(self, runs: Sequence[Run], tokens: Sequence[int]) -> dict[int, str]:
        if self._pipeline is None or not self.ready:
            raise StageFailed("a stage was lost while batch invariance was measured")
        number = -1 - len(self._measured)  # the scheduler's batches count up from 1
        self._measured[number] = answer = asyncio.get_running_loop().create_future()
        rows = Rows(self._pipeline.wiring, number, tuple(runs), {}, measure=True)
        self._pipeline.send(rows, np.asarray(tokens, dtype=np.int32).data.cast("B"))
        return await answer

    def _tell(self, event: Event) -> None:
        answer = self._answers.get(event.stream)
        if answer is None:
            return
        if event.failure is not None:
            self._fail(event.stream, event.failure)
            return
        answer.cached_tokens = max(answer.cached_tokens, event.cached_tokens)
        if event.choice is not None:
            self._recent.count()
        answer.add(event.choice, event.finish_reason)
        if answer.stopped:
            self._cancel(event.stream)

    def _cancel(self, stream: str) -> None:
        self._scheduler.cancel(stream)
        self._suspects.forget(stream)

    def _fail(self, stream: str, reason: str) -> None:
        self._cancel(stream)
        answer = self._answers.pop(stream, None)
        if answer is not None:
            answer.fail(StageFailed(reason))

    def _fail_all(self, reason: str) -> None:
        for stream in list(self._answers):
            self._fail(stream, reason)

    def _publish(self) -> None:
        try:
            self._entry = registry.publish(self.name, self.status())
        except (OSError, StorageFailed):
            log.exception("`cordee ps` will not show this service as it is")


def _slices(
    header: Header,
    model: StoredModel,
    store: Store,
    stages: int,
    force: bool,
    report: Callable[[str], None],
) -> list[SliceFile]:
    """The model's slices, cut where they are not on disk yet; a whole model is its own only slice."""
    if stages == 1:
        return [SliceFile(model.path, 0, header.layers, model.digest, model.nbytes)]
    return [
        store.slice_for(model, first, last, force=force, progress=_announced(first, last, report))
        for first, last in itertools.pairwise(even_cuts(header, stages))
    ]


def _announced(first: int, last: int, report: Callable[[str], None]) -> Callable[[int, int], None]:
    """A progress callback that reports once what is being cut; slices that are on disk make no progress."""
    reported = False

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal reported
        if not reported:
            reported = True
            report(f"cutting layers {first} to {last - 1}: {total_bytes / 1e6:.0f} MB")

    return progress
