"""What a worker computes: micro-batches in, hidden rows or tokens out; its stage and its samplers."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cordee.engine.llama.kv_state import join_layers, pick_layers
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch, Stage, StageDescription, batch_of_one
from cordee.errors import CordeeError, StageFailed
from cordee.generation.batches import SequenceCopy
from cordee.generation.request import Choice
from cordee.generation.sampling import Sampler, scored
from cordee.worker.acceptance import Drawn, outputs_of, without
from cordee.worker.frames import PAYLOAD_BYTES_MAX
from cordee.worker.grammars import WorkerGrammars
from cordee.worker.messages import (
    HeldSequence,
    LoadStage,
    Opening,
    Recompute,
    Recomputed,
    Rows,
    Run,
    Tokens,
)
from cordee.worker.records import Records

if TYPE_CHECKING:
    from cordee.engine.ternary import TernaryStage
    from cordee.models.embedding import Embedding

Result = tuple[Rows | Tokens, memoryview]


class Compute:
    """A loaded slice and the state of its sequences."""

    def __init__(self, load: LoadStage) -> None:
        """Load the slice.

        Raises:
            CordeeError: it cannot be loaded.
        """
        self._path, self._name = Path(load.path), load.name or Path(load.path).name
        engine = LlamaStage if load.engine == "llama" else _ternary_engine()
        self._stage: Stage = engine(self._path, load.config, is_last=load.is_last, name=self._name)
        self._embedding = None if load.embedding is None else _embedding(Path(load.embedding), self._name)
        self._ends = frozenset(load.ends)
        self._samplers: dict[int, Sampler] = {}
        self._scored: dict[int, Opening] = {}  # streams whose prompt is scored, by sequence
        self._output_rows = load.config.output_rows
        self._held: dict[int, HeldSequence] = {}
        self._sure: dict[int, int] = {}  # positions that are of their stream's log, by sequence
        self._drawn = Drawn()
        self._position_bytes = max(
            self.description.kv_bytes // (load.config.context * load.config.sequences), 1
        )
        self.grammars = WorkerGrammars(self._path, self._name, from_elsewhere=load.identity is not None)
        self.records = Records(self.description.n_embd)
        self._batch_rows = load.config.batch_rows

    @property
    def description(self) -> StageDescription:
        """The description of the loaded stage."""
        return self._stage.description

    def clear(self) -> None:
        """Forget every sequence."""
        self._stage.clear()
        self._samplers.clear()
        self._scored.clear()
        self._held.clear()
        self._sure.clear()
        self._drawn.clear()
        self.records.clear()

    def held(self) -> dict[int, HeldSequence]:
        """What could be transferred to another worker, by sequence: no guesses.

        Nothing of a stage that cannot trim: its state is taken neither apart by layers nor at a length.
        """
        if not self.description.can_trim:
            return {}
        longest = PAYLOAD_BYTES_MAX // self._position_bytes
        sure = {
            sequence: _first_positions(held, min(held.length, self._sure.get(sequence, held.length)))
            for sequence, held in self._held.items()
        }
        return {sequence: held for sequence, held in sure.items() if 0 < held.length <= longest}

    def export(self, sequence: int, length: int, first: int, last: int) -> bytes:
        """The state of a sequence's first `length` positions, of some of the slice's layers.

        What follows those positions is forgotten: with sliding windows, a state is of its last position.

        Raises:
            StageFailed: it is not there, or the engine's state cannot be taken apart.
        """
        held = self._held.get(sequence)
        if held is None or not 0 < length <= held.length:
            raise StageFailed(f"sequence {sequence} has no {length} positions here")
        if length < held.length:
            self._stage.trim(sequence, length)
            self._held[sequence] = _first_positions(held, length)
        return pick_layers(self._stage.export_sequence(sequence), _windowed(self._path), first, last)

    def restore(self, sequence: int, held: HeldSequence, states: Sequence[bytes]) -> None:
        """Take a sequence over: `states` are those of its layers, in order.

        Raises:
            StageFailed: they are not of this slice.
        """
        self._stage.import_sequence(sequence, join_layers(states))
        self._held[sequence] = held
        self._sure.pop(sequence, None)
        self.records.forget(sequence)

    def run(self, message: Rows, payload: memoryview) -> Result:
        """Rows for the next stage with their payload, or tokens.

        Raises:
            StageFailed: the engine refused the micro-batch.
        """
        for copy in message.copies:
            self._copy(copy)
        batch = as_batch(message, payload)
        if self.description.is_last:
            stale = [self._drawn.is_stale(run) for run in message.runs]
            if all(stale):
                return Tokens(message.wiring, message.batch), memoryview(b"")
            if any(stale):
                runs, batch = without(message.runs, stale, batch)
                message = msgspec.structs.replace(message, runs=runs)
        received = batch.inputs
        self._hold(message, received)
        batch = Batch(self._embedded(received), batch.positions, batch.sequences, batch.outputs)
        if self.description.is_last:
            tokens = self._tokens(message, batch)
            drawn = {
                sequence: [choice.token, *(each.token for each in tokens.guessed.get(sequence, ()))]
                for sequence, choice in tokens.choices.items()
            }
            self.records.note(message, received, None, drawn)
            return tokens, memoryview(b"")
        result = self._stage.decode(batch)
        self.records.note(message, received, result, {})
        forwarded = Rows(
            wiring=message.wiring,
            batch=message.batch,
            runs=message.runs,
            opens=message.opens,
            n_embd=result.shape[1],
            steps=message.steps,
            measure=message.measure,
            copies=message.copies,
        )
        return forwarded, result.data.cast("B")

    def recompute(self, message: Recompute, payload: memoryview) -> tuple[Recomputed, memoryview]:
        """Compute one sequence from its start, for a spot check; everything else is forgotten.

        Raises:
            StageFailed: the engine refused the rows.
        """
        self.clear()
        kind = np.float32 if message.n_embd else np.int32
        inputs = np.frombuffer(payload, kind)
        if message.n_embd:
            inputs = inputs.reshape(-1, message.n_embd)
        given: list[np.ndarray] = []
        start = 0
        # One output at most in a batch: the stage has one sequence.
        ends = {position + 1 for position in message.outputs} | {len(inputs)}
        ends |= set(range(self._batch_rows, len(inputs), self._batch_rows))
        for end in sorted(ends):
            rows = inputs[start:end]
            found = self._stage.decode(batch_of_one(self._embedded(rows), start))
            if not self.description.is_last or end - 1 in message.outputs:
                given.append(found)
            start = end
        result = np.concatenate(given)
        return Recomputed(result.shape[1]), result.data.cast("B")

    def goes_round(self, message: Rows, tokens: Tokens) -> bool:
        """Whether a micro-batch may travel again with its tokens."""
        return (
            message.steps > 1
            and not tokens.failures
            and not any(choice.token in self._ends for choice in tokens.choices.values())
        )

    def _embedded(self, inputs: np.ndarray) -> np.ndarray:
        """Rows of the first of several stages, which is given token ids; of others what they are given."""
        return inputs if self._embedding is None else self._embedding.rows(inputs)

    def _copy(self, copy: SequenceCopy) -> None:
        """Let a sequence begin as another one, for another stream."""
        held = self._held.get(copy.source)
        if held is None or held.length < copy.length:
            raise StageFailed(f"sequence {copy.source} has no {copy.length} positions here")
        self._stage.copy(copy.source, copy.sequence, copy.length)
        tokens = None if held.tokens is None else held.tokens[: copy.length]
        self._held[copy.sequence] = HeldSequence(copy.tenure, copy.length, tokens)
        self.records.copy(copy.source, copy.sequence, copy.length, copy.tenure)

    def _hold(self, message: Rows, inputs: np.ndarray) -> None:
        """Trim each sequence to where its run starts, and note what it will hold."""
        start = 0
        for run in message.runs:
            held, first, end = self._held.get(run.sequence), run.first_position, start + run.rows
            if held is not None and first < held.length:
                self._stage.trim(run.sequence, first)
            tokens = None
            if not message.n_embd:
                tokens = held.tokens if held is not None and held.tokens is not None else []
                del tokens[first:]
                tokens += inputs[start:end].tolist()
            self._held[run.sequence] = HeldSequence(run.tenure, first + run.rows, tokens)
            self._sure[run.sequence] = run.sure or first + run.rows
            start = end

    def _tokens(self, message: Rows, batch: Batch) -> Tokens:
        if message.measure:
            return self._measured(message, self._stage.decode(batch))
        tokens = Tokens(message.wiring, message.batch, {}, {}, scores={}, guessed={}, forced={})
        self._open(message, tokens.failures)
        if any(run.score for run in message.runs):
            self._score(message, batch, tokens)
            return tokens
        fits = np.count_nonzero(batch.outputs) <= self._output_rows
        pieces = [batch] if fits else by_outputs(batch, self._output_rows)
        rows = (row for piece in pieces for row in self._stage.decode(piece))
        for run in message.runs:
            own = [next(rows) for _ in range(outputs_of(run))]
            if own:
                self._draw(run, own, tokens)
        for _ in rows:  # where no row is an output, this computes them
            pass
        return tokens

    def _draw(self, run: Run, rows: Sequence[np.ndarray], tokens: Tokens) -> None:
        """Draw the tokens of a run's rows of logits, and what its grammar leaves to come next."""

        def choose(row: np.ndarray) -> int | None:
            choice = self._choose(run.sequence, row, tokens)
            return None if choice is None or choice.token in self._ends else choice.token

        self._drawn.draw(run, rows, choose)
        if run.sequence in tokens.choices and (forced := self._samplers[run.sequence].forced()):
            tokens.forced[run.sequence] = forced

    def _measured(self, message: Rows, logits: np.ndarray) -> Tokens:
        sequences = [run.sequence for run in message.runs if run.output]
        digests = {
            sequence: hashlib.sha256(row.tobytes()).hexdigest()
            for sequence, row in zip(sequences, logits, strict=True)
        }
        return Tokens(message.wiring, message.batch, digests=digests)

    def _open(self, message: Rows, failures: dict[int, str]) -> None:
        """Make the samplers of streams that begin."""
        for sequence, opening in message.opens.items():
            self._scored.pop(sequence, None)
            try:
                self._samplers[sequence] = self._sampler(opening)
            except CordeeError as error:
                failures[sequence] = error.message
        for run in message.runs:
            if run.score and run.sequence in message.opens:
                self._scored[run.sequence] = message.opens[run.sequence]

    def _choose(self, sequence: int, row: np.ndarray, tokens: Tokens) -> Choice | None:
        if sequence in tokens.failures:
            return None
        try:
            choice = self._samplers[sequence].sample(row)
        except CordeeError as error:
            tokens.failures[sequence] = error.message
            return None
        if sequence in tokens.choices:
            tokens.guessed.setdefault(sequence, []).append(choice)
        else:
            tokens.choices[sequence] = choice
        return choice

    def _score(self, message: Rows, batch: Batch, tokens: Tokens) -> None:
        """A micro-batch with scored runs. Each row of logits becomes a few numbers as soon as it is there:
        all of a micro-batch may have 400 MB."""
        wanted = iter(self._wanted(message))
        for piece in by_outputs(batch, self._output_rows):
            for row in self._stage.decode(piece):
                sequence, token = next(wanted)
                if token is None:
                    self._choose(sequence, row, tokens)
                    self._drawn.end(sequence)
                else:
                    top = self._scored[sequence].sampling.top_logprobs or 0
                    tokens.scores.setdefault(sequence, []).append(scored(token, row, top))

    def _wanted(self, message: Rows) -> Iterator[tuple[int, int | None]]:
        """What each row of logits is for, in order: the sequence, and the token to score; None: to choose."""
        for run in message.runs:
            if run.score:
                first = run.first_position + 1
                for token in self._scored[run.sequence].prompt[first : first + run.rows - run.output]:
                    yield run.sequence, token
            if run.output:
                yield run.sequence, None

    def _sampler(self, opening: Opening) -> Sampler:
        grammar = opening.sampling.grammar
        constraint = None if grammar is None else self.grammars.open(grammar, opening.generated)
        return Sampler(opening.sampling, constraint, opening.prompt, opening.generated)


def _first_positions(held: HeldSequence, length: int) -> HeldSequence:
    return HeldSequence(held.tenure, length, None if held.tokens is None else held.tokens[:length])


def again(message: Rows, tokens: Tokens) -> tuple[Rows, memoryview]:
    """The micro-batch's next step: the same streams one position on, with the tokens that they got."""
    runs = tuple(Run(run.sequence, run.first_position + 1, 1, True, run.tenure) for run in message.runs)
    chosen = np.array([tokens.choices[run.sequence].token for run in runs], dtype=np.int32)
    rows = Rows(message.wiring, message.batch, runs, {}, steps=message.steps - 1)
    return rows, chosen.data.cast("B")


def as_batch(message: Rows, payload: memoryview) -> Batch:
    """A message as the engine's batch; its inputs lie in `payload`."""
    runs = message.runs
    positions = np.array([run.first_position for run in runs], dtype=np.int32)
    sequences = np.array([run.sequence for run in runs], dtype=np.int32)
    outputs = np.array([run.output or run.score for run in runs], dtype=bool)
    counts = [run.rows for run in runs]
    if max(counts) > 1:  # else nothing is prefilled, and each run is one row
        ends = np.cumsum(counts)
        total = int(ends[-1])
        positions = np.arange(total, dtype=np.int32) + np.repeat(
            positions - (ends - counts).astype(np.int32), counts
        )
        sequences = np.repeat(sequences, counts)
        last = outputs
        outputs = np.zeros(total, dtype=bool)
        outputs[ends - 1] = last
        for run, end in zip(runs, ends, strict=True):
            if run.score:
                outputs[end - run.rows : end] = True
            elif run.guess:
                outputs[end - outputs_of(run) : end] = True
    if message.n_embd:
        inputs = np.frombuffer(payload, dtype=np.float32).reshape(len(positions), message.n_embd)
    else:
        inputs = np.frombuffer(payload, dtype=np.int32)
    return Batch(inputs, positions, sequences, outputs)


def by_outputs(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in pieces with at most so many outputs each."""
    before = np.cumsum(batch.outputs) - batch.outputs  # outputs before each row
    pieces = before // most
    for number in range(int(pieces[-1]) + 1):
        rows = pieces == number
        yield Batch(batch.inputs[rows], batch.positions[rows], batch.sequences[rows], batch.outputs[rows])


def _ternary_engine() -> "type[TernaryStage]":
    from cordee.engine.ternary import TernaryStage  # most workers have no use for it

    return TernaryStage


def _windowed(path: Path) -> list[bool]:
    """Which layers of a slice have a sliding window."""
    from cordee.models.architectures import Architecture, architecture  # 8 MB that few workers ever need
    from cordee.models.gguf import read_header
    from cordee.models.slices import window_pattern

    header = read_header(path)
    rules = architecture(header.architecture) or Architecture(header.architecture)
    return window_pattern(header, rules) or [False] * header.layers


def _embedding(path: Path, name: str) -> "Embedding":
    from cordee.models.embedding import Embedding  # only the first of several stages needs it
    from cordee.models.gguf import read_header

    return Embedding(read_header(path, name=name))
