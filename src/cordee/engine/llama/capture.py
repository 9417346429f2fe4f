"""The Python side of native/capture.c, which takes hidden rows out of libllama's graph."""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cordee.engine.llama import libllama
from cordee.errors import SetupNeeded
from cordee.system import libraries

if TYPE_CHECKING:
    from _ctypes import CFuncPtr


class _Native(ctypes.Structure):
    """`cordee_capture` in native/capture.c."""

    _fields_ = (
        ("tensor_name", ctypes.c_void_p),
        ("tensor_nbytes", ctypes.c_void_p),
        ("tensor_get", ctypes.c_void_p),
        ("wanted", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("capacity_bytes", ctypes.c_size_t),
        ("nbytes", ctypes.c_size_t),
        ("count", ctypes.c_size_t),
    )


class Capture:
    """Captures the tensor called `name`, of at most `rows` rows of width `n_embd`, at every decode call.

    Put `callback` and `user_data` into the context's parameters, and keep this object as long as the context.
    """

    def __init__(self, name: bytes, rows: int, n_embd: int) -> None:
        ggml = libllama.ggml()
        self._rows = np.empty((rows, n_embd), dtype=np.float32)
        self._native = _Native(
            tensor_name=_address(ggml.tensor_name),
            tensor_nbytes=_address(ggml.tensor_nbytes),
            tensor_get=_address(ggml.tensor_get),
            wanted=name,
            rows=self._rows.ctypes.data,
            capacity_bytes=self._rows.nbytes,
        )
        self.callback = _address(_library().cordee_capture_tensor)
        self.user_data = ctypes.addressof(self._native)

    def reset(self) -> None:
        """Forget what was captured; to be called before each decode call."""
        self._native.count = 0

    def copy_rows(self, count: int) -> np.ndarray | None:
        """A copy of the (count, n_embd) float32 rows of the last decode call.

        None if the tensor did not come exactly once with `count` rows.
        """
        row_bytes = self._rows.strides[0]
        if self._native.count != 1 or self._native.nbytes != count * row_bytes:
            return None
        return self._rows[:count].copy()


def _address(function: "CFuncPtr") -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, "a function has an address"
    return address


@cache
def _library() -> ctypes.CDLL:
    try:
        return libraries.load(Path(__file__).with_name("_capture"))
    except OSError as error:
        raise SetupNeeded(f"Cordée's own library does not load ({error}): run `make setup`") from error
