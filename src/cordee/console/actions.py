"""What people ask of a node: by the verbs, through control_server.py, and by the page, through console.py.

Each method takes a question of control.py and answers values fit for JSON, or a struct of control.py.
"""

from typing import Any

from cordee.agent import checks, orders
from cordee.agent.agent import Agent
from cordee.agent.control import (
    AddAdmin,
    AddKey,
    Deploy,
    Drain,
    Empty,
    Invite,
    LimitKey,
    PlanRequest,
    Remove,
    RemoveKey,
    Undeploy,
    bounds_of,
)
from cordee.agent.deploy import Deployer
from cordee.agent.status import ClusterStatus
from cordee.api.usage import rows
from cordee.errors import BadRequest, JoinFailed
from cordee.net.members import advice


class NodeActions:
    """See the module's docstring. All methods on the agent's event loop.

    Raises (each of them):
        CordeeError: what keeps it from being done; the message names the remedy.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def nodes(self, _: Empty) -> Any:
        """The members (ClusterStatus.nodes)."""
        return ClusterStatus(self._agent).nodes()

    async def status(self, _: Empty) -> Any:
        """The models, and what runs where (ClusterStatus.status)."""
        return await ClusterStatus(self._agent).status()

    async def services(self, _: Empty) -> Any:
        """The models that this node runs stages of."""
        return ClusterStatus(self._agent).services()

    async def findings(self, _: Empty) -> Any:
        """What this node finds wrong (checks.py)."""
        return await checks.findings(self._agent)

    async def plan(self, asked: PlanRequest) -> Any:
        """Where a model would run now."""
        return await ClusterStatus(self._agent).plan(asked.model, asked.shape, asked.requested)

    async def invite(self, asked: Invite) -> Any:
        """A code with which a machine can join, and advice."""
        if not self._agent.identity.is_admin:
            raise JoinFailed(f"Only admins can invite. {ClusterStatus(self._agent).admins('invite')}")
        code = await self._agent.invitations.invite(admin=asked.admin)
        nodes = ClusterStatus(self._agent).nodes()["nodes"]
        admins = [node["name"] for node in nodes if node["admin"]]
        return {"code": code, "advice": "" if asked.admin else advice(admins, len(nodes) + 1)}

    async def add_admin(self, asked: AddAdmin) -> Any:
        """Make an admin of a member that runs."""
        status = ClusterStatus(self._agent)
        if not self._agent.identity.is_admin:
            raise BadRequest(f"Only admins can make an admin of a node. {status.admins('admin add')}", "node")
        found = status.find(asked.node)
        if found["admin"]:
            raise BadRequest(f"{found['name']} is an admin already.", "node")
        if found["state"] != "alive":
            raise BadRequest(
                f"{found['name']} is not running: start `cordee up` on it, then try again.", "node"
            )
        await self._agent.add_admin(found["id"])
        return found

    async def remove(self, asked: Remove) -> Any:
        """Remove a member for good."""
        status = ClusterStatus(self._agent)
        if not self._agent.identity.is_admin:
            raise BadRequest(f"Only admins can remove nodes. {status.admins('remove')}", "node")
        found = status.find(asked.node)
        if found["id"] == self._agent.node:
            raise BadRequest("That is this node itself: use `cordee leave` for it.", "node")
        await self._agent.remove(found["id"])
        return found

    async def add_key(self, asked: AddKey) -> Any:
        """Make a key of the API; how it is shown, once."""
        self._check_admin("make keys", "key add")
        return {"key": self._agent.api_keys.add(asked.name, bounds_of(asked))}

    async def limit_key(self, asked: LimitKey) -> Any:
        """Change the bounds of a key of the API."""
        self._check_admin("change keys", "key limit")
        self._agent.api_keys.limit(asked.name, asked.requests, asked.tokens)
        return Empty()

    async def remove_key(self, asked: RemoveKey) -> Any:
        """Revoke a key of the API."""
        self._check_admin("revoke keys", "key rm")
        self._agent.api_keys.remove(asked.name)
        return Empty()

    def _check_admin(self, what: str, verb: str) -> None:
        if not self._agent.identity.is_admin:
            raise BadRequest(f"Only admins can {what}. {ClusterStatus(self._agent).admins(verb)}")

    async def usage(self, _: Empty) -> Any:
        """What each key used, at all nodes that are there."""
        return rows(self._agent.ledger.read_all())

    async def deploy(self, asked: Deploy) -> Any:
        """Have the cluster serve a model (Deployer.deploy)."""
        return await Deployer(self._agent).deploy(asked)

    async def undeploy(self, asked: Undeploy) -> Any:
        """Have the cluster serve a model no longer."""
        Deployer(self._agent).undeploy(asked.model)
        return Empty()

    async def drain(self, asked: Drain) -> Any:
        """Have a node run nothing, or let it run models again; the stages that it still runs."""
        status = ClusterStatus(self._agent)
        found = status.find(asked.node or self._agent.node)
        if found["id"] == self._agent.node:
            self._agent.drain(asked.on)
            return {"name": found["name"], "stays": await ClusterStatus(self._agent).stays()}
        self._check_admin("drain other nodes", "drain")
        if found["state"] != "alive":
            raise BadRequest(f"{found['name']} is not running: nothing runs there to be moved.", "node")
        await orders.drain(self._agent.identity, self._agent.alive()[found["id"]], asked.on)
        [stages] = [node["stages"] for node in status.nodes()["nodes"] if node["id"] == found["id"]]
        stays = [{"model": each["model"], "layers": each["layers"], "why": ""} for each in stages]
        return {"name": found["name"], "stays": stays}
