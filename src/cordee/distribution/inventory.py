"""What lies on a node's disk of the cluster's models: looked at again and again, read once, kept in bounds.

A whole model of the store is *offered* to the cluster once it was read for its manifest; that takes a minute
for 60 GB, so it is done beside everything else, one model at a time, the smallest first. A fault of one
model is told and does not hide the others. All disk work happens in threads.
"""

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from cordee.cluster.disk import StoredSlice, removable
from cordee.cluster.facts import Offer, Reading, SliceHeld
from cordee.cluster.goals import DISK_RESERVE_BYTES, SliceGoal
from cordee.distribution.pull import is_on_hub
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, CordeeError
from cordee.machine.sizing import CELLS_DEFAULT
from cordee.models.gguf import Header
from cordee.models.shape import model_shape
from cordee.models.store import Store, StoredModel

SCAN_SECONDS = 5.0  # how often the store is looked at: `cordee pull` may have added a model
# A node starts so much later, and offers from its first word what is read so fast; and who asks for a model
# that may have been pulled just now waits so long.
READING_SECONDS = 2.0
SEQUENCES = 8  # streams that a model is served for, unless it is wished otherwise
OFFERS_MAX = 32  # heartbeats carry them all
# Free space is told in steps, so that every log line on disk is no news to the cluster.
DISK_STEP_BYTES = 256 << 20
# What was half fetched and then given up stays so long at least: whoever wanted it may want it again.
GROWING_KEEP_SECONDS = 600.0
# A damaged model does not mend itself; a full disk may. Reading is not tried again before.
AGAIN_SECONDS = 600.0

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The node ends, or nobody wants this any more; raised out of a thread's work by its progress."""


class Inventory:
    """See the module's docstring. `changed` is called when there is something new to tell."""

    def __init__(self, store: Store, parts: SliceStore, changed: Callable[[], None]) -> None:
        self.offers: tuple[Offer, ...] = ()
        self.slices: tuple[SliceHeld, ...] = ()
        self.disk_free_bytes = 0
        self.reading: dict[str, Reading] = {}  # by model name
        self._store = store
        self._parts = parts
        self._changed = changed
        self._scanning = asyncio.Lock()
        self._offered: dict[StoredModel, Offer] = {}
        self._told: set[str] = set()  # faults that the last look found
        self._reader: asyncio.Task | None = None
        self._not_before: dict[str, float] = {}  # by digest, of what could not be read or was just verified
        self._verifying: dict[str, asyncio.Task] = {}
        self._stopped = threading.Event()

    async def look(self) -> None:
        """`scan`, and wait a little for what has to be read."""
        await self.scan()
        with suppress(TimeoutError):
            async with asyncio.timeout(READING_SECONDS):
                while self._reader is not None:
                    await asyncio.wait([self._reader])

    async def scan(self) -> None:
        """Look at the disk, and begin to read a model that was added."""
        async with self._scanning:
            found, unread = await asyncio.to_thread(self._look)
            if found != (self.offers, self.slices, self.disk_free_bytes):
                self.offers, self.slices, self.disk_free_bytes = found
                self._changed()
        now = time.monotonic()
        self._not_before = {digest: at for digest, at in self._not_before.items() if at > now}
        ready = [model for model in unread if model.digest not in self._not_before]
        if ready and self._reader is None and not self._stopped.is_set():
            smallest = min(ready, key=lambda model: (model.nbytes, model.name))
            self._reader = asyncio.create_task(self._read(smallest))

    def damaged(self, digest: str, message: str) -> None:
        """A chunk on this disk is not what its manifest says: look at all of the model's parts, but not
        always.

        (A damaged whole model stays, and whoever asks for its chunks finds it damaged again.)
        """
        if digest in self._not_before or digest in self._verifying:
            return
        log.warning("%s", message)
        self._not_before[digest] = time.monotonic() + AGAIN_SECONDS
        self._verifying[digest] = task = asyncio.create_task(self._verify(digest))
        task.add_done_callback(lambda _: self._verifying.pop(digest, None))

    async def tidy(
        self, me: str, wanted: Collection[SliceGoal], others: Mapping[str, Sequence[SliceHeld]]
    ) -> None:
        """Remove what nobody needs, while the disk is short (cluster/disk.py)."""
        gone = await asyncio.to_thread(self._tidy, me, set(wanted), others)
        for part in gone:
            what = f"layers {part.first} to {part.last - 1}" if part.last else "the embedding"
            log.warning("removed to free the disk: %s of model %s", what, part.model)
        if gone:
            await self.scan()

    async def close(self) -> None:
        """End what is being read."""
        self._stopped.set()
        tasks = [*self._verifying.values(), *([self._reader] if self._reader else [])]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look(self) -> tuple[tuple[tuple[Offer, ...], tuple[SliceHeld, ...], int], list[StoredModel]]:
        faults: list[str] = []
        made, offers, unread = self._parts.made(), {}, []
        for named in self._store.list(faults.append)[:OFFERS_MAX]:
            try:
                model = self._store.get(named.name)
                offer = self._offered.get(model)
                if offer is None or offer.shape.digest != made.get(model.digest):
                    offer = self._offer(model, made.get(model.digest))
                if offer is None:
                    unread.append(model)
                else:
                    offers[model] = offer
            except CordeeError as error:
                faults.append(f"{named.name} is not offered: {error.message}")
        self._offered = offers
        slices: list[SliceHeld] = []
        growing_bytes = 0
        for digest in self._parts.known():
            try:
                slices += self._parts.held(digest)
                growing_bytes += sum(part.nbytes for part in self._parts.lying(digest)[1])
            except (CordeeError, OSError) as error:
                faults.append(f"what lies here of model {digest} cannot be used: {error}")
        for fault in faults:
            if fault not in self._told:
                log.warning("%s", fault)
        self._told = set(faults)
        # What is half fetched counts as free: otherwise a fetch would seem to fit no more while it goes on.
        free = shutil.disk_usage(self._store.root).free + growing_bytes
        ordered = sorted(slices, key=lambda held: (held.model, held.first, held.last))
        return (tuple(offers.values()), tuple(ordered), free - free % DISK_STEP_BYTES), unread

    def _offer(self, model: StoredModel, digest: str | None) -> Offer | None:
        """None if the model is to be read first."""
        if digest is None:
            return None
        try:
            header = self._parts.manifest(digest).header
        except BadModelFile:  # the manifest is damaged: made again
            return None
        source = model.source if is_on_hub(model.source) else ""
        return Offer(model.name, model_shape(header, digest), default_context(header), source)

    async def _read(self, model: StoredModel) -> None:
        def progress(done_bytes: int, total_bytes: int) -> None:
            if self._stopped.is_set():
                raise Stopped
            self.reading[model.name] = Reading(model.name, "", done_bytes, total_bytes)

        try:
            await asyncio.to_thread(self._parts.manifest_of, model, progress)
        except CordeeError as error:
            log.warning("%s is not offered: %s", model.name, error.message)
            self._not_before[model.digest] = time.monotonic() + AGAIN_SECONDS
        except Stopped:
            return
        finally:
            self.reading.pop(model.name, None)
            self._reader = None
        await self.scan()

    async def _verify(self, digest: str) -> None:
        def progress(_done_bytes: int, _total_bytes: int) -> None:
            if self._stopped.is_set():
                raise Stopped

        for held in [held for held in self.slices if held.model == digest]:
            try:
                names = await asyncio.to_thread(self._parts.verify, digest, held.first, held.last, progress)
            except Stopped:
                return
            except (CordeeError, OSError) as error:  # removed meanwhile, perhaps
                log.warning("cannot be verified: %s", error)
                continue
            for name in names:
                log.warning("damaged on this disk: %s", name)
        await self.scan()

    def _tidy(
        self, me: str, wanted: set[SliceGoal], others: Mapping[str, Sequence[SliceHeld]]
    ) -> list[SliceHeld]:
        free = shutil.disk_usage(self._store.root).free
        complete: list[StoredSlice] = []
        growing: list[StoredSlice] = []
        for digest in self._parts.known():
            with suppress(CordeeError, OSError):
                for found, into in zip(self._parts.lying(digest), (complete, growing), strict=True):
                    into += found
        free -= self._missing_bytes(wanted, complete, growing)
        gone = []
        models = {goal.model for goal in wanted}
        for part in sorted(growing, key=lambda part: part.used):
            held = part.held
            if free >= DISK_RESERVE_BYTES:
                break
            is_wanted = SliceGoal(held.model, held.first, held.last) in wanted
            is_fresh = time.time() - part.used < GROWING_KEEP_SECONDS
            if not is_wanted and not is_fresh and not (held.last == 0 and held.model in models):
                gone.append(held)
                free += part.nbytes
        gone += removable(me, complete, wanted, others, free)
        for held in gone:
            self._parts.drop(held.model, held.first, held.last)
        return gone

    def _missing_bytes(
        self, wanted: set[SliceGoal], complete: Sequence[StoredSlice], growing: Sequence[StoredSlice]
    ) -> int:
        """What the goals that are not met yet will take of the disk."""
        done = {(part.held.model, part.held.first, part.held.last) for part in complete}
        come = {(part.held.model, part.held.first, part.held.last): part.nbytes for part in growing}
        missing = 0
        for goal in wanted:
            key = (goal.model, goal.first, goal.last)
            with suppress(CordeeError):
                if key not in done and self._parts.slice(*key) is None:
                    missing += max(0, self._parts.layout(*key).nbytes - come.get(key, 0))
        return missing


def default_context(header: Header) -> int:
    """Tokens for each of SEQUENCES streams that a model is served with unless told otherwise."""
    own = header.get(".context_length") or CELLS_DEFAULT
    return min(own, CELLS_DEFAULT // SEQUENCES)
