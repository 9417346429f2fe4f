"""A model served by worker processes of this machine: requests in, chunks of text out.

It is a cluster of one: the gateway of cluster_service.py and the scheduler of scheduler_host.py, joined by
function calls, around stages with fixed goals (cluster_of_one.py). The token logs are in this process, so the
loss of any stage costs a pause and nothing else. Everything runs on one event loop; nothing here blocks it
for longer than a tokenization.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.cluster.demand import SizeRequest
from cordee.cluster.memory import Demand
from cordee.engine.stage import StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError, StageFailed, StorageFailed
from cordee.generation import streams
from cordee.generation.results import RESULT_SECONDS_MAX
from cordee.generation.streams import Said
from cordee.machine import sizing
from cordee.machine.energy import Meter
from cordee.models.fit import own_context
from cordee.models.gguf import Header, engine_of, read_header
from cordee.models.slices import SliceFile, even_cuts
from cordee.models.store import Store, StoredModel
from cordee.serving import batch_invariance, registry
from cordee.serving.cluster_of_one import NODE, ClusterOfOne, SlicedModel
from cordee.serving.cluster_service import ClusterGateway, ClusterService
from cordee.serving.interface import Health
from cordee.serving.samples import Sample, host_samples, machine_samples
from cordee.serving.scheduler_host import speculation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceConfig:
    """How a model is served.

    `context` is tokens per stream, answer included; it and `sequences`, the answers at a time, are chosen by
    memory where they are None (cluster/demand.py). `command` is what people type to choose them, for advice.
    `queue` bounds the streams that wait while `sequences` are answered.
    `in_flight` micro-batches travel the pipeline at once: on one machine more than one only makes batches
    smaller, since the stages share its cores. `batch_invariant` asks for the same bits alone, batched and
    replayed. `speculates`: tokens to come are guessed (docs/speculation.md). `force_cut`
    cuts architectures that no test has certified. `devices` are as `sizing.stage_config` takes them. `port`
    is only shown by `ps`.
    """

    context: int | None = None
    sequences: int | None = None
    command: str = ""
    threads: int | None = None
    queue: int = 256
    in_flight: int = 1
    speculates: bool = True
    batch_invariant: bool = True
    force_cut: bool = False
    devices: tuple[str, ...] = ()
    port: int | None = None


class LocalService(ClusterService):
    """A model being served. Made by `LocalService.start`; all methods on one event loop."""

    def __init__(self, model: StoredModel, vocabulary: Vocabulary, config: StageConfig) -> None:
        gateway = ClusterGateway(self._ask, by_call=True)
        super().__init__(model, vocabulary, config.context, gateway, self._check)
        gateway.follow({self.key: NODE})
        self._config = config
        self._local_gateway = gateway
        self._cluster: ClusterOfOne | None = None
        self._failure: str | None = None  # why nothing can be answered now
        self.shortened = ""  # what it lacks because memory is short, for people
        self._is_closed = False
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
        header = read_header(model.path, name=model.name)
        requested = sizing.size_request(own_context(header), config.context, config.sequences, model.name)
        vocabulary, stage_config = await asyncio.gather(
            asyncio.to_thread(Vocabulary, model.path, model.name, served=True),
            asyncio.to_thread(_stage_config, header, stages, config, requested, model.name),
            return_exceptions=True,
        )
        if isinstance(vocabulary, BaseException):  # the first to count: the file may be too new
            raise vocabulary
        if isinstance(stage_config, BaseException):
            vocabulary.close()
            raise stage_config
        service = cls(model, vocabulary, stage_config)
        service.shortened = requested.shortened(Demand(stage_config.context, stage_config.sequences))
        try:
            slices = await asyncio.to_thread(_slices, header, model, store, stages, config.force_cut, report)
            ends = tuple(service.vocabulary.end_of_generation)
            sliced = SlicedModel(
                model.name, model.digest, header.path, engine_of(header), ends, tuple(slices)
            )
            service._cluster = cluster = ClusterOfOne(sliced, stage_config, service, report)
            await cluster.open(
                service.vocabulary,
                service._say,
                queue=config.queue,
                in_flight=config.in_flight,
                speculates=config.speculates,
            )
            service.batch_invariant = await service._measure(store, report)
            cluster.host.batch_invariant = service.batch_invariant
            service.port = config.port
            service._publish()
        except BaseException:
            await service.close()
            raise
        return service

    @property
    def sequences(self) -> int:
        """Answers at a time."""
        return self._config.sequences

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now; False while a stage is being replaced."""
        return self._cluster is not None and self._cluster.ready

    @property
    def health(self) -> Health:
        """See `ModelService.health`."""
        return "ready" if self.ready else "recovering"

    def status(self) -> dict[str, Any]:
        """What the service is doing, as values for JSON."""
        cluster = self._cluster
        host = None if cluster is None or cluster.state == "loading" else cluster.host
        return {
            "model": self.name,
            "digest": self.model.digest,
            "state": "loading" if cluster is None else cluster.state,
            "placement": "" if cluster is None else cluster.wiring,
            "port": self.port,
            "context": self.context,
            "sequences": self._config.sequences,
            "queue": 0 if host is None else host.waiting,
            "active": 0 if host is None else host.active,
            "tokens_per_second": self._rate.per_second(),
            "batch_invariant": self.batch_invariant,
            "speculation": None if host is None else speculation(host),
            "uptime": time.monotonic() - self._started,
            "stages": [
                {
                    "index": index,
                    "layers": list(stage.layers),
                    "pid": stage.pid,
                    "state": "ready" if stage.pid is not None else "replacing",
                    "rss_bytes": registry.resident_bytes(stage.pid),
                    "restarts": stage.restarts,
                }
                for index, stage in enumerate([] if cluster is None else cluster.stages_now())
            ],
        }

    def samples(self) -> Iterable[Sample]:
        """Its numbers for the metrics."""
        cluster = self._cluster
        if cluster is not None and cluster.state != "loading":
            yield from host_samples(self.name, cluster.host)

    @property
    def restarts(self) -> int:
        """Worker processes that ended and were replaced."""
        cluster = self._cluster
        return 0 if cluster is None or cluster.state == "loading" else cluster.stages.losses

    async def close(self) -> None:
        """End the stages and every stream; closing twice is harmless."""
        self._is_closed = True
        self._failure = f"the service of {self.name} is closed"
        self.fail_all(self._failure)
        await self._local_gateway.close()
        if self._cluster is not None:
            await self._cluster.close()
        await super().close()
        if self._entry is not None:
            registry.withdraw(self._entry)

    def on_ready(self) -> None:
        """Cluster's listener: go on."""
        if not self._is_closed:
            self._failure = None
        if self._entry is not None:
            self._publish()

    def on_failed(self, error: CordeeError) -> None:
        """Cluster's listener: nothing can be answered for now."""
        self._failure = f"{self.name} cannot answer: {error.message}"
        self.fail_all(self._failure)

    def _check(self) -> None:
        """Refuse a request that cannot be answered now, nor soon."""
        if self._failure is not None:
            raise StageFailed(self._failure)

    def _ask(self, node: str, data: bytes) -> None:
        """The gateway's messages to the scheduler."""
        message = streams.decode(data)
        if self._cluster is not None and not isinstance(message, Said):
            self._cluster.host.receive(NODE, message)

    def _say(self, node: str, said: Said) -> None:
        """The scheduler's messages to the gateway."""
        self._local_gateway.receive(NODE, said)

    async def _measure(self, store: Store, report: Callable[[str], None]) -> bool | None:
        """Whether the model is batch-invariant here, as the store knows it or as it is measured now."""
        assert self._cluster is not None
        host = self._cluster.host
        host.is_measured = True  # whatever comes of it: it is not measured beside streams
        name = batch_invariance.key(self._cluster.stages.descriptions, self._config)
        known = store.note(self.model.digest, name)
        if known is not None:
            return known
        report("measuring whether batches change the model's arithmetic (once for each model)")
        await host.measure(RESULT_SECONDS_MAX)
        found = host.batch_invariant
        try:
            if found is not None:
                store.set_note(self.model.digest, name, found)
        except StorageFailed as error:
            report(f"the result is not stored: {error.message}")
        return found

    def _publish(self) -> None:
        try:
            self._entry = registry.publish(self.name, self.status())
        except (OSError, StorageFailed):
            log.exception("`cordee ps` will not show this service as it is")


def samples(services: Mapping[str, LocalService]) -> Callable[[], Iterable[Sample]]:
    """The numbers of all services of this process, each time they are asked for."""
    meter = Meter()

    def now() -> Iterable[Sample]:
        meter.watts()
        running = list(services.values())
        yield from (each for service in running for each in service.samples())
        yield from machine_samples(sum(service.restarts for service in running), meter)

    return now


def _stage_config(
    header: Header, stages: int, config: ServiceConfig, requested: SizeRequest, name: str
) -> StageConfig:
    return sizing.stage_config(
        header,
        requested,
        name=name,
        stages=stages,
        threads=config.threads,
        devices=config.devices,
        batch_invariant=config.batch_invariant,
        command=config.command,
    )


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
