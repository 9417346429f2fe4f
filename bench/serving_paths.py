"""One machine by itself: the local service beside a cluster of one, in one process, interleaved.

    python bench/serving_paths.py [--rounds N] [--model FILE] [--json]

`local` is the service of `cordee run` and `serve` (serving/local_service.py): scheduler, pipeline, text. The
other is what a node of a cluster has around the same worker, with nothing but function calls in between:
gateway, scheduler host, stages with fixed goals, and tokens over the data plane's TLS. Rates are medians over
the rounds in tokens per second; the ratio is the median of the rounds' own ratios, cluster to local.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cordee.cluster.facts import Placement, StagePlace
from cordee.cluster.goals import HostGoal, SliceGoal, StageGoal, StageSpec, spec_of
from cordee.cluster.reconcile import WireAction
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import StageFailed
from cordee.generation import streams
from cordee.generation.streams import Said
from cordee.models.gguf import engine_of, read_header
from cordee.models.store import Store, StoredModel
from cordee.net import identity
from cordee.serving.cluster_service import ClusterGateway, ClusterService
from cordee.serving.local_service import LocalService, ServiceConfig
from cordee.serving.scheduler_host import SchedulerHost
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Join, KvAnswer, Tokens
from cordee.worker.process import opening
from cordee.worker.stages import Files, Stages
from llama import CONTEXT, SEQUENCES, ServicePeer

LISTEN = "127.0.0.1"
WIRING = "wiring"
READY_SECONDS = 60.0
STREAMS = (1, 8)


class ClusterOfOne:
    """What an agent does for a model that runs whole on its own node, goals and routes being fixed."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        self._header = read_header(model.path)
        self._folder = folder
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._host: SchedulerHost | None = None
        self._gateway = ClusterGateway("one", self._ask)
        self.service = ClusterService(model, model.path, CONTEXT, self._gateway)
        place = StagePlace("one", "CPU", 0, self._header.layers)
        self._placement = Placement(model.digest, CONTEXT, SEQUENCES, (place,))

    async def open(self) -> None:
        """Load the model, wire its stage, take requests."""
        self._stages = await Stages.open(self, self._folder, LISTEN)
        inbox, endpoint = await tls_link.open_listener(self._folder, LISTEN, self._accept)
        self._inbox = inbox
        self._stages.start(spec_of(self._placement, 0))
        await self._until("loaded")
        [worker] = self._stages.workers
        self._stages.wire(WireAction(worker, StageGoal(self._placement, 0, WIRING, endpoint)))
        await self._until("wired")
        goal = HostGoal(self._placement, WIRING)
        self._host = SchedulerHost(goal, self.service.vocabulary, self._stages, self._say)
        self._host.is_measured = True  # trying the model out is no part of what is measured
        self._host.follow(goal)
        self._gateway.follow({self.service.key: "one"})
        self._tasks.append(asyncio.create_task(self._tick()))

    async def close(self) -> None:
        """End all of it."""
        for task in self._tasks:
            task.cancel()
        await self._gateway.close()
        self._inbox.close()
        await self._stages.close()

    async def prepare(self, load: StageSpec) -> Files:
        """Stages' owner: the whole model is its only slice."""
        vocabulary: Vocabulary = self.service.vocabulary
        ends = tuple(vocabulary.end_of_generation)
        return Files(engine_of(self._header), self._header.path, None, True, ends)

    def changed(self) -> None:
        """Stages' owner: somebody may be waiting for it."""
        self._changed.set()

    def failed(self, load: StageSpec, detail: str) -> None:
        """Stages' owner: there is nothing to measure."""
        raise StageFailed(f"{SliceGoal(load.model, load.first, load.last)}: {detail}")

    async def _until(self, state: str) -> None:
        async with asyncio.timeout(READY_SECONDS):
            while [each.state for each in self._stages.workers.values()] != [state]:
                self._changed.clear()
                await self._changed.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(await opening(reader), Join):
                while True:
                    message, _ = await frames.read(reader)
                    if isinstance(message, Tokens | KvAnswer) and self._host is not None:
                        self._host.on_result(message)
        except LinkClosed:
            writer.transport.abort()

    async def _tick(self) -> None:
        while self._host is not None:
            await asyncio.sleep(0.05)
            self._host.tick(time.monotonic())

    def _ask(self, node: str, data: bytes) -> None:
        message = streams.decode(data)
        if self._host is not None and not isinstance(message, Said):
            self._host.receive(message)

    def _say(self, node: str, said: Said) -> None:
        self._gateway.receive(streams.encode(said))


async def measure(path: Path, home: Path, rounds: int) -> list[dict[str, object]]:
    """A line for each number of streams."""
    store = Store()
    model = store.add_file(path, path.stem)
    local = await LocalService.start(model, store, config=ServiceConfig(context=CONTEXT, sequences=SEQUENCES))
    one = ClusterOfOne(model, identity.found(time.time()).folder)
    await one.open()
    peers = {"cluster": ServicePeer(one.service), "local": ServicePeer(local)}
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in peers for n in STREAMS}
    try:
        for number in range(-1, rounds):
            order = list(peers.items())
            for name, peer in order if number % 2 else reversed(order):
                for count in STREAMS:
                    rate = await peer.decode(count)
                    if number >= 0:
                        rates[name, count].append(rate)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    finally:
        await one.close()
        await local.close()
    return [_line(count, rates["cluster", count], rates["local", count]) for count in STREAMS]


def _line(count: int, cluster: list[float], local: list[float]) -> dict[str, object]:
    ratios = [left / right for left, right in zip(cluster, local, strict=True)]
    return {
        "case": f"decode-cluster-of-one-{count}-streams",
        "ours": round(statistics.median(cluster), 1),
        "peer": round(statistics.median(local), 1),
        "peer_name": "local",
        "unit": "tokens/s",
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="One machine by itself: the local service beside a cluster of one."
    )
    parser.add_argument("--model", type=Path, default=Path(sys.prefix) / "share" / "cordee" / "starter.gguf")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as home:
        os.environ["CORDEE_HOME"] = home
        found = asyncio.run(measure(options.model, Path(home), options.rounds))
    for line in found:
        print(
            json.dumps(line)
            if options.json
            else "{case:<36}{ours:>8}{peer:>8}  {peer_name:<8}{ratio:>6}".format(**line)
        )


if __name__ == "__main__":
    main()
