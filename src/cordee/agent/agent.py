"""The agent: one process on each node of a cluster. It joins what is pure with what is real.

    bus, disk, workers --facts--> Controller --actions--> workers, fetches
                                      |--hosts----> schedulers
                                      '--routes---> gateway

Theory of operation. Whenever something may have changed, and every TICK_SECONDS in any case, the agent looks
at everything (`_act`): it hands the controller what the node has and runs, and carries out what the
controller decides. Nothing is remembered between two looks that is not looked up again, so a missed event
costs a tick and a wrong state is mended by the next look.

Stages are child processes; rows go from worker to worker and never through here, except to the first stage of
a model that this node hosts, which is on the same machine.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cordee import __version__
from cordee.access.ledger import Ledger
from cordee.agent import admins, capacity, gauges, orders
from cordee.agent.certificates import Certificates
from cordee.agent.deployments_file import DeploymentsFile
from cordee.agent.gossip import Gossip
from cordee.agent.history import History
from cordee.agent.inbox import AgentInbox
from cordee.agent.node_keys import NodeKeys
from cordee.agent.planning import PlanningProcess
from cordee.agent.probes import Probes
from cordee.agent.reach import Reach
from cordee.agent.services import Services
from cordee.agent.spot_checks import SHARE, SpotChecks
from cordee.agent.stream_links import StreamLinks
from cordee.cluster.controller import Controller, Running
from cordee.cluster.demand import SizeRequest
from cordee.cluster.doubts import DOUBT_SECONDS
from cordee.cluster.facts import Facts, Gauges, ModelShape, Offer, SliceHeld, best_host
from cordee.cluster.goals import HostGoal, SliceGoal, StageSpec
from cordee.cluster.membership import Farewell
from cordee.cluster.memory import Demand
from cordee.cluster.reconcile import Actions
from cordee.cluster.soundness import plain
from cordee.distribution.local_models import LocalModels
from cordee.engine.llama import libllama
from cordee.errors import BadRequest, CordeeError, ModelNotFound, nearest
from cordee.generation import streams
from cordee.generation.streams import Said
from cordee.machine.devices import own_devices
from cordee.machine.energy import Meter
from cordee.models.store import Store
from cordee.net import address, enrolment
from cordee.net.bus import Bus, BusOptions
from cordee.net.doors import allow_descriptors
from cordee.net.identity import Identity
from cordee.net.invitations import Invitations
from cordee.net.latency import Distances
from cordee.net.members import KnownMember
from cordee.net.zenoh_bus import ZenohBus
from cordee.serving.cluster_service import ClusterGateway
from cordee.serving.scheduler_host import SchedulerHost
from cordee.worker.messages import DrainOrder, KvAnswer, Prepared, Promotion, Tokens
from cordee.worker.stages import Files, Stages

TICK_SECONDS = 0.5  # how often everything is looked at, even if nothing was heard
GATHER_SECONDS = 0.02  # after news, so that several count as one
HOST_SECONDS = 0.05  # how often schedulers let time pass
CLONE_FILE = "cloned"  # in the identity's folder: that another machine ran as this node
FAREWELL_SECONDS = 0.5  # for a removed node to hear that it was, before the links to it close

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentOptions:
    """`name` is what people call the node, `api` where it serves clients; `bus` where it meets others.

    `lent_bytes` is the most that stages may take of each device; None: what is free when the agent starts.
    `spot_check` is the share of work that a host has computed again; 0: none. `page` is where other machines
    find the page; empty: nowhere. `speculates`: the models that this node hosts guess.
    """

    name: str
    api: str
    bus: BusOptions
    lent_bytes: int | None = None
    spot_check: float = SHARE
    page: str = ""
    speculates: bool = True


class Agent:
    """See the module's theory of operation. Made by `Agent.start`; all methods on one event loop.

    `services` are the models that clients may ask for, by name; it changes while the agent lives.
    """

    def __init__(self, identity: Identity, store: Store, bus: Bus, options: AgentOptions) -> None:
        self.identity = identity
        self.options = options
        self.bus = bus
        self.draining = False
        self.local_models = LocalModels(store, identity.node, bus, self)
        self.distances = Distances(bus, identity.node, self.changed)
        self._listen_host = options.bus.listening().host  # workers listen there as well
        self.probes = Probes(identity, self._others, self.changed)
        self.reach = Reach(bus, identity, self._others)
        self.invitations = Invitations(
            identity, self._listen_host, lambda: bus.addresses, members=self._all_members
        )
        self._deployments_file = DeploymentsFile(identity.folder / "deployments")
        self.planning = PlanningProcess(self._planned)
        self.controller = Controller(
            identity.node,
            secrets.token_hex(8),
            self.planning.planner,
            identity,
            self._deployments_file.deployments,
            bus.remembered,
        )
        self.api_keys = NodeKeys(identity, identity.folder, self._speak)
        shared = self.api_keys.shared
        self.gossip = Gossip(bus, identity, self.controller, self.changed, self._cut_removed, shared)
        self.ledger = Ledger()
        self.members = self.gossip.members
        self._certificates = Certificates(identity, bus, self._listen_host, self.changed, self.gossip.removed)
        self.history = History()
        self.gauges = Gauges()
        self.meter = Meter()
        self._stream_links = StreamLinks(identity.folder, identity.node, self._receive)
        self._gateway = ClusterGateway(self._stream_links.ask)
        self.services = Services(self.local_models, self._gateway, self._keep, self.changed, self._want)
        self._wanted: set[str] = set()  # models that clients asked for, and that are about to be deployed
        self._scheduler_hosts: dict[str, SchedulerHost] = {}  # by stream key
        self._stages: Stages | None = None
        self._spot_checks = SpotChecks(self, identity.folder, self._scheduler_hosts, options.spot_check)
        self._inbox = AgentInbox(self, identity, self._stream_links, self._spot_checks)
        self._facts: Facts | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, identity: Identity, store: Store, options: AgentOptions) -> "Agent":
        """Join the cluster over a bus of its own.

        Raises:
            CordeeError: the identity has run out or was removed, or an address cannot be listened on.
        """
        allow_descriptors()
        now = time.time()
        if identity.is_admin and identity.renewal_due(now):
            identity.renew_self(now)
        enrolment.check(identity, now)
        agent = cls(identity, store, await ZenohBus.open(identity, options.bus), options)
        try:
            await agent._open()
        except BaseException:
            await agent.close()
            raise
        return agent

    @property
    def node(self) -> str:
        """This node's id."""
        return self.identity.node

    @property
    def stages(self) -> Stages:
        """The workers of this node."""
        assert self._stages is not None, "the agent has started"
        return self._stages

    @property
    def removed(self) -> asyncio.Event:
        """Set when this node hears that it was removed from the cluster."""
        return self.gossip.removed

    @property
    def cloned(self) -> asyncio.Event:
        """Set when another machine has been running as this node for longer; then this one has to end."""
        return self.gossip.cloned

    def changed(self) -> None:
        """Something may have changed: look at everything soon."""
        self._news.set()

    # What people ask for.

    def deploy(self, offer: Offer, demand: Demand, replicas: int = 1, only: Sequence[str] = ()) -> None:
        """Have the cluster serve a model that some node offers, with `only` on these nodes (ids)."""
        self.controller.deploy(offer.name, offer.shape, *demand, time.monotonic(), replicas, only=only)
        self.changed()

    async def sized(
        self, name: str, shape: ModelShape, requested: SizeRequest, only: Sequence[str] = ()
    ) -> Demand | None:
        """The most of what is asked of a model that fits now; None if not even the least does."""
        return await capacity.sized(self.controller, name, shape, requested, only)

    def undeploy(self, name: str) -> None:
        """Have the cluster serve a model no longer.

        Raises:
            ModelNotFound: it is not deployed.
        """
        found = (each for each in self.controller.deployments if each.model == name and each.replicas)
        old = next(found, None)
        if old is None:
            served = [each.model for each in self.controller.deployments if each.replicas]
            raise ModelNotFound(
                f"The cluster does not serve a model {name!r}{nearest(name, served)}: `cordee status` lists "
                "them."
            )
        self.controller.deploy(
            name, old.shape, old.context, old.sequences, time.monotonic(), replicas=0, source=old.source
        )
        self.changed()

    def offers(self) -> dict[str, Offer]:
        """The models that nodes have whole, by name."""
        return self.controller.offers(time.monotonic())

    def models(self) -> dict[str, tuple[ModelShape, int, tuple[str, ...]]]:
        """See Controller.models; `services` follows in a moment."""
        return self.controller.models(time.monotonic())

    async def look(self) -> None:
        """Look at the disk now: a model may just have come."""
        await self.local_models.look()
        self._act()

    def drain(self, on: bool) -> None:
        """Have the stages of this node run elsewhere, or let it take some again."""
        self.draining = on
        self._act()

    async def remove(self, node: str) -> None:
        """Remove a node of the cluster for good; this one is an admin.

        Raises:
            BadRequest: that is no node's id.
        """
        self.controller.adopt(node, time.monotonic())
        try:
            self.identity.revoke(node)
        except ValueError as error:
            raise BadRequest(f"{node!r} is not a node's id: `cordee nodes` lists them.", "node") from error
        self._inbox.cut_removed()
        self.members.forget(node)
        self._act()
        self.gossip.speak(self.gauges)
        await asyncio.sleep(FAREWELL_SECONDS)
        await self.bus.refresh()

    async def add_admin(self, node: str) -> None:
        """Make an admin of another node, which is alive; this one is an admin.

        Raises:
            BadRequest: it does not confirm.
        """
        await admins.hand_over(self.identity, self.controller.nodes(time.monotonic())[node][1])

    def note_clone(self) -> None:
        """Leave a note that this node ended because it is cloned, for `cordee doctor`."""
        with contextlib.suppress(OSError):
            (self.identity.folder / CLONE_FILE).write_text(str(round(time.time())), encoding="ascii")

    async def close(self, farewell: Farewell = "stops") -> None:
        """Say farewell to the cluster and end all workers; closing twice is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.gossip.say_farewell(self.gauges, farewell)  # before the bus closes: the gateway takes a while
        await self._gateway.close()
        for scheduler_host in self._scheduler_hosts.values():
            scheduler_host.close()
        self._inbox.close()
        self.members.save()
        await self._stream_links.close()
        await self.local_models.close()
        await self.invitations.close()
        self._certificates.close()
        if self._stages is not None:
            await self._stages.close()
        await self.services.close()
        await self.bus.close()

    # What its stages ask of it.

    async def prepare(self, spec: StageSpec) -> Files:
        """What a worker is loaded from."""
        return await self.local_models.prepare(spec)

    def failed(self, spec: StageSpec, error: CordeeError) -> None:
        """A worker could not load."""
        log.warning("layers %d to %d cannot be run: %s", spec.first, spec.last - 1, error.message)
        self.controller.failed(spec, error.message, time.monotonic())
        self.changed()

    def doubt(self, node: str, reason: str, seconds: float = DOUBT_SECONDS) -> None:
        """A node disappointed, perhaps this one itself: it is left out of placements with this one, for
        `seconds` the first time."""
        facts = self.controller.nodes(time.monotonic()).get(node)
        name = node if facts is None else facts[1].name
        log.warning("this node does without %s for now: %s", name, reason)
        self.controller.doubt(node, reason, time.monotonic(), seconds)
        self.probes.hasten(node)
        self.changed()

    def report(self, line: str) -> None:
        """A worker ended, or hangs."""
        log.warning("%s", line)

    # What its spot checks ask of it.

    def alive(self) -> dict[str, Facts]:
        """The nodes that are alive, this one among them."""
        assert self._facts is not None, "the agent has started"
        return {**self._others(), self.node: self._facts}

    # What its local models ask of it.

    def holders(self) -> Mapping[str, Sequence[SliceHeld]]:
        """What the other live nodes have on disk."""
        nodes = self.controller.nodes(time.monotonic())
        return {node: nodes[node][1].slices for node in self._others()}

    def sources(self) -> Mapping[str, str]:
        """Where on the hub models may be fetched from, by digest."""
        return {
            each.shape.digest: each.source
            for each in self.controller.deployments
            if each.replicas and each.shape and each.source
        }

    def wanted(self) -> set[SliceGoal]:
        """The slices that this node is to hold, or runs."""
        running = (worker.spec.slice for worker in self.stages.workers.values())
        return {*self.controller.goals.slices, *running}

    def damaged(self, goal: SliceGoal) -> None:
        """A slice is damaged: its workers start again, and what is damaged is fetched for them."""
        self.stages.stop_slice(goal)

    def fetch_failed(self, goal: SliceGoal, detail: str) -> None:
        """A slice could not be had."""
        log.warning("layers %d to %d cannot be had: %s", goal.first, goal.last - 1, detail)
        self.controller.fetch_failed(goal, detail, time.monotonic())
        self.changed()

    # How it starts.

    async def _open(self) -> None:
        host = self._listen_host
        self._stages = await Stages.open(self, self.identity.folder, host)
        inbox = await self._inbox.open(host)
        devices = await asyncio.to_thread(own_devices, self.options.lent_bytes)
        await self.local_models.look()
        self._facts = Facts(
            node=self.node,
            name=plain(self.options.name),
            build=libllama.build(),
            devices=devices,
            disk_free_bytes=0,
            api=self.options.api,
            rtts={},
            bytes_per_second={},
            slices=(),
            stages=(),
            inbox=inbox,
            version=__version__,
            page=self.options.page,
        )
        if self.identity.is_admin:
            await self._certificates.serve_as_admin()
        (self.identity.folder / CLONE_FILE).unlink(missing_ok=True)  # it comes back if that is still so
        self.gossip.open()
        for loop in (
            self._act_always,
            self._tick_hosts_always,
            self._certificates.renew_always,
            self.planning.watch,
        ):
            self._keep(loop())
        self._keep(self.gossip.speak_always(self._measure))
        self._keep(self.gossip.seek_lost_always())
        self._keep(self.local_models.watch())
        self._keep(self.probes.watch())
        self._keep(self.local_models.attest())
        self._keep(self._spot_checks.watch())
        self._keep(self.ledger.keep(Meter().watts, lambda text: log.warning("%s", text)))
        self._keep(self.distances.watch(lambda: list(self._others())))

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())

    # What it hears of streams.

    def _receive(self, node: str, data: bytes) -> None:
        """A message about streams came from a node."""
        try:
            message = streams.decode(data)
        except BadRequest as error:
            log.warning("a message of node %s was dropped: %s", node, error.message)
            return
        if isinstance(message, Said):
            self._gateway.receive(node, message)
        elif (host := best_host(self._wirings(), message.model)) is not None:
            self._scheduler_hosts[host].receive(node, message)

    def on_result(self, node: str, message: Tokens | KvAnswer | Prepared) -> None:
        """The last stage of a model that this node may host has a result."""
        for scheduler_host in self._scheduler_hosts.values():
            scheduler_host.on_result(node, message)

    async def become_admin(self, promotion: Promotion, writer: asyncio.StreamWriter) -> None:
        """Another admin gives this node the cluster's key."""
        if await admins.accept(self.identity, promotion, writer):
            await self._certificates.serve_as_admin()
            log.warning("this node is an admin now: another admin gave it the cluster's key")

    async def obey(self, order: DrainOrder, writer: asyncio.StreamWriter) -> None:
        """An admin orders this node to be drained, or to work again."""
        if orders.is_from_admin(self.identity, order):
            self.drain(order.on)
            await orders.confirm(writer)

    def _cut_removed(self) -> None:
        """Other nodes were removed: neither on the bus nor by links from stages are they to reach us."""
        self._inbox.cut_removed()
        self._keep(self.bus.refresh())

    # What it does.

    async def _act_always(self) -> None:
        while True:
            try:
                self._act()
            except Exception:  # the next look starts afresh
                log.exception("looking at everything failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._news.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._news.clear()

    def _act(self) -> None:
        """Look at everything, decide, and carry it out."""
        now, clock = time.monotonic(), time.time()
        controller = self.controller
        controller.unreachable(self.probes.unreachable)
        decision = controller.step(self._look(), self._running(), now, clock, self.gossip.revocations())
        self.planning.pursue()
        self.history.note(controller.chosen, controller.nodes(now), clock)
        self._execute(decision.actions)
        self._host(decision.hosts)
        self._stream_links.follow(self._inboxes(decision.routes.values()))
        self._gateway.follow(decision.routes)
        self.stages.admit_readers(controller.goals.readers)
        self.services.follow(self.models(), controller.goals.routes)
        self._deployments_file.keep(controller.deployments)
        self.api_keys.keep()
        if decision.is_news or self.gossip.has_news:
            self._speak()

    def _speak(self) -> None:
        self.gossip.speak(self.gauges)

    def _planned(self) -> None:
        self.controller.rethink()
        self.changed()

    def _look(self) -> Facts:
        assert self._facts is not None
        self._facts = msgspec.structs.replace(
            self._facts,
            disk_free_bytes=self.local_models.disk_free_bytes,
            inbox=address.renewed(self._facts.inbox, self._listen_host),
            rtts=self.distances.rtts,
            bytes_per_second=self.local_models.bytes_per_second,
            slices=self.local_models.slices,
            offers=self.local_models.offers,
            draining=self.draining,
            admin=self.identity.is_admin,
            renewals=self._certificates.renewals,
            certificate_ends=self.identity.validity()[1],
        )
        return self._facts

    def _running(self) -> Running:
        return Running(self.stages.workers, self._wirings(), self._gateway.routes)

    def _inboxes(self, hosts: Collection[str]) -> dict[str, str]:
        """Where to ask these nodes."""
        nodes = self.controller.nodes(time.monotonic())
        return {node: nodes[node][1].inbox for node in hosts if node in nodes}

    def _wirings(self) -> dict[str, str]:
        return {key: scheduler_host.wiring for key, scheduler_host in self._scheduler_hosts.items()}

    def _execute(self, actions: Actions) -> None:
        self.local_models.pursue(actions.fetch)
        for name in actions.stop:
            self.stages.stop(name)
        for spec in actions.start:
            self.stages.start(spec)
        for name in actions.rename:
            self.stages.rename(name)
        for action in actions.wire:
            self.stages.wire(action)

    def _host(self, wanted: Mapping[str, HostGoal]) -> None:
        hosts = self._scheduler_hosts
        for key in [key for key, each in hosts.items() if not each.fits(wanted.get(key))]:
            hosts.pop(key).close()
        for key, goal in wanted.items():
            service = self.services.of_digest(goal.placement.model)
            if key not in hosts and service is not None:
                vocabulary, on, late = service.vocabulary, self.options.speculates, self._doubt_late
                hosts[key] = SchedulerHost(goal, vocabulary, self.stages, self._say, speculates=on, late=late)
            if key in hosts:
                hosts[key].follow(goal)

    def _doubt_late(self, nodes: Collection[str], seconds: float) -> None:
        for node in nodes:
            self.doubt(node, f"no result came from its stage, or from the others, in {seconds:.0f} s")

    def _want(self, name: str) -> None:
        """A client asks for a model: it is deployed from now on."""
        if not self._is_deployed(name) and name not in self._wanted:
            self._wanted.add(name)
            self._keep(self._deploy_wanted(name))

    async def _deploy_wanted(self, name: str) -> None:
        try:
            offer = self.offers().get(name)
            if offer is None:
                return
            requested = SizeRequest(None, None, offer.context)
            demand = await self.sized(name, offer.shape, requested)
            if not self._is_deployed(name):  # by somebody else, meanwhile
                self.deploy(offer, demand or requested.full)
        finally:
            self._wanted.discard(name)

    def _is_deployed(self, name: str) -> bool:
        return any(each.model == name and each.replicas for each in self.controller.deployments)

    @property
    def scheduler_hosts(self) -> Mapping[str, SchedulerHost]:
        """The schedulers that run here, by stream key."""
        return self._scheduler_hosts

    def _measure(self) -> Gauges:
        self.gauges = gauges.measured(self._scheduler_hosts, self.local_models, self.meter, self.ledger)
        return self.gauges

    def _say(self, node: str, said: Said) -> None:
        self._stream_links.answer(node, streams.encode(said))

    async def _tick_hosts_always(self) -> None:
        while True:
            await asyncio.sleep(HOST_SECONDS)
            for scheduler_host in self._scheduler_hosts.values():
                scheduler_host.tick(time.monotonic())

    def _all_members(self) -> list[KnownMember]:
        """All that are known, and this one."""
        own = KnownMember(
            self.node,
            self.options.name,
            self.identity.is_admin,
            __version__,
            self._certificates.renewals,
            round(time.time()),
        )
        return [own, *self.members.known.values()]

    def _others(self) -> dict[str, Facts]:
        nodes = self.controller.nodes(time.monotonic())
        return {
            node: facts for node, (state, facts) in nodes.items() if state == "alive" and node != self.node
        }
