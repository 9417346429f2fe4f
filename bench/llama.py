"""What stages cost: plain libllama, one stage, three stages, and several streams, side by side in one run.

    python bench/llama.py [--model FILE] [--rounds N] [--cases PREFIX] [--json]

Everything runs on this machine with the same build, model and number of threads, in turn within each round,
so that a machine that changes its speed changes it for all. Rates are medians over the rounds, in tokens a
second; a ratio is the median of the rounds' ratios, ours to the peer's. There are two peers: `libllama` with
its default settings, and `libllama-exact` with those of a batch-invariant stage (see
src/cordee/engine/llama/stage.py), so that the price of stages and the price of batch invariance show
separately. A stage costs about the same time whatever it computes, so the cases named deep show the same for
a model whose tokens take DEEP times as long, since it has the starter's layers DEEP times over. (With
K-quants `libllama-exact` keeps ggml's tiled kernels, which our workers switch off: that holds for a whole
process, and the other peer must have its defaults.)
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import numpy as np

from cordee.engine.llama.libllama import usable_cores
from cordee.generation.request import Request, SamplingParams
from cordee.models.store import Store
from cordee.serving.interface import ModelService
from cordee.serving.local_service import LocalService, ServiceConfig
from deep import deepen
from plain import Plain

PROMPT_TOKENS = 32  # before decoding starts
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
CONTEXT = 1024
SEQUENCES = 8
BATCH_ROWS = 512
STREAMS = (1, 4, 8)
DEEP = 4

Rate = Callable[[], Awaitable[float]]
Result = dict[str, str | float]


def token(index: int) -> int:
    """An ordinary token of the starter model's vocabulary; varied, but the same in every run."""
    return 1000 + (index * 7919) % 40_000


class PlainPeer:
    """Plain libllama, driven as directly as Python can: argmax for sampling, no service."""

    def __init__(self, path: Path, *, batch_invariant: bool) -> None:
        self._model = Plain(
            path,
            context=CONTEXT,
            sequences=SEQUENCES,
            batch_rows=BATCH_ROWS,
            threads=usable_cores(),
            batch_invariant=batch_invariant,
        )

    async def decode(self, streams: int) -> float:
        """Tokens per second of `streams` sequences in one batch."""
        logits = np.empty((0, 0), np.float32)
        for sequence in range(streams):
            self._model.trim(sequence, 0)
            rows = [(token(sequence + i), i, sequence, i == PROMPT_TOKENS - 1) for i in range(PROMPT_TOKENS)]
            logits = self._model.decode(rows)
        chosen = [int(logits[0].argmax())] * streams
        start = time.perf_counter()
        for step in range(DECODE_TOKENS):
            rows = [(chosen[i], PROMPT_TOKENS + step, i, True) for i in range(streams)]
            chosen = [int(row.argmax()) for row in self._model.decode(rows)]
        return streams * DECODE_TOKENS / (time.perf_counter() - start)

    async def prefill(self) -> float:
        """Tokens per second of a prompt that is not in the KV cache."""
        self._model.trim(0, 0)
        rows = [(token(i), i, 0, i == PREFILL_TOKENS - 1) for i in range(PREFILL_TOKENS)]
        start = time.perf_counter()
        self._model.decode(rows)
        return PREFILL_TOKENS / (time.perf_counter() - start)


class ServicePeer:
    """The service as users have it: scheduler, worker processes, sampling, text."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._requests = 0

    async def decode(self, streams: int) -> float:
        """Tokens per second of `streams` concurrent streams, from the moment when all decode."""
        results = await asyncio.gather(
            *(self._stream(PROMPT_TOKENS, DECODE_TOKENS + 1) for _ in range(streams))
        )
        start = max(moments[0][0] for moments in results)
        end = max(moments[-1][0] for moments in results)
        before = sum(max(count for moment, count in moments if moment <= start) for moments in results)
        return (sum(moments[-1][1] for moments in results) - before) / (end - start)

    async def prefill(self) -> float:
        """Tokens per second up to the first token of the answer: all that a user waits for."""
        start = time.perf_counter()
        moments = await self._stream(PREFILL_TOKENS, 1)
        return PREFILL_TOKENS / (moments[0][0] - start)

    async def _stream(self, prompt: int, tokens: int) -> list[tuple[float, int]]:
        """When chunks came, and how many tokens there were by then."""
        self._requests += 1
        request = Request(
            id=str(self._requests),
            prompt=tuple(token(self._requests * 131 + i) for i in range(prompt)),
            sampling=SamplingParams(temperature=0, logit_bias=dict.fromkeys(self._end, -100.0)),
            max_tokens=tokens,
        )
        return [
            (time.perf_counter(), chunk.completion_tokens) async for chunk in self._service.generate(request)
        ]

    @property
    def _end(self) -> frozenset[int]:
        return self._service.vocabulary.end_of_generation


Contenders = tuple[PlainPeer, PlainPeer, ServicePeer, ServicePeer]


def cases(contenders: Contenders) -> dict[str, dict[str, Rate]]:
    """Case -> contender -> what measures it once. `ours` comes first."""
    plain, invariant, one, three = contenders
    table: dict[str, dict[str, Rate]] = {}
    for name, ours in (("1-stage", one), ("3-stages", three)):
        for streams in STREAMS:
            case = f"decode-{name}" if streams == 1 else f"decode-{name}-{streams}-streams"
            table[case] = decoding(streams, ours, plain, invariant)
        table[f"prefill-{name}"] = {
            "ours": ours.prefill,
            "libllama": plain.prefill,
            "libllama-exact": invariant.prefill,
        }
    return table


def deep_cases(contenders: Contenders) -> dict[str, dict[str, Rate]]:
    """The same for the deep model; one stream decodes."""
    plain, invariant, one, three = contenders
    return {
        "decode-1-stage-deep": decoding(1, one, plain, invariant),
        "decode-3-stages-deep": decoding(1, three, plain, invariant),
    }


def decoding(streams: int, ours: ServicePeer, plain: PlainPeer, invariant: PlainPeer) -> dict[str, Rate]:
    """A row of the table."""
    runners = {"ours": ours, "libllama": plain, "libllama-exact": invariant}
    return {name: (lambda runner=runner: runner.decode(streams)) for name, runner in runners.items()}


async def measure(table: dict[str, dict[str, Rate]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """All rates, interleaved, after one round of warm-up that does not count."""
    rates: dict[str, dict[str, list[float]]] = {
        case: {name: [] for name in row} for case, row in table.items()
    }
    for number in range(-1, rounds):
        for case, contenders in table.items():
            for name, run in contenders.items():
                rate = await run()
                if number >= 0:
                    rates[case][name].append(rate)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return rates


def lines(rates: dict[str, dict[str, list[float]]]) -> list[Result]:
    """One object for each case and peer."""
    found: list[Result] = []
    for case, contenders in rates.items():
        ours = contenders["ours"]
        for peer in [name for name in contenders if name != "ours"]:
            ratios = [left / right for left, right in zip(ours, contenders[peer], strict=True)]
            found.append(
                {
                    "case": case,
                    "ours": round(statistics.median(ours), 1),
                    "peer": round(statistics.median(contenders[peer]), 1),
                    "peer_name": peer,
                    "unit": "tokens/s",
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
    return found


@contextlib.asynccontextmanager
async def contending(path: Path, store: Store) -> AsyncGenerator[Contenders]:
    """All contenders with a model, ready; closed afterwards."""
    model = store.add_file(path, path.stem)
    config = ServiceConfig(context=CONTEXT, sequences=SEQUENCES)
    services = [await LocalService.start(model, store, stages=stages, config=config) for stages in (1, 3)]
    try:
        one, three = (ServicePeer(service) for service in services)
        yield PlainPeer(path, batch_invariant=False), PlainPeer(path, batch_invariant=True), one, three
    finally:
        for service in services:
            await service.close()


async def run(path: Path, home: Path, rounds: int, prefix: str) -> list[Result]:
    """Measure the cases whose names begin with `prefix`; models are kept in `home`."""
    deep, store = home / "deep.gguf", Store()
    found: list[Result] = []
    for model, table_of in ((path, cases), (deep, deep_cases)):
        if model is deep:
            deepen(path, deep, DEEP)
        async with contending(model, store) as contenders:
            table = table_of(contenders)
            wanted = {case: row for case, row in table.items() if case.startswith(prefix)}
            found += lines(await measure(wanted, rounds))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(sys.prefix) / "share" / "cordee" / "starter.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="only the cases whose name begins so")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cordee-bench-") as home:
        os.environ["CORDEE_HOME"] = home
        results = asyncio.run(run(options.model, Path(home), options.rounds, options.cases))
    if options.json:
        for line in results:
            print(json.dumps(line))
        return
    print(f"{options.model.name}, {usable_cores()} threads, medians of {options.rounds} rounds, tokens/s")
    print(f"{'case':<28}{'ours':>8}{'peer':>8}  {'peer':<16}{'ratio':>6}")
    for line in results:
        print(
            f"{line['case']:<28}{line['ours']:>8}{line['peer']:>8}  {line['peer_name']:<16}{line['ratio']:>6}"
        )


if __name__ == "__main__":
    main()
