"""Small clusters for the tests of cordee.cluster: layers of equal size, nodes with room for a few each."""

from collections.abc import Mapping, Sequence

import msgspec

from cordee.cluster.choose import Chosen, Planning, choose
from cordee.cluster.deployments import Deployment, statement
from cordee.cluster.facts import (
    Device,
    Facts,
    ModelShape,
    Placement,
    SliceHeld,
    StagePlace,
    StageReport,
    wiring_id,
)
from cordee.cluster.membership import View
from sim.trust import Seals

LAYER_BYTES = 100
ME = Seals("me")  # for a node whose signatures do not matter
CONTEXT, SEQUENCES = 64, 2


def shape_of(name: str = "m", layers: int = 4) -> ModelShape:
    return ModelShape(
        digest=name,
        architecture="llama",
        n_embd=8,
        n_vocab=100,
        layer_bytes=(LAYER_BYTES,) * layers,
        active_bytes=(LAYER_BYTES,) * layers,
        cell_bytes=(1,) * layers,
        row_floats=(8,) * layers,
        windowed=(False,) * layers,
        embedding_bytes=1,
        extra_bytes=0,
        last_extra_bytes=1,
        whole_extra_bytes=1,
        active_head_bytes=1,
    )


def facts_of(
    node: str,
    layers: int = 4,
    speed: float = 100.0,
    stages: Sequence[StageReport] = (),
    slices: Sequence[SliceHeld] = (),
    draining: bool = False,
    disk_free_bytes: int = 1 << 40,
) -> Facts:
    """A node with room for `layers` layers, whose device reads `speed` layers a second."""
    device = Device("cpu", "cpu", layers * LAYER_BYTES, speed * LAYER_BYTES)
    return Facts(
        node=node,
        name=node,
        build="b",
        devices=(device,),
        disk_free_bytes=disk_free_bytes,
        api="",
        rtts={},
        bytes_per_second={},
        slices=tuple(slices),
        stages=tuple(stages),
        draining=draining,
        inbox=f"{node}/inbox",
    )


def placed(*stages: tuple[str, int, int], model: str = "m", context: int = CONTEXT) -> Placement:
    return Placement(
        model, context, SEQUENCES, tuple(StagePlace(node, "cpu", first, last) for node, first, last in stages)
    )


def running(
    placement: Placement, state: str = "wired", nodes: Sequence[str] | None = None
) -> dict[str, list[StageReport]]:
    """What the nodes of a placement report about it; with `nodes`, only those do."""
    workers = [f"w{index}{place.node}" for index, place in enumerate(placement.stages)]
    wiring = wiring_id(placement, workers) if state == "wired" else ""
    reports: dict[str, list[StageReport]] = {}
    for index, place in enumerate(placement.stages):
        if nodes is None or place.node in nodes:
            endpoint = f"{place.node}/{index}"
            report = StageReport(placement, index, state, workers[index], endpoint, wiring)  # type: ignore[arg-type]
            reports.setdefault(place.node, []).append(report)
    return reports


def view_of(
    *nodes: Facts,
    deployments: Sequence[Deployment] | None = None,
    suspects: Sequence[str] = (),
    listening: bool = False,
) -> View:
    if deployments is None:
        deployments = [Deployment("m", shape_of(), CONTEXT, SEQUENCES)]
    return View(
        {facts.node: facts for facts in sorted(nodes, key=lambda facts: facts.node)},
        frozenset(suspects),
        tuple(sorted(deployments, key=lambda deployment: deployment.model)),
        listening,
    )


def signed(deployment: Deployment, author: str = "author") -> Deployment:
    """A deployment as its author writes it, with the stamp that it has."""
    seals = Seals(author)
    said = msgspec.structs.replace(
        deployment, author=author, written=deployment.stamp, certificate=seals.member_certificate
    )
    return msgspec.structs.replace(said, signature=seals.sign_statement(statement(said)))


class Simple(Planning):
    """Fastest nodes first, as many layers on each as it has room for; weights are all that takes memory."""

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        first, stages = 0, []
        for facts in sorted(nodes, key=lambda facts: (-facts.devices[0].read_bytes_per_second, facts.node)):
            last = min(shape.layers, first + facts.devices[0].memory_bytes // LAYER_BYTES)
            if last > first:
                stages.append(StagePlace(facts.node, "cpu", first, last))
            first = last
        done = first == shape.layers
        return Placement(shape.digest, context, sequences, tuple(stages)) if done else None

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        seconds = 0.0
        for place in placement.stages:
            speed = nodes[place.node].devices[0].read_bytes_per_second
            seconds += sum(shape.active_bytes[place.first : place.last]) / speed if speed > 0 else 1e9
        return 1 / seconds

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        place = placement.stages[index]
        return sum(shape.layer_bytes[place.first : place.last])


def chosen(view: View, model: str = "m") -> tuple[Chosen, ...]:
    return choose(view, Simple())[model]


def where(choice: Chosen) -> list[tuple[str, int, int]]:
    return [(place.node, place.first, place.last) for place in choice.placement.stages]
