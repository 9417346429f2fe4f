"""Plain libllama, the oracle: the whole model, fed token ids through llama_decode, as its own programs do it.

Deliberately independent of cordee.engine; only the context's parameters are those of a batch-invariant stage.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cordee.engine.llama import libllama

FLASH_ATTENTION_ON, TYPE_F16, TYPE_BF16 = 1, 1, 30

Row = tuple[int, int, int, bool]  # token, position, sequence, whether logits are wanted


class Plain:
    """A whole model in one libllama context."""

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        sequences: int,
        batch_rows: int,
        threads: int,
        batch_invariant: bool = True,
    ) -> None:
        self.library = library = libllama.load()
        model_params = library.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = False
        self.model = library.llama_model_load_from_file(str(path).encode(), model_params)
        assert self.model, path
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch = params.n_ubatch = batch_rows
        params.n_threads = params.n_threads_batch = threads
        self.context = None
        if batch_invariant:
            params.flash_attn_type, params.type_v = FLASH_ATTENTION_ON, TYPE_BF16
            self.context = library.llama_init_from_model(self.model, params)
            params.type_v = TYPE_F16  # which models with compressed attention (MLA) need
        self.context = self.context or library.llama_init_from_model(self.model, params)
        assert self.context, path
        self.vocabulary_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.batch = library.llama_batch_init(batch_rows, 0, 1)

    def decode(self, rows: Sequence[Row]) -> np.ndarray:
        """(outputs, n_vocab) float32 logits of the rows that want them, in order."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, output) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = output
        assert self.library.llama_decode(self.context, batch) == 0
        wanted = [index for index, row in enumerate(rows) if row[3]]
        return np.stack([self._logits(index) for index in wanted])

    def _logits(self, index: int) -> np.ndarray:
        pointer = self.library.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary_size,)
        ).copy()

    def trim(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of a sequence."""
        memory = self.library.llama_get_memory(self.context)
        assert self.library.llama_memory_seq_rm(memory, sequence, length, -1)

    def close(self) -> None:
        """Free everything."""
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)
