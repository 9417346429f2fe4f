"""The models of the cluster on this node: what is here (inventory.py), and what is being fetched.

Slices come from neighbours by chunks (chunks.py), and what no neighbour has from the hub, if the model was
deployed from there (hub_source.py). The disk is read in threads; everything else runs on one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from cordee.cluster.facts import Offer, Reading, SliceHeld
from cordee.cluster.goals import SliceGoal, StageSpec
from cordee.cluster.membership import LISTEN_SECONDS
from cordee.cluster.memory import BATCH_ROWS
from cordee.distribution.attestation import Attestation
from cordee.distribution.chunks import ChunkClient, ChunkServer, chunk_key
from cordee.distribution.hub_ranges import HubModel
from cordee.distribution.hub_source import Hub
from cordee.distribution.inventory import SCAN_SECONDS, Inventory
from cordee.distribution.manifest import Manifest
from cordee.distribution.slice_store import SliceStore
from cordee.engine.stage import StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.models.gguf import engine_of
from cordee.models.store import Store
from cordee.net.bus import Bus
from cordee.worker.stages import Files, stage_name

FETCHES_MAX = 2  # slices fetched at once: each asks several neighbours already
# A failed fetch is tried again after this long: a neighbour may have started, the hub may answer again.
AGAIN_SECONDS = 10.0
# How long to wait for layers that no neighbour is known to have: a node that has just started, or was cut
# off, may not have heard from all of them yet. And how often to look.
HEARING_SECONDS = LISTEN_SECONDS
LOOK_SECONDS = 0.1
ATTEST_SECONDS = 600.0  # between two slices that are hashed again
OPENED_MAX = 64  # models whose names and end tokens are remembered
OPENINGS_MAX = 2  # vocabularies opened at once: each takes a core for half a second

log = logging.getLogger(__name__)


class LocalModelsOwner(Protocol):
    """What local models need to know of the cluster; called on the event loop."""

    def holders(self) -> Mapping[str, Sequence[SliceHeld]]:
        """What the other live nodes have on disk."""
        ...

    def sources(self) -> Mapping[str, str]:
        """Where on the hub models may be fetched from, by digest: those deployed from there."""
        ...

    def wanted(self) -> Collection[SliceGoal]:
        """Everything that this node should hold, or runs."""
        ...

    def changed(self) -> None:
        """There is something new to publish."""

    def fetch_failed(self, goal: SliceGoal, detail: str) -> None:
        """A slice could not be fetched."""

    def damaged(self, goal: SliceGoal) -> None:
        """A slice on this disk is damaged: workers that have loaded it compute wrongly."""


@dataclass(frozen=True)
class _Opened:
    """What stages need to know of a model: what people call it, and the tokens that end an answer."""

    name: str
    ends: tuple[int, ...]


class LocalModels:
    """See the module's docstring."""

    def __init__(self, store: Store, node: str, bus: Bus, owner: LocalModelsOwner) -> None:
        self.progress: dict[SliceGoal, tuple[int, int]] = {}  # bytes done and in all, of what is fetched now
        self._node = node
        self._owner = owner
        self._slice_store = SliceStore(store)
        self._attestation = Attestation(self._slice_store)
        self._inventory = Inventory(store, self._slice_store, owner.changed)
        self.hub = Hub(self._slice_store)
        self._client = ChunkClient(bus, self._slice_store, log.warning)
        self._fetches: dict[SliceGoal, asyncio.Task[None]] = {}
        self._not_before: dict[SliceGoal, float] = {}
        self._locks: WeakValueDictionary[SliceGoal, asyncio.Lock] = WeakValueDictionary()
        self._opened: dict[str, _Opened] = {}
        self._openings = asyncio.Semaphore(OPENINGS_MAX)
        bus.serve(chunk_key(node), ChunkServer(self._slice_store, self._inventory.damaged).answer)

    @property
    def offers(self) -> tuple[Offer, ...]:
        """The whole models that are here."""
        return self._inventory.offers

    @property
    def slices(self) -> tuple[SliceHeld, ...]:
        """The layers that are here."""
        return self._inventory.slices

    @property
    def disk_free_bytes(self) -> int:
        """Free disk space, as if nothing were half fetched."""
        return self._inventory.disk_free_bytes

    @property
    def reading(self) -> tuple[Reading, ...]:
        """The models that are being read for their manifests, to be offered or deployed."""
        return (*self._inventory.reading.values(), *self.hub.reading)

    @property
    def bytes_per_second(self) -> dict[str, float]:
        """The rate at which each node gave chunks in the last fetch from it."""
        return self._client.bytes_per_second

    async def look(self) -> None:
        """Scan the disk now: at the start, and for a model that may have been pulled just now."""
        await self._inventory.look()

    async def watch(self) -> None:
        """Scan the disk periodically, and keep it from running full."""
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                await self._inventory.scan()
                await self._inventory.tidy(self._node, self._owner.wanted(), self._owner.holders())
            except (CordeeError, OSError) as error:  # the disk may recover
                log.warning("the disk cannot be scanned: %s", error)

    async def attest(self) -> None:
        """Hash what this node should hold against its manifest, one slice at a time and slowly."""
        while True:
            await asyncio.sleep(ATTEST_SECONDS)
            goals = {
                goal
                for goal in self._owner.wanted()
                if SliceHeld(goal.model, goal.first, goal.last) in self.slices
                or SliceHeld(goal.model, goal.first, goal.last, whole=True) in self.slices
            }
            try:
                damaged = await asyncio.to_thread(self._attestation.check_oldest, goals)
            except (CordeeError, OSError) as error:  # it was removed meanwhile, perhaps
                log.info("not attested: %s", error)
                continue
            if damaged is not None:
                log.warning("layers %d to %d on this disk are damaged", damaged.first, damaged.last - 1)
                await self._inventory.scan()  # first: it is not held any more, whoever asks
                self._owner.damaged(damaged)

    async def vocabulary(self, digest: str, name: str) -> Vocabulary:
        """The vocabulary of a model that people call `name`; its manifest may come from another node.

        Raises:
            BadModelFile, UnsupportedModel: the model's vocabulary cannot be used.
            CordeeError: no node gives its manifest.
        """
        await self._manifest(digest)
        async with self._openings:
            path = await asyncio.to_thread(self._slice_store.vocabulary, digest)
            vocabulary = await asyncio.to_thread(Vocabulary, path, name)
        self._opened[digest] = _Opened(name, tuple(vocabulary.end_of_generation))
        while len(self._opened) > OPENED_MAX:
            del self._opened[next(iter(self._opened))]
        return vocabulary

    def pursue(self, goals: Sequence[SliceGoal]) -> None:
        """Fetch these slices, in this order, and no others; what came of others is kept."""
        now = time.monotonic()
        self._not_before = {goal: at for goal, at in self._not_before.items() if at > now}
        chosen = [goal for goal in goals if goal not in self._not_before][:FETCHES_MAX]
        for goal in self._fetches.keys() - set(chosen):
            self._fetches[goal].cancel()
        for goal in chosen:
            if goal not in self._fetches and len(self._fetches) < FETCHES_MAX:
                task = asyncio.get_running_loop().create_task(self._fetch(goal))
                self._fetches[goal] = task
                task.add_done_callback(partial(self._fetched, goal))

    async def prepare(self, load: StageSpec) -> Files:
        """The files of a stage; what is missing is assembled or fetched, what is here is attested.

        Raises:
            BadModelFile: a file is damaged on this disk.
            CordeeError: a file cannot be fetched.
        """
        path = await self._slice(load.slice)
        header = (await self._manifest(load.model)).header
        layers = header.layers
        is_cut_first = load.first == 0 and load.last < layers
        embedding = await self._slice(SliceGoal(load.model, 0, 0)) if is_cut_first else None
        config = StageConfig(
            context=load.context,
            sequences=load.sequences,
            batch_rows=max(BATCH_ROWS, load.sequences),
            devices=() if load.device == "CPU" else (load.device,),
        )
        opened = await self._opened_of(load.model)
        is_last, name = load.last == layers, stage_name(opened.name, load, layers)
        await asyncio.to_thread(self._attestation.check, load.slice, name, opened.name)
        if is_cut_first:
            embedding_goal, called = SliceGoal(load.model, 0, 0), f"the embedding of {opened.name}"
            await asyncio.to_thread(self._attestation.check, embedding_goal, called, opened.name)
        return Files(config, engine_of(header), path, embedding, is_last, opened.ends, name)

    async def close(self) -> None:
        """End all fetches."""
        for task in self._fetches.values():
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        self._attestation.close()
        await self.hub.close()
        await self._inventory.close()

    async def _fetch(self, goal: SliceGoal) -> None:
        try:
            await self._slice(goal)
        except (CordeeError, OSError) as error:
            self._not_before[goal] = time.monotonic() + AGAIN_SECONDS
            self._owner.fetch_failed(goal, str(error))
        await self._inventory.scan()

    def _fetched(self, goal: SliceGoal, _: asyncio.Task[None]) -> None:
        self._fetches.pop(goal, None)

    async def _slice(self, goal: SliceGoal) -> Path:
        def progress(done_bytes: int, total_bytes: int) -> None:
            self.progress[goal] = (done_bytes, total_bytes)

        await self._until_held(goal)
        await self._manifest(goal.model)
        # If two want the same slice at once, one fetches it and the other waits.
        async with self._locks.setdefault(goal, asyncio.Lock()):
            here = await asyncio.to_thread(self._slice_store.slice, goal.model, goal.first, goal.last)
            if here is not None:
                return here.path
            try:
                slice_file = await self._client.slice(
                    goal.model,
                    goal.first,
                    goal.last,
                    self._owner.holders,
                    progress,
                    self._hub_model(goal.model),
                )
            finally:
                self.progress.pop(goal, None)
            self._attestation.note(goal)
        return slice_file.path

    async def _until_held(self, goal: SliceGoal) -> None:
        """Wait a while until each of the layers is known to be on some node."""
        until = time.monotonic() + HEARING_SECONDS
        while not self._is_held(goal) and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)

    def _is_held(self, goal: SliceGoal) -> bool:
        known = [*self.slices, *chain.from_iterable(self._owner.holders().values())]
        held = [each for each in known if each.model == goal.model]
        if goal.model in self._owner.sources():
            return True
        if goal.last == 0:
            return any(each.whole or each.last == 0 for each in held)
        return all(
            any(each.first <= layer < each.last for each in held) for layer in range(goal.first, goal.last)
        )

    def _hub_model(self, digest: str) -> Callable[[], HubModel] | None:
        source = self._owner.sources().get(digest)
        return None if source is None else lambda: self.hub.open(source)

    async def _manifest(self, digest: str) -> Manifest:
        """A model's manifest, from any node; those that hold some of the model are asked first."""
        holders = self._owner.holders()
        holding = {node: any(held.model == digest for held in slices) for node, slices in holders.items()}
        return await self._client.manifest(digest, sorted(holding, key=lambda node: not holding[node]))

    async def _opened_of(self, digest: str) -> _Opened:
        """The same of a model whose vocabulary was perhaps not opened yet."""
        if digest not in self._opened:
            (await self.vocabulary(digest, (await self._manifest(digest)).name)).close()
        return self._opened[digest]
