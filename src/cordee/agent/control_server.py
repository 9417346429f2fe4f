"""The agent's side of the local control API (control.py)."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cordee.agent import checks
from cordee.agent.agent import Agent
from cordee.agent.control import (
    AddAdmin,
    AddKey,
    Deploy,
    Drain,
    Empty,
    Invite,
    PlanRequest,
    Refusal,
    Remove,
    RemoveKey,
    Undeploy,
)
from cordee.agent.deploy import Deployer
from cordee.agent.status import ClusterStatus
from cordee.errors import BadRequest, CordeeError, JoinFailed
from cordee.net.members import advice

BODY_BYTES_MAX = 1 << 20  # the shape of a model with hundreds of layers takes a tenth


class Control:
    """The agent's side. `leave` is called when the node is to leave the cluster."""

    def __init__(self, agent: Agent, leave: Callable[[], None]) -> None:
        self._agent = agent
        self._leave = leave

    def app(self) -> Starlette:
        """The application, to be served on `AgentSocket.socket`."""
        return Starlette(
            routes=[
                _route("GET", "/nodes", Empty, self._nodes),
                _route("GET", "/status", Empty, self._status),
                _route("GET", "/services", Empty, self._services),
                _route("GET", "/findings", Empty, self._findings),
                _route("POST", "/plan", PlanRequest, self._plan),
                _route("POST", "/invite", Invite, self._invite),
                _route("POST", "/remove", Remove, self._remove),
                _route("POST", "/admin", AddAdmin, self._add_admin),
                _route("POST", "/keys/add", AddKey, self._add_key),
                _route("POST", "/keys/remove", RemoveKey, self._remove_key),
                _route("POST", "/deploy", Deploy, self._deploy),
                _route("POST", "/undeploy", Undeploy, self._undeploy),
                _route("POST", "/drain", Drain, self._drain),
                _route("POST", "/leave", Empty, self._end),
            ]
        )

    async def _nodes(self, _: Empty) -> Any:
        return ClusterStatus(self._agent).nodes()

    async def _status(self, _: Empty) -> Any:
        return await ClusterStatus(self._agent).status()

    async def _services(self, _: Empty) -> Any:
        return ClusterStatus(self._agent).services()

    async def _findings(self, _: Empty) -> Any:
        return await checks.findings(self._agent)

    async def _plan(self, asked: PlanRequest) -> Any:
        return await ClusterStatus(self._agent).plan(asked.model, asked.shape, asked.requested)

    async def _invite(self, asked: Invite) -> Any:
        if not self._agent.identity.is_admin:
            raise JoinFailed(f"Only admins can invite. {ClusterStatus(self._agent).admins('invite')}")
        code = await self._agent.invitations.invite(admin=asked.admin)
        nodes = ClusterStatus(self._agent).nodes()["nodes"]
        admins = [node["name"] for node in nodes if node["admin"]]
        return {"code": code, "advice": "" if asked.admin else advice(admins, len(nodes) + 1)}

    async def _add_admin(self, asked: AddAdmin) -> Any:
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

    async def _remove(self, asked: Remove) -> Any:
        status = ClusterStatus(self._agent)
        if not self._agent.identity.is_admin:
            raise BadRequest(f"Only admins can remove nodes. {status.admins('remove')}", "node")
        found = status.find(asked.node)
        if found["id"] == self._agent.node:
            raise BadRequest("That is this node itself: use `cordee leave` for it.", "node")
        await self._agent.remove(found["id"])
        return found

    async def _add_key(self, asked: AddKey) -> Any:
        self._check_admin("make keys", "key add")
        bounds = msgspec.structs.asdict(asked)
        return {"key": self._agent.api_keys.add(bounds.pop("name"), bounds)}

    async def _remove_key(self, asked: RemoveKey) -> Any:
        self._check_admin("revoke keys", "key rm")
        self._agent.api_keys.remove(asked.name)
        return Empty()

    def _check_admin(self, what: str, verb: str) -> None:
        if not self._agent.identity.is_admin:
            raise BadRequest(f"Only admins can {what}. {ClusterStatus(self._agent).admins(verb)}")

    async def _deploy(self, asked: Deploy) -> Any:
        return await Deployer(self._agent).deploy(asked)

    async def _undeploy(self, asked: Undeploy) -> Any:
        Deployer(self._agent).undeploy(asked.model)
        return Empty()

    async def _drain(self, asked: Drain) -> Any:
        self._agent.drain(asked.on)
        return {"stays": await ClusterStatus(self._agent).stays()}

    async def _end(self, _: Empty) -> Any:
        self._leave()
        return Empty()


def _route(method: str, path: str, kind: type, handler: Callable[[Any], Awaitable[Any]]) -> Route:
    decoder = msgspec.json.Decoder(kind)

    async def answer(request: Request) -> Response:
        try:
            body = b""
            async for piece in request.stream():
                body += piece
                if len(body) > BODY_BYTES_MAX:
                    raise BadRequest("the request is too long")
            found, status = await handler(decoder.decode(body or b"{}")), 200
        except msgspec.MsgspecError as error:
            found, status = Refusal(BadRequest.code, str(error)), BadRequest.http_status
        except CordeeError as error:
            found, status = Refusal(error.code, error.message), error.http_status
        return Response(msgspec.json.encode(found), status, media_type="application/json")

    return Route(path, answer, methods=[method])
