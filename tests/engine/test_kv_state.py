"""A sequence's KV state moves to stages of another cut: the next logits have the same bits."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from cordee.engine.llama.kv_state import join_layers, pick_layers
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch, Stage, StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import StageFailed
from cordee.models.architectures import Architecture, architecture
from cordee.models.embedding import Embedding
from cordee.models.gguf import read_header
from cordee.models.slices import cut, window_pattern
from ternary_models import make_ternary
from tiny import ARCHITECTURES, make_tiny

CONFIG = StageConfig(context=128, sequences=3, batch_rows=64, threads=1)
FROM, TO = [0, 4, 9], [0, 2, 7, 9]
FEW = ("llama", "qwen3", "gemma3", "gpt-oss", "apertus")
STEPPED = {
    "deepseek2": ([0, 5, 9], [0, 3, 7, 9]),
    "smollm3": ([0, 8, 12], [0, 4, 12]),
    "smallthinker": ([0, 8, 17], [0, 12, 17]),
}


class Cut:
    """A model's stages in this process, and which layers have windows."""

    def __init__(self, path: Path, bounds: list[int], engine: type, folder: Path) -> None:
        header = read_header(path)
        rules = architecture(header.architecture) or Architecture(header.architecture)
        self.windowed = window_pattern(header, rules) or [False] * header.layers
        self.bounds = bounds
        self.embedding = Embedding(header)
        self.stages: list[Stage] = []
        for first, last in itertools.pairwise(bounds):
            slice_path = cut(header, first, last, folder / f"{first}-{last}.gguf").path
            self.stages.append(engine(slice_path, CONFIG, is_last=last == bounds[-1]))

    def decode(self, tokens: list[int], first: int, sequence: int) -> bytes:
        """The logits after these tokens."""
        batch = batch_of_one(self.embedding.rows(np.array(tokens, np.int32)), first, sequence)
        for stage in self.stages:
            rows = stage.decode(batch)
            batch = Batch(rows, batch.positions, batch.sequences, batch.outputs)
        return rows.tobytes()

    def layers(self, sequence: int, first: int, last: int) -> list[bytes]:
        """The state of these layers, from the stages that have them."""
        found = []
        for stage, (low, high) in zip(self.stages, itertools.pairwise(self.bounds), strict=True):
            start, end = max(first, low), min(last, high)
            if start < end:
                state = stage.export_sequence(sequence)
                found.append(pick_layers(state, self.windowed[low:high], start - low, end - low))
        return found

    def close(self) -> None:
        """Free everything."""
        for stage in self.stages:
            stage.close()


def check_moved(path: Path, engine: type, folder: Path, bounds: tuple[list[int], list[int]]) -> None:
    """Move a sequence of 40 tokens from one cut to another, and continue there."""
    for index in (0, 1):
        (folder / str(index)).mkdir()
    old, new = (Cut(path, bounds[index], engine, folder / str(index)) for index in (0, 1))
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, 200, 43)]
    old.decode(tokens[:40], 0, 1)
    old.decode(tokens[5:25], 0, 2)
    for stage, (first, last) in zip(new.stages, itertools.pairwise(new.bounds), strict=True):
        stage.import_sequence(2, join_layers(old.layers(1, first, last)))
    assert new.decode(tokens[40:42], 40, 2) == old.decode(tokens[40:42], 40, 1)
    assert new.decode(tokens[42:], 42, 2) == old.decode(tokens[42:], 42, 1)
    old.close()
    new.close()


@pytest.mark.parametrize("name", FEW)
def test_a_sequence_moves_between_cuts(name: str, tmp_path: Path) -> None:
    path = make_tiny(name, tmp_path / "whole.gguf", layers=9)
    check_moved(path, LlamaStage, tmp_path, (FROM, TO))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(FEW)))
def test_a_sequence_of_any_architecture_moves_between_cuts(name: str, tmp_path: Path) -> None:
    bounds = STEPPED.get(name, (FROM, TO))
    path = make_tiny(name, tmp_path / "whole.gguf", layers=bounds[0][-1])
    check_moved(path, LlamaStage, tmp_path, bounds)


def test_a_ternary_sequence_moves_between_cuts(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    make_ternary("bitnet", path, layers=9)
    check_moved(path, TernaryStage, tmp_path, (FROM, TO))


def test_what_is_not_a_state_is_refused(tmp_path: Path) -> None:
    stage = LlamaStage(make_tiny("gemma3", tmp_path / "whole.gguf"), CONFIG)
    stage.decode(batch_of_one(range(5, 45)))
    state = stage.export_sequence(0)
    stage.trim(0, 39)
    shorter = stage.export_sequence(0)
    stage.close()
    windowed = [True] * 5 + [False]
    assert join_layers([state]) == state
    for nonsense in (b"", b"CTKV", b"nonsense" * 20, state[:-1], state + b"0", state[:100]):
        with pytest.raises(StageFailed):
            pick_layers(nonsense, windowed, 0, 6)
    for pattern, first, last in (([False] * 6, 0, 6), (windowed, 4, 7), (windowed, 3, 3)):
        with pytest.raises(StageFailed):
            pick_layers(state, pattern, first, last)
    with pytest.raises(StageFailed, match="different positions"):
        join_layers([pick_layers(state, windowed, 0, 3), pick_layers(shorter, windowed, 3, 6)])
