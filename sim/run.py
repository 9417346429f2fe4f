"""Plays one seed and judges it: do all live nodes come to run one feasible placement, and stay there?"""

from collections import Counter
from dataclasses import dataclass

from msgspec.structs import replace

from cordee.cluster.choose import Chosen
from cordee.cluster.facts import Placement, StagePlace, placement_id
from cordee.cluster.goals import Load
from cordee.cluster.view import LEASE_SECONDS
from sim.agent import Agent
from sim.scenario import CONTEXT, FAULT_SECONDS, SEQUENCES, WISH_SECONDS, Scenario

# Within so many lease periods after the last fault everything stands: the last fault may be a stage that
# failed, which counts for FAILED_SECONDS (20 leases); to notice, plan, fetch, load and wire takes the rest.
BOUND_LEASES = 40
STAY_LEASES = 3  # so long nothing may change then


class Broken(AssertionError):
    """What a seed showed to be wrong."""


@dataclass(frozen=True)
class Outcome:
    """How a seed went: lease periods to convergence, and what befell its streams."""

    leases: float
    streams: Counter


def play(seed: int) -> Outcome:
    """Play a seed.

    Raises:
        Broken: with the seed and one line for each node.
    """
    scenario = Scenario(seed)
    try:
        scenario.play()
        return _judge(scenario)
    except Exception as error:
        raise Broken(f"seed {seed}: {error!r}\n" + "\n".join(_lines(scenario))) from error


def _judge(scenario: Scenario) -> Outcome:
    world = scenario.world
    world.run(FAULT_SECONDS + WISH_SECONDS)
    settled_since: float | None = None
    before: object = None
    while True:
        world.run(world.now + LEASE_SECONDS / 3)
        _check_revoked(scenario)
        _check_streams(scenario)
        fault = _unsettled(scenario)
        picture = _picture(scenario)
        if fault:
            settled_since = None
        elif settled_since is None or picture != before:
            settled_since = world.now
        before = picture
        leases = (world.now - FAULT_SECONDS) / LEASE_SECONDS
        if settled_since is not None and world.now - settled_since >= STAY_LEASES * LEASE_SECONDS:
            break
        if leases > BOUND_LEASES:
            raise Broken(f"not settled {BOUND_LEASES} leases after the last fault: {fault or 'it changes'}")
    ends = Counter("gateway lost" if not client.gateway.up else client.ended for client in scenario.clients)
    return Outcome((settled_since - FAULT_SECONDS) / LEASE_SECONDS, ends)


def _picture(scenario: Scenario) -> object:
    """What must not change any more."""
    return [(agent.name, agent.mind.chosen, sorted(agent.workers)) for agent in scenario.live()]


def _unsettled(scenario: Scenario) -> str:
    """What is still missing; empty if nothing."""
    agents = scenario.live()
    if not agents:
        return ""
    chosen = agents[0].mind.chosen
    for agent in agents[1:]:
        if agent.mind.chosen != chosen:
            return f"{agents[0].name} and {agent.name} do not agree"
    if any(agent.crew._failures for agent in agents):
        return "a failure still counts"
    wanted = set()
    for model, picks in chosen.items():
        for pick in picks:
            fault = _not_running(scenario, model, pick)
            if fault:
                return fault
            wanted.add(placement_id(pick.placement))
    for model, shape in scenario.shapes.items():
        if not chosen.get(model) and _could_run(scenario, agents, shape, chosen):
            return f"{model} could run, and does not"
    return _leftovers(scenario, agents, chosen) or _open_streams(scenario)


def _not_running(scenario: Scenario, model: str, pick: Chosen) -> str:
    if not pick.wiring:
        return f"{model} does not serve"
    if pick.successor is not None:
        return f"{model} is moving"
    for index, place in enumerate(pick.placement.stages):
        agent = scenario.world.agents.get(place.node)
        if agent is None or place.node in scenario.revoked:
            return f"{model} is placed on {place.node}, which is not there"
        processes = [p for p in agent.workers.values() if p.wiring == pick.wiring and p.index == index]
        if len(processes) != 1:
            return f"stage {index} of {model} is not wired"
    return ""


def _could_run(scenario: Scenario, agents: list[Agent], shape: object, chosen: dict) -> bool:
    """Whether the machines that are left have room for a model beside what serves."""
    nodes = []
    for agent in agents:
        if not agent.machine.draining:
            free = {device.name: device.memory_bytes for device in agent.machine.devices}
            for process in agent.workers.values():
                free[process.load.device] -= _worker_bytes(scenario, process.load)
            devices = tuple(replace(d, memory_bytes=free[d.name]) for d in agent.machine.devices)
            nodes.append(replace(agent.mind.nodes(0)[agent.name][1], devices=devices))
    return scenario.planning.plan(shape, CONTEXT, SEQUENCES, nodes) is not None


def _worker_bytes(scenario: Scenario, load: Load) -> int:
    shape = next(shape for shape in scenario.shapes.values() if shape.digest == load.model)
    place = StagePlace("", load.device, load.first, load.last)
    placement = Placement(load.model, load.context, load.sequences, (place,))
    return scenario.planning.stage_bytes(shape, placement, 0)


def _leftovers(scenario: Scenario, agents: list[Agent], chosen: dict) -> str:
    wirings = {pick.wiring for picks in chosen.values() for pick in picks}
    for agent in agents:
        for process in agent.workers.values():
            if process.wiring not in wirings:
                return f"{agent.name} runs a worker that nobody needs"
        for pipeline in agent.pipelines.values():
            if pipeline.wiring not in wirings:
                return f"{agent.name} hosts what does not serve"
    return ""


def _open_streams(scenario: Scenario) -> str:
    served = {model for agent in scenario.live() for model, picks in agent.mind.chosen.items() if picks}
    for client in scenario.clients:
        lost = not client.gateway.up or client.gateway.name in scenario.revoked
        if not client.ended and not lost and client.model in served:
            return f"stream {client.request.id} is not answered"
    return ""


def _check_streams(scenario: Scenario) -> None:
    for client in scenario.clients:
        if client.wrong:
            raise Broken(f"stream {client.request.id}: {client.wrong}")


def _check_revoked(scenario: Scenario) -> None:
    """Who knows of a revocation never wants anything of the revoked node."""
    for agent in scenario.live():
        for picks in agent.mind.chosen.values():
            for pick in picks:
                for placement in (pick.placement, pick.successor):
                    for place in placement.stages if placement is not None else ():
                        if place.node in agent.mind._revocations:
                            raise Broken(f"{agent.name} places a stage on {place.node}, which is revoked")


def _lines(scenario: Scenario) -> list[str]:
    """One line for each node."""
    lines = []
    for name, machine in scenario.world.machines.items():
        agent = scenario.world.agents.get(name)
        if agent is None:
            lines.append(f"  {name}: down")
            continue
        state = "revoked" if name in scenario.revoked else "draining" if machine.draining else "up"
        chosen = {
            model: [f"{placement_id(pick.placement)[:4]}/{pick.wiring[:4] or '-'}" for pick in picks]
            for model, picks in agent.mind.chosen.items()
        }
        workers = [
            f"{p.load.model}[{p.load.first}:{p.load.last}] {p.state} {p.wiring[:4]}"
            for p in agent.workers.values()
        ]
        failures = [f"{load.first}:{load.last}" for load in agent.crew._failures]
        knows = {node: state for node, (state, _) in agent.mind.nodes(agent.now).items()}
        lines.append(f"  {name}: {state}; sees {knows}; wants {chosen}; runs {workers}; failed {failures}")
    lines += [
        f"  stream {c.request.id} at {c.gateway.name}: {c.ended or len(c.got)}" for c in scenario.clients
    ]
    return lines
