"""Three nodes of one cluster on this machine, for `cordee demo`: started, felled, brought back, ended.

Each is a `cordee up` with a state folder of its own, told to end with its standard input: the pipe's other
end is this process, so no node outlives it, however it ends. A thread starts again what ended.
"""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from cordee.agent import control
from cordee.errors import BadRequest, CordeeError, ModelNotFound, NotRunning, StageFailed
from cordee.net import address

if TYPE_CHECKING:
    from cordee.models.store import StoredModel

NAMES = ("a", "b", "c")  # people talk to the first, which is never felled and has the model's file
# What the cluster serves the model with: room for some turns of a chat, and for an answer being given up.
CONTEXT, SEQUENCES = 4096, 2
# Of what one half of the model needs, so that any two nodes hold it, whoever has the larger half.
LENT_PART = 1.05
START_SECONDS = 60.0  # until the nodes know each other, on a slow and busy machine
END_SECONDS = 10.0  # for nodes to end their stages and links
RETURN_SECONDS = 8.0  # for which a felled node lies: longer than the others take to go on without it
POLL_SECONDS = 0.1
LOG_BYTES_SHOWN = 400  # of a node that does not start

Tell = Callable[[str], None]


@dataclass
class Node:
    """A `cordee up`. `port` is where other nodes meet it."""

    name: str
    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    ended: float | None = None  # when it was found to be gone, on the monotonic clock
    is_returning: bool = False

    @property
    def lives(self) -> bool:
        """Whether its agent's process is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the agent and its workers, which are groups of their own."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            agent = psutil.Process(self.process.pid)
            agent.suspend()  # or it would notice, and start new ones
            for each in (*agent.children(recursive=True), agent):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.wait()

    def wait_for_former(self) -> None:
        """Wait for an agent that a killed demo left, and that is about to end."""
        ends = time.monotonic() + END_SECONDS
        with contextlib.suppress(FileNotFoundError):
            while time.monotonic() < ends:
                try:
                    with _locked(self.home / "cluster" / "agent.lock"):
                        return
                except BadRequest:
                    time.sleep(POLL_SECONDS)

    def last_words(self) -> str:
        """The end of what it said, in one line."""
        with contextlib.suppress(OSError):
            return " ".join((self.home / "log").read_text(errors="replace")[-LOG_BYTES_SHOWN:].split())
        return ""


class DemoCluster:
    """The nodes and who watches over them; a context manager that ends them.

    `tell` hears from another thread what happens of its own accord. Entering it, this process becomes one
    that asks the first node: `CORDEE_HOME` is that node's from then on.
    """

    def __init__(self, folder: Path, model: "StoredModel", report: Tell, tell: Tell) -> None:
        self._folder = folder
        self._model = model
        self._report = report
        self._tell = tell
        self._lent_bytes = lent_bytes(model)
        ports = _free_ports(len(NAMES))
        self._nodes = [Node(name, folder / name, port) for name, port in zip(NAMES, ports, strict=True)]
        self._parent = os.getppid()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="demo-cluster", daemon=True)

    @property
    def gateway(self) -> Node:
        """The node that this process asks."""
        return self._nodes[0]

    @property
    def api(self) -> str:
        """Where the first node serves clients."""
        return next(each["api"] for each in self.nodes() if each["self"])

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_locked(self._folder / "lock"))
            # Here lie the sockets of stages; what a felled node leaves of them goes with it.
            self._sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="cordee-demo-"))
            os.environ["CORDEE_HOME"] = str(self.gateway.home)
            stack.callback(self._end)
            for node in self._nodes:
                node.wait_for_former()
            try:
                self._begin()
            except CordeeError as error:  # folders of before may be damaged or out of date
                self._report(f"making new nodes, since those of before do not start ({error.message})")
                self._end()
                for node in self._nodes:
                    shutil.rmtree(node.home, ignore_errors=True)
                self._begin()
            self._stack = stack.pop_all()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._watcher.join()
        self._stack.close()

    def fell(self) -> tuple[str, str] | None:
        """Kill a node that runs a stage, but not the first; its name and layers, None if there is none."""
        stages = {each["name"]: each["stages"] for each in self.nodes()}
        running = [node for node in self._nodes[1:] if stages.get(node.name)]
        if not running:
            return None
        node = random.choice(running)
        node.kill()
        return node.name, layers_of(stages[node.name])

    def nodes(self) -> list[dict[str, Any]]:
        """What the first node knows of each, those that this process saw end marked as gone."""
        lives = {node.name: node.lives for node in self._nodes}
        found = control.ask("GET", "/nodes")["nodes"]
        return [each if lives.get(each["name"]) else each | {"state": "gone", "stages": []} for each in found]

    # How it begins and ends.

    def _begin(self) -> None:
        self._put_model()
        strangers = [node for node in self._nodes[1:] if not (node.home / "cluster" / "node.pem").is_file()]
        for node in self._nodes:
            if node not in strangers:
                self._start(node)
        self._until(lambda: bool(control.ask("GET", "/nodes")), [self.gateway])
        for node in strangers:
            self._report(f"node {node.name} joins")
            self._join(node)
            self._start(node)
        self._until(lambda: self._alive() == set(NAMES), self._nodes)
        control.ask("POST", "/deploy", control.Deploy(self._model.name, CONTEXT, SEQUENCES))

    def _put_model(self) -> None:
        from cordee.models.store import Store

        self.gateway.home.mkdir(mode=0o700, exist_ok=True)
        store = Store(self.gateway.home / "models")
        with contextlib.suppress(ModelNotFound):
            if store.get(self._model.name).digest == self._model.digest:
                return
        store.add_file(self._model.path, self._model.name, digest=self._model.digest, take="link")

    def _join(self, node: Node) -> None:
        node.home.mkdir(mode=0o700, exist_ok=True)
        code = control.ask("POST", "/invite", control.Invite())["code"]
        done = subprocess.run(
            _command("join", code),
            env=self._environment(node),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_SECONDS,
        )
        if done.returncode != 0:
            raise StageFailed(f"node {node.name} could not join: {done.stderr.decode(errors='replace')}")

    def _start(self, node: Node) -> None:
        options = ["--name", node.name, "--listen", f"127.0.0.1:{node.port}", "--scouting", "off"]
        options += ["--port", "0", "--memory", f"{self._lent_bytes // 1000}kB", "--until-eof"]
        if node is not self.gateway:
            options += ["--peer", f"127.0.0.1:{self.gateway.port}"]
        with (node.home / "log").open("wb") as log:
            node.process = subprocess.Popen(
                _command("up", *options),
                env=self._environment(node),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the chat
            )
        node.ended = None

    def _environment(self, node: Node) -> dict[str, str]:
        return os.environ | {"CORDEE_HOME": str(node.home), "TMPDIR": self._sockets}

    def _until(self, true: Callable[[], bool], nodes: Sequence[Node]) -> None:
        ends = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(NotRunning):
                if true():
                    return
            for node in nodes:
                if not node.lives:
                    raise StageFailed(f"Node {node.name} ended: {node.last_words()}")
            if time.monotonic() > ends:
                raise StageFailed(f"The nodes did not meet within {START_SECONDS:.0f} s.")
            time.sleep(POLL_SECONDS)

    def _alive(self) -> set[str]:
        return {each["name"] for each in self.nodes() if each["state"] == "alive"}

    def _end(self) -> None:
        """End all nodes, together; by force what takes too long."""
        running = [node for node in self._nodes if node.lives]
        for node in running:
            node.process.terminate()
        ends = time.monotonic() + END_SECONDS
        for node in running:
            try:
                node.process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.kill()

    # What it does on a thread of its own.

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            if os.getppid() != self._parent:  # who started the demo is gone, and so is its terminal
                os.kill(os.getpid(), signal.SIGTERM)
                return
            for node in self._nodes[1:]:
                self._look_after(node)

    def _look_after(self, node: Node) -> None:
        if node.lives:
            with contextlib.suppress(NotRunning):
                if node.is_returning and node.name in self._alive():
                    node.is_returning = False
                    self._tell(f"node {node.name} is back")
        elif node.ended is None:
            node.ended = time.monotonic()
        elif time.monotonic() > node.ended + RETURN_SECONDS:
            self._start(node)
            node.is_returning = True


def lent_bytes(model: "StoredModel") -> int:
    """What each node lends: enough for any two to hold the model, too little for one."""
    from cordee.cluster.memory import Demand, needed_bytes
    from cordee.models.gguf import read_header
    from cordee.models.shape import model_shape

    shape = model_shape(read_header(model.path), model.digest)
    load, middle = Demand(CONTEXT, SEQUENCES), shape.layers // 2
    halves = needed_bytes(shape, load, 0, middle), needed_bytes(shape, load, middle, shape.layers)
    return int(LENT_PART * max(halves))


def layers_of(stages: Sequence[dict[str, Any]]) -> str:
    """The layers of a node's stages, as people write them; empty without any."""
    return ", ".join(f"{s['layers'][0]}-{s['layers'][1] - 1}" for s in stages if s["layers"])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file in a folder that is there; raises BadRequest if somebody else does."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadRequest("The demo runs already, in another terminal.") from None
        yield


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(address.listener("127.0.0.1", 0)) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cordee.cli.main", *words]
