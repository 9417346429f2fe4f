"""The ternary engine beside llama.cpp's TQ2_0 and TQ1_0, interleaved in one run on this machine.

    python bench/ternary.py [--shape 2b4t] [--layers N] [--models FOLDER] [--rounds N] [--cases PREFIX]
                            [--i2s LIBRARY] [--json]

Models of random weights are made in FOLDER (and kept) or in a temporary one. `decode-weights` is the model
with a vocabulary of 64: the layers alone, with attention over a short context and all norms. `decode` and
`prefill-512` are the whole model, both with a head of 6 bits a weight: ours has one scale for each row (6.0
bits in total), llama.cpp's Q6_K one for 16 weights (6.6). Of the shapes of Ternary-Bonsai embedding and head
are ternary on both sides, and the peers are Q2_0 and TQ2_0. `batch-N` is N rows of one sequence at once, in
rows a second: what guessing tokens ahead can build on. `decode-avx2` compares our AVX2 kernels to the peer
as it is (its ternary dots use no more than AVX2). `roof` compares decoding to plain reading of as many bytes:
there `ours` and `peer` are GB/s, elsewhere tokens/s. `dot` is the kernels alone beside bitnet.cpp's, in
billions of weights a second, with LIBRARY (ternary_i2s.py says how to build it). One thread is timed by its
CPU time, which other programs on the machine do not lengthen much; two are timed by the clock. Figures are
medians of the rounds; a ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

import ternary_i2s
from cordee.convert.ternary_file import TernaryModel
from cordee.engine.stage import Batch, StageConfig
from cordee.engine.ternary import TernaryStage, library
from cordee.models.gguf import BlockType, TensorType
from make_model import SHAPES, make_model, with_layers
from ternary_peer import LlamaPeer, write_peer

PEERS: dict[str, TensorType] = {
    "llama.cpp-TQ2_0": GGMLQuantizationType.TQ2_0,
    "llama.cpp-TQ1_0": GGMLQuantizationType.TQ1_0,
}
# Of shapes with scales of groups: the type that their makers' files have, and the same other one.
GROUP_PEERS: dict[str, TensorType] = {
    "llama.cpp-Q2_0": BlockType.Q2_0,
    "llama.cpp-TQ2_0": GGMLQuantizationType.TQ2_0,
}
LAYOUTS = ("trit2", "trit5")
HEAD = "int6"
WEIGHTS_VOCABULARY = 64
PROMPT_ROWS, DECODE_ROWS, PREFILL_ROWS = 16, 8, 512
# libgomp's threads spin for some milliseconds after their work; ours must not be timed meanwhile.
SETTLE_SECONDS = 0.05
LINE_BYTES = 64  # of a cache


class Ours:
    """A model on the ternary engine."""

    def __init__(self, path: Path, threads: int, rows: int, kernels: str | None = None) -> None:
        config = StageConfig(context=1024, sequences=1, batch_rows=rows, threads=threads)
        self._stage = TernaryStage(path, config, kernels=kernels)
        self.weights_bytes = self._stage.description.weights_bytes

    def close(self) -> None:
        """Free the model."""
        self._stage.close()

    def run(self, rows: int, position: int) -> None:
        """See LlamaPeer.run."""
        self._stage.trim(0, position)
        outputs = np.arange(rows) == rows - 1
        tokens = (np.arange(rows) % 60).astype(np.int32)
        zeros = np.zeros(rows, dtype=np.int32)
        self._stage.decode(Batch(tokens, np.arange(position, position + rows), zeros, outputs))


Runner = Ours | LlamaPeer
Result = dict[str, str | float]


def clock(threads: int) -> Callable[[], float]:
    """The clock to time with, in seconds."""
    return time.thread_time if threads == 1 else time.perf_counter


def rate(runner: Runner, rows: int, threads: int) -> float:
    """Tokens per second: of decoding one by one after a short prompt, or (`rows` > 1) of one prompt."""
    time.sleep(SETTLE_SECONDS)
    now = clock(threads)
    if rows > 1:
        start = now()
        runner.run(rows, 0)
        return rows / (now() - start)
    runner.run(PROMPT_ROWS, 0)
    start = now()
    for step in range(DECODE_ROWS):
        runner.run(1, PROMPT_ROWS + step)
    return DECODE_ROWS / (now() - start)


def leave_cache(path: Path) -> None:
    """Drop a file that was just written from the page cache, so that it is read back from the disk.

    As it was written it lies in small pages, which our decoding reads a fifth more slowly than the large ones
    that a mapped file is read into.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Models:
    """The files that the cases need, made at their first use."""

    def __init__(self, folder: Path, shape: str, layers: int | None) -> None:
        self._folder = folder
        self._shape = with_layers(SHAPES[shape], layers)
        self._name = f"{shape}-{layers}-layers" if layers else shape
        self.peers = GROUP_PEERS if self._shape.scale_columns else PEERS

    def ours(self, layout: str, weights_only: bool) -> Path:
        """The path of our file."""
        path = self._path(layout, weights_only)
        if not path.exists():
            model = replace(self._model(weights_only), layout=layout)
            make_model(path, replace(model, head=layout) if model.embedding == "codes" else model)
            leave_cache(path)
        return path

    def peer(self, name: str, weights_only: bool) -> Path:
        """The path of llama.cpp's file."""
        path = self._path(name, weights_only)
        if not path.exists():
            write_peer(path, self._model(weights_only), self.peers[name])
            leave_cache(path)
        return path

    def _model(self, weights_only: bool) -> TernaryModel:
        model = self._shape
        if model.embedding != "codes":
            model = replace(model, embedding=GGMLQuantizationType.Q8_0, head=HEAD)
        return replace(model, n_vocab=WEIGHTS_VOCABULARY) if weights_only else model

    def _path(self, name: str, weights_only: bool) -> Path:
        return self._folder / f"{self._name}-{'weights-' if weights_only else f'{HEAD}-'}{name}.gguf"


def cases() -> dict[str, tuple[bool, int, int, str | None]]:
    """Case -> (weights only, rows, threads, kernels)."""
    return {
        "decode-weights-1t": (True, 1, 1, None),
        "decode-weights-2t": (True, 1, 2, None),
        "decode-1t": (False, 1, 1, None),
        "decode-2t": (False, 1, 2, None),
        "decode-avx2-1t": (True, 1, 1, "avx2"),
        "batch-4-1t": (True, 4, 1, None),
        "batch-8-1t": (True, 8, 1, None),
        "prefill-512-1t": (False, PREFILL_ROWS, 1, None),
        "prefill-512-2t": (False, PREFILL_ROWS, 2, None),
    }


def compare(models: Models, case: str, rounds: int) -> list[Result]:
    """One case: each of our layouts compared to each peer."""
    weights_only, rows, threads, kernels = cases()[case]
    most = max(rows, PROMPT_ROWS)
    runners: dict[str, Runner] = {
        layout: Ours(models.ours(layout, weights_only), threads, most, kernels) for layout in LAYOUTS
    }
    runners |= {name: LlamaPeer(models.peer(name, weights_only), threads, most) for name in models.peers}
    found: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(-1, rounds):
        for name, runner in runners.items():
            value = rate(runner, rows, threads)
            if number >= 0:
                found[name].append(value)
        print(f"{case}: round {number + 1} of {rounds}", file=sys.stderr)
    for runner in runners.values():
        runner.close()
    return [
        line(case, layout, found[layout], peer, found[peer], "tokens/s")
        for layout in LAYOUTS
        for peer in models.peers
    ]


def line(case: str, layout: str, ours: list[float], peer_name: str, peer: list[float], unit: str) -> Result:
    """One result; `ours` and `peer` are the rounds' figures."""
    ratios = [left / right for left, right in zip(ours, peer, strict=True)]
    return {
        "case": case,
        "layout": layout,
        "ours": round(statistics.median(ours), 2),
        "peer": round(statistics.median(peer), 2),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": round(statistics.median(ratios), 3),
    }


def roof(models: Models, threads: int, rounds: int) -> list[Result]:
    """Bytes of weights per second, of decoding and of plain reading."""
    results: list[Result] = []
    now = clock(threads)
    for layout in LAYOUTS:
        ours = Ours(models.ours(layout, True), threads, PROMPT_ROWS)
        nbytes = ours.weights_bytes // (256 * threads) * 256
        memory = np.ones(nbytes * threads + LINE_BYTES, np.uint8)  # in large pages where Linux has them
        address = -(-memory.ctypes.data // LINE_BYTES) * LINE_BYTES
        read, decoded = list[float](), list[float]()
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(rounds):
                start = now()
                if threads == 1:
                    library().ternary_memory_read(address, nbytes)
                else:
                    starts = [address + nbytes * number for number in range(threads)]
                    list(pool.map(library().ternary_memory_read, starts, [nbytes] * threads))
                read.append(nbytes * threads / (now() - start) / 1e9)
                decoded.append(rate(ours, 1, threads) * ours.weights_bytes / 1e9)
        ours.close()
        results.append(line(f"roof-{threads}t", layout, decoded, "plain reading", read, "GB/s"))
    return results


def measure(folder: Path, shape: str, layers: int | None, rounds: int, prefix: str) -> list[Result]:
    """All cases whose name begins with `prefix`."""
    models = Models(folder, shape, layers)
    results: list[Result] = []
    for case, (_, rows, _, _) in cases().items():
        if case.startswith(prefix):
            results += compare(models, case, rounds if rows == 1 else max(rounds // 3, 1))
    for threads in (1, 2):
        if f"roof-{threads}t".startswith(prefix):
            results += roof(models, threads, rounds)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="2b4t")
    parser.add_argument("--models", type=Path, help="folder that keeps the models")
    parser.add_argument("--layers", type=int, help="fewer layers: for prompts beside a slow peer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default="", help="only the cases whose name begins so")
    parser.add_argument("--i2s", type=Path, metavar="LIBRARY", help="bitnet.cpp's dot: see ternary_i2s.py")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as temporary:
        folder = options.models or Path(temporary)
        results = measure(folder, options.shape, options.layers, options.rounds, options.cases)
    if options.i2s:
        results += [line(*found) for found in ternary_i2s.measure(options.i2s, options.rounds, options.cases)]
    if options.json:
        for result in results:
            print(json.dumps(result))
        return
    print(f"{options.shape}, medians of {options.rounds} rounds")
    print(f"{'case':<20}{'layout':<8}{'ours':>9}{'peer':>9}  {'peer':<18}{'ratio':>6}")
    for result in results:
        print("{case:<20}{layout:<8}{ours:>9}{peer:>9}  {peer_name:<18}{ratio:>6}".format(**result))


if __name__ == "__main__":
    main()
