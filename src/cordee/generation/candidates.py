"""Tokens with their logits, as libllama's samplers take them."""

import ctypes
from typing import Any

import numpy as np

from cordee.engine.llama import libllama

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def apply(sampler: Any, candidates: np.ndarray) -> Any:
    """Apply a sampler to (k,) candidates, which it changes; gives libllama's view of them."""
    library = libllama.load()
    array = library.llama_token_data_array(
        data=candidates.ctypes.data_as(library.llama_token_data_p),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )
    library.llama_sampler_apply(sampler, ctypes.byref(array))
    return array
