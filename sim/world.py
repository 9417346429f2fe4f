"""Time and network of the fake world. Everything random comes from one generator, so a seed is a run.

Two kinds of messages, as in a real cluster:
- the bus (heartbeats, asks, said): while faults last they are lost, late, doubled and out of order;
- data links between stages: in order and without loss until the link breaks; then all that is under way is
  lost, and both ends notice within a lease.
"""

import heapq
from collections.abc import Callable
from random import Random
from typing import Protocol

from cordee.cluster.membership import LEASE_SECONDS
from sim.machine import Machine

BUS_DELAY = 0.004
LATE_SECONDS = 1.5  # less than REORDER_SECONDS
LINK_DELAY = 0.003
FOUND_SECONDS = 1.5  # at most, after a start
CREEP_SECONDS = 25.0  # that a message takes over a link that hardly carries anything
RESET_SECONDS = 0.05  # until a neighbour hears that a process ended


class Listener(Protocol):
    """What runs on a machine: each message goes to the method that it is for."""

    @property
    def machine(self) -> Machine:
        """Where it runs."""
        ...

    def endpoints(self) -> set[str]:
        """Where it can be reached by data links."""
        ...


class World:
    """The clock, the queue of what will happen, and the weather: how likely each fault is per message."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.loss = self.late = self.doubled = self.breaks = 0.0
        self.machines: dict[str, Machine] = {}
        self.running: dict[str, Listener] = {}  # on the machines that are up
        self.cut: set[tuple[str, str]] = set()  # (from, to)
        self.half_open: set[tuple[str, str]] = (
            set()
        )  # (of, at): the bus works, but its doors are closed there
        self._queue: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._count = 0
        self._broken: set[tuple[str, int]] = set()  # (wiring, hop)
        self._link_times: dict[tuple[str, int], float] = {}
        self._lost_tokens: set[tuple[str, str]] = set()  # (of, at): the token is lost there

    def after(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        """Something will happen."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, call, arguments))

    def run(self, until: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, call, arguments = heapq.heappop(queue)
            call(*arguments)
        self.now = until

    def id(self) -> str:
        """A random id."""
        return f"{self.random.getrandbits(64):016x}"

    def calm(self) -> None:
        """No more faults."""
        self.loss = self.late = self.doubled = self.breaks = 0.0
        self.cut.clear()
        self.half_open.clear()

    # The bus.

    def send(self, source: str, target: str, take: str, message: object) -> None:
        """Hand `message` to the method `take` of the agent that runs on `target` when it arrives.

        Where none runs now there is no link, and nothing arrives, even if one has started by then.
        """
        random = self.random
        if (source, target) in self.cut or (self.loss and random.random() < self.loss):
            return
        if target not in self.running or (source != target and self._unfound(source, target)):
            return
        delay = BUS_DELAY * (0.5 + random.random()) if source != target else 0.0
        if self.late and random.random() < self.late:
            delay += random.random() * LATE_SECONDS
        self.after(delay, self.arrive, target, take, message)
        if self.doubled and random.random() < self.doubled:
            self.after(random.random() * LATE_SECONDS, self.arrive, target, take, message)

    def _unfound(self, left: str, right: str) -> bool:
        """Whether one of them started just now, and the other has not found it yet."""
        return self.now < max(self.machines[left].found_at, self.machines[right].found_at)

    def arrive(self, target: str, take: str, message: object) -> None:
        """A message is there; a machine that is stopped reads it once it goes on."""
        listener = self.running.get(target)
        if listener is None:
            return
        wait = listener.machine.stopped_until - self.now
        if wait > 0:
            self.after(wait, self.arrive, target, take, message)
        else:
            getattr(listener, take)(message)

    # Liveliness tokens.

    def joined(self, left: str, right: str) -> bool:
        """Whether two machines have a link now: both run, and both directions work."""
        for name in (left, right):
            if name not in self.running or self.machines[name].stopped_until > self.now:
                return False
        if self._unfound(left, right):
            return False
        return (left, right) not in self.cut and (right, left) not in self.cut

    def watch(self, name: str, seconds: float = LEASE_SECONDS) -> None:
        """Something happened to a machine's links: the tokens of it and of the others follow."""
        self.after(seconds, self._look, name)

    def _look(self, name: str) -> None:
        for other in self.machines:
            if other == name:
                continue
            joined = self.joined(name, other)
            for of, at in ((name, other), (other, name)):
                if joined == ((of, at) in self._lost_tokens):
                    (self._lost_tokens.discard if joined else self._lost_tokens.add)((of, at))
                    self.after(0, self.arrive, at, "token", (of, joined))

    # Data links.

    def carry(self, source: str, target: str, wiring: str, hop: int, take: str, message: object) -> None:
        """Send over hop `hop` of a pipeline; the links of a wiring are made once."""
        link = (wiring, hop)
        if link in self._broken:
            return
        if (source, target) in self.cut or (self.breaks and self.random.random() < self.breaks):
            self._broken.add(link)
            for end in (source, target):
                self.after(
                    self.random.random() * LEASE_SECONDS, self.arrive, end, "link_broke", (wiring, hop)
                )
            return
        creeps = source != target and (self.machines[source].creeps or self.machines[target].creeps)
        delay = CREEP_SECONDS if creeps else 0.0
        at = max(
            self.now + delay + LINK_DELAY * (0.5 + self.random.random()), self._link_times.get(link, 0.0)
        )
        self._link_times[link] = at
        self.after(at - self.now, self.arrive, target, take, message)

    def worker_ended(self, wiring: str, index: int, stages: int) -> None:
        """A process ended: its neighbours' links break."""
        for hop in (index, index + 1):
            self._broken.add((wiring, hop))
            for name in self.running:
                self.after(RESET_SECONDS, self.arrive, name, "link_broke", (wiring, hop))
