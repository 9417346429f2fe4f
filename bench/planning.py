"""What planning takes in a node's agent, in clusters of machines that are all unlike: seconds.

    python bench/planning.py [--json]

`step` is the longest step of the controller from the moment when models are deployed until they are placed:
so long the agent's loop stands still. `plan` is what a process plans meanwhile. `quiet` is a step after one
machine's disk changed a little, `hear` decoding and hearing a heartbeat that says what was said before.
"""

import argparse
import json
import time
from collections.abc import Callable
from random import Random

import msgspec

from cordee.cluster.controller import Controller, Running
from cordee.cluster.deployments import Deployment, Deployments
from cordee.cluster.facts import Device, Facts, ModelShape
from cordee.cluster.later_planner import LaterPlanner
from cordee.cluster.membership import LISTEN_SECONDS, Heartbeat
from cordee.cluster.questions import answer

GB = 10**9
# Machines, devices of each, layers, and the models deployed at the same time. The last is all that a cluster
# takes in: as many nodes, devices and layers as are believed.
CLUSTERS = ((4, 1, 32, 1), (16, 2, 80, 1), (30, 2, 80, 8), (256, 2, 80, 1), (256, 64, 1024, 4))
NOTHING = Running({}, {}, {})


def shape_of(name: str, layers: int) -> ModelShape:
    """A model of layers of 1 GB."""
    sizes, windowed = (GB,) * layers, (False,) * layers
    return ModelShape(
        name,
        "llama",
        8192,
        128_000,
        sizes,
        sizes,
        (4096,) * layers,
        (100_000,) * layers,
        windowed,
        GB,
        0,
        GB,
        2 * GB,
        GB,
    )


def machines(count: int, devices: int, layers: int) -> list[Facts]:
    """Machines of which no two are alike, nor any two links; together they hold more than the layers."""
    random = Random(1)
    names = [f"n{i:03d}" for i in range(count)]
    least = 2 + 2 * layers // min(64, count * devices)
    return [
        Facts(
            name,
            name,
            "",
            tuple(
                Device(
                    f"d{k}", "gpu", random.randrange(least * GB, 2 * least * GB), random.uniform(2e10, 5e11)
                )
                for k in range(devices)
            ),
            10_000 * GB,
            "",
            {other: random.uniform(0.0002, 0.0006) for other in names},
            {other: random.uniform(1e7, 2e8) for other in names},
            (),
            (),
        )
        for name in names
    ]


class Unsigned:
    """A Trust that takes anybody's word: signatures are checked once, and are not what is measured."""

    node = "n"
    member_certificate = b"a member"

    def sign_statement(self, statement: bytes) -> bytes:
        """Nothing that would be checked."""
        return b"signed"

    def is_signed(self, node: str, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Always."""
        return True


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(count: int, devices: int, layers: int, models: int) -> dict[str, float]:
    """Figure by name."""
    own, *others = machines(count, devices, layers)
    planner = LaterPlanner()
    controller = Controller(own.node, "s", planner, Unsigned())
    written = Deployments(Unsigned())
    for index in range(models):
        written.write(Deployment(f"m{index}", shape_of(f"m{index}", layers), 4096, 2), 1.0)
    deployments = written.all

    def hear(facts: Facts, now: float) -> float:
        said = msgspec.msgpack.encode(Heartbeat(f"s{facts.node}", now, now, facts, deployments))
        return seconds(lambda: controller.hear(msgspec.msgpack.decode(said, type=Heartbeat), now))

    def step(now: float) -> float:
        return seconds(lambda: controller.step(own, NOTHING, now, now))

    steps, plans, hearings = [0.0], [0.0], [0.0]
    now = 0.0
    for now in range(int(LISTEN_SECONDS) + 2):
        hearings = [hear(facts, now) for facts in others]
        steps.append(step(now))
        planner.settle()
    while (due := planner.due()) is not None:
        start = time.perf_counter()
        found, _ = answer(due.question)
        plans.append(time.perf_counter() - start)
        assert found is not None, "it has all steps that a search may take"
        planner.tell(due, found)
        controller.rethink()
        steps.append(step(now))
        planner.settle()
    hear(msgspec.structs.replace(others[0], disk_free_bytes=9999 * GB), now + 1)
    return {"step": max(steps), "plan": sum(plans), "quiet": step(now + 1), "hear": max(hearings)}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found: list[dict[str, float]] = []
    for cluster in CLUSTERS:
        names = dict(zip(("machines", "devices", "layers", "models"), cluster, strict=True))
        found.append({**names, **measured(*cluster)})
        if not as_json:
            print("  ".join(f"{name} {figure:.4g}" for name, figure in found[-1].items()))
    if as_json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
