"""One run of a node's agent: the real Controller, Gateway and Host, with a fake shell around them.

The shell only carries out: it looks at what is there, hands in what is heard, and does what the controller
decides. It is what the real agent (`cordee.agent`) does with processes, disk and bus, less the waiting.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from cordee.cluster.choose import Planning
from cordee.cluster.controller import Controller, Running
from cordee.cluster.facts import Facts, SliceHeld, best_host
from cordee.cluster.goals import HostGoal, SliceGoal, StageSpec, holds
from cordee.cluster.later_planner import LaterPlanner
from cordee.cluster.membership import HEARTBEAT_SECONDS, Heartbeat
from cordee.cluster.questions import Asked, answer
from cordee.cluster.reconcile import Actions, WireAction
from cordee.generation.gateway import Gateway, News
from cordee.generation.streams import Ask, Assert, Said
from sim import stages
from sim.machine import Machine
from sim.pipeline import Pipeline
from sim.trust import Seals
from sim.world import World

ACT_SECONDS = 0.02  # after news, so that several count as one
TICKS_A_HEARTBEAT = 2
FETCH_SECONDS, LOAD_SECONDS, WIRE_SECONDS = 1.0, 0.7, 0.03
PLAN_SECONDS = 0.5
STEP_SECONDS = 0.01  # a stage's time for a micro-batch
EPOCH = 1.8e9  # what correct clocks show at the start


class Client(Protocol):
    """A client that asked for a stream."""

    def tell(self, news: News) -> None:
        """Hear what became of it."""
        ...


class Agent:
    """See the module's docstring. Made when its machine starts; dropped when it crashes."""

    def __init__(self, world: World, machine: Machine, planning: Planning) -> None:
        self.world, self.machine, self.name = world, machine, machine.name
        machine.boots += 1
        self.controller = Controller(
            machine.name,
            world.id(),
            planning,
            Seals(machine.name, world.machines),
            machine.deployments,
            machine.remembered,
        )
        self.workers: dict[str, stages.Process] = {}
        self.gateway = Gateway(world.random.getrandbits(62))
        self.pipelines: dict[str, Pipeline] = {}  # by stream key
        self.clients: dict[str, Client] = {}  # by request id
        self._planner = planning if isinstance(planning, LaterPlanner) else None
        self._plans = False
        self._fetching: set[SliceGoal] = set()
        self._acting = False
        self._spawned = 0
        self._tick()

    @property
    def now(self) -> float:
        """This machine's steady clock."""
        return self.world.now + self.machine.since

    @property
    def up(self) -> bool:
        """Whether this run still lasts."""
        return self.world.running.get(self.name) is self

    def endpoints(self) -> set[str]:
        """Where data links reach it: its workers, and its inbox."""
        return {process.endpoint for process in self.workers.values()} | {f"{self.name}/inbox"}

    # What wakes it.

    def _tick(self, count: int = 0) -> None:
        if count > 0 and not self.up:
            return
        wait = self.machine.stopped_until - self.world.now
        if wait > 0:
            self.world.after(wait, self._tick, count)
            return
        if count % TICKS_A_HEARTBEAT == 0:
            self._probe()
            self._act()
            self._speak()
        if self.gateway.busy:
            self.gateway.tick(self.now)
        for pipeline in self.pipelines.values():
            pipeline.tick()
        self.drain()
        self.world.after(HEARTBEAT_SECONDS / TICKS_A_HEARTBEAT, self._tick, count + 1)

    def _probe(self) -> None:
        """Knock at the others' doors, as agent/probes.py does."""
        closed = {of for of, at in self.world.half_open if at == self.name}
        self.controller.unreachable(dict.fromkeys(sorted(closed), "its ports are closed"))

    def touch(self) -> None:
        """Something changed: look at everything soon."""
        if not self._acting:
            self._acting = True
            self.world.after(ACT_SECONDS, self.world.arrive, self.name, "wake", self)

    def wake(self, run: "Agent") -> None:
        """The end of `touch`."""
        if run is self:
            self._acting = False
            self._act()

    # What it hears.

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """A heartbeat; its revocations are checked first, as a signature would be."""
        if heartbeat.facts.node in self.machine.revocations:
            return
        for record in heartbeat.revocations:
            if record.startswith(b"revoked "):
                self.machine.revocations.setdefault(record[8:].decode(), record)
        self.machine.remembered.add(heartbeat.facts.node)
        if self.controller.hear(heartbeat, self.now):
            self.touch()

    def token(self, said: tuple[str, bool]) -> None:
        """A liveliness token came or went."""
        self.controller.liveliness(*said, self.now)
        self.touch()

    def ask(self, came: tuple[str, Ask | Assert]) -> None:
        """The gateway of a node wants something of a model that we host."""
        node, message = came
        host = best_host(self._wirings(), message.model)
        if host is not None and node not in self.machine.revocations:
            self.pipelines[host].host.receive(node, message)
            self.pipelines[host].pump()

    def said(self, came: tuple[str, Said]) -> None:
        """A host on a node has news for our streams."""
        self.gateway.receive(*came)
        self.drain()

    def rows(self, rows: stages.Rows) -> None:
        """A micro-batch came to one of our workers."""
        process = next((p for p in self.workers.values() if p.endpoint == rows.endpoint), None)
        if process is None or process.wiring != rows.wiring:
            return
        runs, choices = process.compute(rows)
        index = process.index + 1
        target = process.downstream.partition("/")[0]
        if index == process.stages:
            message = stages.Tokens(rows.wiring, rows.batch, choices)
            self._pass_on(target, rows.wiring, index, "tokens", message)
        else:
            message = stages.Rows(rows.wiring, index, process.downstream, rows.batch, runs, rows.copies)
            self._pass_on(target, rows.wiring, index, "rows", message)

    def _pass_on(self, target: str, wiring: str, hop: int, take: str, message: object) -> None:
        self.world.after(STEP_SECONDS, self.world.carry, self.name, target, wiring, hop, take, message)

    def tokens(self, tokens: stages.Tokens) -> None:
        """The last stage of a pipeline that we host has a result."""
        for pipeline in self.pipelines.values():
            pipeline.take(tokens)

    def link_broke(self, link: tuple[str, int]) -> None:
        """A data link broke, and this end of it hears so: what it joined is no longer wired."""
        wiring, hop = link
        for process in self.workers.values():
            if process.wiring == wiring and process.index in (hop - 1, hop):
                process.unwire()
                self.touch()

    def doubt(self, nodes: set[str], reason: str) -> None:
        """Other nodes disappointed our scheduler."""
        for node in sorted(nodes):
            self.controller.doubt(node, reason, self.now)

    def unwire(self, wiring: str) -> None:
        """Our scheduler left this wiring: so does its first stage."""
        for process in self.workers.values():
            if process.wiring == wiring and process.index == 0:
                process.unwire()
                self.touch()

    # What it does.

    def _act(self) -> None:
        running = Running(
            workers={process.id: process.worker() for process in self.workers.values()},
            wirings=self._wirings(),
            routes=self.gateway.routes,
        )
        clock = EPOCH + self.world.now + self.machine.clock_error
        revocations = self.machine.revocations
        decision = self.controller.step(self._look(), running, self.now, clock, revocations)
        self.machine.deployments = self.controller.deployments
        self._plan_later()
        self._execute(decision.actions)
        self._host(decision.hosts)
        self.gateway.follow(decision.routes)
        self.drain()
        if decision.is_news:
            self._speak()

    def _plan_later(self) -> None:
        """Answer an open question of the planner after a while, as a process of the real agent does."""
        if self._planner is None:
            return
        self._planner.settle()
        due = self._planner.due()
        if due is not None and not self._plans:
            self._plans = True
            self._later(PLAN_SECONDS, self._planned, due)

    def _planned(self, due: Asked) -> None:
        assert self._planner is not None
        self._plans = False
        found, _ = answer(due.question)
        assert found is not None, "it has all steps that a search may take"
        self._planner.tell(due, found)
        self.controller.rethink()

    def _wirings(self) -> dict[str, str]:
        return {key: pipeline.wiring for key, pipeline in self.pipelines.items()}

    def _look(self) -> Facts:
        machine = self.machine
        return Facts(
            node=self.name,
            name=self.name,
            build="sim",
            devices=machine.devices,
            disk_free_bytes=machine.disk_bytes,
            api="",
            rtts={},
            bytes_per_second={},
            slices=tuple(sorted(machine.slices, key=lambda held: (held.model, held.first, held.last))),
            stages=(),
            draining=machine.draining,
            inbox=f"{self.name}/inbox",
        )

    def _speak(self) -> None:
        heartbeat = self.controller.heartbeat(self.now)
        for other in self.world.machines:
            if other != self.name and other not in self.machine.revocations:
                self.world.send(self.name, other, "heartbeat", heartbeat)

    def _execute(self, actions: Actions) -> None:
        for goal in actions.fetch:
            if goal not in self._fetching and len(self._fetching) < 2:
                self._fetching.add(goal)
                self._later(FETCH_SECONDS, self._fetched, goal)
        for name in actions.stop:
            self.end_worker(name)
        for spec in actions.start:
            self.start_worker(spec)
        for name in actions.rename:
            process = self.workers.pop(name)
            process.unwire()
            process.id, process.wirings = self.world.id(), frozenset()
            self.workers[process.id] = process
            self.touch()
        for action in actions.wire:
            self.world.after(WIRE_SECONDS, self.world.arrive, self.name, "wire", (self, action))

    def _later(self, seconds: float, call: Callable[..., None], *arguments: object) -> None:
        seconds *= self.machine.slow * (0.5 + self.world.random.random())
        self.world.after(seconds, self.world.arrive, self.name, "resume", (self, call, arguments))

    def resume(self, what: tuple["Agent", Callable[..., None], tuple[object, ...]]) -> None:
        """Something that took time is done, if this is still the same run."""
        run, call, arguments = what
        if run is self:
            call(*arguments)
            self.touch()

    def _fetched(self, goal: SliceGoal) -> None:
        self._fetching.discard(goal)
        held = (range(one.first, one.last) for one in self.machine.slices if one.model == goal.model)
        if self.machine.disk_bytes > 0 or set().union(*held).issuperset(range(goal.first, goal.last)):
            self.machine.slices.add(SliceHeld(goal.model, goal.first, goal.last))
            return
        self.controller.fetch_failed(goal, "the disk is full", self.now)

    def start_worker(self, spec: StageSpec) -> stages.Process:
        """A worker's process starts; it loads for a while."""
        self._spawned += 1
        endpoint = f"{self.name}/{self.machine.boots}.{self._spawned}"
        process = stages.Process(self.world.id(), endpoint, spec)
        self.workers[process.id] = process
        self._later(LOAD_SECONDS, self._loaded, process)
        return process

    def _loaded(self, process: stages.Process) -> None:
        if process.id not in self.workers:
            return
        if self.machine.never_loads:
            self._later(LOAD_SECONDS, self._loaded, process)
            return
        if self.machine.breaks_loading or not holds(tuple(self.machine.slices), process.spec.slice):
            del self.workers[process.id]
            self.controller.failed(process.spec, "it does not load", self.now)
        else:
            process.state = "loaded"

    def wire(self, what: tuple["Agent", WireAction]) -> None:
        """Try to join a worker to its downstream neighbour."""
        run, action = what
        process = self.workers.get(action.worker)
        if run is not self or process is None or process.state == "loading":
            return
        goal = action.goal
        target = goal.downstream.partition("/")[0]
        stale = goal not in self.controller.goals.stages or goal.wiring in process.wirings
        if stale or not self.world.joined(self.name, target):
            return
        if (target, self.name) in self.world.half_open:
            self.controller.doubt(target, "its ports are closed", self.now)
            return
        if goal.downstream in self.world.running[target].endpoints():
            process.wire(goal.wiring, goal.index, len(goal.placement.stages), goal.downstream)
        self.touch()

    def end_worker(self, name: str) -> None:
        """A worker's process ends."""
        process = self.workers.pop(name)
        if process.wiring:
            self.world.worker_ended(process.wiring, process.index, process.stages)
        self.touch()

    # Streams.

    def _host(self, wanted: Mapping[str, HostGoal]) -> None:
        for key in [key for key, each in self.pipelines.items() if not each.fits(wanted.get(key))]:
            self.pipelines.pop(key).leave()
        for key, goal in wanted.items():
            if key not in self.pipelines:
                self.pipelines[key] = Pipeline(self, goal.placement)
            self.pipelines[key].follow(goal)
            self.pipelines[key].pump()

    def drain(self) -> None:
        """Send what the gateway has to say, and tell clients."""
        messages, news = self.gateway.drain()
        for node, message in messages:
            self.world.send(self.name, node, "ask", (self.name, message))
        for item in news:
            self.clients[item.stream].tell(item)
