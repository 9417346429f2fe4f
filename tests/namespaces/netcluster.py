"""A cluster on the hosts of a lab, by the verbs that people use, and streams through it that are checked.

cluster = Cluster(lab)
cluster.found(), cluster.join(host), ...   nodes, one after the other
with cluster.streams([b, d]) as streams: 8 streams through these gateways, to be disturbed meanwhile
"""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from gguf import GGMLQuantizationType

from netlab import MEGABYTE, PATIENCE_SECONDS, Host, Lab, Machine
from tiny import make_tiny

CORDEE = ("-m", "cordee.cli.main")
API_PORT = 8321
MODEL = "tiny"
LAYERS = 24
STREAMS = 8
TOKENS = 240
POLL_SECONDS = 0.05
# No host can hold all of the model, any two can: a fault of one that has a slice is a fault of the answer.
MACHINE = Machine(memory_bytes=350 * MEGABYTE, cpus=1.0)
ENDS = {"2": -100, "260": -100}  # the model's text is random; it shall not end by chance


class Node:
    """A host as a node of the cluster."""

    def __init__(self, host: Host, *options: str) -> None:
        self.host = host
        self.options = options  # of `cordee up`
        self.id = ""
        self.process: Popen | None = None
        self.program = CORDEE

    def up(self) -> None:
        """`cordee up`, and wait until its agent answers."""
        self.process = self.host.start(*self.program, "up", "--name", self.host.name, *self.options)
        until(lambda: self.runs, f"{self.host.name} is up; {self.tail()}")
        self.id = self.ask("/nodes")["node"]

    def verb(self, *words: str) -> str:
        """What a verb of `cordee` prints on this host."""
        return self.host.run(*CORDEE, *words)

    @property
    def runs(self) -> bool:
        """Whether its agent answers."""
        assert self.process is None or self.process.poll() is None, f"{self.host.name} ended: {self.tail()}"
        try:
            self.ask("/nodes")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def ask(self, path: str) -> dict[str, Any]:
        """What its agent says of the cluster, as the verbs hear it."""
        connection = http.client.HTTPConnection("agent", timeout=PATIENCE_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            try:
                connection.sock.connect(str(self.host.home / "cluster" / "agent.sock"))
            except OSError as error:
                error.add_note(self.state())
                raise
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())

    def states(self) -> dict[str, str]:
        """alive, suspect or gone, by node id, as this node sees it."""
        return {each["id"]: each["state"] for each in self.ask("/nodes")["nodes"]}

    def placement(self) -> dict[str, Any] | None:
        """The placement of the model that this node believes in."""
        models = {each["name"]: each for each in self.ask("/status")["models"]}
        placements = models.get(MODEL, {}).get("placements") or [None]
        return placements[0]

    def offers(self) -> bool:
        """Whether it knows the model by now: it serves what it hears that others have."""
        connection = http.client.HTTPConnection("127.0.0.1", API_PORT)
        connection.sock = self.host.connect(API_PORT)
        with contextlib.closing(connection):
            connection.request("GET", f"/v1/models/{MODEL}")
            response = connection.getresponse()
            return response.status == 200 and json.loads(response.read())["state"] != "loading"

    @property
    def has_ended(self) -> bool:
        """Whether it was up, and is no more."""
        return self.process is not None and self.process.poll() is not None

    def state(self) -> str:
        """What is to be known of it where it does not answer: its process, its memory, its last words."""
        status = self.process and self.process.poll()
        return f"{self.host.name}: exit status {status}, {self.host.memory()}\n{self.tail()}"

    def tail(self) -> str:
        """The end of its log."""
        return self.host.log.read_text(errors="replace")[-2000:] if self.host.log.exists() else ""


class Stream(threading.Thread):
    """One streamed completion through a node; `pieces` are (when, text)."""

    def __init__(self, node: Node, number: int, tokens: int = TOKENS, prompt: str | None = None) -> None:
        super().__init__(daemon=True)
        self.node, self.number, self.tokens = node, number, tokens
        self.prompt = prompt or f"The {number}th cluster holds "
        self.pieces: list[tuple[float, str]] = []
        self.finish_reason: str | None = None
        self.count: int | None = None
        self.failure = ""

    @property
    def text(self) -> str:
        """What came so far."""
        return "".join(text for _, text in self.pieces)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            self.failure = repr(error)

    def _run(self) -> None:
        body = {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "temperature": 1.0,
            "seed": self.number,
            "logit_bias": ENDS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", API_PORT)
        connection.sock = self.node.host.connect(API_PORT)
        connection.sock.settimeout(2 * PATIENCE_SECONDS)
        with contextlib.closing(connection):
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                self.failure = response.read().decode()
                return
            for line in response:
                if line.startswith(b"data: {"):
                    self._take(json.loads(line.removeprefix(b"data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.failure = json.dumps(event["error"])
            return
        for choice in event["choices"]:
            self.pieces.append((time.monotonic(), choice["text"]))
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        if event.get("usage"):
            self.count = event["usage"]["completion_tokens"]


class Cluster:
    """Nodes on hosts of a lab; the first founds the cluster and has the model.

    `steps` are what was done to build it, and how many seconds each took.
    """

    def __init__(self, lab: Lab, hosts: Sequence[Host]) -> None:
        self.lab = lab
        self.nodes = [Node(host) for host in hosts]
        self.first = self.nodes[0]
        self.undisturbed: dict[int, str] = {}
        self.steps: list[tuple[str, float]] = []

    def found(self, model: Path) -> None:
        """The first node, from nothing."""
        self.first.verb("pull", str(model), "--name", MODEL)
        self.first.up()

    def join(self, node: Node) -> None:
        """A further node, by an invitation of the first."""
        code = self.first.verb("invite").strip()
        node.verb("join", code)
        node.up()

    def build(self, layers: int = LAYERS) -> None:
        """The whole cluster: it serves, and its undisturbed answers are known."""
        model = make_model(self.lab.folder / f"tiny-{layers}.gguf", layers)
        with self._step("first node: pull the model, up"):
            self.found(model)
        for node in self.nodes[1:]:
            with self._step(f"node {node.host.name}: invite, join, up"):
                self.join(node)
        with self._step("the last node hears of the model"):
            until(self.nodes[-1].offers, "the last node offers the model")
        with self._step("first token: slices travel, stages load"):
            finish(self.started(Stream(self.nodes[-1], 0, tokens=1)))
        with self._step(f"{STREAMS} answers of {TOKENS} tokens"):
            for stream in self.start(self.nodes):
                finish(stream)
                self.undisturbed[stream.number] = stream.text
        self.settle()

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.steps.append((what, time.monotonic() - began))

    def settle(self) -> None:
        """Wait until every node that is up sees every other, and the model is served and nothing moves."""
        ids = {node.id for node in self.nodes}

        def settled() -> bool:
            known = [(node.states(), node.placement()) for node in self.nodes]
            alive = all(
                {each for each, state in states.items() if state == "alive"} == ids for states, _ in known
            )
            wirings = {placement["wiring"] if placement else "" for _, placement in known}
            still = not any(placement and placement["successor"] for _, placement in known)
            return alive and still and len(wirings) == 1 and "" not in wirings

        try:
            until(settled, "all nodes see each other, and the model is served")
        except AssertionError as error:
            error.add_note(self.report())
            raise

    def stages(self) -> list[Node]:
        """The nodes of the model's stages, in order."""
        nodes = {node.id: node for node in self.nodes}
        placement = self.first.placement()
        assert placement is not None
        return [nodes[stage["node"]] for stage in placement["stages"]]

    def report(self) -> str:
        """What each node that is up believes, and says."""
        lines = []
        for node in self.nodes:
            with contextlib.suppress(OSError):
                own = next(each for each in node.ask("/nodes")["nodes"] if each["self"])
                lines += [
                    f"{node.host.name} ({node.id}), processes {node.host.pids}",
                    str(node.states()),
                    str(node.placement()),
                    str({key: own[key] for key in ("devices", "stages", "disk_free_bytes")}),
                    node.tail(),
                ]
        return "\n".join(lines)

    def start(self, gateways: Sequence[Node]) -> list[Stream]:
        """STREAMS streams through these nodes in turn."""
        return [self.started(Stream(gateways[number % len(gateways)], number)) for number in range(STREAMS)]

    def started(self, stream: Stream) -> Stream:
        """The stream, which has begun."""
        stream.start()
        return stream

    @contextlib.contextmanager
    def streams(self, gateways: Sequence[Node]) -> Iterator[list[Stream]]:
        """Streams that are in the middle of their answers; after the block all of them must end well."""
        streams = self.start(gateways)
        until(
            lambda: all(len(stream.pieces) > TOKENS // 8 or stream.failure for stream in streams),
            "all streams have begun",
        )
        yield streams
        for stream in streams:
            try:
                finish(stream)
            except AssertionError as error:
                error.add_note(self.report())
                raise
            wanted = self.undisturbed[stream.number]
            assert stream.text == wanted, f"stream {stream.number} differs: {stream.text!r}, not {wanted!r}"


def make_model(path: Path, layers: int = LAYERS) -> Path:
    """With LAYERS a model that is as large as MACHINE says; its text is random letters."""
    # Of a type whose arithmetic does not depend on what else is answered: f32's does.
    kind = GGMLQuantizationType.Q8_0
    return make_tiny("llama", path, layers=layers, quantization=kind, tokenizer="bytes")


def finish(stream: Stream) -> None:
    """Wait for a stream's end, which must be a good one."""
    stream.join(2 * PATIENCE_SECONDS)
    assert not stream.is_alive(), f"stream {stream.number} hangs after {len(stream.pieces)} pieces"
    assert not stream.failure, f"stream {stream.number}: {stream.failure}"
    assert (stream.finish_reason, stream.count) == ("length", stream.tokens)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> float:
    """Wait for it; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"after {seconds:.0f} s still not so: {what}"
        time.sleep(POLL_SECONDS)
    return time.monotonic() - start
