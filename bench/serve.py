"""What a client waits for over HTTP: `cordee serve` beside llama.cpp's `llama-server`, in one run.

    python bench/serve.py [--peer llama-server=FILE] [--model FILE] [--rounds N] [--cases PREFIX] [--json]

Both serve the same file on this machine with the same number of threads, context and sequences, and are asked
in turn within each round through /v1/completions: random token ids (so that nothing has been read before), no
sampling, 64 tokens. `first-token-N` is the time from the request to the first event after a prompt of N
tokens; `gap-N` is the time between two events, while N answers are given at once. Times are medians over the
rounds, in ms; a ratio is the median of the rounds' ratios, ours to the peer's, and less is better. `serve` is
Cordée as it comes, where an answer does not change with what else is computed; `serve-fast` is
`cordee serve --fast`, which promises as little as the peer does. Whoever wants the peer builds llama-server
from the sources of the pinned llama-cpp-python (vendor/llama.cpp in its sdist); without it, `peer` is null.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cordee.engine.llama.libllama import usable_cores
from cordee.models.store import Store

TOKENS = 64  # of each answer
CONTEXT, SEQUENCES = 2048, 8
PROMPTS = (32, 512)
STREAMS = (1, 8)
ORDINARY_TOKENS = range(1000, 40_000)  # of the starter model's vocabulary
START_SECONDS = 120.0
ANSWER_SECONDS = 300.0

Result = dict[str, str | float | None]


@dataclass(frozen=True)
class Server:
    """A server that answers on a loopback port."""

    name: str
    port: int

    def events(self, prompt_tokens: int, seed: int) -> list[float]:
        """When the request was sent, and each event with a token came, by time.perf_counter()."""
        draw = random.Random(seed)
        body = {
            "model": "model",
            "prompt": [draw.choice(ORDINARY_TOKENS) for _ in range(prompt_tokens)],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            connection.connect()
            times = [time.perf_counter()]
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name} answers {response.status}: {response.read().decode()}")
            for line in response:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        return times

    def first_token_ms(self, prompt_tokens: int, seed: int) -> float:
        """From the request to the first event."""
        times = self.events(prompt_tokens, seed)
        return (times[1] - times[0]) * 1000

    def gap_ms(self, streams: int, seed: int) -> float:
        """Between two events, while so many answers are given."""
        seeds = range(seed * streams, (seed + 1) * streams)
        with ThreadPoolExecutor(streams) as pool:
            found = pool.map(self.events, itertools.repeat(PROMPTS[0]), seeds)
            gaps = [b - a for times in found for a, b in itertools.pairwise(times[1:])]
        return statistics.median(gaps) * 1000


def free_port() -> int:
    """A loopback port that nothing uses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def healthy(port: int) -> bool:
    """Whether a server there says that it is ready."""
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


Case = Callable[[Server, int], float]


@contextlib.contextmanager
def started(name: str, command: list[str], port: int) -> Generator[Server]:
    """A server's process, ready; ended afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + START_SECONDS
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"{name} does not start: {' '.join(command)}")
            time.sleep(0.1)
        yield Server(name, port)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def contending(model: Path, peer: Path | None) -> Generator[dict[str, Server]]:
    """Both of ours, and the peer if there is one, with a model."""
    threads = str(usable_cores())
    Store().add_file(model, "model")
    common = ("--context", str(CONTEXT), "--sequences", str(SEQUENCES), "--threads", threads)
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, options in (("serve", ()), ("serve-fast", ("--fast",))):
            port = free_port()
            ours = [sys.executable, "-m", "cordee.cli.main", "serve", "model", "--port", str(port)]
            servers[name] = stack.enter_context(started(name, [*ours, *common, *options], port))
        if peer:
            port, total = free_port(), str(CONTEXT * SEQUENCES)
            theirs = [str(peer), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", total]
            theirs += ["-np", str(SEQUENCES), "-t", threads]
            servers["llama-server"] = stack.enter_context(started("llama-server", theirs, port))
        yield servers


def first_token(prompt_tokens: int) -> Case:
    """The case of prompts so long."""
    return lambda server, seed: server.first_token_ms(prompt_tokens, seed)


def gap(streams: int) -> Case:
    """The case of so many answers at once."""
    return lambda server, seed: server.gap_ms(streams, seed)


def cases() -> dict[str, Case]:
    """What is measured of a server, with a seed that no two requests share."""
    return {f"first-token-{n}": first_token(n) for n in PROMPTS} | {f"gap-{n}": gap(n) for n in STREAMS}


def measure(servers: dict[str, Server], rounds: int, prefix: str) -> Iterator[Result]:
    """The cases whose names begin with `prefix`; the first round warms up and is dropped."""
    seeds = iter(range(1 << 30))
    for case, timed in cases().items():
        if not case.startswith(prefix):
            continue
        found: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(rounds + 1):
            for name, server in servers.items():
                found[name].append(timed(server, next(seeds)))
        theirs = found.pop("llama-server", None)
        for name, ours in found.items():
            yield line(f"{name}-{case}", ours[1:], theirs and theirs[1:])


def line(case: str, ours: list[float], theirs: list[float] | None) -> Result:
    """A case's object."""
    peer, ratio = None, None
    if theirs:
        peer = round(statistics.median(theirs), 2)
        ratio = round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)
    return {
        "case": case,
        "ours": round(statistics.median(ours), 2),
        "peer": peer,
        "peer_name": "llama-server" if theirs else None,
        "unit": "ms",
        "ratio": ratio,
    }


def peer_file(text: str) -> Path:
    """The program of `llama-server=FILE`."""
    name, _, path = text.partition("=")
    if name != "llama-server" or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: say llama-server=FILE, the program that was built")
    return Path(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(sys.prefix) / "share" / "cordee" / "starter.gguf")
    parser.add_argument("--peer", type=peer_file, help="llama-server=FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="only the cases whose name begins so")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as home:
        os.environ["CORDEE_HOME"] = home
        with contending(options.model, options.peer) as servers:
            for found in measure(servers, options.rounds, options.cases):
                if options.json:
                    print(json.dumps(found), flush=True)
                else:
                    print("{case:<32}{ours:>9} {peer!s:>9} {unit}  {ratio!s:>6}".format(**found), flush=True)


if __name__ == "__main__":
    main()
