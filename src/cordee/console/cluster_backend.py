"""The console of a node: its cluster, by the same functions as the verbs (actions.py)."""

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec

from cordee.access.api_keys import ApiKey
from cordee.agent import control
from cordee.agent.agent import Agent
from cordee.agent.capacity import reserved
from cordee.agent.control import Planned, PlanRequest
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import ModelShape
from cordee.console import fit
from cordee.console.actions import NodeActions
from cordee.console.copies import is_elsewhere
from cordee.distribution import hub_source
from cordee.distribution.pull import is_on_hub
from cordee.errors import BadRequest, ModelNotFound, nearest
from cordee.models import planned
from cordee.models.cards import cards
from cordee.models.store import Store

EMPTY = control.Empty()
RTT_DIGITS = 4  # tenths of a millisecond: what lies below changes with every measurement
LINKS_MAX = 2000  # round-trip times that are sent: those of 64 machines


class ClusterBackend:
    """See ConsoleBackend and the module's docstring."""

    def __init__(self, agent: Agent, store: Store) -> None:
        self.store = store
        self._agent = agent
        self._actions = actions = NodeActions(agent)
        self.deploy, self.undeploy = actions.deploy, actions.undeploy
        self.invite, self.drain, self.remove = actions.invite, actions.drain, actions.remove
        self.add_key, self.limit_key = actions.add_key, actions.limit_key
        self.remove_key = actions.remove_key

    async def overview(self) -> dict[str, Any]:
        """See ConsoleBackend."""
        nodes, status = await self._actions.nodes(EMPTY), await self._actions.status(EMPTY)
        for node in nodes["nodes"]:
            if node["state"] == "alive":
                node["last_heard"] = None  # now: it would be another value each time
        return {"kind": "cluster", **status, **nodes, "links": self._links()}

    def snapshots(self) -> list[Any]:
        """See ConsoleBackend."""
        return [_snapshot(each) for each in self._agent.history.snapshots]

    async def fit(self, model: str, *, asks_hub: bool) -> dict[str, Any]:
        """See ConsoleBackend."""
        shape, asked = await self._wanted(model, asks_hub=asks_hub)
        known = self._agent.controller.chosen
        others = {
            name: [pick for pick in picks if pick.shape.digest != shape.digest]
            for name, picks in known.items()
        }
        alone = await asyncio.to_thread(fit.each_alone, shape, asked, self._agent.alive(), reserved(others))
        together: Planned = await self._actions.plan(PlanRequest(model, shape, asked))
        return fit.answer(model, shape, alone, together)

    async def check_removal(self, name: str) -> None:
        """See ConsoleBackend."""
        models = {each["name"]: each for each in (await self._actions.status(EMPTY))["models"]}
        if not is_elsewhere(name, models):
            raise BadRequest(
                f"This is the last whole copy of {name} in the house: confirm that it is to go.", "last"
            )

    async def look(self) -> None:
        """See ConsoleBackend."""
        await self._agent.look()

    def api_keys(self) -> Collection[ApiKey]:
        """See ConsoleBackend."""
        return self._agent.api_keys.all()

    def admin_facts(self) -> dict[str, Any]:
        """See ConsoleBackend."""
        agent = self._agent
        admins = [each.name for each in agent.members.admins]
        return {"is_admin": agent.identity.is_admin, "admins": admins, "name": agent.options.name}

    async def _wanted(self, model: str, *, asks_hub: bool) -> tuple[ModelShape, SizeRequest]:
        """The shape of a model, and what is asked of it."""
        for each in self._agent.controller.deployments:
            if each.model == model and each.shape is not None and each.replicas:  # as it is deployed
                return each.shape, SizeRequest(each.context, each.sequences, each.context)
        if model in self._agent.offers():
            offer = self._agent.offers()[model]
            return offer.shape, SizeRequest(None, None, offer.context)
        found = await asyncio.to_thread(planned.of_name, self.store, model)
        if found is not None:
            return found.shape, fit.requested(found, model)
        if asks_hub and is_on_hub(model):
            files = await asyncio.to_thread(hub_source.files, model)
            source = f"{files[0].repository}/{files[0].path}"
            return await asyncio.to_thread(self._agent.local_models.hub.shape, source, model, None, None)
        names = [*self._agent.offers(), *cards()]
        raise ModelNotFound(f"There is no model {model!r}{nearest(model, names)}: choose one of the list.")

    def _links(self) -> list[dict[str, Any]]:
        """Round-trip times between the nodes that are alive, as those say that measured them."""
        alive = self._agent.alive()
        found = [
            {"nodes": [node, other], "rtt_seconds": round(seconds, RTT_DIGITS)}
            for node, facts in sorted(alive.items())
            for other, seconds in sorted(facts.rtts.items())
            if other in alive and (node < other or node not in alive[other].rtts)
        ]
        return found[:LINKS_MAX]


def _snapshot(snapshot: Any) -> dict[str, Any]:
    """A snapshot with names for its fields."""
    return {
        "clock": snapshot.clock,
        "nodes": [each._asdict() for each in snapshot.nodes],
        "models": [msgspec.to_builtins(each._asdict()) for each in snapshot.models],
    }
