"""The agent: one process on each node of a cluster. It joins what is pure with what is real.

    bus, disk, workers --facts--> Mind --goals--> Crew --orders--> workers, fetches
                                    '--routes--> gateway      '--hosts--> schedulers

Theory of operation. Whenever something may have changed, and every TICK_SECONDS in any case, the agent looks
at everything (`_act`): what it has and runs becomes its facts, the mind says what it should do, the crew
what is missing, and the orders are given. Nothing is remembered between two looks that is not looked up
again, so a missed event costs a tick and a wrong state is mended by the next. What it says of itself goes
out as a heartbeat every BEAT_SECONDS and at each change.

Stages are child processes; rows go from worker to worker and never through here, except to the first stage of
a model that this node hosts, which is on the same machine.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from cordee.agent.deployments_file import DeploymentsFile
from cordee.cluster.controller import Controller
from cordee.cluster.facts import Facts, Fetching, Gauges, Hosted, ModelShape, Offer, SliceHeld
from cordee.cluster.goals import Goals, HostGoal, SliceGoal, StageSpec
from cordee.cluster.history import History
from cordee.cluster.membership import HEARTBEAT_SECONDS, Farewell, Heartbeat
from cordee.cluster.planner import Planner
from cordee.cluster.reconcile import Actions, Reconciler
from cordee.distribution.inventory import SEQUENCES
from cordee.distribution.local_models import LocalModels
from cordee.engine.llama import libllama
from cordee.errors import BadRequest, CordeeError, ModelNotFound
from cordee.generation import streams
from cordee.generation.streams import Said
from cordee.machine.devices import own_devices
from cordee.machine.energy import Meter
from cordee.models.store import Store, StoredModel
from cordee.net import address, enrolment
from cordee.net.bus import REMOVED, BusOptions
from cordee.net.identity import Identity, revoked_node
from cordee.net.invitations import Invitations
from cordee.net.latency import Distances
from cordee.net.zenoh_bus import ZenohBus
from cordee.serving.cluster_service import ClusterGateway, ClusterService
from cordee.serving.scheduler_host import SchedulerHost
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Join, KvAnswer, Tokens
from cordee.worker.process import opening
from cordee.worker.stages import Files, Stages

TICK_SECONDS = 0.5  # how often everything is looked at though nothing was heard
GATHER_SECONDS = 0.02  # after news, so that several count as one
HOST_SECONDS = 0.05  # how often schedulers let time pass
RENEW_SECONDS = 3600.0  # how often the certificate's age is looked at
FAREWELL_SECONDS = 0.5  # a removed node hears that it was, before nobody speaks to it any more

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentOptions:
    """`name` is what people call the node, `api` where it serves clients; `bus` where it meets others.

    `lent_bytes` is the most that stages may take of each device; None: what is free when the agent starts.
    """

    name: str
    api: str
    bus: BusOptions
    lent_bytes: int | None = None


class Agent:
    """See the module's theory of operation. Made by `Agent.start`; all methods on one event loop.

    `services` are the models that clients may ask for, by name; it changes while the agent lives.
    """

    def __init__(self, identity: Identity, store: Store, bus: ZenohBus, options: AgentOptions) -> None:
        self.services: dict[str, ClusterService] = {}
        self.identity = identity
        self.options = options
        self.draining = False
        self.removed = asyncio.Event()  # set when this node hears that it was
        self.goals = Goals()
        self.reconciler = Reconciler()
        self.bus = bus
        self.scheduler_hosts: dict[str, SchedulerHost] = {}  # by model digest
        self.local_models = LocalModels(store, identity.node, bus, self)
        self.distances = Distances(bus, identity.node, self.changed)
        self.invitations = Invitations(identity, _host(options), lambda: bus.addresses)
        self._deployments_file = DeploymentsFile(identity.folder / "deployments")
        self.controller = Controller(
            identity.node, secrets.token_hex(8), Planner(), self._deployments_file.deployments, bus.remembered
        )
        self.history = History()
        self.gauges = Gauges()
        self._meter = Meter()
        self._gateway = ClusterGateway(identity.node, self._ask)
        self._stages: Stages | None = None
        self._inbox: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()  # that bring tokens
        self._facts: Facts | None = None
        self._said: Facts | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        self._opening: set[str] = set()  # models whose vocabulary is on its way

    @classmethod
    async def start(cls, identity: Identity, store: Store, options: AgentOptions) -> "Agent":
        """Join the cluster.

        Raises:
            CordeeError: the identity has run out or was removed, or an address cannot be listened on.
        """
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

    def changed(self) -> None:
        """Something may have changed: look at everything soon."""
        self._news.set()

    def deploy(
        self, name: str, *, context: int | None = None, sequences: int = SEQUENCES, replicas: int = 1
    ) -> None:
        """Wish a model that some node offers to be served.

        Raises:
            ModelNotFound: no node of the cluster has it.
        """
        offer = self.offers().get(name)
        if offer is None:
            raise ModelNotFound(
                f"No node of the cluster has a model {name!r}: `cordee pull` on one of them fetches it."
            )
        self.controller.deploy(
            name, offer.shape, context or offer.context, sequences, time.monotonic(), replicas
        )
        self.changed()

    def undeploy(self, name: str) -> None:
        """Wish a model to be served no more.

        Raises:
            ModelNotFound: it is not wished.
        """
        deployment = next(
            (
                deployment
                for deployment in self.controller.deployments
                if deployment.model == name and deployment.replicas
            ),
            None,
        )
        if deployment is None:
            raise ModelNotFound(f"The cluster does not serve a model {name!r}: `cordee status` lists them.")
        self.controller.deploy(
            name,
            deployment.shape,
            deployment.context,
            deployment.sequences,
            time.monotonic(),
            replicas=0,
            source=deployment.source,
        )
        self.changed()

    def offers(self) -> dict[str, Offer]:
        """The models that nodes have whole, by name; of several with one name that of the smallest digest."""
        found: dict[str, Offer] = {}
        for _, facts in self.controller.nodes(time.monotonic()).values():
            for offer in facts.offers:
                other = found.get(offer.name)
                if other is None or offer.shape.digest < other.shape.digest:
                    found[offer.name] = offer
        return found

    async def look(self) -> None:
        """Look at the disk now: a model may have come just now."""
        await self.local_models.look()
        self._act()

    def drain(self, on: bool) -> None:
        """Have the stages of this node run elsewhere, or let it take some again."""
        self.draining = on
        self._act()

    async def remove(self, node: str) -> None:
        """Remove a node of the cluster for good.

        Raises:
            BadRequest: this node cannot, or that is no node's id.
        """
        if not self.identity.is_admin:
            raise BadRequest("Only an admin removes nodes: do it on the node that made the cluster.", "node")
        try:
            self.identity.revoke(node)
        except ValueError as error:
            raise BadRequest(f"{node!r} is no node's id: `cordee nodes` lists them.", "node") from error
        self._cut_removed()
        self._act()
        self._speak()
        await asyncio.sleep(FAREWELL_SECONDS)
        await self.bus.refresh()

    def models(self) -> dict[str, tuple[ModelShape, int]]:
        """Shape and context of all that clients may ask for, by name; `services` follows in a moment."""
        offered = {name: (offer.shape, offer.context) for name, offer in self.offers().items()}
        deployed = {
            deployment.model: (deployment.shape, deployment.context)
            for deployment in self.controller.deployments
            if deployment.shape is not None and deployment.replicas
        }
        return offered | deployed

    async def close(self, farewell: Farewell = "stops") -> None:
        """Leave the cluster's sight, end all workers; closing twice is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._said is not None:
            self._speak(farewell)  # it is on its way before the bus closes: the gateway takes longer
        await self._gateway.close()
        for scheduler_host in self.scheduler_hosts.values():
            scheduler_host.leave()
        if self._inbox is not None:
            self._inbox.close()
        for writer in self._links:
            writer.transport.abort()
        await self.local_models.close()
        await self.invitations.close()
        if self._stages is not None:
            await self._stages.close()
        for service in self.services.values():
            await service.close()
        await self.bus.close()

    # Stages' owner.

    async def prepare(self, load: StageSpec) -> Files:
        """What a worker is loaded from."""
        return await self.local_models.prepare(load)

    def failed(self, load: StageSpec, detail: str) -> None:
        """A worker could not load."""
        log.warning("layers %d to %d cannot be run: %s", load.first, load.last - 1, detail)
        self.reconciler.failed(load, detail, time.monotonic())
        self.changed()

    # Library's owner.

    def holders(self) -> Mapping[str, Sequence[SliceHeld]]:
        """What the other live nodes have on disk."""
        nodes = self.controller.nodes(time.monotonic())
        return {node: nodes[node][1].slices for node in self._others()}

    def sources(self) -> Mapping[str, str]:
        """Where on the hub models may be fetched from, by digest."""
        deployments = self.controller.deployments
        return {
            deployment.shape.digest: deployment.source
            for deployment in deployments
            if deployment.replicas and deployment.shape and deployment.source
        }

    def wanted(self) -> set[SliceGoal]:
        """All that this node is to hold, or runs."""
        return {*self.goals.slices, *(worker.spec.slice for worker in self.stages.workers.values())}

    def fetch_failed(self, goal: SliceGoal, detail: str) -> None:
        """A slice could not be had."""
        for stage in self.goals.stages:
            if stage.spec.slice == goal:
                self.failed(stage.spec, detail)

    # How it starts.

    async def _open(self) -> None:
        host = _host(self.options)
        self._stages = await Stages.open(self, self.identity.folder, host)
        self._inbox, inbox = await tls_link.open_listener(self.identity.folder, host, self._accept)
        devices = await asyncio.to_thread(own_devices, self.options.lent_bytes)
        await self.local_models.look()
        self._facts = Facts(
            node=self.node,
            name=self.options.name,
            build=libllama.build(),
            devices=devices,
            disk_free_bytes=0,
            api=self.options.api,
            rtts={},
            bytes_per_second={},
            slices=(),
            stages=(),
            inbox=inbox,
            admin=self.identity.is_admin,
        )
        if self.identity.is_admin:
            enrolment.serve_renewals(self.bus, self.identity)
        self.bus.subscribe("heartbeat/*", self._hear)
        self.bus.subscribe(f"to/{self.node}/*", self._receive)
        self.bus.watch("alive/*", self._note_liveliness)
        self.bus.watch(REMOVED.format(self.node, "*"), self._hear_removed)
        self.bus.announce(f"alive/{self.node}")
        for loop in (self._act_always, self._heartbeat_always, self._host_always, self._renew_always):
            self._keep(loop())
        self._keep(self.local_models.watch())
        self._keep(self.distances.watch(self._others))

    def _keep(self, coroutine: Coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())

    # What it hears.

    def _hear(self, key: str, payload: bytes) -> None:
        try:
            heartbeat = msgspec.msgpack.decode(payload, type=Heartbeat)
        except (msgspec.MsgspecError, ValueError):
            return
        if heartbeat.facts.node in self.identity.revoked or key != f"heartbeat/{heartbeat.facts.node}":
            return
        self._admit(heartbeat.revocations)
        if heartbeat.farewell == "leaves":
            self.bus.forget(heartbeat.facts.node)
        if self.controller.hear(heartbeat, time.monotonic()):
            self.changed()

    def _hear_removed(self, key: str, alive: bool) -> None:
        with contextlib.suppress(ValueError):  # no hexadecimal digits
            self._admit([bytes.fromhex(key.rpartition("/")[2])])

    def _admit(self, revocations: Sequence[bytes]) -> None:
        removed = self.identity.admit(revocations)
        if self.node in removed:
            self.removed.set()
        elif removed:
            self._cut_removed()
            self._keep(self.bus.refresh())

    def _note_liveliness(self, key: str, alive: bool) -> None:
        node = key.rpartition("/")[2]
        if node != self.node:
            self.controller.liveliness(node, alive, time.monotonic())
            self.changed()

    def _receive(self, key: str, payload: bytes) -> None:
        if key.endswith("/said"):
            self._gateway.receive(payload)
            return
        try:
            message = streams.decode(payload)
        except BadRequest:
            return
        if not isinstance(message, Said) and message.node not in self.identity.revoked:
            scheduler_host = self.scheduler_hosts.get(message.model)
            if scheduler_host is not None:
                scheduler_host.receive(message)

    def _cut_removed(self) -> None:
        """Hear nothing more from stages of nodes that were removed."""
        for writer in self._links:
            try:
                tls_link.check_member(self.identity.folder, writer.get_extra_info("peercert"))
            except LinkClosed:
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A last stage brings tokens."""
        self._links.add(writer)
        try:
            if isinstance(await opening(reader), Join):
                while True:
                    message, _ = await frames.read(reader)
                    if isinstance(message, Tokens | KvAnswer):
                        for scheduler_host in self.scheduler_hosts.values():
                            scheduler_host.on_result(message)
        except LinkClosed:
            pass  # that worker was wired anew, or ended
        finally:
            self._links.discard(writer)
            writer.transport.abort()

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
        now = time.monotonic()
        actions = Actions()
        for _ in range(2):  # the second time with what the first makes us say
            self._facts = facts = self._look()
            revocations = {revoked_node(entry): entry for entry in self.identity.revocations}
            self.controller.observe(facts, now, time.time(), revocations)
            self.goals = self.controller.plan(now)
            actions = self.reconciler.step(self.goals, self.stages.workers, self.local_models.slices, now)
            if actions.reports == facts.stages:
                break
            self._facts = msgspec.structs.replace(facts, stages=actions.reports)
        self.history.note(self.controller.chosen, self.controller.nodes(now), time.time())
        self._execute(actions)
        self._host()
        self._route()
        self._serve()
        self._deployments_file.keep(self.controller.deployments)
        if self._facts != self._said:
            self._speak()

    def _look(self) -> Facts:
        assert self._facts is not None
        return msgspec.structs.replace(
            self._facts,
            disk_free_bytes=self.local_models.disk_free_bytes,
            inbox=address.renewed(self._facts.inbox, _host(self.options)),
            rtts=self.distances.rtts,
            bytes_per_second=self.local_models.bytes_per_second,
            slices=self.local_models.slices,
            offers=self.local_models.offers,
            draining=self.draining,
        )

    def _execute(self, actions: Actions) -> None:
        self.local_models.pursue(actions.fetch)
        for name in actions.stop:
            self.stages.stop(name)
        for load in actions.start:
            self.stages.start(load)
        for name in actions.rename:
            self.stages.rename(name)
        for order in actions.wire:
            self.stages.wire(order)

    def _host(self) -> None:
        wanted = self._wanted_hosts()
        for digest in self.scheduler_hosts.keys() - wanted.keys():
            self.scheduler_hosts.pop(digest).leave()
        for digest, goal in wanted.items():
            scheduler_host = self.scheduler_hosts.get(digest)
            if scheduler_host is not None and not scheduler_host.fits(goal):
                self.scheduler_hosts.pop(digest).leave()
                scheduler_host = None
            service = next((each for each in self.services.values() if each.model.digest == digest), None)
            if scheduler_host is None and service is not None:
                scheduler_host = self.scheduler_hosts[digest] = SchedulerHost(
                    goal, service.vocabulary, self.stages, self._say
                )
            if scheduler_host is not None:
                scheduler_host.follow(goal)

    def _wanted_hosts(self) -> dict[str, HostGoal]:
        """By model digest; where one file is wished under two names, what is hosted already stays."""
        wanted: dict[str, HostGoal] = {}
        for goal in self.goals.hosts:
            digest = goal.placement.model
            scheduler_host = self.scheduler_hosts.get(digest)
            if digest not in wanted or (scheduler_host is not None and scheduler_host.follows(goal)):
                wanted[digest] = goal
        return wanted

    def _route(self) -> None:
        serving: dict[str, list[str]] = {}
        for name, service in self.services.items():
            service.is_deployed = name in self.goals.routes
            hosts = [route.host for route in self.goals.routes.get(name, ()) if route.wiring]
            serving.setdefault(service.model.digest, []).extend(hosts)
        for digest, hosts in serving.items():
            current = self._gateway.routes.get(digest)
            host = current if current in hosts else next(iter(hosts), None)
            if current != host:
                self._gateway.route(digest, host)

    def _serve(self) -> None:
        """Have a service for every model that is offered or wished."""
        models = self.models()
        for name, service in list(self.services.items()):
            shape, context = models.get(name, (None, 0))
            if shape is None or (shape.digest, context) != (service.model.digest, service.context):
                del self.services[name]
                self._keep(service.close())
        for name, (shape, context) in models.items():
            if name not in self.services and name not in self._opening:
                self._opening.add(name)
                self._keep(self._open_service(name, shape, context))

    async def _open_service(self, name: str, shape: ModelShape, context: int) -> None:
        try:
            path = await self.local_models.vocabulary(shape.digest)
            model = StoredModel(
                name=name,
                digest=shape.digest,
                path=path,
                nbytes=sum(shape.layer_bytes),
                source="cluster",
                added=datetime.now(UTC).isoformat(timespec="seconds"),  # to this node
                architecture=shape.architecture,
                layers=shape.layers,
            )
            self.services[name] = ClusterService(
                model, path, context, self._gateway, lambda: self._want(name)
            )
            self.changed()
        except CordeeError as error:
            log.warning("%s cannot be offered here yet: %s", name, error.message)
            await asyncio.sleep(TICK_SECONDS)
        finally:
            self._opening.discard(name)

    def _want(self, name: str) -> None:
        """A client asks for a model: it is wished from now on."""
        if not any(
            deployment.model == name and deployment.replicas for deployment in self.controller.deployments
        ):
            with contextlib.suppress(ModelNotFound):
                self.deploy(name)

    # What it says.

    async def _heartbeat_always(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self.gauges = self._measure()
            self._speak()

    def _speak(self, farewell: Farewell = "") -> None:
        if self._facts is None:
            return
        self._said = self._facts
        heartbeat = self.controller.heartbeat(time.monotonic(), self.gauges, farewell)
        self.bus.publish(f"heartbeat/{self.node}", msgspec.msgpack.encode(heartbeat))

    def _measure(self) -> Gauges:
        hosted = [
            Hosted(
                digest,
                scheduler_host.active,
                scheduler_host.waiting,
                scheduler_host.rate.per_second(),
                scheduler_host.inherited_tokens,
                scheduler_host.batch_invariant,
            )
            for digest, scheduler_host in self.scheduler_hosts.items()
        ]
        fetching = [
            Fetching(goal.model, goal.first, goal.last, *progress)
            for goal, progress in self.local_models.progress.items()
        ]
        return Gauges(tuple(hosted), tuple(fetching), self._meter.watts(), self.local_models.reading)

    def _ask(self, node: str, data: bytes) -> None:
        self.bus.publish(f"to/{node}/ask", data)

    def _say(self, node: str, said: Said) -> None:
        self.bus.publish(f"to/{node}/said", streams.encode(said))

    async def _host_always(self) -> None:
        while True:
            await asyncio.sleep(HOST_SECONDS)
            for scheduler_host in self.scheduler_hosts.values():
                scheduler_host.tick(time.monotonic())

    async def _renew_always(self) -> None:
        while True:
            now = time.time()
            if self.identity.renewal_due(now) and await enrolment.renew(self.bus, self.identity, now):
                await self.bus.refresh()
            await asyncio.sleep(RENEW_SECONDS)

    def _others(self) -> list[str]:
        nodes = self.controller.nodes(time.monotonic())
        return [node for node, (state, _) in nodes.items() if state == "alive" and node != self.node]


def _host(options: AgentOptions) -> str:
    """The host part of the address that the bus listens on: workers listen there as well."""
    return address.parse(options.bus.listen, 0)[0] if options.bus.listen else ""
