"""Arbitrary state at the start: memory, disk and messages under way hold anything of the right types.

Private members of what is tested are written here on purpose: a fault does not ask which are private.
"""

# pyright: reportPrivateUsage=false

import math
from random import Random
from typing import Protocol

import msgspec

from cordee.cluster.deployments import Deployment, statement
from cordee.cluster.facts import Facts, ModelShape, Placement, SliceHeld, StagePlace, StageReport, stream_key
from cordee.cluster.goals import spec_of
from cordee.cluster.membership import Heartbeat, Sighting
from cordee.generation.request import Request
from cordee.generation.streams import Ask, Assert
from sim.agent import EPOCH, Agent
from sim.machine import Machine
from sim.trust import Seals
from sim.world import World


class Scenario(Protocol):
    """What is corrupted."""

    random: Random
    world: World
    agents: dict[str, Agent]
    shapes: dict[str, ModelShape]
    muddled: bool


FORGED = "nobody/wrote/this.gguf"
STATES = ("fetching", "loading", "loaded", "wired", "failed")


def number(random: Random, near: float = 0.0) -> float:
    """A time, perhaps absurd."""
    return random.choice(
        (
            near,
            near + random.random() * 10,
            near - 5,
            near + 30,
            near + 86400,
            1e30,
            -1e30,
            math.inf,
            math.nan,
        )
    )


def placement(scenario: Scenario) -> Placement:
    """Stages anywhere; now and then a placement that could be."""
    random = scenario.random
    shape = random.choice(list(scenario.shapes.values()))
    names = [*scenario.world.machines, "nobody"]
    stages: list[StagePlace] = []
    first = 0
    while first < shape.layers and len(stages) < 4:
        last = random.randint(first + (random.random() < 0.9), shape.layers)
        stages.append(StagePlace(random.choice(names), random.choice(("cpu", "cpu", "gpu0")), first, last))
        first = last
    model = shape.digest if random.random() < 0.9 else "unknown"
    context = random.choice((64, 64, 64, 8))
    return Placement(model, context, 3, tuple(stages))


def report(scenario: Scenario, placed: Placement) -> StageReport:
    """What a node might say of a stage."""
    random = scenario.random
    index = random.randrange(-1, len(placed.stages) + 1)
    wiring, worker = f"w{random.randrange(3)}", f"p{random.randrange(3)}"
    return StageReport(placed, index, random.choice(STATES), worker, "n0/1.1", wiring)


def facts(scenario: Scenario, node: str) -> Facts:
    """Facts of a node as it never was."""
    random = scenario.random
    devices = scenario.world.machines[node].devices if node in scenario.world.machines else ()
    placed = placement(scenario)
    reports = tuple(report(scenario, placed) for _ in range(random.randint(0, 3)))
    slices = (SliceHeld(placed.model, 0, 2),) if random.random() < 0.5 else ()
    return Facts(node, node, "sim", devices, 1 << 40, "", {}, {}, slices, reports, random.random() < 0.2)


def heartbeat(scenario: Scenario, node: str, sessions: list[str]) -> Heartbeat:
    """A heartbeat that was never sent, perhaps in the name of the true session."""
    random = scenario.random
    session = random.choice([*sessions, "old", "older"])
    deployments = tuple(deployment(scenario) for _ in range(random.randint(0, 2)))
    farewell = random.choice(("", "", "", "stops", "leaves"))
    sent, clock = number(random, 1e5), number(random)
    return Heartbeat(session, sent, clock, facts(scenario, node), deployments, farewell=farewell)


def deployment(scenario: Scenario) -> Deployment:
    """A deployment that nobody made; for a true model it would serve it alike, or not at all."""
    random = scenario.random
    name = random.choice((*scenario.shapes, "other"))
    shape = scenario.shapes.get(name) or random.choice(list(scenario.shapes.values()))
    if random.random() < 0.1:
        digest = random.choice(list(scenario.shapes.values())).digest
        shape = msgspec.structs.replace(shape, digest=digest)  # perhaps a wrong one
    context = 64 if name != "other" else random.choice((8, 64))
    replicas, stamp = random.choice((0, 1, 1)), number(random, EPOCH)
    return _authored(scenario, Deployment(name, shape, context, 3, replicas, stamp, "nobody"))


def _authored(scenario: Scenario, made: Deployment) -> Deployment:
    """What a node with a wrong clock signed; now and then unsigned, as an older version left it; or FORGED:
    in another's name, or altered since."""
    random = scenario.random
    author = Seals(random.choice(list(scenario.world.machines)))
    kind = random.random()
    if kind < 0.15:
        return made
    signed = msgspec.structs.replace(
        made, author=author.node, written=made.stamp, certificate=author.member_certificate
    )
    signature = author.sign_statement(statement(signed))
    if kind < 0.7:
        return msgspec.structs.replace(signed, signature=signature)
    other = Seals("nobody").sign_statement(statement(signed)) if kind < 0.85 else signature
    return msgspec.structs.replace(signed, source=FORGED, signature=other)


def disk(scenario: Scenario, machine: Machine) -> None:
    """What a machine finds on its disk."""
    random = scenario.random
    if scenario.muddled and random.random() < 0.5:
        machine.deployments = tuple(deployment(scenario) for _ in range(random.randint(0, 2)))
        machine.remembered = set(random.sample([*scenario.world.machines, "nobody"], random.randint(0, 2)))
    for shape in scenario.shapes.values():
        if random.random() < 0.4:
            machine.slices.add(SliceHeld(shape.digest, 0, shape.layers, whole=True))


def everything(scenario: Scenario) -> None:
    """Memory of all agents, and messages under way."""
    random, world = scenario.random, scenario.world
    sessions = [agent.controller._session for agent in scenario.agents.values()]
    names = [*world.machines, "ghost"]
    for name, agent in scenario.agents.items():
        seen = agent.controller._membership._seen
        for other in names:
            if other != name and random.random() < 0.4:
                lost = None if random.random() < 0.5 else number(random, agent.now)
                seen[other] = Sighting(
                    heartbeat(scenario, other, sessions),
                    number(random, agent.now),
                    number(random),
                    lost,
                    random.choice(sessions),
                    number(random, agent.now),
                )
        _corrupt_controller(scenario, agent)
        _corrupt_reconciler(scenario, agent)
    for _ in range(random.randint(0, 8)):
        target = random.choice(list(world.machines))
        garbage = heartbeat(scenario, random.choice(names), sessions)
        world.after(random.random() * 2, world.arrive, target, "heartbeat", garbage)
        world.after(random.random() * 4, world.arrive, target, "ask", _ask(scenario))


def _corrupt_controller(scenario: Scenario, agent: Agent) -> None:
    """Deployments that nobody made, times that never were, routes that lead nowhere."""
    random, controller = scenario.random, agent.controller
    for _ in range(random.randint(0, 2)):
        controller._deployments._put(deployment(scenario))
    controller._observed, controller._planned = number(random, agent.now), number(random, agent.now)
    controller._listens_until, controller._offset = number(random, agent.now), number(random)
    agent.gateway._routes = {
        stream_key(shape.digest, 64): random.choice(["nobody", agent.name])
        for shape in scenario.shapes.values()
    }


def _ask(scenario: Scenario) -> tuple[str, Ask | Assert]:
    """What the gateway of a node never said, with its true id."""
    random = scenario.random
    agent = random.choice(list(scenario.agents.values()))
    model = stream_key(random.choice(list(scenario.shapes.values())).digest, random.choice((8, 64)))
    counter = random.choice((1, 5, 10**18))
    head = (agent.gateway._id, random.randint(1, 3), model, counter)
    if random.random() < 0.5:
        return agent.name, Assert(*head, ((random.randint(1, 9), random.randint(0, 9)),))
    prompt = tuple(random.randrange(-1, 2000) for _ in range(random.randint(0, 90)))
    request = Request(id=f"s{random.randint(0, 4)}", prompt=prompt, max_tokens=random.choice((None, 5)))
    return agent.name, Ask(*head, random.randint(1, 9), request, ())


def _corrupt_reconciler(scenario: Scenario, agent: Agent) -> None:
    """Workers that nobody started, in wirings that never were; failures that never happened."""
    random = scenario.random
    for _ in range(random.randint(0, 2)):
        placed = placement(scenario)
        mine = [index for index, place in enumerate(placed.stages) if place.last > place.first]
        if not mine:
            continue
        spec = spec_of(placed, random.choice(mine))
        process = agent.start_worker(spec)
        if random.random() < 0.5:
            process.wire(f"w{random.randrange(3)}", 0, len(placed.stages), "n0/1.1")
            process.cache[0] = [random.getrandbits(30) for _ in range(5)]
        agent.controller._reconciler._assignments[process.id] = (placed, random.randrange(4))
        if random.random() < 0.3:
            agent.controller.failed(spec, "corrupted", number(random, agent.now))
