"""The models that clients of a node may ask for: a service for each that is offered or deployed."""

import asyncio
import logging
from collections.abc import Callable, Container, Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from cordee.cluster.facts import ModelShape, stream_key
from cordee.distribution.local_models import LocalModels
from cordee.errors import BadModelFile, CordeeError, UnsupportedModel
from cordee.models.store import StoredModel
from cordee.serving.cluster_service import ClusterGateway, ClusterService

RETRY_SECONDS = 0.5  # after a service could not be opened, before the next attempt

log = logging.getLogger(__name__)


class Services(Mapping[str, ClusterService]):
    """The services of a node by model name; they come and go while the agent lives.

    `keep` runs a coroutine to its end, `changed` is called when a service has come, and `wanted` with the
    name of a model that a client asks for.
    """

    def __init__(
        self,
        local_models: LocalModels,
        gateway: ClusterGateway,
        keep: Callable[[Coroutine[Any, Any, None]], object],
        changed: Callable[[], None],
        wanted: Callable[[str], None],
    ) -> None:
        self._local_models = local_models
        self._gateway = gateway
        self._keep = keep
        self._changed = changed
        self._wanted = wanted
        self._services: dict[str, ClusterService] = {}
        self._opening: set[str] = set()  # models whose vocabulary is on its way
        # By name: the digest of a model that cannot be used here, and why.
        self._refused: dict[str, tuple[str, CordeeError]] = {}

    def __getitem__(self, name: str) -> ClusterService:
        return self._services[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._services)

    def __len__(self) -> int:
        return len(self._services)

    def of_digest(self, digest: str) -> ClusterService | None:
        """A service of that model, under any name."""
        return next((each for each in self._services.values() if each.model.digest == digest), None)

    def refusal(self, name: str) -> CordeeError | None:
        """Why a model cannot be used here, if so: its file is damaged, or too new for this program."""
        _, error = self._refused.get(name, ("", None))
        return None if error is None else type(error)(error.message)

    def follow(
        self, models: Mapping[str, tuple[ModelShape, int, tuple[str, ...]]], deployed: Container[str]
    ) -> None:
        """Have a service for each of these models (see Controller.models), and for no others.

        A service opens in a moment, and again after RETRY_SECONDS if it could not. `deployed` are the names
        that the cluster serves now.
        """
        digests = {name: shape.digest for name, (shape, _, _) in models.items()}
        self._refused = {name: each for name, each in self._refused.items() if digests.get(name) == each[0]}
        for name, service in list(self._services.items()):
            shape, context, only = models.get(name, (None, 0, ()))
            if shape is None or stream_key(shape.digest, context, only) != service.key:
                del self._services[name]
                if shape is not None:
                    service.fail_all(f"{name} is deployed anew, with {context} tokens of context: ask again")
                self._keep(service.close())
            else:
                service.is_deployed = name in deployed
        for name, (shape, context, only) in models.items():
            if name not in self._services.keys() | self._opening | self._refused.keys():
                self._opening.add(name)
                self._keep(self._open(name, shape, context, only))

    async def close(self) -> None:
        """Close all services; closing twice is harmless."""
        for service in self._services.values():
            await service.close()

    async def _open(self, name: str, shape: ModelShape, context: int, only: tuple[str, ...]) -> None:
        try:
            vocabulary = await self._local_models.vocabulary(shape.digest, name)
            model = StoredModel(
                name=name,
                digest=shape.digest,
                path=vocabulary.path,
                nbytes=sum(shape.layer_bytes),
                source="cluster",
                added=datetime.now(UTC).isoformat(timespec="seconds"),  # to this node
                architecture=shape.architecture,
                layers=shape.layers,
            )
            self._services[name] = ClusterService(
                model, vocabulary, context, self._gateway, lambda: self._wanted(name), only
            )
            self._changed()
        except (BadModelFile, UnsupportedModel) as error:  # which does not change: the model is refused
            self._refused[name] = shape.digest, error
            log.warning("%s is not offered here: %s", name, error.message)
        except CordeeError as error:
            log.warning("%s cannot be offered here yet: %s", name, error.message)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._opening.discard(name)
