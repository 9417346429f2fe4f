"""Three nodes of one cluster on this machine, for `cordee demo`: started, killed, brought back, ended.

Each is a `cordee up` with a state folder of its own, which ends with its standard input. The other end of
that pipe is this process, so no node outlives it, however it ends. A thread restarts nodes that ended.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from cordee import children
from cordee.agent import control
from cordee.errors import BadRequest, CordeeError, ModelNotFound, NotRunning, StageFailed
from cordee.net import address
from cordee.system import locks, processes

if TYPE_CHECKING:
    from cordee.models.store import StoredModel

MAIN = "cordee.cli.main"
NAMES = ("a", "b", "c")  # the chat is with the first, which is never killed and has the model's file
# How the model is deployed: room for some turns of a chat, and for an answer that is being cancelled.
CONTEXT, SEQUENCES = 4096, 2
# A node's memory, of what one half of the model needs: any two nodes hold it, whichever has the larger half.
LENT_RATIO = 1.05
START_SECONDS = 60.0  # until the nodes know each other, on a slow and busy machine
END_SECONDS = 10.0  # for nodes to end their stages and links
RETURN_SECONDS = 8.0  # until a killed node is restarted: longer than the others need to take over
POLL_SECONDS = 0.1
LOG_BYTES_SHOWN = 400  # the log's end, of a node that does not start

Tell = Callable[[str], None]


@dataclass
class Node:
    """A `cordee up`. `port` is where it listens for other nodes."""

    name: str
    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    ended: float | None = None  # when it was found to have ended, on the monotonic clock
    is_returning: bool = False

    @property
    def is_running(self) -> bool:
        """Whether its agent's process runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the agent and its workers, which are process groups of their own."""
        assert self.process is not None, "it was started"
        with contextlib.suppress(psutil.Error):
            agent = psutil.Process(self.process.pid)
            agent.suspend()  # or it would notice that workers end, and start new ones
            for each in (*agent.children(recursive=True), agent):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.wait()

    def wait_for_former(self) -> None:
        """Wait for the agent of a demo that was killed: it is about to end."""
        ends = time.monotonic() + END_SECONDS
        with contextlib.suppress(FileNotFoundError):
            while time.monotonic() < ends:
                try:
                    with _locked(self.home / "cluster" / "agent.lock"):
                        return
                except BadRequest:
                    time.sleep(POLL_SECONDS)

    def log_end(self) -> str:
        """The end of its log, in one line."""
        with contextlib.suppress(OSError):
            return " ".join((self.home / "log").read_text(errors="replace")[-LOG_BYTES_SHOWN:].split())
        return ""


class DemoCluster:
    """The nodes, and the thread that watches them; a context manager that ends them.

    `report` gets the steps of the start. `tell` is called on the other thread, with what happens later. From
    its entry on, this process talks to the first node: `CORDEE_HOME` becomes that node's folder.
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
        """The node that this process talks to."""
        return self._nodes[0]

    @property
    def api(self) -> str:
        """Where the first node serves clients."""
        return next(each["api"] for each in self.nodes() if each["self"])

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_locked(self._folder / "lock"))
            # For the sockets of stages: what a killed node leaves there is removed with it.
            self._sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="cordee-demo-"))
            os.environ["CORDEE_HOME"] = str(self.gateway.home)
            stack.callback(self._end)
            for node in self._nodes:
                node.wait_for_former()
            try:
                self._begin()
            except CordeeError as error:  # the last demo's folders may be damaged or out of date
                self._report(f"making new nodes, since the last demo's do not start ({error.message})")
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

    def kill(self) -> tuple[str, str] | None:
        """Kill a node that runs a stage, but not the first; its name and layers, or None if there is none."""
        stages = {each["name"]: each["stages"] for each in self.nodes()}
        running = [node for node in self._nodes[1:] if stages.get(node.name)]
        if not running:
            return None
        node = random.choice(running)
        node.kill()
        return node.name, layers_of(stages[node.name])

    def nodes(self) -> list[dict[str, Any]]:
        """What the first node knows of each; those that this process saw end are marked as gone."""
        running = {node.name: node.is_running for node in self._nodes}
        found: list[dict[str, Any]] = control.ask("GET", "/nodes", kind=dict[str, Any])["nodes"]
        return [
            each if running.get(each["name"]) else each | {"state": "gone", "stages": []} for each in found
        ]

    # How it begins and ends.

    def _begin(self) -> None:
        self._put_model()
        new = [node for node in self._nodes[1:] if not (node.home / "cluster" / "node.pem").is_file()]
        for node in self._nodes:
            if node not in new:
                self._start(node)
        self._until(lambda: bool(self.nodes()), [self.gateway])
        for node in new:
            self._report(f"node {node.name} joins")
            self._join(node)
            self._start(node)
        self._until(lambda: self._alive() == set(NAMES), self._nodes)
        control.ask("POST", "/deploy", control.Deploy(self._model.name, CONTEXT, SEQUENCES), control.Deployed)

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
        code = control.ask("POST", "/invite", control.Invite(), dict[str, str])["code"]
        done = subprocess.run(
            children.command(MAIN, "join", code),
            env=self._environment(node),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_SECONDS,
        )
        if done.returncode != 0:
            raise StageFailed(f"Node {node.name} could not join: {done.stderr.decode(errors='replace')}")

    def _start(self, node: Node) -> None:
        options = ["--name", node.name, "--listen", f"127.0.0.1:{node.port}", "--scouting", "off"]
        options += ["--port", "0", "--memory", f"{self._lent_bytes // 1000}kB", "--until-eof"]
        if node is not self.gateway:
            options += ["--peer", f"127.0.0.1:{self.gateway.port}"]
        with (node.home / "log").open("wb") as log:
            node.process = subprocess.Popen(
                children.command(MAIN, "up", *options),
                env=self._environment(node),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                **processes.APART,  # the terminal's Ctrl-C is for the chat
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
                if not node.is_running:
                    raise StageFailed(f"Node {node.name} ended: {node.log_end()}")
            if time.monotonic() > ends:
                raise StageFailed(f"The nodes did not find each other within {START_SECONDS:.0f} s.")
            time.sleep(POLL_SECONDS)

    def _alive(self) -> set[str]:
        return {each["name"] for each in self.nodes() if each["state"] == "alive"}

    def _end(self) -> None:
        """End all nodes together; by SIGKILL those that take too long."""
        running = [(node, node.process) for node in self._nodes if node.process and node.is_running]
        for _, process in running:
            process.terminate()
        ends = time.monotonic() + END_SECONDS
        for node, process in running:
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.kill()

    # On a thread of its own.

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            if os.getppid() != self._parent:  # the parent is gone, and so is the terminal
                os.kill(os.getpid(), signal.SIGTERM)
                return
            for node in self._nodes[1:]:
                self._look_after(node)

    def _look_after(self, node: Node) -> None:
        if node.is_running:
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
    """Memory of each node: enough for any two to hold the model, too little for one."""
    from cordee.cluster.memory import Demand, needed_bytes
    from cordee.models.gguf import read_header
    from cordee.models.shape import model_shape

    shape = model_shape(read_header(model.path, name=model.name), model.digest)
    load, middle = Demand(CONTEXT, SEQUENCES), shape.layers // 2
    halves = needed_bytes(shape, load, 0, middle), needed_bytes(shape, load, middle, shape.layers)
    return int(LENT_RATIO * max(halves))


def layers_of(stages: Sequence[dict[str, Any]]) -> str:
    """The layers of a node's stages, as people write them: `0-14`; empty without any."""
    return ", ".join(f"{s['layers'][0]}-{s['layers'][1] - 1}" for s in stages if s["layers"])


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a lock on a file; its folder must exist. Raises BadRequest if another process holds it."""
    with path.open("a") as file:
        try:
            locks.take(file)
        except BlockingIOError:
            raise BadRequest("The demo is already running, in another terminal.") from None
        yield


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(address.listener("127.0.0.1", 0)) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
