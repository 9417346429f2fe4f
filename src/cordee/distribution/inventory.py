"""The models and slices on a node's disk: found by scans, read for manifests, removed if the disk is short.

A whole model in the store is *offered* to the cluster once it was read for its manifest; that takes a minute
for 60 GB, so it is done in the background, one model at a time, the smallest first. A fault of one model is
logged and does not hide the others. All disk work is done in threads.
"""

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from cordee.cluster.demand import usual_context
from cordee.cluster.disk import StoredSlice, removable
from cordee.cluster.facts import Offer, Reading, SliceHeld
from cordee.cluster.goals import DISK_RESERVE_BYTES, SliceGoal
from cordee.distribution.pull import is_on_hub
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.models.architectures import is_encoder
from cordee.models.fit import own_context
from cordee.models.shape import model_shape
from cordee.models.store import Store, StoredModel

SCAN_SECONDS = 5.0  # how often the store is scanned: `cordee pull` may have added a model
# How long a starting node waits for models to be read, so that its first heartbeat offers them; and a request
# for a model that may have been pulled just now.
READING_SECONDS = 2.0
OFFERS_MAX = 32  # heartbeats carry them all
# Free space is published in steps, so that not every log line on disk makes a heartbeat.
DISK_STEP_BYTES = 256 << 20
# An abandoned, half-fetched slice stays at least this long: it may be wanted again.
GROWING_KEEP_SECONDS = 600.0
# Reading is not tried again before: a damaged model does not repair itself, but a full disk may get room.
AGAIN_SECONDS = 600.0

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The node stops, or this is no longer wanted; raised by the progress callback to end a thread's work."""


class Inventory:
    """See the module's docstring. `changed` is called when there is something new to publish."""

    def __init__(self, store: Store, slice_store: SliceStore, changed: Callable[[], None]) -> None:
        self.offers: tuple[Offer, ...] = ()
        self.slices: tuple[SliceHeld, ...] = ()
        self.disk_free_bytes = 0
        self.reading: dict[str, Reading] = {}  # by model name
        self._store = store
        self._slice_store = slice_store
        self._changed = changed
        self._scanning = asyncio.Lock()
        self._offered: dict[StoredModel, Offer] = {}
        self._logged: set[str] = set()  # faults that the last scan found
        self._reader: asyncio.Task[None] | None = None
        self._not_before: dict[str, float] = {}  # by digest, of what could not be read or was just verified
        self._verifying: dict[str, asyncio.Task[None]] = {}
        self._stopped = threading.Event()

    async def look(self) -> None:
        """`scan`, and wait a little for models that have to be read."""
        await self.scan()
        with suppress(TimeoutError):
            async with asyncio.timeout(READING_SECONDS):
                while self._reader is not None:
                    await asyncio.wait([self._reader])

    async def scan(self) -> None:
        """Scan the disk, and begin to read a model that was added."""
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
        """A chunk on this disk does not match its manifest: verify the model's slices, but not too often.

        (A damaged whole model stays, so each request for its chunks finds it damaged again.)
        """
        if digest in self._not_before or digest in self._verifying:
            return
        log.warning("%s", message)
        self._not_before[digest] = time.monotonic() + AGAIN_SECONDS
        self._verifying[digest] = task = asyncio.create_task(self._verify(digest))

        def forget(_: asyncio.Task[None]) -> None:
            self._verifying.pop(digest, None)

        task.add_done_callback(forget)

    async def tidy(
        self, me: str, wanted: Collection[SliceGoal], others: Mapping[str, Sequence[SliceHeld]]
    ) -> None:
        """While the disk is short, remove what no node needs (cluster/disk.py)."""
        gone = await asyncio.to_thread(self._tidy, me, set(wanted), others)
        for held in gone:
            what = f"layers {held.first} to {held.last - 1}" if held.last else "the embedding"
            log.warning("removed to free the disk: %s of model %s", what, held.model)
        if gone:
            await self.scan()

    async def close(self) -> None:
        """Stop reading and verifying."""
        self._stopped.set()
        tasks = [*self._verifying.values(), *([self._reader] if self._reader else [])]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look(self) -> tuple[tuple[tuple[Offer, ...], tuple[SliceHeld, ...], int], list[StoredModel]]:
        faults: list[str] = []
        made = self._slice_store.made()
        offers: dict[StoredModel, Offer] = {}
        unread: list[StoredModel] = []
        for named in self._store.list(faults.append)[:OFFERS_MAX]:
            try:
                model = self._store.get(named.name)
                if is_encoder(model.architecture):  # answered where it is (serving/embedders.py)
                    continue
                offer = self._offered.get(model)
                if offer is None or offer.shape.digest != made.get(model.digest):
                    offer = self._offer(model, made.get(model.digest))
                if offer is None:
                    unread.append(model)
                else:
                    offers[model] = offer
            except Exception as error:  # also a fault of ours: one model must not hide the others
                faults.append(f"{named.name} is not offered: {_said(error)}")
        self._offered = offers
        slices: list[SliceHeld] = []
        growing_bytes = 0
        for digest in self._slice_store.known():
            try:
                slices += self._slice_store.held(digest)
                growing_bytes += sum(growing.nbytes for growing in self._slice_store.on_disk(digest)[1])
            except Exception as error:  # as above
                faults.append(f"the slices of model {digest} on this disk cannot be used: {_said(error)}")
        for fault in faults:
            if fault not in self._logged:
                log.warning("%s", fault)
        self._logged = set(faults)
        # What is half fetched counts as free: otherwise a fetch would no longer seem to fit while it runs.
        free = shutil.disk_usage(self._store.root).free + growing_bytes
        ordered = sorted(slices, key=lambda held: (held.model, held.first, held.last))
        return (tuple(offers.values()), tuple(ordered), free - free % DISK_STEP_BYTES), unread

    def _offer(self, model: StoredModel, digest: str | None) -> Offer | None:
        """The offer of a model with that manifest; None if the model must be read first."""
        if digest is None:
            return None
        try:
            header = self._slice_store.manifest(digest).header
        except (BadModelFile, UnsupportedModel):
            return None  # the manifest is damaged: make it again
        source = model.source if is_on_hub(model.source) else ""
        return Offer(model.name, model_shape(header, digest), usual_context(own_context(header)), source)

    async def _read(self, model: StoredModel) -> None:
        def progress(done_bytes: int, total_bytes: int) -> None:
            if self._stopped.is_set():
                raise Stopped
            self.reading[model.name] = Reading(model.name, "", done_bytes, total_bytes)

        try:
            await asyncio.to_thread(self._slice_store.manifest_of, model, progress)
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
            verify = self._slice_store.verify
            try:
                names = await asyncio.to_thread(verify, digest, held.first, held.last, progress)
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
        for digest in self._slice_store.known():
            with suppress(CordeeError, OSError):
                for found, into in zip(self._slice_store.on_disk(digest), (complete, growing), strict=True):
                    into += found
        free -= self._missing_bytes(wanted, complete, growing)
        gone: list[SliceHeld] = []
        models = {goal.model for goal in wanted}
        for stored in sorted(growing, key=lambda stored: stored.used):
            held = stored.held
            if free >= DISK_RESERVE_BYTES:
                break
            is_wanted = SliceGoal(held.model, held.first, held.last) in wanted
            is_fresh = time.time() - stored.used < GROWING_KEEP_SECONDS
            if not is_wanted and not is_fresh and not (held.last == 0 and held.model in models):
                gone.append(held)
                free += stored.nbytes
        gone += removable(me, complete, wanted, others, free)
        for held in gone:
            self._slice_store.drop(held.model, held.first, held.last)
        return gone

    def _missing_bytes(
        self, wanted: set[SliceGoal], complete: Sequence[StoredSlice], growing: Sequence[StoredSlice]
    ) -> int:
        """Bytes that the goals that are not met yet will take on disk."""
        done = {_key(stored) for stored in complete}
        come = {_key(stored): stored.nbytes for stored in growing}
        missing = 0
        for goal in wanted:
            key = (goal.model, goal.first, goal.last)
            with suppress(CordeeError):
                if key not in done and self._slice_store.slice(*key) is None:
                    missing += max(0, self._slice_store.layout(*key).nbytes - come.get(key, 0))
        return missing


def _said(error: Exception) -> str:
    return error.message if isinstance(error, CordeeError) else f"{type(error).__name__}: {error}"


def _key(stored: StoredSlice) -> tuple[str, int, int]:
    return stored.held.model, stored.held.first, stored.held.last
