"""How much of what is asked of a model fits into what the cluster's nodes have left."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from cordee.cluster import planner
from cordee.cluster.choose import Chosen
from cordee.cluster.controller import Controller
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import ModelShape, Placement
from cordee.cluster.memory import Demand, needed_bytes

LOOK_SECONDS = 0.1  # how often it is looked whether the other nodes were heard


async def sized(
    controller: Controller,
    name: str,
    shape: ModelShape,
    requested: SizeRequest,
    only: Sequence[str] = (),
) -> Demand | None:
    """The most of what is asked of a model that fits beside the others; None if not even the least does.

    `only` are the nodes that may run it; none: all. A node that has just started first hears the others, so
    as not to count itself alone. What runs of the model under this name makes room. In a thread: a large
    cluster takes a while.
    """
    while controller.is_listening(time.monotonic()):  # for LISTEN_SECONDS at most
        await asyncio.sleep(LOOK_SECONDS)
    nodes = {
        node: facts
        for node, (state, facts) in controller.nodes(time.monotonic()).items()
        if state == "alive" and (not only or node in only)
    }
    others = {model: picks for model, picks in controller.chosen.items() if model != name}
    return await asyncio.to_thread(planner.largest, shape, nodes, requested, reserved(others))


def reserved(chosen: Mapping[str, Sequence[Chosen]]) -> dict[tuple[str, str], int]:
    """The bytes of each (node, device) that these models take."""
    found: dict[tuple[str, str], int] = {}
    for pick in (pick for picks in chosen.values() for pick in picks):
        for placement in (pick.placement, pick.successor):
            if placement is not None:
                _reserve(found, pick.shape, placement)
    return found


def _reserve(found: dict[tuple[str, str], int], shape: ModelShape, placement: Placement) -> None:
    demand = Demand(placement.context, placement.sequences)
    for place in placement.stages:
        key = (place.node, place.device)
        found[key] = found.get(key, 0) + needed_bytes(shape, demand, place.first, place.last)
