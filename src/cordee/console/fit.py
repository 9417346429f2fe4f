"""Whether a model fits, before it is fetched: on each machine by itself, and on all together."""

from collections.abc import Mapping
from typing import Any

from cordee.agent.control import Planned
from cordee.cluster import planner
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import Facts, ModelShape
from cordee.cluster.planner import Reserved
from cordee.errors import BadRequest
from cordee.machine.sizing import size_request
from cordee.models.planned import PlannedModel

MACHINES_MAX = 64  # that are planned for one by one: a page, and some milliseconds for each


def requested(wanted: PlannedModel, name: str) -> SizeRequest:
    """What a model is asked for where nobody says more."""
    return size_request(wanted.context, None, None, name)


def planned_on(
    shape: ModelShape, asked: SizeRequest, nodes: Mapping[str, Facts], reserved: Reserved | None = None
) -> Planned:
    """Where a model would run on these machines, beside what is `reserved`. For a thread."""
    demand = planner.largest(shape, nodes, asked, reserved) or asked.least
    found = planner.plan(shape, nodes, demand, reserved)
    return Planned(shape, demand, asked.shortened(demand), found, 1 if found.placement else 0)


def verdict(planned: Planned) -> dict[str, Any]:
    """A plan as the page shows it; `why` is the planner's own."""
    plan = planned.plan
    return {
        "fits": plan.placement is not None,
        "why": plan.why,
        "lacks": planned.lacks if plan.placement is not None else "",
        "context": planned.demand.context,
        "sequences": planned.demand.sequences,
        "tokens_per_second": plan.tokens_per_second,
        "prompt_tokens_per_second": plan.prompt_tokens_per_second,
        "needed_bytes": sum(stage.needed_bytes for stage in plan.stages),
        "fetch_bytes": sum(stage.fetch_bytes for stage in plan.stages),
        "copies": planned.copies,
        "stages": [
            {"name": stage.name, "layers": [stage.first, stage.last], "needed_bytes": stage.needed_bytes}
            for stage in plan.stages
        ],
        "machines": [{"name": each.name, "used": each.used, "why": each.why} for each in plan.machines],
    }


def each_alone(
    shape: ModelShape, asked: SizeRequest, nodes: Mapping[str, Facts], reserved: Reserved | None = None
) -> list[dict[str, Any]]:
    """The verdict for each machine by itself, by name. For a thread."""
    chosen = sorted(nodes.values(), key=lambda facts: (facts.name, facts.node))[:MACHINES_MAX]
    return [
        {"name": facts.name, "id": facts.node}
        | verdict(planned_on(shape, asked, {facts.node: facts}, reserved))
        for facts in chosen
    ]


def answer(
    name: str, shape: ModelShape, alone: list[dict[str, Any]], all_together: Planned
) -> dict[str, Any]:
    """All of it, for a model."""
    return {
        "model": name,
        "layers": shape.layers,
        "weights_bytes": sum(shape.layer_bytes) + shape.whole_extra_bytes,
        "machines": alone,
        "together": verdict(all_together),
    }


def check_source(text: str) -> str:
    """A card's name, or a model of the hub: the page fetches no file of this machine.

    Raises:
        BadRequest: it is neither.
    """
    found = text.strip()
    if not found or found.startswith((".", "/", "~", "\\")) or not found.isprintable():
        raise BadRequest(
            f"{text!r} is no model to fetch: choose one of the list, or write owner/name of a repository on "
            "huggingface.co.",
            "source",
        )
    return found
