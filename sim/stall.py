"""Plays what never comes up, or creeps, with a spare machine at hand: answers must go on all the same.

Unlike the faults of scenario.py these last, and the bound is much shorter: what people wait for.
"""

from collections.abc import Callable

from cordee.cluster.facts import Device
from cordee.cluster.goals import READ_BYTES_PER_SECOND_MIN
from sim import checks
from sim.run import Broken
from sim.scenario import LAYER_BYTES, STAGE_BYTES, Scenario, creeps, half_open, never_loads, shape_of

# From the fault to the last answer: 30 s, and the time in which the slowest disk would read a stage.
SERVED_SECONDS = 30.0 + 3 * LAYER_BYTES / READ_BYTES_PER_SECOND_MIN
SETTLED_SECONDS = 20.0
MACHINES, STREAMS = 4, 3


def play_stall(seed: int) -> str:
    """Play a seed; the fault that it was.

    Raises:
        Broken: an answer did not come in time; with the seed and one line for each node.
    """
    scenario = Scenario(seed, muddled=False, machines=MACHINES)
    try:
        fault = _play(scenario)
    except Exception as error:
        raise Broken(f"stall {seed}: {error!r}\n" + "\n".join(checks.lines(scenario))) from error
    return fault


def _play(scenario: Scenario) -> str:
    world, random = scenario.world, scenario.random
    for machine in world.machines.values():  # two of them hold the model, and rows are quick
        machine.devices = (Device("cpu", "cpu", STAGE_BYTES + 3 * LAYER_BYTES, 1e12),)
        scenario.boot(machine.name)
    scenario.shapes = {"small": shape_of("small", 4)}
    scenario.sequences = {"small": STREAMS}
    name, (strike, loses_worker) = random.choice(list(FAULTS.items()))
    if is_early := random.random() < 0.3:
        strike(scenario, random.choice(sorted(scenario.agents)))
    world.run(world.now + 2)
    scenario.deploy("small", scenario.shapes["small"], replicas=1)
    world.run(world.now + SETTLED_SECONDS)
    for _ in range(STREAMS):
        scenario.open_stream()
    if not is_early:
        world.run(world.now + random.random() * 0.3)  # in the middle of the answers
        victim = random.choice(_stages(scenario))
        strike(scenario, victim)
        if loses_worker:
            agent = scenario.agents[victim]
            agent.end_worker(random.choice(sorted(agent.workers)))
    _answered(scenario, name)
    scenario.open_stream()  # and there is nothing left that waits
    _answered(scenario, name)
    return name


def _answered(scenario: Scenario, name: str) -> None:
    scenario.world.run(scenario.world.now + SERVED_SECONDS)
    if wrong := checks.always(scenario):
        raise Broken(wrong)
    for client in scenario.clients:
        if client.ended not in ("stop", "length"):
            raise Broken(f"{name}: stream {client.request.id} is not answered ({client.ended or 'waits'})")


def _stages(scenario: Scenario) -> list[str]:
    """The nodes that serve."""
    return sorted(name for name, agent in scenario.agents.items() if agent.workers)


def _wrong_clock(scenario: Scenario, name: str) -> None:
    """Certificates seem to have run out, in both directions; links that are open stay."""
    scenario.world.machines[name].clock_error += 40 * 86400.0
    others = [other for other in scenario.world.machines if other != name]
    scenario.world.half_open |= {(name, other) for other in others} | {(other, name) for other in others}


# And whether the fault shows only once a worker is lost.
FAULTS: dict[str, tuple[Callable[[Scenario, str], None], bool]] = {
    "its ports are closed": (half_open, True),
    "its clock is wrong": (_wrong_clock, True),
    "it never loads": (never_loads, True),
    "its links creep": (creeps, False),
}
