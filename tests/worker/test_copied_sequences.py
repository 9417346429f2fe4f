"""What a worker holds of a sequence that began as a copy can be taken over like one that was read."""

from pathlib import Path

import numpy as np
import pytest

from cordee.engine.stage import StageConfig
from cordee.errors import StageFailed
from cordee.generation.batches import SequenceCopy
from cordee.worker.compute import Compute
from cordee.worker.messages import HeldSequence, LoadStage, Rows, Run
from tiny import make_tiny

TOKENS = list(range(10, 50))
CONFIG = StageConfig(context=64, sequences=3, batch_rows=64, threads=1)


def send(compute: Compute, sequence: int, first: int, tokens: list[int], *copies: SequenceCopy) -> None:
    run = Run(sequence, first, len(tokens), False, tenure=sequence + 5)
    message = Rows("w", 1, (run,), {}, copies=copies)
    compute.run(message, np.array(tokens, np.int32).data.cast("B"))


def test_a_copied_sequence_is_handed_over_like_one_that_was_read(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path / "whole.gguf", layers=3)
    compute = Compute(LoadStage(str(path), CONFIG, is_last=True))
    send(compute, 0, 0, TOKENS[:30])
    send(compute, 0, 30, TOKENS[30:])
    send(compute, 1, 0, TOKENS[:30])
    send(compute, 1, 30, [5, 6, 7])
    send(compute, 2, 0, [9] * 50)
    send(compute, 2, 30, TOKENS[30:], SequenceCopy(1, 2, 30, tenure=7))
    held = compute.held()
    assert held[2] == HeldSequence(7, len(TOKENS), TOKENS)
    assert held[1] == HeldSequence(6, 33, [*TOKENS[:30], 5, 6, 7])
    successor = Compute(LoadStage(str(path), CONFIG, is_last=True))
    states = []
    for sequence in (0, 2):  # where a state was exported is in it
        successor.clear()
        successor.restore(0, held[sequence], [compute.export(sequence, 40, 0, 3)])
        states.append(successor.export(0, 40, 0, 3))
    assert states[0] == states[1]
    with pytest.raises(StageFailed, match="has no 40 positions"):
        send(compute, 2, 40, [1], SequenceCopy(1, 2, 40, tenure=8))
