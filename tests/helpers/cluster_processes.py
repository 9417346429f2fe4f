"""Nodes of a cluster on this machine, for tests: `cordee up` as processes, each with its state folder."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import openai

from cordee.agent import control
from cordee.errors import NotRunning
from cordee.models.store import Store

# The whole starter model, served like this, is too much for one node; two of three hold it.
MEMORY = "250MB"
SERVED = ("--context", 1024, "--sequences", 4)
PROGRAM = (sys.executable, "-m", "cordee.cli.main")
SECONDS = 120  # what takes longer hangs, however busy the machine is
POLL_SECONDS = 0.1


class Node:
    """A state folder, and the agent that runs for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program = PROGRAM  # that `up` runs
        self.environment: dict[str, str] = {}  # besides
        self.process: subprocess.Popen[str] | None = None

    def cordee(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a verb, whether it succeeds or not."""
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"CORDEE_HOME": str(self.home)},
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a verb that goes on; the caller reads what it prints."""
        return subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            env=os.environ | {"CORDEE_HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, *arguments: object) -> str:
        """Run a verb that must succeed; what it prints."""
        done = self.cordee(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def told(self, verb: str) -> Any:
        """What `cordee VERB --json` prints."""
        return json.loads(self.do(verb, "--json"))

    def asked(self, path: str) -> dict[str, Any]:
        """What the agent answers a verb: quicker than a process, for those who ask often."""
        with mock.patch.dict(os.environ, CORDEE_HOME=str(self.home)):
            return control.ask("GET", path)

    @property
    def runs(self) -> bool:
        """Whether an agent answers."""
        try:
            return bool(self.asked("/nodes"))
        except NotRunning:
            return False

    def up(self, *options: object) -> None:
        """Start the agent, and wait until it answers."""
        command = [*self.program, "up", "--port", "0", *map(str, options)]
        with (self.home / "up.log").open("a") as log:
            environment = os.environ | {"CORDEE_HOME": str(self.home)} | self.environment
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        until(lambda: self.process.poll() is not None or self.runs)
        assert self.process.poll() is None, self.said

    def down(self) -> int:
        """End the agent as Ctrl-C does; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS)

    @property
    def said(self) -> str:
        """All that `cordee up` printed."""
        return (self.home / "up.log").read_text()

    @property
    def id(self) -> str:
        return self.asked("/nodes")["node"]

    def states(self) -> dict[str, str]:
        """alive, suspect or gone, by the node's name."""
        return {node["name"]: node["state"] for node in self.asked("/nodes")["nodes"]}

    def model(self, name: str) -> dict[str, Any]:
        """What `status` says of a model; its state is unknown while the node has not heard of it, or of its
        deployment."""
        models = self.asked("/status")["models"]
        return {"state": "unknown"} | next((model for model in models if model["name"] == name), {})

    @contextlib.contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        """OpenAI's client at this node's API."""
        api = self.asked("/nodes")["nodes"][0]["api"]
        with openai.OpenAI(base_url=api, api_key="none", max_retries=20, timeout=SECONDS) as client:
            yield client


class Cluster:
    """Nodes of one cluster; the first has the model file (if there is one) and is the admin."""

    def __init__(self, folder: Path, model: Path | None, *options: object) -> None:
        self._folder = folder
        self._model = model
        self._options = options
        self.nodes: dict[str, Node] = {}
        self.port = free_port()

    def add(
        self,
        name: str,
        *options: object,
        program: Sequence[str] = PROGRAM,
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """One more node, up; `program` and `environment` are for its agent."""
        home = self._folder / name
        home.mkdir(exist_ok=True)  # a test may have put files there
        node = Node(home)
        node.program, node.environment = tuple(program), dict(environment or {})
        if self.nodes:
            node.do("join", next(iter(self.nodes.values())).do("invite").strip())
            listen = "127.0.0.1:0"
        else:
            if self._model is not None:
                Store(home / "models").add_file(self._model, "starter", take="link")
            listen = f"127.0.0.1:{self.port}"
        self.nodes[name] = node
        node.up("--name", name, "--listen", listen, *self._options, *options)
        brought = [each["name"] for each in json.loads(node.do("ls", "--json"))] == ["starter"]
        if self._model is None and brought:  # as on every first machine, the starter is offered
            node.do("rm", "starter", "--yes")
            until(lambda: not node.asked("/status")["models"])
        return node

    def close(self) -> None:
        """Kill the nodes that still run."""
        for node in self.nodes.values():
            if node.process is not None:
                node.process.kill()
                node.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def until(true: Callable[[], bool]) -> None:
    """Wait until it is true; fails after SECONDS."""
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends, "it did not become true"
        time.sleep(POLL_SECONDS)
