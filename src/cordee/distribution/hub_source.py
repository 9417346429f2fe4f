"""A node's access to the model hub: only for models that were deployed from there, and logged each time.

A model on the hub is read once (a *pass*), of which nothing is kept but its manifest; then any node can fetch
and check its chunks.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import ModelShape, Reading
from cordee.distribution.hub import HubFile
from cordee.distribution.hub_ranges import HubModel
from cordee.distribution.inventory import Stopped
from cordee.distribution.manifest import Manifest
from cordee.distribution.pull import hub_files
from cordee.distribution.slice_store import SliceStore
from cordee.errors import CordeeError, Overloaded
from cordee.machine.sizing import size_request
from cordee.models.fit import own_context
from cordee.models.shape import model_shape

PASSES_MAX = 2  # at once: one fills most connections already
FAULTS_MAX = 16  # kept of failed passes, for those who ask how they went

log = logging.getLogger(__name__)


@dataclass
class _Pass:
    reading: Reading
    task: asyncio.Task[None] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)


class Hub:
    """See the module's docstring. `open` and `shape` are for threads, everything else for one event loop."""

    def __init__(self, slice_store: SliceStore) -> None:
        self._slice_store = slice_store
        self._passes: dict[str, _Pass] = {}
        self._faults: dict[str, CordeeError] = {}

    @property
    def reading(self) -> list[Reading]:
        """The passes that are under way."""
        return [each.reading for each in self._passes.values()]

    def open(self, source: str) -> HubModel:
        """A model on the hub ('owner/name/file.gguf'), to fill slices from; takes seconds.

        Raises:
            CordeeError: the hub cannot be reached or has no such model.
        """
        with _opened(source) as model:
            return model

    def shape(
        self, source: str, name: str, context: int | None, sequences: int | None
    ) -> tuple[ModelShape, SizeRequest]:
        """The shape of a model with `name` for a digest, and what is asked of it.

        Raises:
            BadRequest: the model was made for a shorter context.
            CordeeError: as `open` does.
        """
        with _opened(source) as model:
            own = own_context(model.header)
            return model_shape(model.header, name), size_request(own, context, sequences, name)

    def read(self, name: str, source: str, nbytes: int, then: Callable[[Manifest], None]) -> Reading:
        """Begin to read a model for its manifest, unless that is under way; `then` is called with it.

        Raises:
            Overloaded: too many passes are under way.
        """
        if name not in self._passes:
            if len(self._passes) >= PASSES_MAX:
                names = ", ".join(self._passes)
                raise Overloaded(
                    f"This node is reading {names} from the hub: deploy {name} when that is done."
                )
            self._faults.pop(name, None)
            begun = self._passes[name] = _Pass(Reading(name, source, 0, nbytes))
            begun.task = asyncio.create_task(self._read(begun, then))
        return self._passes[name].reading

    def fault(self, name: str) -> CordeeError | None:
        """Why the last pass over a model failed; returned once, then forgotten."""
        return self._faults.pop(name, None)

    def stop(self, name: str) -> bool:
        """End a pass that is no longer wanted; whether there was one."""
        if name in self._passes:
            self._passes[name].stopped.set()
        return name in self._passes

    async def close(self) -> None:
        """End all passes."""
        for each in self._passes.values():
            each.stopped.set()
        tasks = [each.task for each in self._passes.values() if each.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, begun: _Pass, then: Callable[[Manifest], None]) -> None:
        name, source = begun.reading.name, begun.reading.source

        def progress(done_bytes: int, total_bytes: int) -> None:
            if begun.stopped.is_set():
                raise Stopped
            begun.reading = Reading(name, source, done_bytes, total_bytes)

        try:
            manifest = await asyncio.to_thread(self._pass, source, progress)
        except CordeeError as error:
            log.warning("%s is not deployed: %s", name, error.message)
            self._faults[name] = error
            while len(self._faults) > FAULTS_MAX:
                del self._faults[next(iter(self._faults))]
        except Stopped:
            log.warning("reading %s from the hub was stopped", name)
        else:
            then(manifest)
        finally:
            del self._passes[name]

    def _pass(self, source: str, progress: Callable[[int, int], None]) -> Manifest:
        log.warning("reading %s from the hub once, to know its chunks; nothing of it is kept", source)
        with _opened(source) as model:
            return model.manifest(self._slice_store, progress)


def files(source: str) -> list[HubFile]:
    """The files of a model on the hub, as `hub_files` gives them; logged."""
    log.warning("asking the hub for %s", source)
    return hub_files(source)


@contextmanager
def _opened(source: str) -> Generator[HubModel]:
    """A model on the hub; its header can be read inside the block, ranges of its weights also later."""
    with TemporaryDirectory(prefix="cordee-") as folder:
        yield HubModel(files(source), Path(folder))
