"""What can happen to a machine: `strike` while streams run, `mend` afterwards."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from netcluster import Cluster, Node

GARBAGE_BYTES = 5000
FAKETIME = "/usr/lib/*-linux-gnu/faketime/libfaketime.so.1"
IDENTITY = ("ca.pem", "ca.key", "node.key", "node.pem", "revoked")  # damage there is named, not repaired
LEFT_BYTES = 100 << 10  # of a disk that is all but full

Fault = Callable[[Cluster, Node, Random], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def crash(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """A power cut: nothing more is heard from it."""
    node.host.crash()
    yield
    node.host.plug()
    node.up()


@contextlib.contextmanager
def kill(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """Every process is killed, the machine stays: its system closes the links."""
    node.host.kill()
    yield
    node.up()


@contextlib.contextmanager
def kill_worker(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """The worker alone is killed, as by a system that ran out of memory."""
    for pid in node.host.pids:
        if b"cordee.worker.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    yield


@contextlib.contextmanager
def pause(cluster: Cluster, node: Node, random: Random, seconds: float = 7.0) -> Iterator[None]:
    """The machine stands still, as a laptop that sleeps, and goes on."""
    node.host.signal(signal.SIGSTOP)
    time.sleep(seconds)
    node.host.signal(signal.SIGCONT)
    yield


@contextlib.contextmanager
def long_pause(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """It stands still until no node waits for it any more, and comes back to a changed cluster."""
    with pause(cluster, node, random, seconds=30.0):
        yield


@contextlib.contextmanager
def cut(cluster: Cluster, node: Node, random: Random, seconds: float = 7.0) -> Iterator[None]:
    """Its cable is pulled out and put in again."""
    node.host.unplug()
    time.sleep(seconds)
    node.host.plug()
    yield


@contextlib.contextmanager
def short_cut(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """Its cable is out for less time than it takes to give a node up."""
    with cut(cluster, node, random, seconds=0.8):
        yield


@contextlib.contextmanager
def move(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """It gets another address."""
    node.host.move()
    yield


@contextlib.contextmanager
def garbage(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """It crashes, and comes back with nonsense in every file that is not its identity."""
    node.host.kill()
    for path in node.host.home.rglob("*"):
        if path.is_file() and path.name not in IDENTITY:
            path.write_bytes(random.randbytes(random.randrange(GARBAGE_BYTES)))
    node.up()
    yield


@contextlib.contextmanager
def full_disk(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """Its disk runs full; only for hosts with a disk of their own."""
    filler = node.host.home / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(LEFT_BYTES))
    yield
    filler.unlink()


@contextlib.contextmanager
def wrong_clock(cluster: Cluster, node: Node, random: Random) -> Iterator[None]:
    """It is started again with a clock that is a day off, to either side."""
    node.host.kill()
    was = dict(node.host.machine.environment)
    node.host.machine.environment.update(fake_clock(random.choice(("-1d", "+1d"))))
    try:
        node.up()
        yield
    finally:
        node.host.machine.environment.clear()
        node.host.machine.environment.update(was)
    node.host.kill()
    node.up()


# What fifty faults in a row are drawn from.
RANDOM: tuple[Fault, ...] = (
    crash,
    kill,
    kill_worker,
    pause,
    cut,
    short_cut,
    move,
    garbage,
    wrong_clock,
)


def fake_clock(offset: str) -> dict[str, str]:
    """The environment of a process whose clock is off; empty where there is no libfaketime."""
    libraries = sorted(Path("/").glob(FAKETIME.lstrip("/")))
    if not libraries:
        return {}
    # The clock that only counts stays true, as on a machine whose date is wrong.
    return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
