"""The console of a machine by itself (`cordee serve`): its models and keys; there is no cluster to change."""

import asyncio
import platform
from collections.abc import Collection, Mapping
from typing import Any

from cordee.access.api_keys import ApiKey
from cordee.access.keys_file import KeysFile, NoCluster, folder
from cordee.agent import control
from cordee.agent.node_keys import NodeKeys
from cordee.api.failures import NotOffered
from cordee.console import fit
from cordee.errors import BadRequest, ModelNotFound, nearest
from cordee.files import home
from cordee.machine.alone import this_machine
from cordee.machine.energy import Meter
from cordee.machine.memory import memory_for_stages
from cordee.models import planned
from cordee.models.cards import cards
from cordee.models.store import Store
from cordee.net import identity
from cordee.serving.local_service import LocalService

CLUSTER_NEEDED = (
    "this machine works by itself: end `cordee serve` and start `cordee up`, and it is a node of a cluster, "
    "to which others can be added"
)


class SingleBackend:
    """See ConsoleBackend and the module's docstring. `services` are those that are served, by name."""

    def __init__(self, services: Mapping[str, LocalService], store: Store) -> None:
        self.store = store
        self._services = services
        self._meter = Meter()
        self._name = platform.node() or "localhost"

    async def overview(self) -> dict[str, Any]:
        """See ConsoleBackend."""
        found = [service.status() for service in self._services.values()]
        watts, name = self._meter.watts(), self._name
        node = {
            "id": name,
            "name": name,
            "self": True,
            "state": "alive",
            "draining": False,
            "admin": True,
            "rtt_seconds": None,
            "devices": [{"name": "CPU", "kind": "cpu", "memory_bytes": memory_for_stages()}],
            "stages": [_stage(each, stage) for each in found for stage in each["stages"]],
            "watts": watts,
        }
        return {
            "kind": "single",
            "cluster": "",
            "node": name,
            "warnings": [],
            "nodes": [node],
            "links": [],
            "models": [self._model(each) for each in found],
            "fetching": [],
            "reading": [],
            "changes": [],
            "watts": watts,
        }

    def snapshots(self) -> list[Any]:
        """See ConsoleBackend."""
        return []

    async def fit(self, model: str, *, asks_hub: bool) -> dict[str, Any]:
        """See ConsoleBackend; the hub is not asked."""
        wanted = await asyncio.to_thread(planned.of_name, self.store, model)
        if wanted is None:
            raise ModelNotFound(
                f"There is no model {model!r}{nearest(model, cards())}: choose one of the list."
            )
        asked = fit.requested(wanted, model)
        facts = await asyncio.to_thread(this_machine, wanted)
        found = await asyncio.to_thread(fit.planned_on, wanted.shape, asked, facts)
        alone = [{"name": self._name, "id": self._name} | fit.verdict(found)]
        return fit.answer(model, wanted.shape, alone, found)

    async def deploy(self, asked: control.Deploy) -> Any:
        """See ConsoleBackend."""
        raise NotOffered(f"{CLUSTER_NEEDED}; or start `cordee serve {asked.model}`")

    async def undeploy(self, asked: control.Undeploy) -> Any:
        """See ConsoleBackend."""
        raise NotOffered(f"{asked.model} is served as long as `cordee serve` runs: {CLUSTER_NEEDED}")

    async def check_removal(self, name: str) -> None:
        """See ConsoleBackend."""
        if name in self._services:
            raise BadRequest(f"{name} is being served here: confirm that it is to go all the same.", "last")

    async def look(self) -> None:
        """See ConsoleBackend: nobody else looks at the store."""

    async def invite(self, asked: control.Invite) -> Any:
        """See ConsoleBackend."""
        raise NotOffered(CLUSTER_NEEDED)

    async def drain(self, asked: control.Drain) -> Any:
        """See ConsoleBackend."""
        raise NotOffered(CLUSTER_NEEDED)

    async def remove(self, asked: control.Remove) -> Any:
        """See ConsoleBackend."""
        raise NotOffered(CLUSTER_NEEDED)

    def api_keys(self) -> Collection[ApiKey]:
        """See ConsoleBackend."""
        return KeysFile(folder()).read()

    async def add_key(self, asked: control.AddKey) -> Any:
        """See ConsoleBackend."""
        return {"key": self._keys().add(asked.name, control.bounds_of(asked))}

    async def limit_key(self, asked: control.LimitKey) -> Any:
        """See ConsoleBackend."""
        self._keys().limit(asked.name, asked.requests, asked.tokens)
        return control.Empty()

    async def remove_key(self, asked: control.RemoveKey) -> Any:
        """See ConsoleBackend."""
        self._keys().remove(asked.name)
        return control.Empty()

    def admin_facts(self) -> dict[str, Any]:
        """See ConsoleBackend."""
        return {"is_admin": not identity.exists(), "admins": [], "name": self._name}

    def _keys(self) -> NodeKeys:
        if identity.exists():
            raise NotOffered(
                "this machine belongs to a cluster, whose admins make its keys: start `cordee up` here"
            )
        return NodeKeys(NoCluster(), home())

    def _model(self, status: dict[str, Any]) -> dict[str, Any]:
        service = self._services[status["model"]]
        model = service.model
        return {
            "name": status["model"],
            "digest": status["digest"],
            "architecture": model.architecture,
            "layers": model.layers,
            "weights_bytes": model.nbytes,
            "offered_by": [self._name],
            "offered_here": True,
            "deployed": True,
            "context": status["context"],
            "sequences": status["sequences"],
            "replicas": 1,
            "only": [],
            "state": "serving" if service.ready else "loading",
            "why": "",
            "reasons": [],
            "placements": [
                {
                    "id": status["placement"],
                    "state": "serving" if service.ready else "loading",
                    "host": self._name,
                    "predicted_tokens_per_second": None,
                    "tokens_per_second": status["tokens_per_second"],
                    "active": status["active"],
                    "waiting": status["queue"],
                    "stages": [
                        {
                            "node": self._name,
                            "name": self._name,
                            "layers": each["layers"],
                            "state": each["state"],
                        }
                        for each in status["stages"]
                    ],
                    "successor": None,
                }
            ],
        }


def _stage(status: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": status["model"],
        "layers": stage["layers"],
        "device": "CPU",
        "state": stage["state"],
        "bytes": stage["rss_bytes"],
    }
