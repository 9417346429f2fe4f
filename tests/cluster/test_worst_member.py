"""The most that one member may say, and something else each time: an agent's step stays short."""

from random import Random

import msgspec

from calls import calls_of
from clusters import ME, signed
from cordee.cluster.controller import Controller, Running
from cordee.cluster.deployments import DEPLOYMENTS_MAX, REPLICAS_MAX, Deployment
from cordee.cluster.facts import Facts, ModelShape, Offer, Placement, SliceHeld, StagePlace, StageReport
from cordee.cluster.later_planner import LaterPlanner
from cordee.cluster.membership import LISTEN_SECONDS, Heartbeat
from cordee.cluster.questions import answer
from cordee.cluster.soundness import COUNTS, ITEMS_MAX, PLACES_MAX, fault
from plans import device, machine, made_shape

LAYERS = ITEMS_MAX
STAGES = COUNTS[Facts, "stages"]
PLACES = PLACES_MAX // STAGES
# Some 0.1 s of Python; a search may take ten times as many.
CALLS_MAX = 600_000


def shape_of(digest: str, layers: int, random: Random) -> ModelShape:
    return made_shape(
        layers,
        digest=digest,
        layer_bytes=tuple(random.randrange(1, 10**7) for _ in range(layers)),
        cell_bytes=(1,) * layers,
        windowed=tuple(layer % 2 == 0 for layer in range(layers)),
        refused_counts=tuple(range(5000, 5000 + ITEMS_MAX)),
    )


class Worst:
    """What the member says: it serves all that it wishes for, on more devices than anybody has."""

    def __init__(self) -> None:
        self._random = Random(0)
        names = [f"m{k:02d}" for k in range(DEPLOYMENTS_MAX - 1)]
        self._deployments = tuple(
            signed(
                Deployment(name, shape_of(name, LAYERS, self._random), 4096, 2, REPLICAS_MAX, 1.0), "worst"
            )
            for name in names
        )
        self._offered = shape_of("o", 32, self._random)

    def heartbeat(self, now: float) -> Heartbeat:
        random, names = self._random, [each.model for each in self._deployments]
        devices = COUNTS[Facts, "devices"]
        cut = LAYERS // PLACES
        placements = [
            Placement(
                names[k % len(names)],
                4096,
                2,
                tuple(
                    StagePlace("worst", f"d{(k + j + int(now)) % devices}", j * cut, (j + 1) * cut)
                    for j in range(PLACES)
                ),
            )
            for k in range(STAGES)
        ]
        facts = machine(
            "worst",
            *(device(1000 + random.random(), random.uniform(10, 900), name=f"d{k}") for k in range(devices)),
            slices=tuple(SliceHeld(names[k % len(names)], 0, LAYERS) for k in range(ITEMS_MAX)),
            stages=tuple(StageReport(each, 0, "wired", "w", "e", "x") for each in placements),
            rtts={f"n{k}": random.random() for k in range(COUNTS[Facts, "rtts"])},
            offers=tuple(
                Offer(f"o{k}", msgspec.structs.replace(self._offered, digest=f"o{k} {now}"), 4096)
                for k in range(COUNTS[Facts, "offers"])
            ),
        )
        said = Heartbeat("s", now, now, facts, self._deployments)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Heartbeat)


def test_the_worst_member_takes_little_of_a_step_and_hides_nothing() -> None:
    planner, worst = LaterPlanner(), Worst()
    controller = Controller("ada", "s", planner, ME)
    own = machine("ada", device(16, 50))
    controller.deploy("honest", made_shape(5, digest="honest"), 4096, 2, 0.0)
    for now in range(int(LISTEN_SECONDS) + 3):
        heartbeat = worst.heartbeat(float(now))
        assert fault(msgspec.structs.replace(heartbeat, deployments=())) == ""
        _, hearing = calls_of(lambda said=heartbeat, now=now: controller.hear(said, now))
        _, stepping = calls_of(lambda now=now: controller.step(own, Running({}, {}, {}), now, now))
        assert max(hearing, stepping) <= CALLS_MAX
        planner.settle()
        if (due := planner.due()) is not None:
            found, _ = answer(due.question)
            planner.tell(due, found)
            controller.rethink()
    controller.step(own, Running({}, {}, {}), now, now)
    assert controller.unsound == {}
    assert len(controller.chosen) == DEPLOYMENTS_MAX
    assert controller.chosen["honest"]
