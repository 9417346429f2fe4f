"""What a worker computes: micro-batches in, hidden rows or tokens out; its stage, and who samples on it."""

import hashlib
from pathlib import Path

import numpy as np

from cordee.engine.llama import LlamaStage
from cordee.engine.stage import Batch, Stage, StageDescription
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.generation.grammar import GrammarTokenizer
from cordee.generation.request import Choice
from cordee.generation.sampling import Sampler
from cordee.node.messages import Load, Opening, Rows, Run, Tokens

Result = tuple[Rows | Tokens, memoryview]


class Compute:
    """A loaded slice and the state of its sequences."""

    def __init__(self, load: Load) -> None:
        """Load the slice.

        Raises:
            CordeeError: it cannot be loaded.
        """
        self._path = Path(load.path)
        engine = LlamaStage if load.engine == "llama" else _ternary_engine()
        self._stage: Stage = engine(self._path, load.config, is_last=load.is_last)
        self._embedding = None if load.embedding is None else _embedding(Path(load.embedding))
        self._ends = frozenset(load.ends)
        self._samplers: dict[int, Sampler] = {}
        self._lengths: dict[int, int] = {}  # tokens that each sequence holds
        self._tokenizer: GrammarTokenizer | None = None

    @property
    def description(self) -> StageDescription:
        """What the stage says of itself."""
        return self._stage.description

    def clear(self) -> None:
        """Forget every sequence."""
        self._stage.clear()
        self._samplers.clear()
        self._lengths.clear()

    def run(self, message: Rows, payload: memoryview) -> Result:
        """Rows for the next stage with their payload, or tokens.

        Raises:
            StageFailed: the engine refused the micro-batch.
        """
        self._trim(message)
        batch = as_batch(message, payload)
        if self._embedding is not None:
            batch = Batch(self._embedding.rows(batch.inputs), batch.positions, batch.sequences, batch.outputs)
        result = self._stage.decode(batch)
        if self.description.is_last:
            return self._sample(message, result), memoryview(b"")
        forwarded = Rows(
            placement=message.placement,
            batch=message.batch,
            runs=message.runs,
            opens=message.opens,
            n_embd=result.shape[1],
            steps=message.steps,
            measure=message.measure,
        )
        return forwarded, memoryview(result).cast("B")

    def goes_round(self, message: Rows, tokens: Tokens) -> bool:
        """Whether a micro-batch may travel again with its tokens."""
        return (
            message.steps > 1
            and not tokens.failures
            and not any(choice.token in self._ends for choice in tokens.choices.values())
        )

    def _trim(self, message: Rows) -> None:
        """Make each sequence as long as its next run expects it."""
        for run in message.runs:
            if run.first_position < self._lengths.get(run.sequence, 0):
                self._stage.trim(run.sequence, run.first_position)
            self._lengths[run.sequence] = run.first_position + run.rows

    def _sample(self, message: Rows, logits: np.ndarray) -> Tokens:
        sequences = [run.sequence for run in message.runs if run.output]
        if message.measure:
            digests = {
                sequence: hashlib.sha256(row.tobytes()).hexdigest()
                for sequence, row in zip(sequences, logits, strict=True)
            }
            return Tokens(message.placement, message.batch, digests=digests)
        choices: dict[int, Choice] = {}
        failures: dict[int, str] = {}
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                if sequence in message.opens:
                    self._samplers[sequence] = self._sampler(message.opens[sequence])
                choices[sequence] = self._samplers[sequence].sample(row)
            except CordeeError as error:
                failures[sequence] = error.message
        return Tokens(message.placement, message.batch, choices, failures)

    def _sampler(self, opening: Opening) -> Sampler:
        if opening.sampling.grammar is not None and self._tokenizer is None:
            self._tokenizer = GrammarTokenizer(Vocabulary(self._path))  # slow, and most streams need none
        return Sampler(opening.sampling, self._tokenizer, opening.prompt, opening.generated)


def again(message: Rows, tokens: Tokens) -> Result:
    """The micro-batch's next step: the same streams one position on, with the tokens that they got."""
    runs = tuple(Run(run.sequence, run.first_position + 1, 1, True) for run in message.runs)
    chosen = np.array([tokens.choices[run.sequence].token for run in runs], dtype=np.int32)
    rows = Rows(message.placement, message.batch, runs, {}, steps=message.steps - 1)
    return rows, memoryview(chosen).cast("B")


def as_batch(message: Rows, payload: memoryview) -> Batch:
    """The engine's batch behind a message; its inputs lie in `payload`."""
    runs = message.runs
    positions = np.array([run.first_position for run in runs], dtype=np.int32)
    sequences = np.array([run.sequence for run in runs], dtype=np.int32)
    outputs = np.array([run.output for run in runs], dtype=bool)
    counts = [run.rows for run in runs]
    if max(counts) > 1:  # else nobody prefills, and every run is its row
        ends = np.cumsum(counts)
        total = int(ends[-1])
        positions = np.arange(total, dtype=np.int32) + np.repeat(
            positions - (ends - counts).astype(np.int32), counts
        )
        sequences = np.repeat(sequences, counts)
        last = outputs
        outputs = np.zeros(total, dtype=bool)
        outputs[ends - 1] = last
    if message.n_embd:
        inputs = np.frombuffer(payload, dtype=np.float32).reshape(len(positions), message.n_embd)
    else:
        inputs = np.frombuffer(payload, dtype=np.int32)
    return Batch(inputs, positions, sequences, outputs)


def _ternary_engine():
    from cordee.engine.ternary import TernaryStage  # most workers have no use for it

    return TernaryStage


def _embedding(path: Path):
    from cordee.models.embedding import Embedding  # only the first of several stages needs it
    from cordee.models.gguf import read_header

    return Embedding(read_header(path))
