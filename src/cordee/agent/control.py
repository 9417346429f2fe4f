"""The local control API: how the verbs talk to the agent that runs for the same state folder.

HTTP with JSON over the link `cluster/agent.sock` (system/links.py), which only this user may open. The agent
that answers there holds the lock on `cluster/agent.lock`; the system takes a lock from a process that ends,
so a socket without a lock is what a dead agent left.

    GET  /nodes, /status       what agent/status.py tells about the cluster
    GET  /services             and about this node's stages
    GET  /usage                what each key used at the API, on all nodes
    GET  /findings             what the agent finds wrong (agent/checks.py)
    POST /plan                 where a model would run now
    POST /invite, /remove, /admin    what admins do
    POST /keys/add, /keys/limit, /keys/remove    who may ask at the API: what admins do
    POST /deploy, /undeploy    what the cluster serves
    POST /drain, /leave        what this node does for the cluster

An expected error is answered as its class's code and its sentence, and raised again at the client. The side
of the agent is console/control_server.py; the client's is here, and imports little.
"""

import http.client
import os
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec
import psutil

from cordee import errors
from cordee.cluster import planner
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import ModelShape, Reading
from cordee.cluster.memory import Demand
from cordee.errors import BadRequest, CordeeError, NotRunning
from cordee.files import disk_faults, home
from cordee.system import links, locks

ANSWER_SECONDS = 120.0  # planning a large model on many machines takes some
SOCKET = "agent.sock"

T = TypeVar("T")


class Invite(msgspec.Struct, frozen=True):
    """Answered by the code, and by advice to be shown with it (perhaps empty)."""

    admin: bool = False


class Remove(msgspec.Struct, frozen=True):
    """`node` is an id or a name. Answered by the node's id and name, and whether it was an admin."""

    node: str


class AddAdmin(msgspec.Struct, frozen=True):
    """`node` is an id or a name. Answered by the node's id and name."""

    node: str


class AddKey(msgspec.Struct, frozen=True):
    """A key of the API; the fields are those of ApiKey. Answered by the key as it is shown, once."""

    name: str
    admin: bool = False
    requests: int = 0
    tokens: int = 0
    expires: float = 0.0


def bounds_of(asked: AddKey) -> dict[str, Any]:
    """All but the name, as NodeKeys.add takes it."""
    bounds = msgspec.structs.asdict(asked)
    del bounds["name"]
    return bounds


class LimitKey(msgspec.Struct, frozen=True):
    """The bounds that a key of this `name` has from now on; 0: none."""

    name: str
    requests: int = 0
    tokens: int = 0


class RemoveKey(msgspec.Struct, frozen=True):
    """`name` is a key's."""

    name: str


class Deploy(msgspec.Struct, frozen=True):
    """See Deployer.deploy. With `follow` nothing is begun: it asks how far that is. Answered by Deployed.

    `only` are names or ids of nodes.
    """

    model: str
    context: int | None = None
    sequences: int | None = None
    replicas: int = 1
    follow: bool = False
    only: tuple[str, ...] = ()


class Deployed(msgspec.Struct, frozen=True):
    """The name under which a model is deployed; with a `reading`, will be once it has been read.

    For people: `demand` is what it gets, where that is known, `lacks` how much less that is as memory is
    short, `why` why it cannot run for now.
    """

    name: str
    reading: Reading | None = None
    lacks: str = ""
    why: str = ""
    demand: Demand | None = None


class Undeploy(msgspec.Struct, frozen=True):
    """See Deployer.undeploy."""

    model: str


class Drain(msgspec.Struct, frozen=True):
    """With `on` false: the node takes stages again. Answered by the stages that it still runs.

    `node` is the name or id of another node, which only admins can order to; "" is the one that is asked.
    """

    on: bool = True
    node: str = ""


class PlanRequest(msgspec.Struct, frozen=True):
    """A model of the cluster by its name, or any by its shape. Answered by Planned."""

    model: str
    shape: ModelShape | None
    requested: SizeRequest


class Planned(msgspec.Struct, frozen=True):
    """A plan, and what it is for; `lacks` says what that is less than was asked, for people.

    `copies` is how often the model fits, each time on other nodes.
    """

    shape: ModelShape
    demand: Demand
    lacks: str
    plan: planner.Plan
    copies: int


class Empty(msgspec.Struct, frozen=True):
    """Nothing to say."""


class Refusal(msgspec.Struct, frozen=True):
    """An error of cordee.errors."""

    code: str
    message: str


class AgentSocket:
    """The one place per state folder where an agent can be asked. Close it when the agent has ended.

    Raises:
        BadRequest: another agent holds it.
        StorageFailed: it cannot be made in this folder.
    """

    def __init__(self, folder: Path) -> None:
        with disk_faults(folder):
            self._lock = _locked(folder / "agent.lock")
            self._path = folder / SOCKET
            self._path.unlink(missing_ok=True)  # a dead agent's
            self.socket = links.local_listener(self._path)

    def close(self) -> None:
        """Make room for the next agent."""
        self._path.unlink(missing_ok=True)
        self.socket.close()
        self._lock.close()


def _locked(path: Path) -> TextIO:
    file = path.open("a+")
    try:
        locks.take(file)
    except BlockingIOError:
        file.seek(0)
        pid = file.read(20).strip() or "unknown"
        file.close()
        raise BadRequest(
            f"A node already runs here (process {pid}): `cordee nodes` shows it. For a second node on this "
            "machine, set CORDEE_HOME to another folder."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def ask(method: str, path: str, body: msgspec.Struct | None = None, kind: type[T] = dict) -> T:
    """One exchange with the agent that runs for this state folder.

    Raises:
        NotRunning: none does.
        CordeeError: it does not answer, or what the agent raised.
    """
    connection = _Connection(home() / "cluster" / SOCKET)
    try:
        data = b"" if body is None else msgspec.json.encode(body)
    except UnicodeEncodeError as error:  # the name of a file, where that of a model should be
        raise BadRequest("A name in the cluster is UTF-8 text.") from error
    try:
        connection.request(method, path, data)
        response = connection.getresponse()
        data = response.read()
    except TimeoutError as error:
        raise CordeeError("The node here does not answer: end it, then run `cordee up` again.") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, ConnectionRefusedError) and _is_starting(home() / "cluster" / "agent.lock"):
            raise NotRunning(
                "The node here is not ready yet: what `cordee up` printed says what it waits for."
            ) from error
        raise NotRunning(
            "No node runs here: start one with `cordee up` in another terminal, then try again."
        ) from error
    finally:
        connection.close()
    if response.status == 200:
        return msgspec.json.decode(data, type=kind)
    raise _error(data)


def _is_starting(lock: Path) -> bool:
    """Whether the process that took the lock last lives. To try the lock would disturb one that wants it."""
    try:
        return psutil.pid_exists(int(lock.read_text(encoding="ascii")[:20]))
    except (OSError, ValueError):
        return False


def error_of(code: str, message: str) -> CordeeError:
    """An error of cordee.errors again, from its code and message."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, CordeeError) and kind.code == code:
            return kind(message)
    return CordeeError(message)


def _error(data: bytes) -> CordeeError:
    try:
        refusal = msgspec.json.decode(data, type=Refusal)
    except msgspec.MsgspecError:
        return CordeeError("The agent failed at this: what `cordee up` printed says why.")
    return error_of(refusal.code, refusal.message)


class _Connection(http.client.HTTPConnection):
    """HTTP over a link of this machine."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = links.connect(self._path, self.timeout)
