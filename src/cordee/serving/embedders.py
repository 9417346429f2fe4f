"""The models of this machine's store that give vectors: which they are, and a service for each that is asked.

A model is answered where it is: its file is small beside those that are cut, and each text is read once. So
in a cluster the node that a client talks to must have it on its own disk.
"""

from collections.abc import Collection

from cordee.errors import CordeeError, ModelNotFound, nearest
from cordee.models.architectures import is_encoder
from cordee.models.store import Store, StoredModel
from cordee.serving.embedding_service import EmbeddingService

OPEN_MAX = 4  # services at a time; each has a process, and a model in memory while it is asked


class Embedders:
    """Services by name, made when first asked for; `only` are the names that may be (None: all)."""

    def __init__(self, store: Store, only: Collection[str] | None = None) -> None:
        self._store = store
        self._only = only
        self._services: dict[str, EmbeddingService] = {}  # the latest asked last

    def models(self) -> list[StoredModel]:
        """Those that do nothing else."""
        found = self._store.list(lambda _: None)  # damaged entries are not the question
        return [model for model in found if self._may(model.name) and is_encoder(model.architecture)]

    async def service(self, name: str) -> EmbeddingService:
        """The service of a model; any model whose whole file is here has one.

        Raises:
            ModelNotFound: there is no such model on this machine.
        """
        try:
            model = self._store.get(name) if self._may(name) else None
        except CordeeError:
            model = None
        if model is None:
            names = [each.name for each in self.models()]
            raise ModelNotFound(
                f"the model {name[:100]!r} is not on this machine, so it gives no vectors here"
                f"{nearest(name, names)}: `cordee pull MODEL` fetches one, such as nomic-embed-text"
            )
        service = self._services.pop(name, None)
        if service is not None and service.model.digest != model.digest:  # replaced by another of that name
            await service.close()
            service = None
        self._services[name] = service = service or EmbeddingService(model)
        if len(self._services) > OPEN_MAX:
            await self._services.pop(next(iter(self._services))).close()
        return service

    async def close(self) -> None:
        """End all; closing twice is harmless."""
        for service in self._services.values():
            await service.close()

    def _may(self, name: str) -> bool:
        return self._only is None or name in self._only
