"""A stage worker that fails at certain tokens, to test how the pipeline recovers. Run like
`cordee.worker.worker`, as the only stage of a tiny model."""

import os
import signal
import time

import numpy as np

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch
from cordee.worker import compute, worker

CRASH, REFUSE, HANG = 301, 302, 304  # tokens that batch_invariance.measure does not use
HANG_SECONDS = 3600.0


class BreakingStage(LlamaStage):
    """A stage whose decode crashes, fails or does not come back."""

    def decode(self, batch: Batch) -> np.ndarray:
        if CRASH in batch.inputs:
            os.kill(os.getpid(), signal.SIGSEGV)
        if HANG in batch.inputs:
            time.sleep(HANG_SECONDS)
        if REFUSE in batch.inputs:
            raise RuntimeError("a fault of this stage")
        return super().decode(batch)


if __name__ == "__main__":
    compute.LlamaStage = BreakingStage
    worker.main()
