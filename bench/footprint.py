"""What a large model takes in a process of its own: seconds to load, peak memory, tokens a second.

    python bench/footprint.py [--shape 7b] [--context 512] [--cache f16] [--models FOLDER] [--json]

The model's file, of random weights, is made in FOLDER (and kept) or in a temporary one, and read once, so
that it is in memory as on a machine that has run it before. `load` ends with the logits of a first token, for
which all weights have been read. `peak` is the process's largest resident memory (VmHWM, with Python and the
mapped file) when the whole context is full. `decode` goes on after a short prompt: with one thread by its CPU
time, with two by the clock.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from make_model import SHAPES, laid_out, make_model

LAYOUTS = ("trit2", "trit5")
PROMPT_ROWS, DECODE_ROWS, BATCH_ROWS = 16, 8, 128
CHUNK_BYTES = 1 << 24


def measure(path: Path, threads: int, context: int, cache: str) -> dict[str, float]:
    """Figure by name, measured in this process: seconds, GB, tokens/s."""
    start = time.perf_counter()
    config = StageConfig(context=context, sequences=1, batch_rows=BATCH_ROWS, threads=threads, kv_cache=cache)
    stage = TernaryStage(path, config)
    stage.decode(batch_of_one([0]))
    load_seconds = time.perf_counter() - start
    stage.decode(batch_of_one(np.arange(1, PROMPT_ROWS), 1))
    now = time.thread_time if threads == 1 else time.perf_counter
    start = now()
    for position in range(PROMPT_ROWS, PROMPT_ROWS + DECODE_ROWS):
        stage.decode(batch_of_one([position], position))
    rate = DECODE_ROWS / (now() - start)
    stage.decode(batch_of_one(np.arange(PROMPT_ROWS + DECODE_ROWS, context), PROMPT_ROWS + DECODE_ROWS))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"load": load_seconds, "peak": int(status["VmHWM"].split()[0]) * 1024 / 1e9, "decode": rate}


def child(path: Path, threads: int, context: int, cache: str) -> dict[str, float]:
    """What `measure` gives in a new process."""
    options = ["--threads", str(threads), "--context", str(context), "--cache", cache]
    command = [sys.executable, __file__, "--measure", path, *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def results(folder: Path, shape: str, context: int, cache: str) -> list[dict[str, str | float]]:
    """All figures of a shape."""
    found: list[dict[str, str | float]] = []
    for layout in LAYOUTS:
        path = folder / f"{shape}-{layout}.gguf"
        if not path.exists():
            make_model(path, laid_out(SHAPES[shape], layout))
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass
        one, two = (child(path, threads, context, cache) for threads in (1, 2))
        figures = (
            (f"load-{shape}", max(one["load"], two["load"]), "s"),
            (f"peak-{shape}", max(one["peak"], two["peak"]), "GB"),
            (f"decode-{shape}-1t", one["decode"], "tokens/s"),
            (f"decode-{shape}-2t", two["decode"], "tokens/s"),
        )
        found += [
            {"case": case, "layout": layout, "ours": float(f"{value:.3g}"), "unit": unit}
            for case, value, unit in figures
        ]
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--models", type=Path, help="folder that keeps the models")
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--cache", choices=("f16", "int8"), default="f16")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.threads, options.context, options.cache)))
        return
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as temporary:
        folder = options.models or Path(temporary)
        found = results(folder, options.shape, options.context, options.cache)
    for result in found:
        print(
            json.dumps(result) if options.json else "{case:<14}{layout:<8}{ours:>8} {unit}".format(**result)
        )


if __name__ == "__main__":
    main()
