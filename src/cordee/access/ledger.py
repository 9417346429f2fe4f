"""The ledger: how much each key used. Counts only; never a word of what was asked or answered.

Each node of a cluster counts what comes in at it, and tells the others with its heartbeats (elsewhere.py).

It lies in `usage` of the state folder. Several processes may serve from one folder: each adds what it counted
since, under a lock. What was not written when a process is killed, FLUSH_SECONDS at most, is lost.
"""

import asyncio
import contextlib
import heapq
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cordee import files
from cordee.access.elsewhere import NOWHERE, Elsewhere
from cordee.cluster.facts import KeyUse
from cordee.errors import CordeeError, StorageFailed
from cordee.system import locks

NAME = "usage"
FLUSH_SECONDS = 2.0  # between two writes
KEYS_MAX = 1024  # names, those of keys that are long gone included; then the least recent are put together
USES_MAX = 64  # keys that others are told of, the most recent ones: some kilobytes of each heartbeat
REST = "(others)"
LOCAL = "(this machine)"  # requests from this machine without a key
FILE_BYTES_MAX = 1 << 20


class Used(msgspec.Struct):
    """What a key used. `joules` None: nothing measured them. Times are in seconds since 1970."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    joules: float | None = None
    first: float = 0.0
    last: float = 0.0

    def add(self, other: "Used | KeyUse") -> None:
        """Add what was counted elsewhere, or later."""
        self.requests += other.requests
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        if other.joules is not None:
            self.joules = (self.joules or 0.0) + other.joules
        self.first = min(self.first or other.first, other.first or self.first)
        self.last = max(self.last, other.last)


class Ledger:
    """See the module's docstring. `clock` as `time.time`."""

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder or files.home()
        self._clock = clock
        self.elsewhere: Elsewhere = NOWHERE
        self.at_once: Counter[str] = Counter()  # requests that are under way
        self._total: dict[str, Used] | None = None  # as far as this process knows; None: not read yet
        self._since: dict[str, Used] = {}  # the last write
        self._tokens: dict[str, int] = {}  # since energy was last shared out

    def count(self, name: str, *, requests: int = 0, tokens_in: int = 0, tokens_out: int = 0) -> None:
        """Count what was done for a key."""
        now = self._clock()
        self._add(name, Used(requests, tokens_in, tokens_out, None, now, now))
        if tokens_in + tokens_out and len(self._tokens) < KEYS_MAX:
            self._tokens[name] = self._tokens.get(name, 0) + tokens_in + tokens_out

    def share_out(self, joules: float) -> None:
        """Energy was spent since the last time: it is shared among those for whom tokens were computed."""
        total = sum(self._tokens.values())
        for name, tokens in self._tokens.items():
            self._add(name, Used(joules=joules * tokens / total))
        self._tokens.clear()

    def read(self) -> dict[str, Used]:
        """What each key used up to now, by name.

        Raises:
            StorageFailed: the file cannot be read.
        """
        found = _read(self._folder / NAME)
        _merge(found, self._since)
        return found

    def read_all(self) -> dict[str, Used]:
        """The same, with what the other nodes of the cluster that are there counted lately.

        Raises:
            StorageFailed: the file cannot be read.
        """
        found = self.read()
        for use in self.elsewhere.all():
            found.setdefault(use.name, Used()).add(use)
        return found

    def uses(self) -> tuple[KeyUse, ...]:
        """What the other nodes are told with each heartbeat, while it is noted what they told; without a file
        that can be read, what this process counted."""
        self.elsewhere.look(time.monotonic())
        if self._total is None:
            self._total = {}
            with contextlib.suppress(StorageFailed):
                self._total = _read(self._folder / NAME)
            _merge(self._total, self._since)
        total = self._total
        latest = heapq.nlargest(USES_MAX, total, key=lambda name: (self.at_once[name], total[name].last))
        return tuple(
            KeyUse(name, self.at_once[name], **msgspec.structs.asdict(total[name])) for name in latest
        )

    async def flush(self) -> None:
        """Write what was counted.

        Raises:
            StorageFailed: the disk has no room, or the file is damaged; nothing of it is lost yet.
        """
        counted, self._since = self._since, {}
        if not counted:
            return
        try:
            await asyncio.to_thread(_write, self._folder / NAME, counted)
        except BaseException:
            _merge(self._since, counted)
            raise

    async def keep(self, watts: Callable[[], float | None], warn: Callable[[str], None]) -> None:
        """Until it is cancelled: share out what energy was spent (mean power since the last call, None where
        nothing measures it), and write; `warn` is told once what is in the way."""
        warned, then = "", time.monotonic()
        try:
            while True:
                await asyncio.sleep(FLUSH_SECONDS)
                power, now = watts(), time.monotonic()
                if power is not None:
                    self.share_out(power * (now - then))
                then = now
                try:
                    await self.flush()
                    warned = ""
                except CordeeError as error:
                    if error.message != warned:
                        warned = error.message
                        warn(f"usage is not written: {warned}")
        finally:
            if self._since:  # the loop is about to end: no thread any more
                with contextlib.suppress(CordeeError):
                    _write(self._folder / NAME, self._since)
                    self._since = {}

    def _add(self, name: str, used: Used) -> None:
        _merge(self._since, {name: used})
        if self._total is not None:
            _merge(self._total, {name: used})


def _merge(found: dict[str, Used], more: dict[str, Used]) -> None:
    for name, used in more.items():
        found.setdefault(name, Used()).add(used)
    while len(found) > KEYS_MAX:
        least = min((name for name in found if name != REST), key=lambda name: found[name].last)
        found.setdefault(REST, Used()).add(found.pop(least))


def _write(path: Path, counted: dict[str, Used]) -> None:
    with _locked(path.with_name(f"{NAME}.lock")):
        found = _read(path)
        _merge(found, counted)
        with files.atomic_file(path) as file:
            files.write_all(file, msgspec.msgpack.encode(found))


def _read(path: Path) -> dict[str, Used]:
    try:
        data = path.read_bytes()
        if len(data) > FILE_BYTES_MAX:
            raise ValueError("it is too long")
        return msgspec.msgpack.decode(data, type=dict[str, Used])
    except FileNotFoundError:
        return {}
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageFailed(f"{path} is damaged: move it away, and counting begins anew.") from error
    except OSError as error:
        raise files.storage_failed(path, error, "cannot be read") from error


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with files.disk_faults(path), path.open("a") as file:
        locks.wait_for(file)
        yield
