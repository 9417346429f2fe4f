"""What an agent knows of its cluster, for people and their programs: `cordee nodes`, `status`, `plan`.

JSON-able values; units stand in the names. Nothing here changes anything.
"""

import time
from collections.abc import Mapping
from typing import Any

from cordee.cluster import planner
from cordee.cluster.facts import Facts, ModelShape
from cordee.errors import BadRequest, ModelNotFound
from cordee.node.agent import Agent
from cordee.node.peers import Peers


def nodes(agent: Agent) -> dict[str, Any]:
    """Every node that is known, this one first."""
    known = agent.mind.nodes(time.monotonic())
    own = known.get(agent.node)
    rtts = own[1].rtts if own is not None else {}
    listed = [_node(agent, state, facts, rtts) for state, facts in known.values()]
    listed.sort(key=lambda node: (not node["self"], node["name"], node["id"]))
    return {"cluster": agent.identity.cluster, "node": agent.node, "nodes": listed}


def _node(agent: Agent, state: str, facts: Facts, rtts: Mapping[str, float]) -> dict[str, Any]:
    return {
        "id": facts.node,
        "name": facts.name,
        "self": facts.node == agent.node,
        "state": state,
        "draining": facts.draining,
        "api": facts.api,
        "rtt_seconds": rtts.get(facts.node),
        "build": facts.build,
        "disk_free_bytes": facts.disk_free_bytes,
        "devices": [
            {
                "name": device.name,
                "kind": device.kind,
                "memory_bytes": device.memory_bytes,
                "read_bytes_per_second": device.read_bytes_per_second,
            }
            for device in facts.devices
        ],
        "stages": len(facts.stages),
    }


def find(agent: Agent, wanted: str) -> dict[str, Any]:
    """A node by its id or its name: also one that is gone, or that only its address is known of.

    Raises:
        BadRequest: none is called so, or several are.
    """
    found = [node for node in nodes(agent)["nodes"] if wanted in (node["id"], node["name"])]
    if not found and wanted in Peers(agent.identity).known:
        found = [{"id": wanted, "name": wanted, "self": False}]
    if not found:
        raise BadRequest(f"No node is called {wanted!r}: `cordee nodes` lists them.", "node")
    if len(found) > 1:
        ids = ", ".join(node["id"] for node in found)
        raise BadRequest(f"Several nodes are called {wanted!r}: say which by its id ({ids}).", "node")
    return {"id": found[0]["id"], "name": found[0]["name"], "self": found[0]["self"]}


async def status(agent: Agent) -> dict[str, Any]:
    """The models of the cluster."""
    return {"cluster": agent.identity.cluster, "node": agent.node, "models": []}


async def stays(agent: Agent) -> list[dict[str, Any]]:
    """The stages that this node still runs."""
    return []


async def plan(
    agent: Agent, model: str, shape: ModelShape | None, context: int | None, sequences: int
) -> planner.Plan:
    """Where a model would run now, beside what runs already."""
    raise ModelNotFound("x")
