"""What an agent knows of its cluster, for people and programs: `cordee nodes`, `status`, `plan`, `drain`.

Values fit for JSON; units are in the names, layers are [first, last) as everywhere. Nothing here changes
anything.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil

from cordee.agent.agent import Agent
from cordee.agent.capacity import reserved
from cordee.agent.control import Planned
from cordee.agent.warnings import listing, warnings
from cordee.cluster import planner
from cordee.cluster.choose import Chosen, Reports
from cordee.cluster.demand import SizeRequest
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import (
    Facts,
    Gauges,
    Hosted,
    ModelShape,
    Placement,
    StagePlace,
    StageReport,
    placement_id,
    stream_key,
)
from cordee.cluster.memory import Demand, needed_bytes
from cordee.cluster.search import STEPS_MAX
from cordee.errors import BadRequest, ModelNotFound, nearest
from cordee.net.members import KnownMember
from cordee.serving.registry import resident_bytes

WHY_STEPS_MIN = 100_000  # of the planner's, to say why one model of many runs nowhere

# A model's state is that of its most advanced placement.
STATES = ("serving", "wiring", "loading", "fetching")


class ClusterStatus:
    """What the agent knows at the moment when this is made."""

    def __init__(self, agent: Agent) -> None:
        now = time.monotonic()
        self._agent = agent
        self._controller = agent.controller
        self._known = self._controller.nodes(now)
        self._facts = {node: facts for node, (state, facts) in self._known.items() if state != "gone"}
        self._reports = Reports(self._facts)
        self._gauges = self._controller.gauges(now) | {agent.node: agent.gauges}
        self._offers = agent.offers()
        self._deployments = {
            deployment.model: (deployment, deployment.shape)
            for deployment in self._controller.deployments
            if deployment.replicas and deployment.shape is not None
        }
        self._models = {offer.shape.digest: (name, offer.shape) for name, offer in self._offers.items()}
        self._models |= {shape.digest: (name, shape) for name, (_, shape) in self._deployments.items()}
        self._head = {
            "cluster": agent.identity.cluster,
            "node": agent.node,
            "warnings": warnings(agent, self._known, now, time.time()),
        }

    def nodes(self) -> dict[str, Any]:
        """All members, this one first: what each has, and what stages take of it.

        Those that are missing are `gone`: they said farewell, fell silent, or were not heard since this node
        started. Of the latter no more is known than what they are called, and when they were heard last.
        """
        listed = [self._node(state, facts) for state, facts in self._known.values()]
        listed += [self._node("gone", facts) for facts in self._missing()]
        listed.sort(key=lambda node: (not node["self"], node["name"], node["id"]))
        return self._head | {"nodes": listed}

    def _missing(self) -> list[Facts]:
        """What is remembered of members that the controller does not know."""
        members = self._agent.members.known
        remembered = (members.keys() | self._agent.bus.remembered) - self._known.keys()
        found: list[Facts] = []
        for node in remembered - {self._agent.node}:
            member = members.get(node, KnownMember(node, node))
            facts = Facts(node, member.name, "", (), 0, "", {}, {}, (), ())
            found.append(msgspec.structs.replace(facts, admin=member.admin, version=member.version))
        return found

    def admins(self, verb: str) -> str:
        """In words, on which other nodes a verb works that only admins have: for a node that is none."""
        found = [node for node in self.nodes()["nodes"] if node["admin"] and not node["self"]]
        running = [node["name"] for node in found if node["state"] == "alive"]
        if running:
            return f"Type `cordee {verb}` on {listing(running, 'or')}."
        if found:
            names = listing([node["name"] for node in found], "or")
            return f"Start `cordee up` on {names}, then type `cordee {verb}` there."
        return "No node is known to be one: a machine that was an admin may be off."

    def find(self, wanted: str) -> dict[str, Any]:
        """A node by its id or name, for `remove` and `admin add`; also one that is gone.

        Raises:
            BadRequest: no node has that name, or several have.
        """
        listed = self.nodes()["nodes"]
        found = [node for node in listed if node["id"] == wanted] or [
            node for node in listed if node["name"] == wanted
        ]
        if not found:
            names = [node["name"] for node in listed]
            raise BadRequest(
                f"No node is called {wanted!r}{nearest(wanted, names)}: `cordee nodes` lists them.", "node"
            )
        if len(found) > 1:
            ids = ", ".join(node["id"] for node in found)
            raise BadRequest(f"Several nodes are called {wanted!r}: say which by its id ({ids}).", "node")
        return {key: found[0][key] for key in ("id", "name", "admin", "state")}

    async def status(self) -> dict[str, Any]:
        """The models of the cluster: which nodes run what, how fast, and why if none do."""
        models = [await self._model(name) for name in sorted(self.names)]
        watts = [gauges.watts for gauges in self._gauges.values() if gauges.watts is not None]
        return self._head | {
            "models": models,
            "fetching": [
                {
                    "node": self._name(node),
                    "model": self._models.get(each.model, (each.model,))[0],
                    "layers": [each.first, each.last],
                    "done_bytes": each.done_bytes,
                    "total_bytes": each.total_bytes,
                }
                for node, gauges in self._gauges.items()
                for each in gauges.fetching
            ],
            "reading": [
                {"node": self._name(node)} | msgspec.to_builtins(each)
                for node, gauges in self._gauges.items()
                for each in gauges.reading
            ],
            "changes": msgspec.to_builtins(list(self._agent.history.changes)),
            "watts": sum(watts) if watts else None,
        }

    def services(self) -> list[dict[str, Any]]:
        """The models that this node runs stages of, as `cordee ps` shows them beside local services."""
        process = psutil.Process()
        own, pids = self._facts[self._agent.node], self._agent.stages.pids
        services: dict[str, dict[str, Any]] = {}
        for report in own.stages:
            stage = self._own_stage(report)
            pid = pids.get(report.worker)
            service: dict[str, Any] = {
                "model": stage["model"],
                "digest": report.placement.model,
                "node": own.name,
                "pid": process.pid,
                "port": urlsplit(own.api).port,
                "context": report.placement.context,
                "sequences": report.placement.sequences,
                "uptime": time.time() - process.create_time(),
                "stages": [],
            }
            services.setdefault(report.placement.model, service)["stages"].append(
                {
                    "index": report.index,
                    "layers": stage["layers"],
                    "pid": pid,
                    "state": report.state,
                    "rss_bytes": resident_bytes(pid),
                    "restarts": None,
                }
            )
        return list(services.values())

    async def stays(self) -> list[dict[str, Any]]:
        """The stages that this node still runs, and why; `why` is empty if they are being moved."""
        others = [node for node, facts in self._alive().items() if not facts.draining]
        stuck = self._stuck()
        found: list[dict[str, Any]] = []
        for report in self._facts[self._agent.node].stages:
            if report.state == "failed":
                continue
            stage, why = self._own_stage(report), ""
            job = stuck.get(placement_id(report.placement)) or stuck.get(report.placement.model)
            if job is not None and not others:
                why = "There is no other node that could take it."
            elif job is not None:
                elsewhere = await self._plan(stage["model"], *job)
                why = "" if elsewhere.placement is not None else elsewhere.why
            found.append({"model": stage["model"], "layers": stage["layers"], "why": why})
        return found

    def _stuck(self) -> dict[str, tuple[ModelShape, Demand]]:
        """What has no successor: placements, by id; and models that run nowhere, by digest."""
        found: dict[str, tuple[ModelShape, Demand]] = {}
        for name, (deployment, shape) in self._deployments.items():
            if not self._controller.chosen.get(name):
                found[shape.digest] = shape, Demand(deployment.context, deployment.sequences)
        for pick in (pick for picks in self._controller.chosen.values() for pick in picks):
            if pick.successor is None:
                demand = Demand(pick.placement.context, pick.placement.sequences)
                found[placement_id(pick.placement)] = pick.shape, demand
        return found

    async def plan(
        self, model: str, shape: ModelShape | None, requested: SizeRequest, only: Sequence[str] = ()
    ) -> Planned:
        """Where a model would run now, beside what else runs. Without a `shape`, a model of the cluster.

        `only` are the nodes that may run it, by id; none: all.

        Raises:
            ModelNotFound: the cluster has no such model.
        """
        if shape is None:
            shape, usual = self._known_shape(model)
            requested = requested._replace(usual=usual)
        able, taken = self._alive(only), self._reserved(shape)
        demand = await asyncio.to_thread(planner.largest, shape, able, requested, taken) or requested.least
        found = await self._plan(model, shape, demand, only=only)
        copies = await asyncio.to_thread(planner.copies, shape, able, demand, taken)
        return Planned(shape, demand, requested.shortened(demand), found, copies)

    def _known_shape(self, model: str) -> tuple[ModelShape, int]:
        """Shape and usual context of a model that nodes have, whole or in slices."""
        if model in self._offers:
            return self._offers[model].shape, self._offers[model].context
        if model in self._deployments:
            deployment, shape = self._deployments[model]
            return shape, deployment.context
        raise ModelNotFound(f"No node of the cluster has a model {model!r}{nearest(model, self.names)}.")

    @property
    def names(self) -> set[str]:
        """The models of the cluster."""
        return self._offers.keys() | self._deployments.keys()

    def _alive(self, only: Sequence[str] = ()) -> dict[str, Facts]:
        return {
            node: facts
            for node, (state, facts) in self._known.items()
            if state == "alive" and (not only or node in only)
        }

    def _name(self, node: str) -> str:
        return self._known[node][1].name if node in self._known else node

    def _node(self, state: str, facts: Facts) -> dict[str, Any]:
        return {
            "id": facts.node,
            "name": facts.name,
            "self": facts.node == self._agent.node,
            "state": state,
            "draining": facts.draining,
            "admin": facts.admin,
            "api": facts.api,
            "rtt_seconds": self._known[self._agent.node][1].rtts.get(facts.node),
            "build": facts.build,
            "version": facts.version,
            "last_heard": self._last_heard(facts.node, state),
            "cloned": facts.node in self._controller.clones(time.monotonic()),
            "disk_free_bytes": facts.disk_free_bytes,
            "devices": msgspec.to_builtins(facts.devices),
            "stages": [self._own_stage(report) for report in facts.stages] if state != "gone" else [],
            "watts": self._gauges[facts.node].watts if facts.node in self._gauges else None,
        }

    def _last_heard(self, node: str, state: str) -> float | None:
        """When a node was heard last, in seconds since 1970; None: never, as far as is remembered."""
        if state == "alive":
            return time.time()
        member = self._agent.members.known.get(node)
        return member.heard if member is not None and member.heard else None

    def _own_stage(self, report: StageReport) -> dict[str, Any]:
        """A stage as its node reports it; `bytes` is what it takes of the device, None where unknown."""
        placement, nbytes = report.placement, None
        name, shape = self._models.get(placement.model, (placement.model, None))
        place = placement.stages[report.index] if 0 <= report.index < len(placement.stages) else None
        if shape is not None and place is not None and shape.allows(place.first, place.last):
            nbytes = needed_bytes(
                shape, Demand(placement.context, placement.sequences), place.first, place.last
            )
        return {
            "model": name,
            "layers": None if place is None else [place.first, place.last],
            "device": None if place is None else place.device,
            "state": report.state,
            "bytes": nbytes,
            "worker": report.worker,
            "detail": report.detail,
        }

    async def _model(self, name: str) -> dict[str, Any]:
        found = self._deployments.get(name)
        shape = self._offers[name].shape if found is None else found[1]
        holders = [facts.name for facts in self._facts.values() if name in {o.name for o in facts.offers}]
        model: dict[str, Any] = {
            "name": name,
            "digest": shape.digest,
            "architecture": shape.architecture,
            "layers": shape.layers,
            "weights_bytes": sum(shape.layer_bytes) + shape.whole_extra_bytes,
            "offered_by": holders,
            "offered_here": name in {offer.name for offer in self._facts[self._agent.node].offers},
            "deployed": found is not None,
        }
        return model if found is None else model | await self._deployed(*found)

    async def _deployed(self, deployment: Deployment, shape: ModelShape) -> dict[str, Any]:
        picks = self._controller.chosen.get(deployment.model, ())
        placements = [self._placement(pick) for pick in picks]
        states = {placement["state"] for placement in placements}
        return {
            "context": deployment.context,
            "sequences": deployment.sequences,
            "replicas": deployment.replicas,
            "only": [self._name(node) for node in deployment.only],
            "state": next((state for state in STATES if state in states), "unplaced"),
            "why": "" if picks else await self._why_not(deployment, shape),
            "reasons": self._reasons(shape),
            "placements": placements,
        }

    def _reasons(self, shape: ModelShape) -> list[str]:
        """What keeps machines from running a model, or from working together, as those say that met it."""
        return [
            f"{facts.name} cannot run layers {place.first} to {place.last - 1}: {report.detail}"
            for facts in self._facts.values()
            for report in facts.stages
            if report.placement.model == shape.digest and report.state == "failed"
            for place in report.placement.stages[report.index : report.index + 1]
        ] + [
            f"{facts.name} does without {self._name(doubt.node)} for now: {doubt.reason}"
            for facts in self._facts.values()
            for doubt in facts.doubts
        ]

    def _placement(self, pick: Chosen) -> dict[str, Any]:
        placement, host = pick.placement, pick.placement.stages[0].node
        hosted = self._gauges.get(host, Gauges()).hosted
        key = stream_key(placement.model, placement.context, placement.only)
        busy = next((each for each in hosted if each.key == key), Hosted(key, 0, 0, 0.0))
        return {
            "id": placement_id(placement),
            "wiring": pick.wiring,
            "state": self._state(pick),
            "host": host,
            "predicted_tokens_per_second": planner.tokens_per_second(pick.shape, placement, self._facts),
            "tokens_per_second": busy.tokens_per_second,
            "active": busy.active,
            "waiting": busy.waiting,
            "inherited_tokens": busy.inherited_tokens,
            "batch_invariant": busy.batch_invariant,
            "spot_checks": busy.spot_checks,
            "speculation": {"on": busy.speculates, "offered": busy.guessed, "accepted": busy.accepted},
            "stages": self._stages(placement),
            "successor": self._stages(pick.successor) if pick.successor is not None else None,
        }

    def _state(self, pick: Chosen) -> str:
        if pick.wiring:
            return "serving"
        reports = self._reports.stages(pick.placement)
        states = {"fetching" if report is None else report.state for report in reports}
        return next((state for state in ("fetching", "loading") if state in states), "wiring")

    def _stages(self, placement: Placement) -> list[dict[str, Any]]:
        reports = self._reports.stages(placement)
        return [self._stage(place, report) for place, report in zip(placement.stages, reports, strict=True)]

    def _stage(self, place: StagePlace, report: StageReport | None) -> dict[str, Any]:
        return {
            "node": place.node,
            "name": self._name(place.node),
            "device": place.device,
            "layers": [place.first, place.last],
            "state": "unheard" if report is None else report.state,
            "worker": "" if report is None else report.worker,
            "detail": "" if report is None else report.detail,
        }

    async def _why_not(self, deployment: Deployment, shape: ModelShape) -> str:
        """Why a deployed model has no placement."""
        if shape in self._controller.aside:
            return (
                f"Planning it failed ({self._controller.aside[shape]}), so it was set aside: what the model "
                f"is said to be cannot be right. `cordee undeploy {deployment.model}`, then deploy it anew."
            )
        if shape in self._controller.unfound:
            return f"It is set aside: {self._controller.unfound[shape]}."
        if self._agent.planning.planner.is_open(shape):
            return "It is being planned, which takes a moment in a large cluster."
        failed = {
            node: f"{facts.name} cannot run it: {report.detail}"
            for node, facts in self._facts.items()
            for report in facts.stages
            if report.placement.model == shape.digest and report.state == "failed"
        }
        demand = Demand(deployment.context, deployment.sequences)
        # Of all models that run nowhere together, so that the status of a cluster that is full comes soon.
        unplaced = sum(not picks for picks in self._controller.chosen.values())
        steps = max(WHY_STEPS_MIN, STEPS_MAX // max(1, unplaced))
        found = await self._plan(deployment.model, shape, demand, failed, deployment.only, steps)
        if found.placement is not None:
            return "It will be placed in a moment."
        return " ".join([found.why, *failed.values()])

    async def _plan(
        self,
        name: str,
        shape: ModelShape,
        demand: Demand,
        without: Collection[str] = (),
        only: Sequence[str] = (),
        steps: int = STEPS_MAX,
    ) -> planner.Plan:
        """Plan a model beside the others, without some nodes. In a thread: a large cluster takes a while."""
        able = {node: facts for node, facts in self._alive(only).items() if node not in without}
        taken, command = self._reserved(shape), f"cordee deploy {name}"
        found = await asyncio.to_thread(planner.plan, shape, able, demand, taken, command, steps)
        if found.placement is None and only:
            names = listing([self._name(node) for node in only])
            found = msgspec.structs.replace(found, why=f"It may run only on {names} (`--only`). {found.why}")
        return found

    def _reserved(self, shape: ModelShape) -> dict[tuple[str, str], int]:
        """What the other models take."""
        chosen = self._controller.chosen
        others = {
            name: [pick for pick in chosen[name] if pick.shape.digest != shape.digest] for name in chosen
        }
        return reserved(others)
