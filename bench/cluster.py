"""What a cluster costs: until a fault is noticed and over, what hops add, prompts, the first half hour.

    python bench/cluster.py [--faults N] [--cases NAME,…] [--machine NAME] [--csv FILE] [--json]
                            [--peer llama.cpp-rpc=FOLDER]                              as root, on Linux

Takes fifteen minutes on two quiet cores. Says what it does, prints the tables of docs/performance.md, and
writes all figures to bench/results/cluster-MACHINE.csv, and each fault to cluster-MACHINE-faults.csv beside
it.

Hosts are network namespaces on this machine (tests/namespaces/netlab.py) with at most one processor each.
Cases:

    faults    random faults (tests/namespaces/netfaults.py, seeded) of nodes with a stage of a model that
              answers 8 streams. Seconds until another node sees that something is wrong (notice), until it
              sees another placement, or other links between its workers, serve (replace), and until the
              last of the streams goes on (resume).
    hops      one stream's milliseconds a token, with the same model in 1 to 4 stages.
    prefill   seconds from a prompt of 2,000 tokens to the first token of the answer, with 4 hosts of half a
              processor each beside one such host.
    prefix    the same on 4 hosts, of a second prompt that begins like the first.
    promise   seconds of each step from nothing to a first token, slices at 1 Gbit/s (tc tbf); and the same
              for gpt-oss-120b on four machines, by arithmetic that is shown.
    peer      one model over four hosts, beside llama.cpp's RPC if --peer says where that is: see
              bench/cluster_peer.py. Only if it is asked for by name: it takes long.

The peer of hops and of prefill is the one stage, that of prefix the first prompt; where there is none, `peer`
is null.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "namespaces"), str(TESTS / "helpers")]

import cluster_peer  # noqa: E402
import netfaults  # noqa: E402
import tiny  # noqa: E402
from cordee.cluster.facts import Placement, StagePlace  # noqa: E402
from cordee.cluster.planner import Planner  # noqa: E402
from cordee.models.gguf import read_header  # noqa: E402
from cordee.models.shape import model_shape  # noqa: E402
from netcluster import MACHINE, MODEL, Cluster, Node, Stream, finish, make_model, until  # noqa: E402
from netlab import MEGABYTE, PATIENCE_SECONDS, Lab, Machine, Unable, run  # noqa: E402

HOSTS = 4
SEED = 1
POLL_SECONDS = 0.02
SILENCE_SECONDS = 0.5  # in a stream of 50 tokens a second: it was interrupted
FAULTS_SECONDS = 1500.0  # no fault begins later
TOKENS = 400  # of the stream that hops are measured on
ROUNDS = 3
CONTEXT, SEQUENCES = 4096, 8
RATE = "1gbit"
WIDE, FEED_FORWARD, WIDE_LAYERS = 2048, 8192, 8  # of the model whose slices travel: 0.45 GB
READER, READER_FEED_FORWARD, READER_LAYERS = 256, 1024, 16  # of the one that reads prompts: 20 MB
PROMPT_TOKENS, QUESTION_TOKENS = 2000, 40
HALF_A_CORE = 0.5
MEMORY_SLACK = 1.1
# gpt-oss-120b as ggml-org publishes it (GGUF, MXFP4): bytes of the files, and layers.
LARGE_BYTES, LARGE_MACHINES = 63.4e9, 4
DISK_BYTES_PER_SECOND = 1e9  # a plain NVMe disk; a SATA disk reads half
INTERNET_BYTES_PER_SECOND = 1e9 / 8  # of a home with fibre
INSTALL_SECONDS = 160.0
STARTER = Path(sys.prefix) / "share" / "cordee" / "starter.gguf"
RESULTS = Path(__file__).parent / "results"
STARTED = time.monotonic()

Row = dict[str, Any]  # of a CSV file: value by column


@dataclass
class Figure:
    """A line of the result. `note` says where the figure comes from."""

    case: str
    ours: float
    unit: str
    peer: float | None = None
    peer_name: str | None = None
    note: str = ""

    def line(self) -> Row:
        """As the other benchmarks print theirs."""
        ratio = None if not self.peer else round(self.ours / self.peer, 3)
        return {
            "case": self.case,
            "ours": round(self.ours, 3),
            "peer": None if self.peer is None else round(self.peer, 3),
            "peer_name": self.peer_name,
            "unit": self.unit,
            "ratio": ratio,
        }


def faults(count: int, rows: list[Row]) -> Iterator[Figure]:
    """`count` random faults of nodes with a stage, one after another; `rows` gets each of them."""
    draw = random.Random(SEED)
    began = time.monotonic()
    with Lab([MACHINE] * HOSTS) as lab:
        cluster = Cluster(lab, lab.hosts)
        cluster.build()
        for number in range(count):
            if time.monotonic() - began > FAULTS_SECONDS:
                tell(f"only {number} faults: {FAULTS_SECONDS:.0f} s are over")
                break
            fault, victim = draw.choice(netfaults.RANDOM), draw.choice(cluster.stages())
            try:
                loss = lose(cluster, fault, victim, draw)
            except AssertionError as error:
                tell(f"{number + 1} of {count}: {fault.__name__} did harm: {error}")
                yield Figure(
                    "faults-that-did-harm", 1, "faults", note=f"{fault.__name__}, number {number + 1}"
                )
                break
            rows.append({"number": number + 1, "fault": fault.__name__, **asdict(loss)})
            tell(f"{number + 1} of {count}: {fault.__name__}: {loss}")
    for kind in ("", *dict.fromkeys(fault.__name__ for fault in netfaults.RANDOM)):
        yield from summary(kind, [row for row in rows if kind in ("", row["fault"])])


def summary(kind: str, rows: Sequence[Row]) -> Iterator[Figure]:
    """Median and p99 of the seconds that faults of a kind (all for "") cost; faults that cost nothing do not
    count.
    """
    for what in ("notice", "replace", "resume"):
        seconds: list[float] = [row[f"{what}_seconds"] for row in rows if row[f"{what}_seconds"] is not None]
        name = f"faults-{kind}-{what}" if kind else f"faults-{what}"
        note = f"{len(seconds)} of {len(rows)} faults"
        if seconds:
            yield Figure(f"{name}-median", statistics.median(seconds), "s", note=note)
            yield Figure(f"{name}-p99", quantile(seconds, 0.99), "s", note=note)


@dataclass
class Loss:
    """Seconds from a fault until another node noticed it, until another placement or wiring served, and until
    the last of the streams went on; None where that did not happen, since there was no need.
    """

    notice_seconds: float | None = None
    replace_seconds: float | None = None
    resume_seconds: float | None = None

    def __str__(self) -> str:
        steps = zip(("noticed", "replaced", "resumed"), asdict(self).values(), strict=True)
        return ", ".join(
            f"{what} {'-' if seconds is None else f'{seconds:.1f} s'}" for what, seconds in steps
        )


def lose(cluster: Cluster, fault: netfaults.Fault, victim: Node, draw: random.Random) -> Loss:
    """What a fault of `victim` costs its cluster, while streams run through all other nodes."""
    gateways = [node for node in cluster.nodes if node is not victim]
    with cluster.streams(gateways) as streams, watched(gateways[0], victim) as (loss, began):
        mended = fault(cluster, victim, draw)
        mended.__enter__()
        for stream in streams:
            stream.join(2 * PATIENCE_SECONDS)
    loss.resume_seconds = max(filter(None, (resumed(stream, began) for stream in streams)), default=None)
    mended.__exit__(None, None, None)
    cluster.settle()
    return loss


@contextlib.contextmanager
def watched(observer: Node, victim: Node) -> Generator[tuple[Loss, float]]:
    """What `observer` sees of the loss of `victim`, and when the block began (monotonic clock)."""
    placement = observer.placement()
    wiring = placement and placement["wiring"]
    loss, began, ended = Loss(), time.monotonic(), threading.Event()

    def watch() -> None:
        while loss.replace_seconds is None and not ended.wait(POLL_SECONDS):
            placement, now = observer.placement(), time.monotonic() - began
            is_broken = placement is None or placement["wiring"] != wiring
            if loss.notice_seconds is None and (is_broken or observer.states().get(victim.id) != "alive"):
                loss.notice_seconds = now
            if is_broken and placement is not None and placement["wiring"]:
                loss.replace_seconds = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield loss, began
    finally:
        ended.set()
        watcher.join()


def resumed(stream: Stream, began: float) -> float | None:
    """Seconds from `began` until a stream went on: the end of its longest pause; None if it had none."""
    times = [when for when, _ in stream.pieces]
    pauses = [(b - a, b) for a, b in pairwise(times) if b > began]
    length, end = max(pauses, default=(0.0, began))
    return end - began if length >= SILENCE_SECONDS else None


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def hops() -> Iterator[Figure]:
    """The same model in 1 to HOSTS stages, which the memory of its nodes decides."""
    alone = None
    for stages in range(1, HOSTS + 1):
        with Lab([replace(MACHINE, memory_bytes=2 * MACHINE.memory_bytes)] * stages) as lab:
            path = make_model(lab.folder / "tiny.gguf")
            cluster = Cluster(lab, lab.hosts)
            for node in cluster.nodes:
                node.options = ("--memory", lent(path, stages))
            cluster.build()
            assert len(cluster.stages()) == stages, f"{len(cluster.stages())} stages instead of {stages}"
            took = statistics.median(milliseconds_a_token(cluster) for _ in range(ROUNDS))
            tell(f"{stages} stages: {took:.2f} ms a token")
        alone = alone or took
        name = "1-stage" if stages > 1 else None
        yield Figure(f"hops-{stages}-stages", took, "ms/token", alone if stages > 1 else None, name)
        if stages > 1:
            yield Figure(f"hops-{stages}-stages-added-by-a-hop", (took - alone) / stages, "ms")


def lent(path: Path, stages: int) -> str:
    """Memory for one of `stages` even stages of a model, as `cordee up --memory` takes it."""
    shape = model_shape(read_header(path), "bench")
    share = -(-shape.layers // stages)
    bounds = [*range(0, shape.layers, share), shape.layers]
    places = tuple(StagePlace("a", "CPU", *each) for each in pairwise(bounds))
    placement = Placement("bench", CONTEXT, SEQUENCES, places)
    needed = (Planner().stage_bytes(shape, placement, index) for index in range(len(places)))
    return f"{max(needed) * MEMORY_SLACK / MEGABYTE:.0f}MB"


def milliseconds_a_token(cluster: Cluster) -> float:
    """Of one stream through the host's own gateway."""
    stream = Stream(cluster.stages()[0], 0, tokens=TOKENS)
    stream.start()
    finish(stream)
    return 1000 * (stream.pieces[-1][0] - stream.pieces[0][0]) / (TOKENS - 1)


def prefill() -> Iterator[Figure]:
    """A prompt whose pieces overlap over the stages, and one that a host reads alone."""
    alone, together = ([first for first, _ in reading(stages)] for stages in (1, HOSTS))
    took = statistics.median(together)
    yield Figure(f"prefill-{HOSTS}-stages", took, "s", statistics.median(alone), "1-stage")


def prefix() -> Iterator[Figure]:
    """A second prompt that begins like the one before."""
    pairs = reading(HOSTS)
    ratio = statistics.median(second / first for first, second in pairs)
    first = statistics.median(first for first, _ in pairs)
    note = f"{PROMPT_TOKENS} tokens in common, {QUESTION_TOKENS} of its own; median of {len(pairs)} ratios"
    yield Figure("prefix-second-prompt", ratio * first, "s", first, "first-prompt", note)


def reading(stages: int) -> list[tuple[float, float]]:
    """Seconds to the first token of prompts that are new, and of some that begin alike."""
    with Lab([Machine(cpus=HALF_A_CORE)] * stages) as lab:
        model = sized_model(lab.folder / "tiny.gguf", READER, READER_FEED_FORWARD, READER_LAYERS)
        cluster = Cluster(lab, lab.hosts)
        for node in cluster.nodes:
            node.options = ("--memory", lent(model, stages))
        cluster.found(model)
        for node in cluster.nodes[1:]:
            cluster.join(node)
        until(cluster.nodes[-1].offers, "the last node offers the model")
        sizes = ("--context", str(CONTEXT), "--sequences", str(SEQUENCES))
        cluster.nodes[-1].verb("deploy", MODEL, *sizes)
        finish(cluster.started(Stream(cluster.nodes[-1], 0, tokens=1)))
        cluster.settle()
        assert len(cluster.stages()) == stages, f"{len(cluster.stages())} stages instead of {stages}"
        host, draw = cluster.stages()[0], random.Random(SEED)
        pairs: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            system = letters(draw, PROMPT_TOKENS)
            first, second = (until_first(host, system + letters(draw, QUESTION_TOKENS)) for _ in range(2))
            tell(f"{stages} stages: {first:.2f} s, then {second:.2f} s to a first token")
            pairs.append((first, second))
    return pairs


def letters(draw: random.Random, count: int) -> str:
    """A text of so many tokens of the bench's models."""
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=count))


def until_first(node: Node, prompt: str) -> float:
    """Seconds from a prompt to the first token of its answer."""
    stream = Stream(node, 0, tokens=1, prompt=prompt)
    began = time.monotonic()
    stream.start()
    finish(stream)
    return stream.pieces[0][0] - began


def promise() -> Iterator[Figure]:
    """From nothing to a first token; slices travel at RATE."""
    yield Figure(
        "promise-install", INSTALL_SECONDS, "s", note="make setup on two cores, as docs/performance.md has it"
    )
    with Lab([Machine(memory_bytes=4_000_000_000)] * HOSTS) as lab:
        model = sized_model(lab.folder / "wide.gguf", WIDE, FEED_FORWARD, WIDE_LAYERS)
        cluster = Cluster(lab, lab.hosts)
        for host in lab.hosts:
            host.shape(RATE)
        for node in cluster.nodes:
            node.options = ("--memory", lent(model, HOSTS))
        founding = timed(lambda: cluster.found(model))
        nbytes = model.stat().st_size
        note = f"pull and up: the model, {nbytes / 1e6:.0f} MB on its disk, is copied and read once"
        yield Figure("promise-first-node", founding, "s", note=note)
        join = statistics.median([timed(lambda node=node: cluster.join(node)) for node in cluster.nodes[1:]])
        yield Figure("promise-join", join, "s", note="each further machine: invite, join, up")
        tell(f"first node {founding:.1f} s, each further {join:.1f} s")
        until(cluster.nodes[-1].offers, "the last node offers the model")
        before, began = sent_bytes(lab), time.monotonic()
        stream = Stream(cluster.nodes[-1], 0, tokens=1)
        stream.start()
        travelled = until(lambda: is_loading(cluster), "all slices are there")
        sent = sent_bytes(lab) - before
        finish(stream)
        first = time.monotonic() - began - travelled
    note = f"{sent / 1e6:.0f} MB leave the node that has the model, at {sent / travelled / 1e6:.0f} MB/s"
    yield Figure("promise-slices", travelled, "s", note=note)
    yield Figure("promise-load-and-first-token", first, "s")
    # The first node takes what each further one takes, and reads the model.
    yield from extrapolated(nbytes / max(founding - join, POLL_SECONDS), join, sent / travelled, first)


def timed(work: Callable[[], object]) -> float:
    """The seconds that `work` takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def extrapolated(reading: float, join: float, rate: float, first: float) -> Iterator[Figure]:
    """gpt-oss-120b: the first machine has the file, and its slices go from there to the others.

    `reading` and `rate` are bytes/s, `join` and `first` seconds.
    """
    share = LARGE_BYTES / LARGE_MACHINES
    leaving, disk, internet = LARGE_BYTES - share, DISK_BYTES_PER_SECOND, INTERNET_BYTES_PER_SECOND
    steps = {
        "install": (INSTALL_SECONDS, "on all machines at the same time"),
        "read": (LARGE_BYTES / reading, f"{size(LARGE_BYTES)} / {size(reading)}/s, as the first node above"),
        "join": ((LARGE_MACHINES - 1) * join, f"{LARGE_MACHINES - 1} machines x {join:.1f} s"),
        "slices": (leaving / rate, f"{size(leaving)} / {size(rate)}/s, as above"),
        "load": (share / disk + first, f"{size(share)} / {size(disk)}/s (assumed) + {first:.1f} s"),
    }
    for name, (seconds, note) in steps.items():
        yield Figure(f"gpt-oss-120b-{name}", seconds, "s", note=note)
    total = sum(seconds for seconds, _ in steps.values())
    yield Figure("gpt-oss-120b-total", total, "s", note="the sum; the first machine has the file")
    note = f"{size(LARGE_BYTES)} / {size(internet)}/s (assumed), before that"
    yield Figure("gpt-oss-120b-download", LARGE_BYTES / internet, "s", note=note)


def size(nbytes: float) -> str:
    """Bytes in GB or MB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def sized_model(path: Path, width: int, feed_forward: int, layers: int) -> Path:
    """A model with random weights and tensors of that size, whose tokens are bytes."""
    was = tiny.EMBD, tiny.FF
    tiny.EMBD, tiny.FF = width, feed_forward
    try:
        kind = GGMLQuantizationType.Q8_0
        return tiny.make_tiny("llama", path, layers=layers, quantization=kind, tokenizer="bytes")
    finally:
        tiny.EMBD, tiny.FF = was


def is_loading(cluster: Cluster) -> bool:
    """Whether every stage has its slice."""
    placement = cluster.first.placement()
    states = [stage["state"] for stage in placement["stages"]] if placement else []
    return bool(states) and not {"fetching", "unheard"} & set(states)


def sent_bytes(lab: Lab) -> int:
    """What the first host has sent so far."""
    links = json.loads(run("ip", "-n", lab.hosts[0].namespace, "--json", "--stats", "link", "show", "eth0"))
    return links[0]["stats64"]["tx"]["bytes"]


def tell(what: str) -> None:
    """A line of progress."""
    print(f"{time.monotonic() - STARTED:6.0f} s  {what}", file=sys.stderr, flush=True)


def this_machine() -> str:
    """A name for it: its cores, and its processor's name."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", text)
    return f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else 'an unknown processor'}"


def readme(figures: Sequence[Figure]) -> str:
    """The figures as docs/performance.md shows them."""
    by_case = {each.case: each for each in figures}
    losses: list[str] = []
    for what, title in (
        ("notice", "noticed"),
        ("replace", "another placement serves"),
        ("resume", "all go on"),
    ):
        if f"faults-{what}-median" in by_case:
            middle, worst = (by_case[f"faults-{what}-{kind}"] for kind in ("median", "p99"))
            losses.append(f"| {title} | {middle.ours:.1f} | {worst.ours:.1f} | {middle.note} |")
    steps = [each for each in figures if each.case.startswith(("promise", "gpt"))]
    hops = [each for each in figures if each.case.startswith("hops")]
    peers = [each for each in figures if each.case.startswith("cluster4")]
    tables = {
        "| seconds from a fault | median | p99 | |\n|---|---|---|---|": losses,
        "| step | seconds | |\n|---|---|---|": [
            f"| {each.case} | {each.ours:.1f} | {each.note} |" for each in steps
        ],
        "| stages | ms a token |\n|---|---|": [f"| {each.case} | {each.ours:.2f} |" for each in hops],
        "| four hosts | ours | llama.cpp RPC | |\n|---|---|---|---|": [
            f"| {each.case} | {each.ours:.1f} | {each.peer or 0:.1f} | {each.unit} |" for each in peers
        ],
        "| prompt | seconds to the first token | ratio |\n|---|---|---|": [
            f"| {each.case} | {each.ours:.2f} | {each.line()['ratio']} of {each.peer_name} |"
            for each in figures
            if each.case.startswith("pref")
        ],
    }
    return "\n\n".join("\n".join((head, *lines)) for head, lines in tables.items() if lines)


def write(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """Rows of the same columns as CSV, each with the machine's name first."""
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["machine", *rows[0]])
            writer.writeheader()
            writer.writerows({"machine": machine, **row} for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument(
        "--cases",
        default="faults,hops,prefill,prefix,promise",
        help="the cases, separated by commas; peer is one, too",
    )
    parser.add_argument("--peer", type=cluster_peer.peer_folder, help="llama.cpp-rpc=FOLDER")
    parser.add_argument("--json", action="store_true", help="one object a line in place of the tables")
    parser.add_argument("--machine", default=this_machine(), help="name of this machine in the files")
    parser.add_argument("--csv", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(TESTS.parent / "src")
    each_fault: list[Row] = []
    cases: dict[str, Callable[[], Iterator[Figure]]] = {
        "faults": lambda: faults(options.faults, each_fault),
        "hops": hops,
        "prefill": prefill,
        "prefix": prefix,
        "promise": promise,
        "peer": lambda: (Figure(**row) for row in cluster_peer.peer(STARTER, options.peer, tell)),
    }
    figures: list[Figure] = []
    wanted = options.cases.split(",")
    if unknown := set(wanted) - cases.keys():
        parser.error(f"there is no case {', '.join(sorted(unknown))}: choose among {', '.join(cases)}")
    try:
        for name, measure in cases.items():
            if name in wanted:
                tell(name)
                figures += list(measure())
    except Unable as error:
        raise SystemExit(f"bench/cluster.py: {error}") from error
    slug = re.sub(r"[^a-z0-9]+", "-", options.machine.lower()).strip("-")
    path = options.csv or RESULTS / f"cluster-{slug}.csv"
    write(path, options.machine, [{**each.line(), "note": each.note} for each in figures])
    write(path.with_name(f"{path.stem}-faults.csv"), options.machine, each_fault)
    if options.json:
        print("\n".join(json.dumps(each.line()) for each in figures))
    else:
        print(readme(figures))


if __name__ == "__main__":
    main()
