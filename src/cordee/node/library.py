"""What lies on a node's disk of the cluster's models, and what is being fetched.

The whole models of this node's store are *offered* to the cluster; slices of others come from neighbours, by
chunks (chunks.py). Reading the disk happens in threads; everything else on one event loop.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cordee.cluster.facts import Offer, SliceHeld
from cordee.cluster.goals import Load, SliceGoal
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.models.parts import Parts
from cordee.models.shape import model_shape
from cordee.models.store import Store
from cordee.node.bus import Bus
from cordee.node.chunks import ChunkClient, ChunkServer, chunk_key
from cordee.node.sizing import CELLS_DEFAULT
from cordee.node.stages import Files

SCAN_SECONDS = 5.0  # how often the store is looked at: `cordee pull` may have added a model
FETCHES_MAX = 2  # slices fetched at once: each asks several neighbours already
SEQUENCES = 8  # streams that a model is served for, unless it is wished otherwise
OFFERS_MAX = 32  # beats carry them all
# Free space is told in steps, so that every log line on disk is no news to the cluster.
DISK_STEP_BYTES = 256 << 20

Holders = Callable[[], Mapping[str, Sequence[SliceHeld]]]

log = logging.getLogger(__name__)


class Library:
    """See the module's docstring.

    `holders` says which other nodes have what; `changed` is called when there is something new to tell.
    """

    def __init__(
        self, store: Store, node: str, bus: Bus, holders: Holders, changed: Callable[[], None]
    ) -> None:
        self.offers: tuple[Offer, ...] = ()
        self.slices: tuple[SliceHeld, ...] = ()
        self.disk_free_bytes = 0
        self.progress: dict[SliceGoal, tuple[int, int]] = {}  # bytes done and in all, of what is fetched now
        self._store = store
        self._parts = Parts(store)
        self._client = ChunkClient(bus, self._parts, log.warning)
        self._holders = holders
        self._changed = changed
        self._fetches: dict[SliceGoal, asyncio.Task] = {}
        self._verifying: dict[str, asyncio.Task] = {}
        self._ends: dict[str, tuple[int, ...]] = {}
        bus.serve(chunk_key(node), ChunkServer(self._parts, self._on_damage).answer)

    @property
    def bytes_per_second(self) -> dict[str, float]:
        """What each node gave when it was last fetched from."""
        return self._client.bytes_per_second

    async def watch(self) -> None:
        """Look at the disk, again and again."""
        while True:
            await self.scan()
            await asyncio.sleep(SCAN_SECONDS)

    async def scan(self) -> None:
        """Look at the disk. A model that was just added is read once, for its sheet."""
        found = await asyncio.to_thread(self._scan)
        if found != (self.offers, self.slices, self.disk_free_bytes):
            self.offers, self.slices, self.disk_free_bytes = found
            self._changed()

    async def vocabulary(self, digest: str, nodes: Iterable[str]) -> Path:
        """A file for `Vocabulary`; the model's sheet comes from one of `nodes` if it is not here.

        Raises:
            CordeeError: nobody gives it.
        """
        await self._client.sheet(digest, nodes)
        return await asyncio.to_thread(self._parts.vocabulary, digest)

    def fetch(self, goal: SliceGoal, failed: Callable[[str], None]) -> None:
        """Begin to fetch a slice, unless that is under way, or enough others are."""
        if goal in self._fetches or len(self._fetches) >= FETCHES_MAX:
            return
        task = asyncio.get_running_loop().create_task(self._fetch(goal, failed))
        self._fetches[goal] = task
        task.add_done_callback(lambda _: self._fetches.pop(goal, None))

    def abandon(self, wanted: Iterable[SliceGoal]) -> None:
        """End all fetches but those wanted; what came is kept."""
        for goal in self._fetches.keys() - set(wanted):
            self._fetches[goal].cancel()

    async def prepare(self, load: Load) -> Files:
        """The files of a load; what is missing is assembled or fetched.

        Raises:
            CordeeError: it cannot be had.
        """
        part = await self._part(load.slice)
        layers = (await self._client.sheet(load.model, self._holders())).header.layers
        is_cut_first = load.first == 0 and load.last < layers
        embedding = await self._part(SliceGoal(load.model, 0, 0)) if is_cut_first else None
        return Files(part, embedding, load.last == layers, await self._ends_of(load.model))

    async def close(self) -> None:
        """End all fetches."""
        tasks = [*self._fetches.values(), *self._verifying.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, goal: SliceGoal, failed: Callable[[str], None]) -> None:
        try:
            await self._part(goal)
        except CordeeError as error:
            failed(error.message)
        finally:
            self.progress.pop(goal, None)
            await self.scan()

    async def _part(self, goal: SliceGoal) -> Path:
        holders = self._holders()
        await self._client.sheet(goal.model, [node for node, held in holders.items() if held])

        def progress(done_bytes: int, total_bytes: int) -> None:
            self.progress[goal] = (done_bytes, total_bytes)

        part = await self._client.part(goal.model, goal.first, goal.last, self._holders, progress)
        self.progress.pop(goal, None)
        return part.path

    async def _ends_of(self, digest: str) -> tuple[int, ...]:
        if digest not in self._ends:
            path = await asyncio.to_thread(self._parts.vocabulary, digest)
            vocabulary = Vocabulary(path)
            self._ends[digest] = tuple(vocabulary.end_of_generation)
            vocabulary.close()
        return self._ends[digest]

    def _scan(self) -> tuple[tuple[Offer, ...], tuple[SliceHeld, ...], int]:
        offers = []
        try:
            for model in self._store.list()[:OFFERS_MAX]:
                sheet = self._parts.sheet_of(model)
                own = sheet.header.get(".context_length") or CELLS_DEFAULT
                context = min(own, CELLS_DEFAULT // SEQUENCES)
                offers.append(Offer(model.name, model_shape(sheet.header, sheet.digest), context))
        except CordeeError as error:
            log.warning("a model of the store is not offered: %s", error.message)
        slices: list[SliceHeld] = []
        for digest in self._parts.known():
            try:
                slices += self._parts.held(digest)
            except CordeeError as error:
                log.warning("what lies here of model %s cannot be used: %s", digest, error.message)
        free = shutil.disk_usage(self._store.root).free
        ordered = sorted(slices, key=lambda held: (held.model, held.first, held.last))
        return tuple(offers), tuple(ordered), free - free % DISK_STEP_BYTES

    def _on_damage(self, digest: str, message: str) -> None:
        """A chunk on this disk is not what its sheet says: look at all of the model's parts."""
        log.warning("%s", message)
        if digest not in self._verifying:
            self._verifying[digest] = task = asyncio.get_running_loop().create_task(self._verify(digest))
            task.add_done_callback(lambda _: self._verifying.pop(digest, None))

    async def _verify(self, digest: str) -> None:
        for held in self.slices:
            if held.model == digest:
                for name in await asyncio.to_thread(self._parts.verify, digest, held.first, held.last):
                    log.warning("damaged on this disk: %s", name)
        await self.scan()
