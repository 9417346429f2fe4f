"""The local control API: how the verbs talk to the agent that runs for the same state folder.

HTTP with JSON over the Unix socket `cluster/agent.sock`, which only this user may open. Who answers there is
the agent that holds the lock on `cluster/agent.lock`; the system takes a lock from a process that ends, so a
socket without a lock is what a dead agent left.

    GET  /nodes, /status       what node/overview.py tells of the cluster
    GET  /services             and of this node's stages
    POST /plan                 where a model would run now
    POST /invite, /remove      what keepers do
    POST /share, /unshare      what the cluster serves
    POST /drain, /leave        what this node does for the cluster

An expected error is answered as its class's code and its sentence, and raised again at the client.
"""

import fcntl
import http.client
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cordee import errors
from cordee.cluster.facts import ModelShape
from cordee.errors import BadRequest, CordeeError, NotRunning
from cordee.files import home
from cordee.node.agent import Agent
from cordee.node.library import SEQUENCES
from cordee.node.overview import Overview

BODY_BYTES_MAX = 1 << 20  # the shape of a model with hundreds of layers takes a tenth
ANSWER_SECONDS = 120.0  # planning a large model on many machines takes some
SOCKET_NAME_BYTES_MAX = 103  # what systems allow: macOS the least
BACKLOG = 64

T = TypeVar("T")


class Invite(msgspec.Struct, frozen=True):
    """Answered by the code."""

    keeper: bool = False


class Remove(msgspec.Struct, frozen=True):
    """`node` is an id or a name. Answered by the node's id and name, and whether it was a keeper."""

    node: str


class Share(msgspec.Struct, frozen=True):
    """See Agent.wish."""

    model: str
    context: int | None = None
    sequences: int = SEQUENCES
    replicas: int = 1


class Unshare(msgspec.Struct, frozen=True):
    """See Agent.unwish."""

    model: str


class Drain(msgspec.Struct, frozen=True):
    """With `on` false: the node takes stages again. Answered by the stages that it still runs."""

    on: bool = True


class Plan(msgspec.Struct, frozen=True):
    """A model of the cluster by its name, or any by its shape. Answered by overview.Planned."""

    model: str
    shape: ModelShape | None
    context: int | None
    sequences: int


class Empty(msgspec.Struct, frozen=True):
    """Nothing to say."""


class Refusal(msgspec.Struct, frozen=True):
    """An error of cordee.errors."""

    code: str
    message: str


class Control:
    """The agent's side. `leave` is called when the node is to be no member any more."""

    def __init__(self, agent: Agent, leave: Callable[[], None]) -> None:
        self._agent = agent
        self._leave = leave

    def app(self) -> Starlette:
        """The application, to be served on `Place.socket`."""
        return Starlette(
            routes=[
                _route("GET", "/nodes", Empty, self._nodes),
                _route("GET", "/status", Empty, self._status),
                _route("GET", "/services", Empty, self._services),
                _route("POST", "/plan", Plan, self._plan),
                _route("POST", "/invite", Invite, self._invite),
                _route("POST", "/remove", Remove, self._remove),
                _route("POST", "/share", Share, self._share),
                _route("POST", "/unshare", Unshare, self._unshare),
                _route("POST", "/drain", Drain, self._drain),
                _route("POST", "/leave", Empty, self._end),
            ]
        )

    async def _nodes(self, _: Empty) -> Any:
        return Overview(self._agent).nodes()

    async def _status(self, _: Empty) -> Any:
        return await Overview(self._agent).status()

    async def _services(self, _: Empty) -> Any:
        return Overview(self._agent).services()

    async def _plan(self, asked: Plan) -> Any:
        return await Overview(self._agent).plan(asked.model, asked.shape, asked.context, asked.sequences)

    async def _invite(self, asked: Invite) -> Any:
        return {"code": await self._agent.desk.invite(keeper=asked.keeper)}

    async def _remove(self, asked: Remove) -> Any:
        found = Overview(self._agent).find(asked.node)
        if found["id"] == self._agent.node:
            raise BadRequest("That is this node itself: `cordee leave` is for it.", "node")
        await self._agent.remove(found["id"])
        return found

    async def _share(self, asked: Share) -> Any:
        self._agent.wish(
            asked.model, context=asked.context, sequences=asked.sequences, replicas=asked.replicas
        )
        return Empty()

    async def _unshare(self, asked: Unshare) -> Any:
        self._agent.unwish(asked.model)
        return Empty()

    async def _drain(self, asked: Drain) -> Any:
        self._agent.drain(asked.on)
        return {"stays": await Overview(self._agent).stays()}

    async def _end(self, _: Empty) -> Any:
        self._leave()
        return Empty()


def _route(method: str, path: str, kind: type, handler: Callable[[Any], Awaitable[Any]]) -> Route:
    decoder = msgspec.json.Decoder(kind)

    async def answer(request: Request) -> Response:
        try:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES_MAX:
                    raise BadRequest("the request is too long")
            found, status = await handler(decoder.decode(body or b"{}")), 200
        except msgspec.MsgspecError as error:
            found, status = Refusal(BadRequest.code, str(error)), BadRequest.http_status
        except CordeeError as error:
            found, status = Refusal(error.code, error.message), error.http_status
        return Response(msgspec.json.encode(found), status, media_type="application/json")

    return Route(path, answer, methods=[method])


class Place:
    """The one place per state folder where an agent can be asked. Close it when the agent has ended.

    Raises:
        BadRequest: another agent holds it, or the folder's name is too long for a socket.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = _locked(folder / "agent.lock")
        self._path = _socket_path(folder)
        self._path.unlink(missing_ok=True)  # a dead agent's
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(self._path))
        self._path.chmod(0o600)
        self.socket.listen(BACKLOG)

    def close(self) -> None:
        """Make room for the next agent."""
        self._path.unlink(missing_ok=True)
        self.socket.close()
        self._lock.close()


def _locked(path: Path) -> TextIO:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read(20).strip() or "unknown"
        file.close()
        raise BadRequest(
            f"An agent runs here already (process {pid}): `cordee status` asks it. For a second node on this "
            "machine set CORDEE_HOME to another folder."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _socket_path(folder: Path) -> Path:
    path = folder / "agent.sock"
    if len(os.fsencode(path)) > SOCKET_NAME_BYTES_MAX:
        raise BadRequest(f"The name {path} is too long for a socket: set CORDEE_HOME to a shorter one.")
    return path


def ask(method: str, path: str, body: msgspec.Struct | None = None, kind: type[T] = dict) -> T:
    """One exchange with the agent that runs for this state folder.

    Raises:
        NotRunning: none does.
        CordeeError: whatever the agent raised.
    """
    connection = _Connection(_socket_path(home() / "cluster"))
    try:
        connection.request(method, path, b"" if body is None else msgspec.json.encode(body))
        response = connection.getresponse()
        data = response.read()
    except TimeoutError as error:
        raise NotRunning(
            "The agent that runs here does not answer: end it and start `cordee up` again."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise NotRunning(
            "No agent runs here: start it with `cordee up` in another terminal, then try again."
        ) from error
    finally:
        connection.close()
    if response.status == 200:
        return msgspec.json.decode(data, type=kind)
    raise _error(data)


def _error(data: bytes) -> CordeeError:
    try:
        refusal = msgspec.json.decode(data, type=Refusal)
    except msgspec.MsgspecError:
        return CordeeError("The agent failed at this: what `cordee up` printed says why.")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, CordeeError) and kind.code == refusal.code:
            return kind(refusal.message)
    return CordeeError(refusal.message)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
