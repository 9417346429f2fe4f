"""Fake workers. A token depends on every row that each stage of the pipeline holds of the stream.

A worker keeps for each sequence the digests of what it holds, position by position. A row travels with its
token and the digest of the stages before; a stage that holds something else spoils it. The last stage draws
the token from the digest and from its sampler's own history. In an undisturbed run all of these are equal,
and the token is `next_token` of the stream's log.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cordee.cluster.goals import StageSpec
from cordee.cluster.reconcile import WorkerState, WorkerStatus
from cordee.generation.batches import MicroBatch, SequenceCopy
from cordee.generation.request import Choice
from cordee.worker import messages
from cordee.worker.acceptance import Drawn, outputs_of

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
    tenure: int = 0
    guess: tuple[int, ...] = ()

    @property
    def head(self) -> messages.Run:
        """As real stages take it."""
        first, rows = self.first_position, len(self.rows)
        return messages.Run(self.sequence, first, rows, self.sample, self.tenure, guess=self.guess)


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
    choices: dict[int, list[Choice]]  # more than one where guesses were right


def rows_of(batch: MicroBatch) -> list[Run]:
    """A scheduler's micro-batch as the host sends it."""
    runs: list[Run] = []
    for segment in batch.segments:
        log = batch.opens.get(segment.sequence)
        opens = (digest_of([*log.prompt, *log.generated]), log.sampling.seed) if log is not None else None
        rows = [(token, -1) for token in segment.tokens]
        guess = tuple(segment.tokens[len(segment.tokens) - segment.guesses :])
        first = segment.first_position
        runs.append(Run(segment.sequence, first, rows, segment.sample, opens, segment.tenure, guess))
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
    drawn: Drawn = field(default_factory=Drawn)

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
        self.drawn.clear()

    def unwire(self) -> None:
        """A link broke."""
        if self.state == "wired":
            self.state, self.wiring = "loaded", ""

    def compute(self, rows: Rows) -> tuple[list[Run], dict[int, list[Choice]]]:
        """Take rows in; give the rows for the next stage, and tokens where this is the last."""
        runs: list[Run] = []
        choices: dict[int, list[Choice]] = {}
        is_last = self.index == self.stages - 1
        for copy in rows.copies:
            self.cache[copy.sequence] = self.cache.get(copy.source, [])[: copy.length]
        for run in rows.runs:
            if is_last and self.drawn.is_stale(run.head):
                continue
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
            runs.append(dataclasses.replace(run, rows=out))
            if run.sample and is_last:
                choices[run.sequence] = self._draw(run, [digest for _, digest in out])
        return runs, choices

    def _draw(self, run: Run, digests: list[int]) -> list[Choice]:
        if run.opens is not None:
            self.samplers[run.sequence] = run.opens
        found: list[Choice] = []

        def choose(digest: int) -> int | None:
            history, seed = self.samplers.get(run.sequence, (1, 1))
            token = draw(digest, history, seed)
            self.samplers[run.sequence] = (self.remember(history, token, bool(found)), seed)
            found.append(Choice(token))
            return None if token in ENDS else token

        self.drawn.draw(run.head, digests[len(digests) - outputs_of(run.head) :], choose)
        return found

    @staticmethod
    def remember(history: int, token: int, guessed: bool) -> int:
        """The sampler's history with a token more; `guessed`: drawn behind a guess."""
        return step(history, token)
