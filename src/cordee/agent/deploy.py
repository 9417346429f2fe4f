"""What `cordee deploy` does: deploy a model that some node has, or one of the hub, which is read once first.

Reading a model from the hub may take hours, so it is done only if it must be and can be of use: not for a
model that some node has whole or that was deployed before, not twice at the same time, not under a name that
is taken, and not for one that would fit nowhere.
"""

import asyncio
import time

import msgspec

from cordee.agent.agent import Agent
from cordee.agent.control import Deploy, Deployed
from cordee.agent.status import ClusterStatus
from cordee.cluster.demand import SizeRequest
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import ModelShape, Reading
from cordee.cluster.memory import Demand
from cordee.distribution import hub_source
from cordee.distribution.hub import HubFile
from cordee.distribution.manifest import Manifest
from cordee.distribution.pull import hub_name, is_on_hub
from cordee.errors import BadRequest, DoesNotFit, ModelNotFound, nearest
from cordee.models.cards import cards
from cordee.models.fit import own_context
from cordee.models.gguf import read_header
from cordee.models.shape import model_shape

# A model that has just come is a service within a second, unless the machine is busy: then it is deployed as
# it is, and what is wrong with it shows in `cordee status`.
OPENING_SECONDS, OPENING_POLL_SECONDS = 10.0, 0.05


class Deployer:
    """See the module's docstring."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def deploy(self, asked: Deploy) -> Deployed:
        """Deploy a model by its name in the cluster, or one of the hub.

        Of the hub is 'owner/name', alone or with ':QUANTIZATION' or '/file.gguf' after it; it then has the
        name that `cordee pull` gives it. Context and answers at a time that were not asked for are chosen by
        memory (cluster/demand.py). A model that a node has is deployed even if it does not fit: it will run
        once it does. A model that is deployed and kept on some nodes stays on those unless others are named.

        Raises:
            ModelNotFound: no node of the cluster has it, and it is not on the hub.
            BadRequest: the repository has several models, the name is another model's, the context is
                longer than the model was made for, or a node is unknown.
            BadModelFile, UnsupportedModel: this node cannot use its vocabulary.
            DoesNotFit: the cluster's machines could not run it.
            StorageFailed: the hub cannot be reached.
            CordeeError: what ended the reading that is asked for with `follow`.
        """
        agent, model = self._agent, asked.model
        asked = msgspec.structs.replace(asked, only=self._nodes(asked.only))
        await self._require_context(model, asked.context)
        if model not in agent.offers() and not is_on_hub(model):
            await agent.look()
        if model in agent.offers():
            await self._require_usable(model)
            if model in agent.offers():  # still: its only machine may have removed it meanwhile
                return await self._offered(model, asked)
        deployment = self._known(model)
        if deployment is not None:
            return await self._again(deployment, asked, deployment.source)
        if not is_on_hub(model):
            self._require_read(model)
            raise self._not_found(model)
        name = hub_name(model)
        reading = self._reading(name)
        if reading is not None:
            return Deployed(name, reading)
        if asked.follow:
            return self._ended(name)
        return await self._from_hub(name, await asyncio.to_thread(hub_source.files, model), asked)

    def undeploy(self, model: str) -> None:
        """Have the cluster serve a model no longer, or stop reading it from the hub.

        Raises:
            ModelNotFound: it is neither deployed nor being read.
        """
        name = hub_name(model) if is_on_hub(model) else model
        if not self._agent.local_models.hub.stop(name):
            deployed = {
                deployment.model for deployment in self._agent.controller.deployments if deployment.replicas
            }
            self._agent.undeploy(model if model in deployed else name)

    async def _from_hub(self, name: str, files: list[HubFile], asked: Deploy) -> Deployed:
        agent = self._agent
        source = f"{files[0].repository}/{files[0].path}"
        offers = agent.offers()
        for offer in offers.values():
            if offer.source == source:  # some node pulled it, and has it; the hub does if that node is gone
                before = SizeRequest(None, None, offer.context).full
                return await self._again(Deployment(offer.name, offer.shape, *before), asked, source)
        for deployment in agent.controller.deployments:
            if deployment.source == source and deployment.shape is not None:
                return await self._again(deployment, asked, source)
        if name in offers or self._named(name):
            raise BadRequest(
                f"The cluster has another model called {name}: `cordee pull {asked.model} --name NAME` on a "
                "node gives this one another name.",
                "model",
            )
        shape, requested = await asyncio.to_thread(
            agent.local_models.hub.shape, source, name, asked.context, asked.sequences
        )
        demand = await agent.sized(name, shape, requested, asked.only)
        if demand is None:
            why = await self._why_not(asked.model, shape, requested, asked.only)
            raise DoesNotFit(f"{name} is not read from the hub, as the cluster could not run it. {why}")

        def deploy_it(manifest: Manifest) -> None:
            self._write(
                Deployment(
                    name,
                    model_shape(manifest.header, manifest.digest),
                    *demand,
                    asked.replicas,
                    source=source,
                    only=asked.only,
                )
            )

        total = sum(file.nbytes for file in files)
        reading = agent.local_models.hub.read(name, source, total, deploy_it)
        return Deployed(name, reading, requested.shortened(demand), demand=demand)

    async def _offered(self, name: str, asked: Deploy) -> Deployed:
        if asked.follow:
            return Deployed(name)
        offer = self._agent.offers()[name]
        requested = SizeRequest(asked.context, asked.sequences, offer.context)
        only = self._kept_on(name, asked)
        demand, told = await self._sized(name, offer.shape, requested, only)
        self._agent.deploy(offer, demand, asked.replicas, only)
        return told

    async def _again(self, deployment: Deployment, asked: Deploy, source: str) -> Deployed:
        """Deploy a model whose chunks are known, with the options of before where none are given."""
        name, shape = deployment.model, deployment.shape
        if asked.follow or shape is None:
            return Deployed(name)
        requested = SizeRequest(asked.context, asked.sequences, deployment.context, deployment.sequences)
        only = self._kept_on(name, asked)
        demand, told = await self._sized(name, shape, requested, only)
        self._write(Deployment(name, shape, *demand, asked.replicas, source=source, only=only))
        return told

    async def _sized(
        self, name: str, shape: ModelShape, requested: SizeRequest, only: tuple[str, ...]
    ) -> tuple[Demand, Deployed]:
        """What a model is deployed with, and what people are told."""
        demand = await self._agent.sized(name, shape, requested, only)
        if demand is None:
            return requested.full, Deployed(name, why=await self._why_not(name, shape, requested, only))
        return demand, Deployed(name, lacks=requested.shortened(demand), demand=demand)

    async def _why_not(
        self, name: str, shape: ModelShape, requested: SizeRequest, only: tuple[str, ...]
    ) -> str:
        return (await ClusterStatus(self._agent).plan(name, shape, requested, only)).plan.why

    def _nodes(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The ids of these nodes, which people name."""
        if not wanted:
            return ()
        status = ClusterStatus(self._agent)
        return tuple(sorted({status.find(each)["id"] for each in wanted}))

    def _kept_on(self, name: str, asked: Deploy) -> tuple[str, ...]:
        """The nodes that may run a model: those that are named now, else those that were before."""
        before = self._named(name)
        return asked.only or (before.only if before is not None and before.replicas else ())

    def _not_found(self, model: str) -> ModelNotFound:
        if model in cards():
            return ModelNotFound(
                f"No node of the cluster has {model} yet: `cordee pull {model}` on one of them fetches it."
            )
        names = [
            *self._agent.offers(),
            *(each.model for each in self._agent.controller.deployments),
            *cards(),
        ]
        return ModelNotFound(
            f"No node of the cluster has a model {model!r}{nearest(model, names)}: `cordee pull` on one of "
            "them fetches it. Or deploy one from the hub (owner/name)."
        )

    def _ended(self, name: str) -> Deployed:
        """How the reading of a model ended."""
        fault = self._agent.local_models.hub.fault(name)
        if fault is not None:
            raise fault
        if self._named(name) is not None:
            return Deployed(name)
        raise ModelNotFound(f"{name} is not deployed: reading it from the hub was stopped.")

    def _known(self, model: str) -> Deployment | None:
        """The deployment of a model of the hub that was deployed before, by its name in the cluster."""
        deployment = self._named(model)
        return deployment if deployment is not None and deployment.source else None

    def _named(self, name: str) -> Deployment | None:
        deployments = (
            deployment
            for deployment in self._agent.controller.deployments
            if deployment.model == name and deployment.shape is not None
        )
        return next(deployments, None)

    def _reading(self, name: str) -> Reading | None:
        """How far a model of the hub is being read, here or on another node."""
        return next((each for each in self._readings() if each.name == name and each.source), None)

    def _readings(self) -> list[Reading]:
        """All models that nodes read now."""
        gauges = self._agent.controller.gauges(time.monotonic()).values()
        return [*self._agent.local_models.reading, *(each for gauge in gauges for each in gauge.reading)]

    async def _require_context(self, name: str, context: int | None) -> None:
        """Refuse a longer context than the model was made for, if its header is here already."""
        service = self._agent.services.get(name)
        if service is None or context is None:
            return
        header = await asyncio.to_thread(read_header, service.vocabulary.path, weights=False)
        own = own_context(header)
        if own is not None and context > own:
            raise BadRequest(f"{name} was made for at most {own} tokens, not {context}", "context")

    async def _require_usable(self, name: str) -> None:
        """Refuse a model whose vocabulary this node cannot use; one that has just come is opened first."""
        services = self._agent.services
        until = time.monotonic() + OPENING_SECONDS
        while name not in services and time.monotonic() < until:
            if (refusal := services.refusal(name)) is not None:
                raise refusal
            await asyncio.sleep(OPENING_POLL_SECONDS)

    def _require_read(self, name: str) -> None:
        """A large model that was just pulled is offered once it has been read."""
        reading = next((each for each in self._readings() if each.name == name), None)
        if reading is not None:
            percent = 100 * reading.done_bytes // max(reading.total_bytes, 1)
            raise ModelNotFound(f"{name} is still being read ({percent} %): deploy it in a moment.")

    def _write(self, deployment: Deployment) -> None:
        self._agent.controller.deploy(
            deployment.model,
            deployment.shape,
            deployment.context,
            deployment.sequences,
            time.monotonic(),
            deployment.replicas,
            deployment.source,
            deployment.only,
        )
        self._agent.changed()
