"""What compressing the starter model costs: method, group, planes and rotation, and what comes of them.

    python bench/compress.py [--model FILE] [--cases PREFIX] [--files FOLDER] [--json]

Each case compresses the model and reads the package's English text with the result and with the original
(`cordee eval`). The calibration text is the package's, too: a later part of the same article. Bits are of the
layers' weights with their scales: `nominal` without the padding of rows to whole groups, which takes a tenth
of a model as small as this one, and `stored` with it. Files are kept in FOLDER, if one is given. All cases
take about half an hour on two idle cores.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cordee.compress.compress import compress
from cordee.compress.evaluate import evaluate, size_of_model
from cordee.compress.fitter import CompressOptions
from cordee.models.gguf import read_header
from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, ENVIRONMENT

TRIT_BITS, SCALE_BITS = 8 / 5, 16  # five codes in a byte; a scale is a float16
CASES = {
    "absmean-128": CompressOptions("absmean", 128),
    "fit-128": CompressOptions("fit", 128),
    "fit-128-3planes": CompressOptions("fit", 128, 3),
    "gptq-128": CompressOptions("gptq", 128),
    "gptq-64": CompressOptions("gptq", 64),
    "gptq-128-rotated": CompressOptions("gptq", 128, rotate=True),
    "gptq-128-2planes": CompressOptions("gptq", 128, 2),
    "gptq-128-3planes": CompressOptions("gptq", 128, 3),
}


@dataclass(frozen=True)
class Row:
    """One case. Bits are of the layers' weights; the perplexity of the original is beside each."""

    case: str
    bits_nominal: float
    bits_stored: float
    perplexity: float
    perplexity_original: float
    kl: float
    same_top1: float
    bytes: int
    seconds: float


def measured(case: str, model: Path, folder: Path) -> Row:
    """Compress, then read."""
    options, out = CASES[case], folder / f"{case}.gguf"
    text = (files("cordee.compress") / "texts" / "english.txt").read_text(encoding="utf-8")
    began = time.perf_counter()
    compress(model, out, options)
    seconds = time.perf_counter() - began
    found = evaluate(read_header(out), text, original=read_header(model))
    size = size_of_model(read_header(out))
    return Row(
        case,
        options.planes * (TRIT_BITS + SCALE_BITS / options.span),
        size.bits_per_layer_weight,
        found.perplexity,
        found.perplexity_original or 0.0,
        found.kl or 0.0,
        found.same_top1 or 0.0,
        size.nbytes,
        seconds,
    )


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.case:<18}{row.bits_nominal:>8.3f}{row.bits_stored:>8.3f}{row.perplexity:>14.5g}{row.kl:>8.3f}"
        f"{100 * row.same_top1:>8.1f}{row.bytes / 1e6:>8.1f}{row.seconds:>8.0f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(sys.prefix) / "share" / "cordee" / "starter.gguf")
    parser.add_argument("--cases", default="", help="only the cases whose name begins so")
    parser.add_argument("--files", type=Path, help="folder that keeps the compressed models")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT | BATCH_INVARIANT_ENVIRONMENT
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as temporary:
        rows = [
            measured(case, options.model, options.files or Path(temporary))
            for case in CASES
            if case.startswith(options.cases)
        ]
    if options.json:
        for row in rows:
            print(json.dumps(vars(row)))
        return
    print(f"{options.model.name}: perplexity {rows[0].perplexity_original:.2f}" if rows else "no such case")
    print(
        f"{'case':<18}{'nominal':>8}{'stored':>8}{'perplexity':>14}{'KL':>8}{'top 1 %':>8}{'MB':>8}{'s':>8}"
    )
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
