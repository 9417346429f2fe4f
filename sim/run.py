"""Plays one seed and judges it. What must hold:

- always: a stream's tokens are those of the undisturbed answer, each once; a node that knows of a revocation
  places nothing on the revoked node;
- within BOUND_LEASES after the last fault or deployment: all live nodes agree, and run exactly what they
  agreed on, within their memory; a model that could run does; nothing else runs; draining nodes are relieved
  where possible; slices lie twice where disk allows; all streams are answered;
- then nothing changes any more: not by itself, and not when a liveliness token is lost for a moment;
- a machine that comes back does not interrupt a model that serves.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cordee.cluster.deployments import Deployment
from cordee.cluster.membership import LEASE_SECONDS, SUSPICION_SECONDS
from sim import checks
from sim.scenario import Scenario

# By then everything stands: the last fault may be a stage that failed, which counts for FAILED_SECONDS (20
# leases), twice if the next stage fails then; to notice, plan, load and wire takes 2 or 3.
BOUND_LEASES = 40
STAY_LEASES = 2  # for this long nothing may change then
LOOK_SECONDS = 0.5
LOOK_CLOSELY_SECONDS = 0.1
NOTHING: Mapping[str, Deployment] = {}


class Broken(AssertionError):
    """What a seed showed to be wrong."""


@dataclass(frozen=True)
class Outcome:
    """How a seed went: lease periods to convergence, and what befell its streams."""

    leases: float
    streams: Counter[str]


def play(seed: int) -> Outcome:
    """Play a seed.

    Raises:
        Broken: with the seed and one line for each node.
    """
    scenario = Scenario(seed)
    try:
        scenario.play()
        over = scenario.world.now
        settled, _ = _settle(scenario, over, NOTHING)
        leases = (settled - over) / LEASE_SECONDS
        _blink(scenario)
        if scenario.dead:
            _return(scenario)
    except Exception as error:
        raise Broken(f"seed {seed}: {error!r}\n" + "\n".join(checks.lines(scenario))) from error
    ends = Counter("gateway lost" if not client.gateway.up else client.ended for client in scenario.clients)
    return Outcome(leases, ends)


def _settle(
    scenario: Scenario, since: float, served: Mapping[str, Deployment]
) -> tuple[float, Mapping[str, Deployment]]:
    """Let time pass until nothing changes; when that began, and what of `served` was deployed the same way
    all along.

    What is `served` must not be interrupted, unless its deployment changes: clocks that are days apart may
    make an old deployment the newest for a moment.
    """
    world = scenario.world
    look_seconds = LOOK_CLOSELY_SECONDS if served else LOOK_SECONDS
    settled: float | None = None
    before: object = None
    while settled is None or world.now - settled < STAY_LEASES * LEASE_SECONDS:
        world.run(world.now + look_seconds)
        known = scenario.known_deployments()
        served = {
            model: deployment
            for model, deployment in served.items()
            if all(deployments.get(model, deployment) == deployment for deployments in known)
        }
        fault = checks.always(scenario) or checks.interrupted(scenario, served)
        if fault:
            raise Broken(fault)
        fault, picture = checks.unsettled(scenario), checks.picture(scenario)
        if fault:
            settled = None
        elif settled is None or picture != before:
            settled = world.now
        before = picture
        if world.now - since > BOUND_LEASES * LEASE_SECONDS:
            raise Broken(f"not settled within {BOUND_LEASES} leases: {fault or 'it changes'}")
    return settled, served


def _blink(scenario: Scenario) -> None:
    """The bus takes one node's token away and gives it back: nothing may happen."""
    names = sorted(scenario.agents)
    if not names:
        return
    before = checks.picture(scenario)
    name = scenario.random.choice(names)
    for other in names:
        if other != name:
            scenario.world.arrive(other, "token", (name, False))
            scenario.world.after(SUSPICION_SECONDS / 2, scenario.world.arrive, other, "token", (name, True))
    scenario.world.run(scenario.world.now + SUSPICION_SECONDS)
    if checks.picture(scenario) != before:
        raise Broken(f"{name} only lost its token for a moment, and things moved")


def _return(scenario: Scenario) -> None:
    """Machines that were thought dead come back: what serves goes on, and moves for a clear gain only."""
    before = checks.serving(scenario)
    known, deployed = scenario.known_revocations(), scenario.deployed()
    scenario.promised = frozenset()  # their disks may hold deployments that are credible
    for name in sorted(scenario.dead):
        scenario.dead.discard(name)
        scenario.boot(name)
    scenario.revoked = scenario.known_revocations()
    if scenario.revoked != known:
        before = {}  # what it used may have to go
    _, served = _settle(scenario, scenario.world.now, {model: deployed[model] for model in before})
    after = checks.serving(scenario)
    fault = checks.moved_for_little({model: before[model] for model in served}, after)
    if fault:
        raise Broken(fault)
