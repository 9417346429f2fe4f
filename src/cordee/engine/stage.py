"""The `Stage` protocol: what every engine implements, and all that the rest of the package knows of one.

A *slice* is a contiguous range of a model's layers in a GGUF of its own; a *stage* is a loaded slice with its
KV cache. The first stage of a pipeline takes token ids or embedded rows, every other stage takes the hidden
rows of the one before; the last gives logits, every other gives hidden rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cordee.cluster.memory import output_rows

EngineName = Literal["llama", "ternary"]
CacheName = Literal["f16", "int8"]


@dataclass(frozen=True)
class Batch:
    """Rows for one decode call; rows of one sequence are in order of position.

    `inputs` is (n,) int32 token ids or (n, n_embd) float32 rows; `positions` and `sequences` are (n,)
    int32; `outputs` is (n,) bool and marks the rows whose logits the last stage gives.
    """

    inputs: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    outputs: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class StageConfig:
    """How a slice is loaded.

    `context` is the KV cache's size in tokens for each of `sequences` sequences. `batch_invariant` asks for
    arithmetic that gives a row the same bits whatever else is in its batch, where the engine can; it costs
    some speed. `threads` None means all cores that this process may use. `devices` are names as the engine's
    `devices()` lists them; none means the CPU alone. `kv_cache` "int8" halves the cache's memory at a small
    loss (native/FORMAT.md); only the ternary engine has it.
    """

    context: int = 4096
    sequences: int = 8
    batch_rows: int = 512
    threads: int | None = None
    devices: tuple[str, ...] = ()
    batch_invariant: bool = True
    kv_cache: CacheName = "f16"

    @property
    def output_rows(self) -> int:
        """The most rows of a decode call that may be outputs of the last stage."""
        return output_rows(self)


@dataclass(frozen=True)
class StageDescription:
    """Facts about a loaded stage. Bytes are measured by the engine, not estimated.

    Where `can_trim` is off the state of a sequence is not kept by position (mamba, rwkv, hybrids with
    attention): it can go on or be forgotten, but not be shortened.
    """

    architecture: str
    layers: int
    is_last: bool
    n_embd: int
    n_vocab: int
    build: str
    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    threads: int
    devices: tuple[str, ...]
    can_trim: bool = True


class Stage(Protocol):
    """A loaded slice. Not thread-safe: one owner calls it, one call at a time."""

    description: StageDescription

    def decode(self, batch: Batch) -> np.ndarray:
        """Run the rows; give (n, n_embd) float32 rows, or on the last stage (outputs, n_vocab) logits.

        At most `StageConfig.output_rows` rows may be outputs.

        Raises:
            StageFailed: the engine refused the batch; the KV cache is as before the call.
        """
        ...

    def trim(self, sequence: int, length: int) -> None:
        """Keep only the first `length` positions of a sequence (0 forgets it).

        Raises:
            StageFailed: it is longer, `length` is not 0, and the stage cannot trim: it is forgotten.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a sequence begin as another one: it holds its first `length` positions, and nothing else.

        For stages that can trim. It is complete once other rows have been decoded.

        Raises:
            StageFailed: `source` is shorter, or the same sequence.
        """

    def clear(self) -> None:
        """Forget every sequence."""

    def export_sequence(self, sequence: int) -> bytes:
        """The KV state of a sequence, for `import_sequence` on a stage of the same slice and build."""
        ...

    def import_sequence(self, sequence: int, state: bytes) -> None:
        """Restore what `export_sequence` gave."""

    def close(self) -> None:
        """Free native memory; the stage is unusable afterwards."""


def batch_of_one(tokens: Sequence[int] | np.ndarray, first_position: int = 0, sequence: int = 0) -> Batch:
    """A batch of consecutive rows of one sequence, the last of them an output.

    `tokens` is (n,) token ids or (n, n_embd) float32 rows.
    """
    inputs = np.asarray(tokens)
    if inputs.ndim == 1:
        inputs = inputs.astype(np.int32)
    rows = len(inputs)
    outputs = np.zeros(rows, dtype=bool)
    outputs[-1] = True
    positions = np.arange(first_position, first_position + rows, dtype=np.int32)
    return Batch(inputs, positions, np.full(rows, sequence, dtype=np.int32), outputs)
