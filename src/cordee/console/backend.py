"""What the console shows and does; a node of a cluster and a machine by itself each have their own way."""

from collections.abc import Collection
from typing import Any, Protocol

from cordee.access.api_keys import ApiKey
from cordee.agent import control
from cordee.models.store import Store


class ConsoleBackend(Protocol):
    """The machines that this program knows, as the pages see them. All methods on one event loop.

    Raises (each that does something):
        CordeeError: why it cannot be done, and what to do.
    """

    store: Store

    async def overview(self) -> dict[str, Any]:
        """The machines, how they are connected, what runs where, what is under way."""
        ...

    def snapshots(self) -> list[Any]:
        """What there was before: see agent/history.py."""
        ...

    async def fit(self, model: str, *, asks_hub: bool) -> dict[str, Any]:
        """Whether a model fits (fit.py); `asks_hub`: the hub may be asked about it."""
        ...

    async def deploy(self, asked: control.Deploy) -> Any:
        """Have a model served."""
        ...

    async def undeploy(self, asked: control.Undeploy) -> Any:
        """Have it served no longer."""
        ...

    async def check_removal(self, name: str) -> None:
        """Refuse to remove what is nowhere else."""
        ...

    async def look(self) -> None:
        """The store has changed."""
        ...

    async def invite(self, asked: control.Invite) -> Any:
        """Let a machine in."""
        ...

    async def drain(self, asked: control.Drain) -> Any:
        """Have a machine run nothing, or let it run models again."""
        ...

    async def remove(self, asked: control.Remove) -> Any:
        """Remove a machine for good."""
        ...

    def api_keys(self) -> Collection[ApiKey]:
        """People's keys, and names of those that were revoked."""
        ...

    async def add_key(self, asked: control.AddKey) -> Any:
        """Make one; how it is shown, once."""
        ...

    async def limit_key(self, asked: control.LimitKey) -> Any:
        """Change the bounds of one."""
        ...

    async def remove_key(self, asked: control.RemoveKey) -> Any:
        """Revoke one."""
        ...

    def admin_facts(self) -> dict[str, Any]:
        """Whether admins' work can be done at this node, and if not at which."""
        ...
