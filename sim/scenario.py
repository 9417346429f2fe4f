"""What a seed means: machines, models, deployments, streams, and the faults that befall them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Device, ModelShape, stream_key
from cordee.cluster.later_planner import LaterPlanner
from cordee.cluster.membership import HEARTBEAT_SECONDS, SILENCE_SECONDS, SUSPICION_SECONDS
from cordee.cluster.planner import Planner
from cordee.generation.gateway import News
from cordee.generation.request import Request, SamplingParams
from sim import corrupt, stages
from sim.agent import Agent
from sim.machine import DISK_BYTES, Machine
from sim.world import FOUND_SECONDS, World

FAULT_SECONDS = 12.0
# From the end of the faults to the users' last deployment: membership is right by then, so is the cluster's
# clock.
DEPLOYMENT_SECONDS = SILENCE_SECONDS + SUSPICION_SECONDS + HEARTBEAT_SECONDS
CONTEXT, SEQUENCES = 64, 3
MB = 1_000_000
LAYER_BYTES, STAGE_BYTES = 101 * MB, 60 * MB  # with the KV cache; what a stage takes beside
DAY = 86400.0


@dataclass(eq=False)
class Client:
    """A client that asked for a stream: it compares every token with the undisturbed answer."""

    request: Request
    key: str  # of the stream
    gateway: Agent
    expected: list[int]
    got: list[int] = field(default_factory=list[int])
    ended: str = ""
    wrong: str = ""

    def tell(self, news: News) -> None:
        """Take what the gateway says."""
        if self.ended:
            self.wrong = "news after the end"
        self.got += [choice.token for choice in news.choices]
        if self.got != self.expected[: len(self.got)]:
            self.wrong = self.wrong or f"token {len(self.got) - 1} is not that of the undisturbed answer"
        if news.error is not None:
            self.ended = f"error: {news.error.message}"
        elif news.finish_reason is not None:
            self.ended = news.finish_reason
            if self.got != self.expected:
                self.wrong = self.wrong or "the answer ended early"


def shape_of(name: str, layers: int, cuttable: bool = True) -> ModelShape:
    """A model whose layers are alike, 100 MB each."""
    return ModelShape(
        digest=f"manifest-{name}-{layers}",
        architecture="llama",
        n_embd=8,
        n_vocab=stages.VOCABULARY,
        layer_bytes=(100 * MB,) * layers,
        active_bytes=(100 * MB,) * layers,
        cell_bytes=(1000,) * layers,
        row_floats=(64,) * layers,
        windowed=(False,) * layers,
        embedding_bytes=MB,
        extra_bytes=0,
        last_extra_bytes=MB,
        whole_extra_bytes=2 * MB,
        active_head_bytes=MB,
        cuttable=cuttable,
    )


class Scenario:
    """One seed's world and story; `play` runs it up to the end of the faults."""

    def __init__(self, seed: int, muddled: bool | None = None, machines: int = 0) -> None:
        self.world = World(seed)
        self.random = self.world.random
        self.planner = Planner()
        self.agents: dict[str, Agent] = {}  # of the machines that are up
        self.clients: list[Client] = []
        self.revoked: set[str] = set()
        self.dead: set[str] = set()  # never to come back
        # Corrupted state at the start.
        self.muddled = self.random.random() < 0.5 if muddled is None else muddled
        models = ("small", "large")[: 1 + (self.random.random() < 0.3)]
        self.shapes = {name: shape_of(name, 4 + 2 * index) for index, name in enumerate(models)}
        self.sequences: dict[str, int] = dict.fromkeys(models, SEQUENCES)
        if self.random.random() < 0.2:  # one file under two names, and not alike
            self.shapes["again"], self.sequences["again"] = self.shapes["small"], SEQUENCES - 1
        self.promised = frozenset(self.shapes)  # what users deployed last
        for index in range(machines or self.random.choice((2, 3, 3, 3, 4, 4, 5))):
            self._machine(f"n{index}")
        self.plans_later = self.random.random() < 0.3  # in all agents, as if each were large

    def _machine(self, name: str) -> None:
        random = self.random
        memory_bytes = STAGE_BYTES + random.randint(2, 7) * LAYER_BYTES
        devices = [Device("cpu", "cpu", memory_bytes, random.choice((1e9, 2e9, 4e9)))]
        if random.random() < 0.25:
            memory_bytes = STAGE_BYTES + random.randint(2, 6) * LAYER_BYTES
            devices.append(Device("gpu0", "gpu", memory_bytes, 2e10))
        machine = Machine(name, tuple(devices), since=random.random() * 1e6)
        if self.muddled and random.random() < 0.4:
            machine.clock_error = random.choice((-DAY, DAY, 3600.0, 1e9, -1e9))
        self.world.machines[name] = machine

    def _planning(self) -> Planner:
        if not self.plans_later:
            return self.planner
        planner = LaterPlanner()
        planner.at_once_steps = 0
        return planner

    def play(self) -> None:
        """From the start to the moment when the last fault is over, and users say again what they want."""
        random, world = self.random, self.world
        for machine in world.machines.values():
            corrupt.disk(self, machine)
            self.boot(machine.name)
        if self.muddled:
            corrupt.everything(self)
        for name, shape in self.shapes.items():
            world.after(random.random(), self.deploy, name, shape)
        if random.random() < 0.7:
            world.loss, world.late = random.choice((0, 0.05, 0.2)), random.choice((0, 0.05, 0.3))
            world.doubled, world.breaks = random.choice((0, 0.1)), random.choice((0, 0.0, 0.01))
        for _ in range(random.randint(2, 5)):
            world.after(0.5 + random.random() * FAULT_SECONDS, self.open_stream)
        for _ in range(random.randint(1, 7)):
            fault = random.choice(FAULTS)
            world.after(random.random() * FAULT_SECONDS, fault, self, random.choice(list(world.machines)))
        world.run(FAULT_SECONDS)
        self._calm()
        world.run(FAULT_SECONDS + (DEPLOYMENT_SECONDS if self.muddled else HEARTBEAT_SECONDS))
        for name, shape in self.shapes.items():
            self.deploy(name, shape)

    def boot(self, name: str) -> None:
        """A machine's agent starts."""
        world = self.world
        if name not in self.agents and name not in self.dead:
            wait = self.random.random() * FOUND_SECONDS
            world.machines[name].found_at = world.now + wait
            agent = Agent(world, world.machines[name], self._planning())
            self.agents[name] = world.running[name] = agent
            world.watch(name, wait)

    def crash(self, name: str) -> None:
        """A machine's agent and its workers end."""
        agent = self.agents.pop(name, None)
        if agent is not None:
            del self.world.running[name]
            for process in agent.workers.values():
                if process.wiring:
                    self.world.worker_ended(process.wiring, process.index, process.stages)
            self.world.watch(name, 0.05)

    def live(self) -> list[Agent]:
        """The agents that run and are not revoked."""
        return [agent for name, agent in self.agents.items() if name not in self.revoked]

    def known_deployments(self) -> list[dict[str, Deployment]]:
        """The deployments that each live agent knows, without dates."""
        return [
            {
                deployment.model: replace(deployment, stamp=0.0, author="")
                for deployment in agent.controller.deployments
            }
            for agent in self.live()
        ]

    def deployed(self) -> dict[str, Deployment]:
        """The deployments that all live agents know, without dates."""
        known = self.known_deployments()
        return {
            model: deployment
            for model, deployment in (known[0] if known else {}).items()
            if all(other.get(model) == deployment for other in known)
        }

    def deploy(self, name: str, shape: ModelShape, replicas: int = 0) -> None:
        """A user deploys a model at some machine, perhaps twice."""
        agents = self.live()
        if agents:
            agent = self.random.choice(agents)
            replicas = replicas or self.random.choice((1, 1, 1, 1, 2))
            agent.controller.deploy(name, shape, CONTEXT, self.sequences[name], agent.now, replicas)
            agent.touch()

    def open_stream(self) -> None:
        """A client asks at some machine."""
        agents = [agent for agent in self.live() if agent.machine.stopped_until <= self.world.now]
        if not agents:
            return
        random = self.random
        agent = random.choice(agents)
        prompt = tuple(random.randrange(100, 140) for _ in range(random.randint(1, 30)))
        if self.clients and random.random() < 0.6:  # as with a system prompt, or another turn
            other = random.choice(self.clients)
            known = (*other.request.prompt, *other.got)
            prompt = (known[: random.randint(1, len(known))] + prompt)[:45]
        seed, limit = random.randrange(1000), random.randint(1, 30)
        request = Request(
            id=f"s{len(self.clients)}",
            prompt=prompt,
            sampling=SamplingParams(seed=seed),
            max_tokens=limit,
        )
        key = stream_key(random.choice(list(self.shapes.values())).digest, CONTEXT)
        client = Client(request, key, agent, stages.solo(prompt, seed, limit, CONTEXT))
        self.clients.append(client)
        agent.clients[request.id] = client
        agent.gateway.open(request, key)
        agent.drain()

    def _calm(self) -> None:
        """The faults end; what was only down comes back."""
        world = self.world
        world.calm()
        for name, machine in world.machines.items():
            machine.slow, machine.breaks_loading = 1.0, False
            machine.never_loads = machine.creeps = False
            self.boot(name)
            world.watch(name, 0.3)
        self.revoked = self.known_revocations()

    def known_revocations(self) -> set[str]:
        """Nodes whose revocation lies on the disk of a running machine that is not revoked itself."""
        return {name for agent in self.live() for name in agent.machine.revocations}


def _crash(scenario: Scenario, name: str) -> None:
    scenario.crash(name)
    if scenario.random.random() < 0.5 and len(scenario.dead) < len(scenario.world.machines) - 1:
        scenario.dead.add(name)
    else:
        scenario.world.after(scenario.random.random() * 6, scenario.boot, name)


def _stop(scenario: Scenario, name: str) -> None:
    world = scenario.world
    seconds = min(scenario.random.choice((0.5, 2, 4, 8)), FAULT_SECONDS - world.now)
    world.machines[name].stopped_until = world.now + seconds
    world.watch(name)
    world.watch(name, seconds + 0.3)


def _cut(scenario: Scenario, name: str) -> None:
    world, random = scenario.world, scenario.random
    others = [other for other in world.machines if other != name]
    pairs = {(name, random.choice(others))} if random.random() < 0.5 else {(name, other) for other in others}
    if random.random() < 0.6:
        pairs |= {(right, left) for left, right in pairs}
    world.cut |= pairs
    seconds = random.choice((1, 3, 6, 10))
    world.watch(name)
    world.after(seconds, world.cut.difference_update, pairs)
    world.watch(name, seconds + 0.3)


def _clock(scenario: Scenario, name: str) -> None:
    scenario.world.machines[name].clock_error += scenario.random.choice((-DAY, DAY, 30.0, -30.0))
    scenario.muddled = True


def _slow(scenario: Scenario, name: str) -> None:
    scenario.world.machines[name].slow = 8.0


def _full(scenario: Scenario, name: str) -> None:
    scenario.world.machines[name].disk_bytes = 0
    if scenario.random.random() < 0.7:
        scenario.world.after(
            scenario.random.random() * 5, setattr, scenario.world.machines[name], "disk_bytes", DISK_BYTES
        )


def _breaks_loading(scenario: Scenario, name: str) -> None:
    scenario.world.machines[name].breaks_loading = True


def never_loads(scenario: Scenario, name: str) -> None:
    """Its workers load for ever."""
    scenario.world.machines[name].never_loads = True


def creeps(scenario: Scenario, name: str) -> None:
    """Hardly anything comes over its data links."""
    scenario.world.machines[name].creeps = True


def half_open(scenario: Scenario, name: str) -> None:
    """The bus works, but its doors are closed to stages of others."""
    scenario.world.half_open |= {(name, other) for other in scenario.world.machines if other != name}


def _kill_worker(scenario: Scenario, name: str) -> None:
    agent = scenario.agents.get(name)
    if agent is not None and agent.workers:
        agent.end_worker(scenario.random.choice(sorted(agent.workers)))


def _drain(scenario: Scenario, name: str) -> None:
    machine = scenario.world.machines[name]
    machine.draining = not machine.draining


def _revoke(scenario: Scenario, name: str) -> None:
    if scenario.revoked or len(scenario.live()) < 2:
        return
    others = [agent for agent in scenario.live() if agent.name != name]
    if others:
        scenario.revoked.add(name)
        admin = scenario.random.choice(others)
        admin.controller.adopt(name, admin.now)
        admin.machine.revocations[name] = f"revoked {name}".encode()


FAULTS: list[Callable[[Scenario, str], None]] = [
    _crash,
    _crash,
    _crash,
    _stop,
    _stop,
    _cut,
    _cut,
    _cut,
    _clock,
    _slow,
    _full,
    _breaks_loading,
    never_loads,
    creeps,
    half_open,
    _kill_worker,
    _kill_worker,
    _drain,
    _revoke,
]
