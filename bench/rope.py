"""What a cluster costs: until a fault is noticed, mended and over; what hops add; the first half hour.

    python bench/rope.py [--faults N] [--cases PREFIX] [--csv FILE] [--json]      as root, on Linux

Hosts are network namespaces on this machine (tests/net/netlab.py) with at most one processor each. Cases:

    faults    a node with a stage of a model that answers 8 streams loses its processes, and its system closes
              the links (kill), or it is gone without a word (crash: its cable is out as well). Seconds until
              another node sees it suspect (notice), until a placement without it is chosen (re-place), and
              until the last of the streams goes on (resume).
    hops      one stream's milliseconds for a token, with the same model in 1 to 4 stages.
    promise   seconds of each step from nothing to a first token, slices at 1 Gbit/s (tc tbf); and the same
              for gpt-oss-120b on four machines, by arithmetic that is shown.

There is no peer in any case: `peer` is null, but for hops, where it is the one stage.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from gguf import GGMLQuantizationType

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "net"), str(TESTS)]

import netfaults  # noqa: E402
import tiny  # noqa: E402
from cordee.cluster.facts import Placement, StagePlace  # noqa: E402
from cordee.cluster.planner import Planner  # noqa: E402
from cordee.models.gguf import read_header  # noqa: E402
from cordee.models.shape import model_shape  # noqa: E402
from netlab import MEGABYTE, Lab, Machine, Unable, run  # noqa: E402
from netrope import MACHINE, Node, Rope, Stream, finish, make_model, until  # noqa: E402

HOSTS = 4
SEED = 1
POLL_SECONDS = 0.01
TOKENS = 400  # of the stream that hops are measured on
ROUNDS = 3
SEQUENCES = 8
RATE = "1gbit"
WIDE, FEED_FORWARD, WIDE_LAYERS = 2048, 8192, 8  # of the model whose slices travel: 0.45 GB
MEMORY_SLACK = 1.1
# gpt-oss-120b as ggml-org publishes it (GGUF, MXFP4): bytes of the files, and layers.
LARGE_BYTES, LARGE_MACHINES = 63.4e9, 4
DISK_BYTES_PER_SECOND = 1e9  # a plain NVMe disk; a SATA disk reads half


@dataclass
class Figure:
    """A line of the result. `note` says where a figure comes from that was not measured."""

    case: str
    ours: float
    unit: str
    peer: float | None = None
    peer_name: str | None = None
    note: str = ""

    def line(self) -> dict:
        """As the other benches print it."""
        ratio = None if not self.peer else round(self.ours / self.peer, 3)
        return {
            "case": self.case,
            "ours": round(self.ours, 3),
            "peer": None if self.peer is None else round(self.peer, 3),
            "peer_name": self.peer_name,
            "unit": self.unit,
            "ratio": ratio,
        }


@contextlib.contextmanager
def laboratory(machines: Sequence[Machine]) -> Iterator[Lab]:
    """Hosts, and nothing of them afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lab"))
    try:
        with Lab(folder, machines) as lab:
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def faults(count: int) -> Iterator[Figure]:
    """Each kind of loss, `count` times, of a node with a stage."""
    draw = random.Random(SEED)
    with laboratory([MACHINE] * HOSTS) as lab:
        rope = Rope(lab, lab.hosts)
        rope.build()
        for fault in (netfaults.kill, netfaults.crash):
            times = []
            for number in range(count):
                times.append(lose(rope, fault, draw.choice(rope.stages()), draw))
                print(f"{fault.__name__} {number + 1} of {count}: {times[-1]}", file=sys.stderr)
            for name, seconds in zip(("notice", "re-place", "resume"), zip(*times, strict=True), strict=True):
                yield Figure(f"{fault.__name__}-{name}-median", statistics.median(seconds), "s")
                yield Figure(f"{fault.__name__}-{name}-p99", quantile(seconds, 0.99), "s")


def lose(rope: Rope, fault: netfaults.Fault, victim: Node, draw: random.Random) -> tuple[float, float, float]:
    """Seconds until the loss of a node is noticed, mended, and over."""
    gateways = [node for node in rope.nodes if node is not victim]
    observer = gateways[0]
    with rope.streams(gateways) as streams:
        mended = fault(rope, victim, draw)
        began = time.monotonic()
        mended.__enter__()
        noticed = replaced = 0.0
        while not replaced:
            if not noticed and observer.states().get(victim.id) != "alive":
                noticed = time.monotonic() - began
            placement = observer.placement()
            if placement and victim.id not in {stage["node"] for stage in placement["stages"]}:
                replaced = time.monotonic() - began
            time.sleep(POLL_SECONDS)
    mended.__exit__(None, None, None)
    rope.settle()
    return noticed, replaced, max(resumed(stream, began) for stream in streams) - began


def resumed(stream: Stream, began: float) -> float:
    """When a stream went on: the end of its longest silence that ends after the loss."""
    times = [when for when, _ in stream.pieces]
    silences = [(b - a, b) for a, b in pairwise(times) if b > began]
    return max(silences)[1] if silences else began


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that so large a part of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def hops() -> Iterator[Figure]:
    """The same model in 1 to HOSTS stages, by what memory its nodes lend."""
    alone = None
    for stages in range(1, HOSTS + 1):
        with laboratory([replace(MACHINE, memory_bytes=2 * MACHINE.memory_bytes)] * stages) as lab:
            path = make_model(lab.folder / "tiny.gguf")
            rope = Rope(lab, lab.hosts)
            for node in rope.nodes:
                node.options = ("--memory", lent(path, stages))
            rope.build()
            assert len(rope.stages()) == stages, f"{len(rope.stages())} stages instead of {stages}"
            took = statistics.median(milliseconds_a_token(rope) for _ in range(ROUNDS))
        alone = alone or took
        name = "1-stage" if stages > 1 else None
        yield Figure(f"hops-{stages}-stages", took, "ms/token", alone if stages > 1 else None, name)
        if stages > 1:
            yield Figure(f"hops-{stages}-stages-added-by-a-hop", (took - alone) / stages, "ms")


def lent(path: Path, stages: int) -> str:
    """Memory for a part of a model, if it is cut in so many even ones; as `cordee up --memory` wants it."""
    shape = model_shape(read_header(path), "bench")
    share = -(-shape.layers // stages)
    bounds = [*range(0, shape.layers, share), shape.layers]
    places = tuple(StagePlace("a", "CPU", *each) for each in pairwise(bounds))
    placement = Placement("bench", 4096, SEQUENCES, places)
    needed = (Planner().stage_bytes(shape, placement, index) for index in range(len(places)))
    return f"{max(needed) * MEMORY_SLACK / MEGABYTE:.0f}MB"


def milliseconds_a_token(rope: Rope) -> float:
    """Of one stream through the host's own gateway."""
    stream = Stream(rope.stages()[0], 0, tokens=TOKENS)
    stream.start()
    finish(stream)
    gaps = [b - a for (a, _), (b, _) in pairwise(stream.pieces)]
    return 1000 * statistics.median(gaps)


def promise() -> Iterator[Figure]:
    """From nothing to a first token, with slices at RATE."""
    with laboratory([Machine(memory_bytes=4_000_000_000)] * HOSTS) as lab:
        model = wide_model(lab.folder / "wide.gguf")
        rope = Rope(lab, lab.hosts)
        for host in lab.hosts:
            host.shape(RATE)
        for node in rope.nodes:
            node.options = ("--memory", lent(model, HOSTS))
        began = time.monotonic()
        rope.found(model)
        yield Figure(
            "promise-first-node", time.monotonic() - began, "s", note="the model on its disk is read once"
        )
        joins = []
        for node in rope.nodes[1:]:
            began = time.monotonic()
            rope.join(node)
            joins.append(time.monotonic() - began)
        yield Figure(
            "promise-join", statistics.median(joins), "s", note="each further machine: invite, join, up"
        )
        until(rope.nodes[-1].offers, "the last node offers the model")
        before = sent_bytes(lab)
        began = time.monotonic()
        stream = Stream(rope.nodes[-1], 0, tokens=1)
        stream.start()
        travelled = until(lambda: is_loading(rope), "all slices are there")
        sent = sent_bytes(lab) - before
        finish(stream)
        yield Figure(
            "promise-slices", travelled, "s", note=f"{sent / 1e6:.0f} MB leave the node that has the model"
        )
        yield Figure("promise-slices-rate", sent / travelled / 1e6, "MB/s")
        first = time.monotonic() - began - travelled
        yield Figure("promise-load-and-first-token", first, "s")
    yield from extrapolated(statistics.median(joins), sent / travelled, first)


def extrapolated(join: float, rate: float, first: float) -> Iterator[Figure]:
    """gpt-oss-120b: one machine has fetched it, its slices go from there to the others."""
    share = LARGE_BYTES / LARGE_MACHINES
    leaving = LARGE_BYTES - share
    case = "gpt-oss-120b-"
    joins = (LARGE_MACHINES - 1) * join
    yield Figure(
        case + "joins", joins, "s", note=f"{LARGE_MACHINES - 1} machines x {join:.1f} s, one after another"
    )
    slices = leaving / rate
    yield Figure(
        case + "slices", slices, "s", note=f"{leaving / 1e9:.1f} GB / {rate / 1e6:.0f} MB/s, measured"
    )
    load = share / DISK_BYTES_PER_SECOND
    assumed = f"{share / 1e9:.1f} GB a machine / {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s of disk, assumed"
    yield Figure(case + "load", load + first, "s", note=f"{assumed}, + {first:.1f} s")
    total = joins + slices + load + first
    yield Figure(case + "total", total, "s", note="without the install and the download from the hub")
    download = LARGE_BYTES / rate
    yield Figure(
        case + "download", download, "s", note=f"{LARGE_BYTES / 1e9:.1f} GB, if the internet is as fast"
    )


def wide_model(path: Path) -> Path:
    """A model of few and large tensors, for slices that take a while."""
    was = tiny.EMBD, tiny.FF
    tiny.EMBD, tiny.FF = WIDE, FEED_FORWARD
    try:
        kind = GGMLQuantizationType.Q8_0
        return tiny.make_tiny("llama", path, layers=WIDE_LAYERS, quantization=kind, tokenizer="bytes")
    finally:
        tiny.EMBD, tiny.FF = was


def is_loading(rope: Rope) -> bool:
    """Whether every stage has its slice."""
    placement = rope.first.placement()
    states = [stage["state"] for stage in placement["stages"]] if placement else []
    return bool(states) and not {"fetching", "unheard"} & set(states)


def sent_bytes(lab: Lab) -> int:
    """What the first host has sent."""
    told = json.loads(run("ip", "-n", lab.hosts[0].namespace, "--json", "--stats", "link", "show", "eth0"))
    return told[0]["stats64"]["tx"]["bytes"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=10, help="of each kind")
    parser.add_argument("--cases", default="", help="only faults, hops or promise")
    parser.add_argument("--csv", type=Path, help="write the figures there, too")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(TESTS.parent / "src")
    cases = {"faults": lambda: faults(options.faults), "hops": hops, "promise": promise}
    figures = []
    try:
        for name, measure in cases.items():
            if name.startswith(options.cases):
                figures += list(measure())
    except Unable as error:
        raise SystemExit(f"bench/rope.py: {error}") from error
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*figures[0].line(), "note"])
            writer.writeheader()
            writer.writerows({**each.line(), "note": each.note} for each in figures)
    for each in figures:
        line = each.line()
        print(
            json.dumps(line)
            if options.json
            else f"{each.case:<36}{each.ours:>10.3f} {each.unit:<9}{each.note}"
        )


if __name__ == "__main__":
    main()
