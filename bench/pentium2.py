"""How fast a Pentium II of 350 MHz would run our program, and the same model as plain float loops.

    python bench/pentium2.py [--cases PREFIX] [--model FILE ...] [--json] [--csv FILE]

Nothing is timed: instructions are counted under qemu-user, and a trace of one token drives a timing model of
the processor, its caches and its memory (bench/pentium2_model). So figures are the same on every machine and
in every run.

Shapes have random weights; trained models are those in the package, or those that `--model` names. A case is
SHAPE-POSITION: the token at that position of a text, with everything (attention over all tokens before it,
the choice of the next token).
`tokens/s` assumes memory with a latency of 55 clocks and 28 clocks a line, `tokens/s, slow memory` 70 and 45;
a processor with nothing else to do; and the model in memory.

The peer (bench/pentium2_model/floats.c) does the same in single precision, compiled as well as gcc can (-O3
-ffast-math).
The cases called calibration compare the timing model to a real machine: there `ours` is what it says of the
float loops compiled without optimisation, and `peer` what llama98.c, such a program built without any flag,
was reported to do on a Pentium II 350 with 128 MB (39.31 tokens/s on stories260K, 1.03 on stories15M).
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from cordee.convert.pentium2 import LAYOUT
from cordee.engine.vocabulary import Vocabulary
from cordee.models.gguf import read_header
from make_model import SHAPES, make_model
from pentium2_model.machine import HERE, NORMAL, PESSIMISTIC, Call, Machine, MissingTool, run

ROOT = Path(__file__).parents[1]
PROGRAM = Path("..", "build", "pentium2", "cordee-tiny")  # as native/Makefile calls it
POSITIONS = (4, 128, 250)
TARGET = ("-m32", "-march=pentium2", "-mmmx", "-mno-sse", "-mfpmath=387", "-static", "-no-pie")
BUILDS = {"float-O3": ("-O3", "-ffast-math"), "float-O0": ("-O0",)}
PEER = "float-O3"
# Published of llama98.c on a real machine, for a story of unknown length: its middle.
MEASURED = {"260k": 39.31, "15m": 1.03}
MEASURED_POSITION = 128
# (shape of bench/make_model.py, vocabulary, positions); a token of the largest takes the peer a minute.
RANDOM = (
    ("260k", 512, POSITIONS),
    ("15m", 32_000, POSITIONS),
    ("15m", 4096, POSITIONS),
    ("110m", 32_000, (128,)),
)
STORY = "Once upon a time there was a small cat who lived in a big red house. "
FIELDS: tuple[str, ...] = ("case", "ours", "peer", "peer_name", "unit", "ratio")

Result = dict[str, str | float]  # value by field


@dataclass(frozen=True)
class Shape:
    """A model to measure, as both programs need it."""

    name: str
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    model: Path
    positions: tuple[int, ...]

    @property
    def peer_arguments(self) -> list[str]:
        """The shape as the float program takes it."""
        numbers = (
            self.dim,
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads,
            self.vocabulary,
            self.context,
        )
        return [str(number) for number in numbers]


@dataclass(frozen=True)
class Token:
    """One token on the modelled machine, with either memory."""

    normal: Call
    slow: Call


def figures(ours: Token, peer: Token) -> Iterator[tuple[str, float, float]]:
    """(unit, ours, the peer's)."""
    for unit, field in (
        ("instructions/token", "instructions"),
        ("L1 misses/token", "l1_misses"),
        ("DRAM lines/token", "dram_lines"),
    ):
        yield unit, getattr(ours.normal, field), getattr(peer.normal, field)
    yield "tokens/s", round(ours.normal.per_second, 2), round(peer.normal.per_second, 2)
    yield "tokens/s, slow memory", round(ours.slow.per_second, 2), round(peer.slow.per_second, 2)


def line(case: str, ours: float, peer: float, peer_name: str, unit: str) -> Result:
    """One result."""
    return dict(zip(FIELDS, (case, ours, peer, peer_name, unit, round(ours / peer, 4)), strict=True))


class Bench:
    """Programs and models, in the folder of a Machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._program = shutil.copy(ROOT / "native" / PROGRAM, machine.folder)  # the same for all cases
        # Where asm/ is, which gcc looks for elsewhere when it compiles for i686 (as in native/Makefile).
        includes = ("-idirafter", f"/usr/include/{run(['gcc', '-print-multiarch']).strip()}")
        compiler = ("gcc", "-std=gnu11", *TARGET, *includes)
        for name, flags in BUILDS.items():
            run([*compiler, *flags, "-o", machine.folder / name, HERE / "floats.c", "-lm"])

    def shapes(self, models: list[Path]) -> Iterator[Shape]:
        """The random ones, each made when it is its turn, and the trained ones."""
        for name, vocabulary, positions in RANDOM:
            label = name if vocabulary == SHAPES[name].n_vocab else f"{name}-vocab{vocabulary}"
            path = self._machine.folder / f"{label}.gguf"
            make_model(path, replace(SHAPES[name], layout=LAYOUT, n_vocab=vocabulary))
            yield shape_of(label, path, positions)
        for path in models:
            yield shape_of(path.stem, path, POSITIONS)

    def ours(self, shape: Shape, position: int) -> Token:
        """Our program: the first token that it writes after reading `position` tokens."""
        command = [self._program, shape.model, beginning(shape.model, position), "-n", "3", "--greedy"]
        return self._token(command, position + 1)

    def peer(self, shape: Shape, position: int, build: str = PEER) -> Token:
        """The float program, which begins one position before."""
        program = self._machine.folder / build
        return self._token([program, *shape.peer_arguments, str(position - 1), "3"], 2)

    def _token(self, command: list[str | Path], call: int) -> Token:
        self._machine.counts(command, call)
        return Token(*self._machine.time(command, call, NORMAL, PESSIMISTIC))


def trained_models() -> list[Path]:
    """The models in the package that are made for a Pentium II."""
    found = sorted((ROOT / "src" / "cordee").rglob("*.gguf"))
    return [path for path in found if read_header(path).text("cordee.ternary.layout", "") == LAYOUT]


def shape_of(name: str, path: Path, positions: tuple[int, ...]) -> Shape:
    """The shape of a model file, to be measured at `positions`."""
    header = read_header(path)
    heads = header.count(".attention.head_count")
    return Shape(
        name=name,
        dim=header.count(".embedding_length"),
        hidden=header.count(".feed_forward_length"),
        layers=header.layers,
        heads=heads,
        kv_heads=header.count(".attention.head_count_kv", heads),
        vocabulary=header.count(".vocab_size"),
        context=header.count(".context_length"),
        model=path,
        positions=tuple(position for position in positions if position < header.count(".context_length") - 1),
    )


def beginning(model: Path, tokens: int) -> str:
    """A text of `tokens` tokens, counting the one that begins every text."""
    with closing(Vocabulary(model)) as vocabulary:
        ids = vocabulary.tokenize(STORY * tokens, add_bos=True)
        for end in range(1, len(ids)):
            text = vocabulary.detokenize(ids[:end]).decode(errors="ignore").strip()
            if len(vocabulary.tokenize(text, add_bos=True)) == tokens:
                return text
    raise RuntimeError(f"{model}: no text of {tokens} tokens")


def calibration(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The timing model compared to a real machine."""
    token = bench.peer(shape, MEASURED_POSITION, "float-O0")
    for unit, call in (("tokens/s", token.normal), ("tokens/s, slow memory", token.slow)):
        case, ours = f"calibration-{shape.name}", round(call.per_second, 2)
        yield line(case, ours, MEASURED[shape.name], "llama98.c, real machine", unit)


def measure(bench: Bench, models: list[Path], prefix: str) -> Iterator[Result]:
    """All cases whose names begin with `prefix`."""
    for shape in bench.shapes(models):
        if shape.name in MEASURED and f"calibration-{shape.name}".startswith(prefix):
            yield from calibration(bench, shape)
        for position in shape.positions:
            case = f"{shape.name}-{position}"
            if case.startswith(prefix):
                found = figures(bench.ours(shape, position), bench.peer(shape, position))
                for unit, ours, peer in found:
                    yield line(case, ours, peer, PEER, unit)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default="", help="only the cases whose name begins so")
    parser.add_argument("--model", type=Path, nargs="*", help="trained models")
    parser.add_argument("--csv", type=Path, help="write the results there, too")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    subprocess.run(["make", "-C", ROOT / "native", PROGRAM], check=True, stdout=sys.stderr)
    models = trained_models() if options.model is None else options.model
    results: list[Result] = []
    try:
        with Machine() as machine:
            for result in measure(Bench(machine), models, options.cases):
                results.append(result)
                row = "{case:<20}{unit:<24}{ours:>12}{peer:>14}  {peer_name:<24}{ratio:>8}"
                print(json.dumps(result) if options.json else row.format(**result), flush=True)
    except MissingTool as missing:
        sys.exit(f"bench/pentium2.py: something is missing here; this line installs it: {missing}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
