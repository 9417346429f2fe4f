"""The agent's side of the local control API (control.py)."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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
    Refusal,
    Remove,
    RemoveKey,
    Undeploy,
)
from cordee.console.actions import NodeActions
from cordee.errors import BadRequest, CordeeError

BODY_BYTES_MAX = 1 << 20  # the shape of a model with hundreds of layers takes a tenth


class Control:
    """The agent's side. `leave` is called when the node is to leave the cluster."""

    def __init__(self, agent: Agent, leave: Callable[[], None]) -> None:
        self._actions = NodeActions(agent)
        self._leave = leave

    def app(self) -> Starlette:
        """The application, to be served on `AgentSocket.socket`."""
        actions = self._actions
        return Starlette(
            routes=[
                _route("GET", "/nodes", Empty, actions.nodes),
                _route("GET", "/status", Empty, actions.status),
                _route("GET", "/services", Empty, actions.services),
                _route("GET", "/findings", Empty, actions.findings),
                _route("GET", "/usage", Empty, actions.usage),
                _route("POST", "/plan", PlanRequest, actions.plan),
                _route("POST", "/invite", Invite, actions.invite),
                _route("POST", "/remove", Remove, actions.remove),
                _route("POST", "/admin", AddAdmin, actions.add_admin),
                _route("POST", "/keys/add", AddKey, actions.add_key),
                _route("POST", "/keys/limit", LimitKey, actions.limit_key),
                _route("POST", "/keys/remove", RemoveKey, actions.remove_key),
                _route("POST", "/deploy", Deploy, actions.deploy),
                _route("POST", "/undeploy", Undeploy, actions.undeploy),
                _route("POST", "/drain", Drain, actions.drain),
                _route("POST", "/leave", Empty, self._end),
            ]
        )

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
