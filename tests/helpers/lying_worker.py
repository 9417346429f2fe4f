"""A stage worker whose stage alters every 50th value that it gives, or only those that it sends on. Run like
`cordee.worker.worker`, by `lying_node`."""

import os

import numpy as np

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch
from cordee.worker import compute, worker
from cordee.worker.messages import Data, Rows

EVERY = 50
HOW = "CORDEE_TEST_LIE"  # computes: a stage that gives wrong values; sends: a worker that hides what it sent


def altered(values: np.ndarray) -> np.ndarray:
    """The same, with every 50th value off by half."""
    values = values.copy()
    values[..., ::EVERY] *= 1.5
    return values


class LyingStage(LlamaStage):
    """A stage whose every 50th value is wrong."""

    def decode(self, batch: Batch) -> np.ndarray:
        return altered(super().decode(batch))


class LyingWorker(worker.Worker):
    """A worker that keeps a record of what it should have sent."""

    def _send(self, message: Data, payload: bytes | memoryview = b"") -> None:
        if isinstance(message, Rows):
            rows = np.frombuffer(payload, np.float32).reshape(-1, message.n_embd)
            payload = altered(rows).data.cast("B")
        super()._send(message, payload)


if __name__ == "__main__":
    if os.environ[HOW] == "computes":
        compute.LlamaStage = LyingStage
    else:
        worker.Worker = LyingWorker
    worker.main()
