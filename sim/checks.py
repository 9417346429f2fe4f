"""What is right: looked at from above, with the truth about every machine in hand. Empty answers are good."""

from collections.abc import Mapping

from msgspec.structs import replace

from cordee.cluster.choose import UPGRADE_RATIO, Chosen
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Facts, ModelShape, Placement, StagePlace, placement_id, stream_key
from cordee.cluster.goals import StageSpec, holds, spec_of
from sim.agent import Agent
from sim.corrupt import FORGED
from sim.scenario import CONTEXT, SEQUENCES, Scenario

Speeds = dict[str, dict[str, float]]  # predicted tokens per second by model and placement


def always(scenario: Scenario) -> str:
    """What may never be, faults or not."""
    for client in scenario.clients:
        if client.wrong:
            return f"stream {client.request.id}: {client.wrong}"
    for agent in scenario.live():
        for pick in _picks(agent):
            for placement in (pick.placement, pick.successor):
                for place in placement.stages if placement is not None else ():
                    if place.node in agent.controller.revoked:
                        return f"{agent.name} places a stage on {place.node}, which is revoked"
    return ""


def interrupted(scenario: Scenario, served: Mapping[str, Deployment]) -> str:
    """Whether a model that served, and is deployed as it was, does not serve now."""
    running = {
        process.wiring
        for agent in scenario.live()
        for process in agent.workers.values()
        if process.state == "wired"
    }
    for model in served:
        picks = [pick for agent in scenario.live() for pick in agent.controller.chosen.get(model, ())]
        if not any(pick.wiring in running for pick in picks):
            return f"{model} was interrupted"
    return ""


def picture(scenario: Scenario) -> object:
    """What must not change once things are settled."""
    return [
        (
            agent.name,
            agent.controller.chosen,
            sorted(agent.workers),
            {key: pipeline.wiring for key, pipeline in agent.pipelines.items()},
            dict(agent.gateway.routes),
        )
        for agent in scenario.live()
    ]


def serving(scenario: Scenario) -> Speeds:
    """What serves each model, save what uses a draining node: that moves as soon as it can."""
    agents = scenario.live()
    facts = {agent.name: facts_of(agent) for agent in agents}
    found: Speeds = {}
    for model, picks in agents[0].controller.chosen.items() if agents else ():
        for pick in picks:
            if pick.wiring and model in scenario.shapes and not _leaves(scenario, pick):
                speed = scenario.planner.speed(scenario.shapes[model], pick.placement, facts)
                found.setdefault(model, {})[placement_id(pick.placement)] = speed
    return found


def moved_for_little(before: Speeds, after: Speeds) -> str:
    """Whether a placement was left though none is clearly faster than the slowest of them was."""
    for model in before.keys() & after.keys():
        old, new = min(before[model].values()), max(after[model].values())
        if before[model].keys() - after[model].keys() and new < old * UPGRADE_RATIO:
            return f"{model} was moved for little: {old:.2f} to {new:.2f} tokens/s"
    return ""


def _leaves(scenario: Scenario, pick: Chosen) -> bool:
    return any(scenario.world.machines[place.node].draining for place in pick.placement.stages)


def unsettled(scenario: Scenario) -> str:
    """What is still missing."""
    agents = scenario.live()
    if not agents:
        return ""
    chosen = agents[0].controller.chosen
    for agent in agents[1:]:
        if agent.controller.chosen != chosen:
            return f"{agents[0].name} and {agent.name} do not agree"
    if any(each.source == FORGED for agent in agents for each in agent.controller.deployments):
        return "a forged deployment is held"
    if any(agent.controller.failures for agent in agents):
        return "a failure still counts"
    if any(facts_of(agent).doubts for agent in agents):
        return "a doubt still counts"
    return (
        _not_running(scenario, chosen)
        or _not_planned(scenario, agents, chosen)
        or _leftovers(scenario, agents, chosen)
        or _copies(scenario, agents, chosen)
        or _open_streams(scenario)
    )


def _picks(agent: Agent) -> list[Chosen]:
    return [pick for picks in agent.controller.chosen.values() for pick in picks]


def facts_of(agent: Agent) -> Facts:
    """What an agent says of itself."""
    return agent.controller.nodes(agent.now)[agent.name][1]


def _not_running(scenario: Scenario, chosen: Mapping[str, tuple[Chosen, ...]]) -> str:
    for model, picks in chosen.items():
        for pick in picks:
            if not pick.wiring:
                return f"{model} does not serve"
            if pick.successor is not None:
                return f"{model} is moving"
            for index, place in enumerate(pick.placement.stages):
                agent = scenario.agents.get(place.node)
                if agent is None or place.node in scenario.revoked:
                    return f"{model} is placed on {place.node}, which is not there"
                found = [p for p in agent.workers.values() if p.wiring == pick.wiring and p.index == index]
                if len(found) != 1 or found[0].spec != spec_of(pick.placement, index):
                    return f"stage {index} of {model} is not wired"
    return ""


def _not_planned(scenario: Scenario, agents: list[Agent], chosen: Mapping[str, tuple[Chosen, ...]]) -> str:
    """A model that could run, or could do without draining nodes, and does not."""
    for model in scenario.promised:
        shape, picks = scenario.shapes[model], chosen.get(model, ())
        if not picks and _could_run(scenario, agents, shape):
            return f"{model} could run, and does not"
        for pick in picks:
            apart = {place.node for p in picks if p is not pick for place in p.placement.stages}
            others = [agent for agent in agents if agent.name not in apart]
            if _leaves(scenario, pick) and _could_run(scenario, others, shape, pick.wiring):
                return f"{model} keeps a draining node busy"
    return ""


def _could_run(scenario: Scenario, agents: list[Agent], shape: ModelShape, without: str = "") -> bool:
    """Whether these machines have room for a model beside all that runs, save one wiring."""
    nodes: list[Facts] = []
    for agent in agents:
        free = _free(scenario, agent, without)
        devices = tuple(replace(d, memory_bytes=free[d.name]) for d in agent.machine.devices)
        nodes.append(replace(facts_of(agent), devices=devices))
    return scenario.planner.plan(shape, CONTEXT, SEQUENCES, nodes) is not None


def _free(scenario: Scenario, agent: Agent, without: str = "") -> dict[str, int]:
    free = {device.name: device.memory_bytes for device in agent.machine.devices}
    for process in agent.workers.values():
        if (not without or process.wiring != without) and process.spec.device in free:
            free[process.spec.device] -= _worker_bytes(scenario, agent, process.spec)
    return free


def _worker_bytes(scenario: Scenario, agent: Agent, spec: StageSpec) -> int:
    """What a worker takes, by the shape of the deployment that it is for: some deployments are wrong."""
    place = StagePlace("", spec.device, spec.first, spec.last)
    placement = Placement(spec.model, spec.context, spec.sequences, (place,))
    for deployment in agent.controller.deployments:
        shape = deployment.shape
        if shape is not None and shape.digest == spec.model and shape.allows(spec.first, spec.last):
            return scenario.planner.stage_bytes(shape, placement, 0)
    return 0


def _leftovers(scenario: Scenario, agents: list[Agent], chosen: Mapping[str, tuple[Chosen, ...]]) -> str:
    wirings = {pick.wiring for picks in chosen.values() for pick in picks}
    for agent in agents:
        for process in agent.workers.values():
            if process.wiring not in wirings and process.id not in agent.controller.goals.keep:
                return f"{agent.name} runs a worker that is not needed"
        for pipeline in agent.pipelines.values():
            if pipeline.wiring not in wirings:
                return f"{agent.name} hosts what does not serve"
        if min(_free(scenario, agent).values()) < 0:
            return f"{agent.name} has more stages than memory"
    return ""


def _copies(scenario: Scenario, agents: list[Agent], chosen: Mapping[str, tuple[Chosen, ...]]) -> str:
    """A slice that lies on one node only, though another has the disk for it."""
    for placement in {placement_id(p.placement): p.placement for ps in chosen.values() for p in ps}.values():
        for index, place in enumerate(placement.stages):
            goal = spec_of(placement, index).slice
            others = [agent for agent in agents if agent.name != place.node and not agent.machine.draining]
            held = any(holds(tuple(agent.machine.slices), goal) for agent in others)
            if not held and any(agent.machine.disk_bytes > 0 for agent in others):
                return f"layers {goal.first} to {goal.last} of {goal.model} lie on {place.node} only"
    return ""


def _open_streams(scenario: Scenario) -> str:
    """A stream of a model that is deployed and placed; a corrupted deployment may have replaced it."""
    served = {
        stream_key(each.shape.digest, each.context)
        for agent in scenario.live()
        for each in agent.controller.deployments
        if each.shape is not None and agent.controller.chosen.get(each.model)
    }
    for client in scenario.clients:
        lost = not client.gateway.up or client.gateway.name in scenario.revoked
        if not client.ended and not lost and client.key in served:
            return f"stream {client.request.id} is not answered"
    return ""


def lines(scenario: Scenario) -> list[str]:
    """One line for each node, and for each stream."""
    found: list[str] = []
    for name, machine in scenario.world.machines.items():
        agent = scenario.agents.get(name)
        if agent is None:
            found.append(f"  {name}: down")
            continue
        state = "revoked" if name in scenario.revoked else "draining" if machine.draining else "up"
        chosen = {
            model: [f"{placement_id(pick.placement)[:4]}/{pick.wiring[:4] or '-'}" for pick in picks]
            for model, picks in agent.controller.chosen.items()
        }
        workers = [
            f"{p.spec.model}[{p.spec.first}:{p.spec.last}] {p.state} {p.wiring[:4]}"
            for p in agent.workers.values()
        ]
        failures = [f"{spec.first}:{spec.last}" for spec in agent.controller.failures]
        knows = {node: state for node, (state, _) in agent.controller.nodes(agent.now).items()}
        found.append(f"  {name}: {state}; sees {knows}; wants {chosen}; runs {workers}; failed {failures}")
    found += [
        f"  stream {c.request.id} at {c.gateway.name}: {c.ended or len(c.got)}" for c in scenario.clients
    ]
    return found
