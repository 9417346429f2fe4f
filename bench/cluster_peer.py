"""Our cluster beside llama.cpp's RPC on the same four hosts: `bench/cluster.py --cases peer`.

Hosts are network namespaces with half a processor each, given anew every 2 ms, and links of 1 Gbit/s. The
model is the starter DEEP times over (bench/deep.py): 120 layers. On both sides every host has a part of the
layers and one thread, and clients ask the first host over HTTP for the same tokens, in turn within each
round. `cluster4-N` is the tokens a second of N answers at once; `cluster4-prefill` those of one prompt of
4,096 tokens; `cluster4-first` the seconds to the first token of a prompt of 2,000 tokens, and
`cluster4-again` the same for another prompt that begins with these. The peer is built by whoever runs the
bench, from the sources of the pinned llama-cpp-python (vendor/llama.cpp in its sdist) with -DGGML_RPC=ON:
FOLDER has llama-server and ggml-rpc-server.
"""

import contextlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from deep import deepen
from netcluster import API_PORT, MODEL, Cluster, until
from netlab import MEGABYTE, Host, Lab, Machine

HOSTS, RATE, DEEP = 4, "1gbit", 4
MACHINE = Machine(memory_bytes=1500 * MEGABYTE, cpus=0.5, cpu_period_us=2000)
MEMORY = "450MB"  # that a node lends: all four are needed for layers and cache
PEER, RPC_PORT, SERVER_PORT = "llama.cpp RPC", 50052, 8090
ROUNDS = 3
STREAMS, STREAM_TOKENS, STREAM_PROMPT = (1, 8, 32), 48, 24
LONG, LONG_SHARED = 4096, 2000
ORDINARY_TOKENS = range(1000, 40_000)  # of the starter's vocabulary
SERVE_SECONDS, ANSWER_SECONDS = 600.0, 1200.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How the model is served: tokens of each answer with its prompt, and answers at a time."""

    context: int
    sequences: int


SHORT, TALL = Shape(256, 32), Shape(LONG + 64, 2)


@dataclass(frozen=True)
class Side:
    """A server on the first host."""

    host: Host
    port: int

    def healthy(self) -> bool:
        """Whether it is ready."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._sent("GET", "/health", None).status == 200
        return False

    def answer(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token of an answer, and to its end."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        response = self._sent("POST", "/v1/completions", body | {"stream": True})
        if response.status != 200:
            raise SystemExit(f"port {self.port} answers {response.status}: {response.read().decode()}")
        first = 0.0
        for line in response:
            if line.startswith(b"data: {") and not first:
                first = time.perf_counter() - began
        return first, time.perf_counter() - began

    def _sent(self, method: str, path: str, body: Row | None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.sock = self.host.connect(self.port)
        connection.sock.settimeout(ANSWER_SECONDS)
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        return connection.getresponse()


def prompt(tokens: int, seed: int) -> list[int]:
    """Random tokens."""
    draw = random.Random(seed)
    return [draw.choice(ORDINARY_TOKENS) for _ in range(tokens)]


def streams(count: int) -> Callable[[Side, int], float]:
    """Tokens a second of so many answers at once."""

    def timed(side: Side, seed: int) -> float:
        prompts = [prompt(STREAM_PROMPT, seed * 1000 + number) for number in range(count)]
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(side.answer, prompts, repeat(STREAM_TOKENS)))
        return count * STREAM_TOKENS / (time.perf_counter() - began)

    return timed


def prefill(side: Side, seed: int) -> float:
    """Tokens a second of a long prompt."""
    return LONG / side.answer(prompt(LONG, seed), 1)[0]


def first(side: Side, seed: int) -> float:
    """Seconds to the first token of a prompt with a beginning that is new."""
    return side.answer(prompt(LONG_SHARED, seed) + prompt(16, -seed), 1)[0]


def again(side: Side, seed: int) -> float:
    """The same with a beginning that was read for another."""
    side.answer(prompt(LONG_SHARED, seed) + prompt(16, -seed), 1)
    return side.answer(prompt(LONG_SHARED, seed) + prompt(16, -seed - 1), 1)[0]


CASES: dict[str, tuple[Shape, str, Callable[[Side, int], float]]] = {
    **{f"cluster4-{count}": (SHORT, "tokens/s", streams(count)) for count in STREAMS},
    "cluster4-prefill": (TALL, "tokens/s", prefill),
    "cluster4-first": (TALL, "s", first),
    "cluster4-again": (TALL, "s", again),
}


def peer(source: Path, folder: Path | None, tell: Callable[[str], None]) -> Iterator[Row]:
    """All cases, with the model file `source` (the starter); without `folder` there is no peer."""
    with Lab([MACHINE] * HOSTS) as lab:
        for host in lab.hosts:
            host.shape(RATE)
        model = lab.folder / "deep.gguf"
        deepen(source, model, DEEP)
        cluster = Cluster(lab, lab.hosts)
        for node in cluster.nodes:
            node.options = ("--memory", MEMORY)
        cluster.found(model)
        for node in cluster.nodes[1:]:
            cluster.join(node)
        for shape in (SHORT, TALL):
            ours = _deployed(cluster, shape)
            tell(f"{len(cluster.stages())} stages serve {shape}")
            with _served(lab, model, folder, shape) as theirs:
                for name, (wanted, unit, timed) in CASES.items():
                    if wanted == shape:
                        tell(name)
                        yield _measured(name, unit, timed, ours, theirs)
            cluster.first.verb("undeploy", MODEL)


def _measured(
    case: str, unit: str, timed: Callable[[Side, int], float], ours: Side, theirs: Side | None
) -> Row:
    """A case's figures; the first round warms up and does not count."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    seeds = iter(range(1, 1000))
    for _ in range(ROUNDS + 1):
        found["ours"].append(timed(ours, next(seeds)))
        if theirs:
            found["theirs"].append(timed(theirs, next(seeds)))
    own, other = found["ours"][1:], found["theirs"][1:]
    return {
        "case": case,
        "ours": statistics.median(own),
        "unit": unit,
        "peer": statistics.median(other) if other else None,
        "peer_name": PEER if other else None,
        "note": f"median of {ROUNDS} rounds",
    }


def _deployed(cluster: Cluster, shape: Shape) -> Side:
    """Our side, which serves the model in that shape."""
    options = ("--context", str(shape.context), "--sequences", str(shape.sequences))
    cluster.first.verb("deploy", MODEL, *options)
    until(
        lambda: (cluster.first.placement() or {}).get("state") == "serving",
        "the model is served",
        SERVE_SECONDS,
    )
    return Side(cluster.first.host, API_PORT)


@contextlib.contextmanager
def _served(lab: Lab, model: Path, folder: Path | None, shape: Shape) -> Generator[Side | None]:
    """The peer's side, on the same hosts; ended afterwards."""
    if folder is None:
        yield None
        return
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for host in lab.hosts:
            command = [folder / "ggml-rpc-server", "--host", host.address, "--port", str(RPC_PORT), "-t", "1"]
            processes.append(_started(host, command))
        places = ",".join(f"{host.address}:{RPC_PORT}" for host in lab.hosts)
        total = str(shape.context * shape.sequences)
        command = [
            folder / "llama-server",
            "-m",
            model,
            "--rpc",
            places,
            "-ngl",
            "999",
            "-c",
            total,
            "-t",
            "1",
        ]
        command += [
            "-np",
            str(shape.sequences),
            "--host",
            "127.0.0.1",
            "--port",
            str(SERVER_PORT),
            "--no-webui",
        ]
        processes.append(_started(lab.hosts[0], command))
        side = Side(lab.hosts[0], SERVER_PORT)
        until(side.healthy, "llama-server is ready", SERVE_SECONDS)
        yield side
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _started(host: Host, command: list[Any]) -> "subprocess.Popen[bytes]":
    """A program of another folder on a host, in place of this Python."""
    script = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    with host.log.open("ab") as log:
        return host.popen(["-c", script, *map(str, command)], stdout=log, stderr=log)


def peer_folder(text: str) -> Path:
    """The folder of `llama.cpp-rpc=FOLDER`."""
    name, _, path = text.partition("=")
    missing = [each for each in ("llama-server", "ggml-rpc-server") if not (Path(path) / each).is_file()]
    if name != "llama.cpp-rpc" or missing:
        sys.exit(f"{text}: say llama.cpp-rpc=FOLDER, which has llama-server and ggml-rpc-server")
    return Path(path)
