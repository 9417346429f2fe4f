"""Fake workers. A token depends on every row that each stage of the pipeline holds of the stream.

A worker keeps for each sequence the digests of what it holds, position by position. A row travels with its
token and the digest of the stages before; a stage that holds something else spoils it. The last stage draws
the token from the digest and from its sampler's own history. In an undisturbed run all of these are equal,
and the token is `next_token` of the stream's log.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cordee.cluster.goals import StageSpec
from cordee.cluster.reconcile import WorkerState, WorkerStatus
from cordee.generation.batches import MicroBatch, SequenceCopy
from cordee.generation.request import Choice

VOCABULARY = 1000
END = 0  # ends an answer: tokens below 40 do, so an answer has 25 on average
ENDS = frozenset(range(40))


def step(digest: int, token: int) -> int:
    """The digest of a sequence with one more token."""
    return zlib.crc32(token.to_bytes(4, "little"), digest)


def digest_of(tokens: Sequence[int]) -> int:
    """The digest of a whole sequence."""
    digest = 0
    for token in tokens:
        digest = step(digest, token)
    return digest


def draw(digest: int, sampler: int, seed: int) -> int:
    """The token after a sequence; `sampler` is the digest of the sampler's history."""
    return step(digest ^ (sampler * 3), seed) % VOCABULARY


def solo(prompt: Sequence[int], seed: int, max_tokens: int, context: int) -> list[int]:
    """The undisturbed answer, without the token that ends it."""
    digest = digest_of(prompt)
    answer: list[int] = []
    while len(answer) < max_tokens and len(prompt) + len(answer) < context:
        token = draw(digest, digest, seed)
        if token in ENDS:
            break
        answer.append(token)
        digest = step(digest, token)
    return answer


@dataclass(frozen=True)
class Run:
    """Rows of one sequence: (token, digest so far) each, and what a new sampler starts from."""

    sequence: int
    first_position: int
    rows: list[tuple[int, int]]
    sample: bool
    opens: tuple[int, int] | None  # (digest of the log, seed)


@dataclass(frozen=True)
class Rows:
    """A micro-batch on its way to stage `index` of a wiring."""

    wiring: str
    index: int
    endpoint: str
    batch: int
    runs: list[Run]
    copies: tuple[SequenceCopy, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """A micro-batch's result on its way to the host."""

    wiring: str
    batch: int
    choices: dict[int, Choice]


def rows_of(batch: MicroBatch) -> list[Run]:
    """A scheduler's micro-batch as the host sends it."""
    runs: list[Run] = []
    for segment in batch.segments:
        log = batch.opens.get(segment.sequence)
        opens = (digest_of([*log.prompt, *log.generated]), log.sampling.seed) if log is not None else None
        rows = [(token, -1) for token in segment.tokens]
        runs.append(Run(segment.sequence, segment.first_position, rows, segment.sample, opens))
    return runs


@dataclass(eq=False)
class Process:
    """A worker process: the truth about it, and its KV cache."""

    id: str
    endpoint: str
    spec: StageSpec
    state: WorkerState = "loading"
    wiring: str = ""
    wirings: frozenset[str] = frozenset()
    index: int = 0  # of its stage in the wiring
    stages: int = 0  # of the wiring
    downstream: str = ""
    cache: dict[int, list[int]] = field(
        default_factory=dict[int, list[int]]
    )  # digests by sequence and position
    samplers: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    def worker(self) -> WorkerStatus:
        """As the controller sees it."""
        return WorkerStatus(self.id, self.spec, self.state, self.endpoint, self.wiring, self.wirings)

    def wire(self, wiring: str, index: int, stages: int, downstream: str) -> None:
        """Join a wiring, with an empty cache."""
        self.state, self.wiring, self.downstream = "wired", wiring, downstream
        self.wirings |= {wiring}
        self.index, self.stages = index, stages
        self.cache.clear()
        self.samplers.clear()

    def unwire(self) -> None:
        """A link broke."""
        if self.state == "wired":
            self.state, self.wiring = "loaded", ""

    def compute(self, rows: Rows) -> tuple[list[Run], dict[int, Choice]]:
        """Take rows in; give the rows for the next stage, and tokens where this is the last."""
        runs: list[Run] = []
        choices: dict[int, Choice] = {}
        for copy in rows.copies:
            self.cache[copy.sequence] = self.cache.get(copy.source, [])[: copy.length]
        for run in rows.runs:
            held = self.cache.setdefault(run.sequence, [])
            del held[run.first_position :]
            while len(held) < run.first_position:
                held.append(-7)  # a row that never came
            out: list[tuple[int, int]] = []
            for token, upstream in run.rows:
                digest = step(held[-1] & 0xFFFFFFFF if held else 0, token)
                held.append(digest)
                spoilt = upstream not in (-1, digest)
                out.append((token, step(digest, upstream & 0xFFFFFFFF) if spoilt else digest))
            runs.append(Run(run.sequence, run.first_position, out, run.sample, run.opens))
            if run.sample and self.index == self.stages - 1:
                choices[run.sequence] = self._draw(run, out[-1][1])
        return runs, choices

    def _draw(self, run: Run, digest: int) -> Choice:
        if run.opens is not None:
            self.samplers[run.sequence] = run.opens
        history, seed = self.samplers.get(run.sequence, (1, 1))
        token = draw(digest, history, seed)
        self.samplers[run.sequence] = (step(history, token), seed)
        return Choice(token)
