"""Golden: a model cut into stages gives exactly the bits that plain libllama gives for the whole model.

For every architecture that the roster certifies (tiny models with random weights) and for the starter model;
in prefill, decode, mixed batches, after a trim and after a replay. These tests are what "certified" means in
architectures.toml.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch, StageConfig, batch_of_one
from cordee.errors import StageFailed, UnsupportedModel
from cordee.models.architectures import roster
from cordee.models.embedding import Embedding
from cordee.models.gguf import Header, read_header
from cordee.models.slices import cut
from plain import Plain, Row
from tiny import ARCHITECTURES, make_tiny

CONFIG = StageConfig(context=256, sequences=4, batch_rows=128, threads=2)
ODD_AND_EVEN = ([0, 9], [0, 4, 9], [0, 5, 9], [0, 3, 5, 9], [0, 2, 6, 9])
# Architectures whose graph counts layers in steps of four.
BOUNDS = {"smollm3": ([0, 12], [0, 4, 12], [0, 4, 8, 12]), "smallthinker": ([0, 17], [0, 8, 17])}
# What most people run; the others are tried where there is more time.
EVERYDAY = {"llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "gpt-oss", "apertus"}


class Cut:
    """Stages one after the other in this process, fed like a pipeline."""

    def __init__(self, header: Header, bounds: list[int], folder: Path, config: StageConfig) -> None:
        self.embedding = Embedding(header) if len(bounds) > 2 else None
        self.stages = []
        for first, last in itertools.pairwise(bounds):
            path = header.path
            if self.embedding is not None:
                path = cut(header, first, last, folder / f"{first}-{last}-{len(bounds)}.gguf").path
            self.stages.append(LlamaStage(path, config, is_last=last == bounds[-1]))

    def decode(self, rows: list[Row]) -> np.ndarray:
        """As Plain.decode."""
        tokens, positions, sequences, outputs = (np.array(column) for column in zip(*rows, strict=True))
        inputs = tokens.astype(np.int32) if self.embedding is None else self.embedding.rows(tokens)
        for stage in self.stages:
            inputs = stage.decode(Batch(inputs, positions, sequences, outputs.astype(bool)))
        return inputs

    def trim(self, sequence: int, length: int) -> None:
        """As Plain.trim."""
        for stage in self.stages:
            stage.trim(sequence, length)

    def close(self) -> None:
        """Free everything."""
        for stage in self.stages:
            stage.close()


def rows_of(tokens: np.ndarray, first: int, sequence: int) -> list[Row]:
    """Consecutive rows of a sequence, the last an output."""
    last = len(tokens) - 1
    return [(int(token), first + i, sequence, i == last) for i, token in enumerate(tokens)]


# A batch as the calls that libllama needs for it (neighbouring sequences with equally many rows share one),
# or a trim: (sequence, length).
Step = list[list[Row]] | tuple[int, int]


def script(vocabulary_size: int) -> list[Step]:
    """The steps that each model runs."""
    draw = np.random.default_rng(7)

    def rows(count: int, first: int, sequence: int) -> list[Row]:
        return rows_of(draw.integers(3, vocabulary_size, count), first, sequence)

    prompt = draw.integers(3, vocabulary_size, 90)
    return [
        [rows_of(prompt, 0, 0)],  # prefill, long enough for tiled attention if that were not prevented
        *[[rows(1, 90 + step, 0)] for step in range(3)],  # decode
        [rows(40, 0, 1)],
        [rows(1, 93, 0) + rows(1, 40, 1)],  # decode together
        [rows(1, 94, 0), rows(17, 41, 1), rows(30, 0, 2), rows(5, 0, 3)],  # mixed: decode, chunk, prefills
        [rows(1, 95, 0), rows(1, 30, 2) + rows(1, 5, 3)],  # mixed: not all are neighbours
        *[[rows(1, 96 + step, 0) + rows(1, 58 + step, 1) + rows(1, 31 + step, 2)] for step in range(2)],
        (0, 50),  # trim and go on
        [rows(20, 50, 0)],
        [rows(1, 70, 0) + rows(1, 60, 1) + rows(1, 33, 2) + rows(1, 6, 3)],
        (0, 0),  # replay in the same shapes
        [rows_of(prompt, 0, 0)],
        [rows(1, 90, 0), rows(1, 7, 3)],
    ]


def run(model: Plain | Cut, steps: list[Step]) -> list[np.ndarray]:
    """The logits of every step that has any. Stages get whole batches, plain libllama call by call."""
    found = []
    for step in steps:
        if isinstance(step, tuple):
            model.trim(*step)
        elif isinstance(model, Plain):
            found.append(np.concatenate([model.decode(call) for call in step]))
        else:
            found.append(model.decode([row for call in step for row in call]))
    model.close()
    return found


def assert_equal_bits(whole: list[np.ndarray], cut_up: list[np.ndarray]) -> None:
    """Same bits, in logits that are not trivially equal."""
    assert len(whole) == len(cut_up)
    for step, (left, right) in enumerate(zip(whole, cut_up, strict=True)):
        assert np.isfinite(left).all() and np.ptp(left) > 0.01, f"step {step} tells nothing"
        assert left.tobytes() == right.tobytes(), f"step {step}: max |Δ| {np.abs(left - right).max()}"
    assert len({logits.tobytes() for logits in whole}) == len(whole) - 1, "only the replay repeats a step"


def test_every_certified_architecture_is_tried_here() -> None:
    certified = {name for name, architecture in roster().items() if architecture.certified}
    assert certified == set(ARCHITECTURES)
    assert certified >= EVERYDAY


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in EVERYDAY else pytest.mark.slow) for each in ARCHITECTURES],
)
def test_cut_anywhere_gives_the_bits_of_the_whole(architecture: str, tmp_path: Path) -> None:
    all_bounds = BOUNDS.get(architecture, ODD_AND_EVEN)
    path = make_tiny(architecture, tmp_path / "whole.gguf", layers=all_bounds[0][-1])
    header = read_header(path)
    plain = Plain(path, context=256, sequences=4, batch_rows=128, threads=2)
    steps = script(plain.vocabulary_size)
    whole = run(plain, steps)
    tried = 0
    for bounds in all_bounds:
        try:
            stages = Cut(header, bounds, tmp_path, CONFIG)
        except UnsupportedModel as refusal:
            assert "sliding" in str(refusal), refusal  # libllama aborts on a slice without a sliding layer
            continue
        assert_equal_bits(whole, run(stages, steps))
        tried += 1
    assert tried >= 2, "whole, and cut at least once"


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [[0, 30], [0, 15, 30], [0, 10, 20, 30], [0, 7, 19, 30]])
def test_starter_cut_anywhere_gives_the_bits_of_the_whole(
    bounds: list[int], starter_path: Path, tmp_path: Path
) -> None:
    plain = Plain(starter_path, context=256, sequences=4, batch_rows=128, threads=2)
    steps = script(40_000)
    assert_equal_bits(run(plain, steps), run(Cut(read_header(starter_path), bounds, tmp_path, CONFIG), steps))


@pytest.mark.slow
def test_starter_is_batch_invariant_beyond_512_tokens(starter_path: Path) -> None:
    """A row's bits do not depend on its batch, also where plain libllama splits the cache by threads."""
    config = StageConfig(context=640, sequences=3, batch_rows=256, threads=2)
    stage = LlamaStage(starter_path, config)
    tokens = np.random.default_rng(3).integers(3, 40_000, 601)
    for first in range(0, 600, 200):
        stage.decode(batch_of_one(tokens[first : min(first + 200, 600)], first, 0))
    for first in range(0, 600, 50):
        stage.decode(batch_of_one(tokens[first : first + 50], first, 1))
    alone = stage.decode(batch_of_one(tokens[600:], 600, 0))
    stage.decode(batch_of_one(tokens[:9], 0, 2))
    stage.trim(0, 600)
    rows = [(int(tokens[600]), 600, sequence, True) for sequence in (0, 1)] + [(5, 9, 2, True)]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    together = stage.decode(
        Batch(columns[0].astype(np.int32), columns[1], columns[2], columns[3].astype(bool))
    )
    stage.close()
    assert together[0].tobytes() == alone[0].tobytes()
    assert together[1].tobytes() == alone[0].tobytes()
    assert together[2].tobytes() != alone[0].tobytes()


def test_rows_may_come_in_any_order_of_sequences(starter_path: Path) -> None:
    stage = LlamaStage(starter_path, StageConfig(context=64, sequences=4, batch_rows=32, threads=2))
    draw = np.random.default_rng(5)
    prompts = draw.integers(3, 40_000, (4, 5))
    alone = [stage.decode(batch_of_one(prompts[sequence], 0, sequence)) for sequence in range(4)]
    stage.clear()
    order = [2, 0, 3, 1]
    together = stage.decode(
        Batch(
            inputs=np.concatenate([prompts[sequence] for sequence in order]).astype(np.int32),
            positions=np.tile(np.arange(5), 4),
            sequences=np.repeat(order, 5),
            outputs=np.tile(np.arange(5) == 4, 4),
        )
    )
    stage.close()
    for row, sequence in zip(together, order, strict=True):
        assert row.tobytes() == alone[sequence][0].tobytes()


def test_a_sequence_moves_to_another_stage_of_the_slice(tmp_path: Path) -> None:
    path = make_tiny("qwen3", tmp_path / "whole.gguf")
    left, right = (LlamaStage(path, CONFIG) for _ in range(2))
    tokens = np.arange(10, 60)
    left.decode(batch_of_one(tokens, 0, 1))
    right.import_sequence(3, left.export_sequence(1))
    expected = left.decode(batch_of_one([7], 50, 1))
    assert right.decode(batch_of_one([7], 50, 3)).tobytes() == expected.tobytes()
    with pytest.raises(StageFailed, match="another slice"):
        right.import_sequence(2, b"nonsense" * 10)
    left.close()
    right.close()


def test_a_refused_batch_leaves_the_sequence_as_it_was(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path / "whole.gguf")
    config = StageConfig(context=256, sequences=1, batch_rows=128, threads=1)
    stage = LlamaStage(path, config)
    stage.decode(batch_of_one(range(3, 103)))
    stage.decode(batch_of_one(range(3, 103), 100))
    with pytest.raises(StageFailed, match="context of 256"):
        stage.decode(batch_of_one(range(3, 103), 200))
    after = stage.decode(batch_of_one([5], 200))
    stage.trim(0, 0)
    stage.decode(batch_of_one(range(3, 103)))
    stage.decode(batch_of_one(range(3, 103), 100))
    assert stage.decode(batch_of_one([5], 200)).tobytes() == after.tobytes()
    stage.close()
