"""One run of a node's agent: the real Mind, Crew, Gateway and Host, with a fake shell around them.

The shell only carries out: it observes what is there, hands in what is heard, executes orders. It is what
the real agent does with processes, disk and bus, less the waiting.
"""

import msgspec

from cordee.cluster.controller import Controller
from cordee.cluster.facts import Facts, Placement, SliceHeld
from cordee.cluster.goals import Goals, HostGoal, SliceGoal, StageSpec, holds
from cordee.cluster.membership import HEARTBEAT_SECONDS, Heartbeat
from cordee.cluster.reconcile import Actions, Reconciler, WireAction
from cordee.generation.gateway import Gateway
from cordee.generation.streams import Ask, Assert, Said
from sim import stages
from sim.machine import Machine
from sim.pipeline import Pipeline
from sim.world import World

ACT_SECONDS = 0.02  # after news, so that several count as one
TICKS_A_HEARTBEAT = 2
FETCH_SECONDS, LOAD_SECONDS, WIRE_SECONDS = 1.0, 0.7, 0.03
STEP_SECONDS = 0.01  # a stage's time for a micro-batch
EPOCH = 1.8e9  # what correct clocks show at the start


def _job(placement: Placement) -> tuple[str, int, int]:
    return placement.model, placement.context, placement.sequences


class Agent:
    """See the module's docstring. Made when its machine starts; dropped when it crashes."""

    def __init__(self, world: World, machine: Machine, planning: object) -> None:
        self.world, self.machine, self.name = world, machine, machine.name
        machine.boots += 1
        self.controller = Controller(
            machine.name, world.id(), planning, machine.deployments, machine.remembered
        )
        self.reconciler = Reconciler()
        self.workers: dict[str, stages.Process] = {}
        self.gateway = Gateway(machine.name, world.random.getrandbits(62))
        self.pipelines: dict[tuple, Pipeline] = {}
        self.goals = Goals()
        self.clients: dict[str, object] = {}
        self._facts: Facts | None = None
        self._fetching: set[SliceGoal] = set()
        self._acting = False
        self._said: Facts | None = None
        self._spawned = 0
        self._tick()

    @property
    def now(self) -> float:
        """This machine's steady clock."""
        return self.world.now + self.machine.since

    @property
    def up(self) -> bool:
        """Whether this run still lasts."""
        return self.world.agents.get(self.name) is self

    # What wakes it.

    def _tick(self, count: int = 0) -> None:
        if count > 0 and not self.up:
            return
        wait = self.machine.stopped_until - self.world.now
        if wait > 0:
            self.world.after(wait, self._tick, count)
            return
        if count % TICKS_A_HEARTBEAT == 0:
            self._act()
            self._speak()
        if self.gateway.busy:
            self.gateway.tick(self.now)
        for pipeline in self.pipelines.values():
            pipeline.host.tick(self.now)
            pipeline.pump()
        self._drain()
        self.world.after(HEARTBEAT_SECONDS / TICKS_A_HEARTBEAT, self._tick, count + 1)

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

    def ask(self, message: Ask | Assert) -> None:
        """A gateway wants something of a model that we host."""
        pipeline = self._hosted(message.model)
        if pipeline is not None and message.node not in self.machine.revocations:
            pipeline.host.receive(message)
            pipeline.pump()

    def said(self, message: Said) -> None:
        """A host has news for our streams."""
        self.gateway.receive(message)
        self._drain()

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
            message = stages.Rows(rows.wiring, index, process.downstream, rows.batch, runs)
            self._pass_on(target, rows.wiring, index, "rows", message)

    def _pass_on(self, target: str, wiring: str, hop: int, take: str, message: object) -> None:
        self.world.after(STEP_SECONDS, self.world.carry, self.name, target, wiring, hop, take, message)

    def tokens(self, tokens: stages.Tokens) -> None:
        """The last stage of a pipeline that we host has a result."""
        for pipeline in self.pipelines.values():
            pipeline.take(tokens)

    def link_broke(self, link: tuple[str, int]) -> None:
        """An end of a data link is told so: what it joins is no longer wired."""
        wiring, hop = link
        for process in self.workers.values():
            if process.wiring == wiring and process.index in (hop - 1, hop):
                process.unwire()
                self.touch()

    def unwire(self, wiring: str) -> None:
        """Our scheduler left this wiring: so does its first stage."""
        for process in self.workers.values():
            if process.wiring == wiring and process.index == 0:
                process.unwire()
                self.touch()

    # What it does.

    def _act(self) -> None:
        for _ in range(2):  # the second time with what the first made us say
            clock = EPOCH + self.world.now + self.machine.clock_error
            self.controller.observe(self._look(), self.now, clock, self.machine.revocations)
            self.machine.deployments = self.controller.deployments
            self.goals = self.controller.plan(self.now)
            workers = {process.id: process.worker() for process in self.workers.values()}
            actions = self.reconciler.step(self.goals, workers, tuple(self.machine.slices), self.now)
            facts = self._facts
            assert facts is not None
            if actions.reports == facts.stages:
                break
            self._facts = msgspec.structs.replace(facts, stages=actions.reports)
        self._execute(actions)
        self._host()
        if self._facts != self._said:
            self._speak()

    def _look(self) -> Facts:
        machine = self.machine
        slices = tuple(sorted(machine.slices, key=lambda held: (held.model, held.first, held.last)))
        stages_now = self._facts.stages if self._facts is not None else ()
        if (
            self._facts is None
            or self._facts.slices != slices
            or self._facts.disk_free_bytes != machine.disk_bytes
            or self._facts.draining != machine.draining
        ):
            self._facts = Facts(
                node=self.name,
                name=self.name,
                build="sim",
                devices=machine.devices,
                disk_free_bytes=machine.disk_bytes,
                api="",
                rtts={},
                bytes_per_second={},
                slices=slices,
                stages=stages_now,
                draining=machine.draining,
                inbox=f"{self.name}/inbox",
            )
        return self._facts

    def _speak(self) -> None:
        self._said = self._facts
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
        for load in actions.start:
            self._start(load)
        for name in actions.rename:
            process = self.workers.pop(name)
            process.unwire()
            process.id, process.wirings = self.world.id(), frozenset()
            self.workers[process.id] = process
            self.touch()
        for order in actions.wire:
            self.world.after(WIRE_SECONDS, self.world.arrive, self.name, "wire", (self, order))

    def _later(self, seconds: float, call: object, *arguments: object) -> None:
        seconds *= self.machine.slow * (0.5 + self.world.random.random())
        self.world.after(seconds, self.world.arrive, self.name, "resume", (self, call, arguments))

    def resume(self, what: tuple) -> None:
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
        for stage in self.goals.stages:
            if stage.spec.slice == goal:
                self.reconciler.failed(stage.spec, "the disk is full", self.now)

    def _start(self, load: StageSpec) -> None:
        self._spawned += 1
        endpoint = f"{self.name}/{self.machine.boots}.{self._spawned}"
        process = stages.Process(self.world.id(), endpoint, load)
        self.workers[process.id] = process
        self._later(LOAD_SECONDS, self._loaded, process)

    def _loaded(self, process: stages.Process) -> None:
        if process.id not in self.workers:
            return
        if self.machine.breaks_loading or not holds(tuple(self.machine.slices), process.load.slice):
            del self.workers[process.id]
            self.reconciler.failed(process.load, "it does not load", self.now)
        else:
            process.state = "loaded"

    def wire(self, what: tuple["Agent", WireAction]) -> None:
        """Try to join a worker to its downstream neighbour."""
        run, order = what
        process = self.workers.get(order.worker)
        if run is not self or process is None or process.state == "loading":
            return
        goal = order.goal
        target = goal.downstream.partition("/")[0]
        stale = goal not in self.goals.stages or goal.wiring in process.wirings
        if stale or not self.world.joined(self.name, target):
            return
        target_agent = self.world.agents[target]
        endpoints = {other.endpoint for other in target_agent.workers.values()} | {f"{target}/inbox"}
        if goal.downstream in endpoints:
            process.wire(goal.wiring, goal.index, len(goal.placement.stages), goal.downstream)
        self.touch()

    def end_worker(self, name: str) -> None:
        """A worker's process ends."""
        process = self.workers.pop(name)
        if process.wiring:
            self.world.worker_ended(process.wiring, process.index, process.stages)
        self.touch()

    # Streams.

    def _host(self) -> None:
        wanted: dict[object, HostGoal] = {}
        for goal in self.goals.hosts:  # as the agent: of two wishes for one file, what is hosted already
            key = _job(goal.placement)
            hosted = self.pipelines.get(key)
            if key not in wanted or (hosted is not None and goal.wiring and hosted.wiring == goal.wiring):
                wanted[key] = goal
        for key, pipeline in list(self.pipelines.items()):
            if key not in wanted:
                pipeline.leave()
                del self.pipelines[key]
        for key, goal in wanted.items():
            if key not in self.pipelines:
                self.pipelines[key] = Pipeline(self, key[1], key[2])
            self.pipelines[key].follow(self._checked(goal))
            self.pipelines[key].pump()
        for model in self.world.models:
            routes = self.goals.routes.get(model)
            self.gateway.route(model, routes[0].host if routes else None)
        self._drain()

    def _checked(self, goal: HostGoal) -> HostGoal:
        """Without the wiring if our own first stage has left it already."""
        wired = any(p.wiring == goal.wiring and p.index == 0 for p in self.workers.values())
        return goal if wired else HostGoal(goal.placement)

    def _hosted(self, model: str) -> Pipeline | None:
        for route in self.goals.routes.get(model, ()):
            if route.host == self.name:
                return self.pipelines.get(_job(route.placement))
        return None

    def _drain(self) -> None:
        messages, news = self.gateway.drain()
        for node, message in messages:
            self.world.send(self.name, node, "ask", message)
        for item in news:
            self.clients[item.stream].tell(item)
