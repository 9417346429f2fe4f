"""A sequence that begins as a copy of another one gives the bits of one that read the same tokens itself."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch, Stage, StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import StageFailed
from cordee.models.embedding import Embedding
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from ternary_models import make_ternary
from tiny import ARCHITECTURES, make_tiny

CONFIG = StageConfig(context=128, sequences=4, batch_rows=64, threads=1)
FEW = ("llama", "qwen3", "gemma3", "gpt-oss", "apertus")
# Architectures whose graph counts layers in steps of four, or whose first layers must stay together.
BOUNDS = {"deepseek2": [0, 5, 9], "smollm3": [0, 8, 12], "smallthinker": [0, 8, 17]}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(3, 200, 60)]


class Cut:
    """A model's stages in this process."""

    def __init__(self, path: Path, bounds: list[int], engine: type, config: StageConfig) -> None:
        header = read_header(path)
        self.embedding = Embedding(header)
        self.stages: list[Stage] = []
        for first, last in itertools.pairwise(bounds):
            slice_path = cut(header, first, last, path.with_name(f"{first}-{last}.gguf")).path
            self.stages.append(engine(slice_path, config, is_last=last == bounds[-1]))

    def decode(self, tokens: list[int], first: int, sequence: int) -> bytes:
        """The logits after these tokens."""
        batch = batch_of_one(self.embedding.rows(np.array(tokens, np.int32)), first, sequence)
        for stage in self.stages:
            rows = stage.decode(batch)
            batch = Batch(rows, batch.positions, batch.sequences, batch.outputs)
        return rows.tobytes()

    def copy(self, source: int, target: int, length: int) -> None:
        for stage in self.stages:
            stage.copy(source, target, length)

    def trim(self, sequence: int, length: int) -> None:
        for stage in self.stages:
            stage.trim(sequence, length)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def check_copied(path: Path, bounds: list[int], engine: type, config: StageConfig = CONFIG) -> None:
    """Copies of a sequence in the middle of its answer, over others, and of copies."""
    model = Cut(path, bounds, engine, config)
    model.decode(TOKENS[:37], 0, 0)
    expected = [model.decode(TOKENS[37:50], 37, 0), model.decode(TOKENS[50:51], 50, 0)]
    model.decode(TOKENS[:37], 0, 1)
    model.decode(TOKENS[20:50], 37, 1)  # the source goes on in another way
    model.decode(TOKENS[10:60], 0, 2)
    model.copy(1, 2, 37)
    assert model.decode(TOKENS[37:50], 37, 2) == expected[0]
    model.copy(2, 3, 37)  # a copy of a copy, to where nothing was
    assert model.decode(TOKENS[50:51], 50, 2) == expected[1]
    assert model.decode(TOKENS[37:50], 37, 3) == expected[0]
    model.trim(1, 0)  # a copy has nothing to do with where it came from
    model.decode(TOKENS[:9], 0, 1)
    assert model.decode(TOKENS[50:51], 50, 3) == expected[1]
    for stage in model.stages:
        for source, target, length in ((1, 0, 10), (0, 0, 5)):
            with pytest.raises(StageFailed, match="has no"):
                stage.copy(source, target, length)
    model.trim(0, 50)
    assert model.decode(TOKENS[50:51], 50, 0) == expected[1], "what is refused changes nothing"
    model.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in sorted(ARCHITECTURES)],
)
def test_a_copied_sequence_gives_the_bits_of_one_that_was_read(name: str, tmp_path: Path) -> None:
    bounds = BOUNDS.get(name, [0, 4, 9])
    path = make_tiny(name, tmp_path / "whole.gguf", layers=bounds[-1])
    check_copied(path, bounds, LlamaStage)


@pytest.mark.parametrize("kv_cache", ["f16", "int8"])
def test_a_copied_ternary_sequence_gives_the_bits_of_one_that_was_read(kv_cache: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    make_ternary("bitnet", path, layers=9)
    config = StageConfig(context=128, sequences=4, batch_rows=64, threads=1, kv_cache=kv_cache)
    check_copied(path, [0, 4, 9], TernaryStage, config)
