"""What `cordee bench` measures: one stage with the whole model in this process, and this machine's memory.

There is no scheduler and no other process: the figures are the engine's alone. Rates are medians of repeated
runs.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cordee.cluster.demand import SizeRequest
from cordee.engine.stage import Batch, Stage, StageConfig, batch_of_one
from cordee.errors import SetupNeeded
from cordee.machine import sizing
from cordee.machine.devices import memory_speed
from cordee.machine.energy import Meter
from cordee.machine.memory import memory
from cordee.models.fit import own_context
from cordee.models.gguf import Header, engine_of
from cordee.models.shape import model_shape

PREFILL_ROWS = (16, 128, 512)
DECODE_BATCHES = (1, 2, 4, 8)
PROMPT_ROWS, DECODE_STEPS = 16, 16
CONTEXT = max(*PREFILL_ROWS, PROMPT_ROWS + DECODE_STEPS)
# A case is repeated for this long and this often, after a warm-up; a warm-up that takes longer is the result.
CASE_SECONDS = 2.0
ROUNDS_MIN = 3
# A case that would take longer, by the rate of the one before it, is left out.
CASE_SECONDS_MAX = 60.0
# Larger than caches; less where little memory is free.
ROOF_BYTES, ROOF_PART = 256 << 20, 1 / 4
ROOF_SECONDS, ROOF_PASSES = 2.0, 4
ROOF_STEP_BYTES = 256  # ternary_memory_read takes multiples of it
LINE_BYTES = 64  # of a cache

Report = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One result; with a `peer`, compared to the value that `peer_name` reached."""

    case: str
    value: float
    unit: str
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class StageOptions:
    """How to load the stage, as the command line says; `name` is what people call the model."""

    name: str
    threads: int | None
    devices: tuple[str, ...]
    batch_invariant: bool


def figures(header: Header, wanted: StageOptions, report: Report) -> Iterator[Figure]:
    """All figures of a model, one by one; `report` gets what is being measured, and what is left out.

    Raises:
        DoesNotFit, BadRequest, UnsupportedModel, BadModelFile, StageFailed: it cannot be loaded.
    """
    config = _config(header, wanted)
    report("loading")
    began = time.perf_counter()
    stage = _load(header, config)
    try:
        yield Figure("load", time.perf_counter() - began, "s")
        runs = _Runs(stage, config.context)
        runs.prefill(1)
        yield Figure("first-token", time.perf_counter() - began, "s")
        yield from _prefills(runs, config.context, report)
        yield from _decodes(runs, config.sequences, report)
        if stage.description.devices == ("CPU",):
            report("measuring roof")
            yield _roof(runs, header, stage.description.threads)
    finally:
        stage.close()


class _Reader:
    """Plain reading from memory by `threads` threads; `name` says what reads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._nbytes = int(min(ROOF_BYTES, memory().available_bytes * ROOF_PART))
        try:
            from cordee.engine.ternary import library

            self._read, self.name = library().ternary_memory_read, "plain reading"
        except SetupNeeded:
            self._read, self.name = None, "reading by numpy"
            return
        self._part = self._nbytes // threads // ROOF_STEP_BYTES * ROOF_STEP_BYTES
        # Pages that nobody wrote to are not read from memory; numpy asks Linux for huge ones.
        self._memory = np.ones(self._part * threads + LINE_BYTES, np.uint8)

    def speed(self) -> float:
        """Bytes a second, the best of some passes."""
        if self._read is None:
            return memory_speed(self._nbytes, self._threads)
        address = -(-self._memory.ctypes.data // LINE_BYTES) * LINE_BYTES
        starts = [address + self._part * number for number in range(self._threads)]
        best = 0.0
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in range(ROOF_PASSES):
                began = time.perf_counter()
                list(pool.map(self._read, starts, [self._part] * self._threads))
                best = max(best, self._part * self._threads / (time.perf_counter() - began))
        return best


@dataclass(frozen=True)
class _Run:
    """`tokens` in `seconds`; `joules` None where the machine does not tell."""

    tokens: int
    seconds: float
    joules: float | None


class _Runs:
    """Single runs on a loaded stage."""

    def __init__(self, stage: Stage, context: int) -> None:
        self._stage = stage
        self._prompt = min(PROMPT_ROWS, context // 2)
        self._steps = min(DECODE_STEPS, context - self._prompt)
        self._meter = Meter()

    def tokens(self, count: int, first: int = 0) -> np.ndarray:
        """Tokens of the vocabulary in order, (count,) int32: which they are makes no difference."""
        return (np.arange(first, first + count) % self._stage.description.n_vocab).astype(np.int32)

    def prefill(self, rows: int) -> _Run:
        """One prompt."""
        self._stage.clear()
        return self._timed([batch_of_one(self.tokens(rows))])

    def decode(self, answers: int) -> _Run:
        """Some tokens of `answers` answers at a time, each after a short prompt."""
        self._stage.clear()
        for sequence in range(answers):
            self._stage.decode(batch_of_one(self.tokens(self._prompt), sequence=sequence))
        numbers, outputs = np.arange(answers, dtype=np.int32), np.ones(answers, dtype=bool)
        return self._timed(
            [
                Batch(
                    self.tokens(answers, step), np.full_like(numbers, self._prompt + step), numbers, outputs
                )
                for step in range(self._steps)
            ]
        )

    def _timed(self, batches: Sequence[Batch]) -> _Run:
        self._meter.watts()
        began = time.perf_counter()
        for batch in batches:
            self._stage.decode(batch)
        seconds = time.perf_counter() - began
        watts = self._meter.watts()
        joules = None if watts is None else watts * seconds
        return _Run(sum(map(len, batches)), seconds, joules)


def _config(header: Header, wanted: StageOptions) -> StageConfig:
    """The most sequences of CONTEXT tokens that fit; fewer tokens where the model was made for fewer."""
    context = min(CONTEXT, own_context(header) or CONTEXT)
    devices = ("CPU",) if engine_of(header) == "ternary" else wanted.devices
    return sizing.stage_config(
        header,
        SizeRequest(context, None, context, usual_sequences=max(DECODE_BATCHES)),
        name=wanted.name,
        threads=wanted.threads,
        devices=devices,
        batch_invariant=wanted.batch_invariant,
    )


def _load(header: Header, config: StageConfig) -> Stage:
    if engine_of(header) == "ternary":
        from cordee.engine.ternary import TernaryStage

        return TernaryStage(header.path, config)
    from cordee.engine.llama.stage import LlamaStage

    return LlamaStage(header.path, config)


def _prefills(runs: _Runs, context: int, report: Report) -> Iterator[Figure]:
    rate = None
    for rows in PREFILL_ROWS:
        if rows > context:
            report(f"prefill-{rows} is left out: the model's context is {context} tokens")
        elif rate and rows / rate > CASE_SECONDS_MAX:
            report(f"prefill-{rows} is left out: it would take {rows / rate:.0f} s")
        else:
            report(f"measuring prefill-{rows}")
            rate, _ = _repeated(lambda rows=rows: runs.prefill(rows))
            yield Figure(f"prefill-{rows}", rate, "tokens/s")


def _decodes(runs: _Runs, sequences: int, report: Report) -> Iterator[Figure]:
    for batch in DECODE_BATCHES:
        if batch > sequences:
            report(f"decode-{batch} is left out: memory is short")
            continue
        report(f"measuring decode-{batch}")
        rate, joules = _repeated(lambda batch=batch: runs.decode(batch))
        yield Figure(f"decode-{batch}", rate, "tokens/s")
        if joules is not None:
            yield Figure(f"energy-{batch}", joules, "J/token")


def _roof(runs: _Runs, header: Header, threads: int) -> Figure:
    """Weights that one answer reads a second, compared to plain reading.

    The two are measured in turn, since a machine's speed changes; the ratio is the median of the rounds'.
    """
    shape, reader = model_shape(header, ""), _Reader(threads)
    nbytes = sum(shape.active_bytes) + shape.active_head_bytes
    rounds: list[tuple[float, float]] = []
    ends = time.monotonic() + ROOF_SECONDS
    while len(rounds) < ROUNDS_MIN or time.monotonic() < ends:
        run = runs.decode(1)
        rounds.append((nbytes * run.tokens / run.seconds / 1e9, reader.speed() / 1e9))
    ours, peer = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(decoded / read for decoded, read in rounds)
    return Figure("roof", ours, "GB/s", peer, reader.name, ratio)


def _repeated(run: Callable[[], _Run]) -> tuple[float, float | None]:
    """Median tokens/s of a run, and median joules for each token where the machine tells."""
    took = [run()]
    if took[0].seconds < CASE_SECONDS:
        took.clear()
        while len(took) < ROUNDS_MIN or sum(each.seconds for each in took) < CASE_SECONDS:
            took.append(run())
    joules = [each.joules / each.tokens for each in took if each.joules is not None]
    rate = statistics.median(each.tokens / each.seconds for each in took)
    return rate, statistics.median(joules) if joules else None
