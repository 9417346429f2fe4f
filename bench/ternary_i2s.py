"""bitnet.cpp's side of bench/ternary.py: the dot of its I2_S beside ours, integers in and integers out.

`--i2s LIBRARY` names a shared object that exports bitnet.cpp's `ggml_vec_dot_i2_i8_s` by its C name, as the
project declares it; nothing of it is in this tree. Build it from the project's src/ggml-bitnet-mad.cpp and
include/gemm-config.h with a C++ compiler and -O3 -march=native -fpermissive -shared -fPIC, as its own build
does. Of ggml's headers that file needs only that declaration, ggml_row_size and GGML_TYPE_I2_S.

`dot-1t` goes through the matrices of some layers of the 2B-4T shape, more bytes than caches hold;
`dot-cached-1t` through one matrix of 6912 x 2560 again and again. One thread, timed by its CPU time.
"""

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cordee.convert.ternary_file import LAYOUTS, pack
from cordee.engine.ternary import kernels, library
from make_model import SHAPES

PEER_NAME = "bitnet.cpp-I2_S"
# 139 MB in 2 bits; a last-level cache has 32 MB or so.
LAYERS = 8
CACHED = (6912, 2560)
# A round goes through all matrices for this long: many ticks of the clock.
ROUND_SECONDS = 0.1
BLOCK, SHIFTS = 128, np.array([6, 4, 2, 0], dtype=np.uint8)[:, None]
LINE_BYTES = 64  # of a cache
PEER_COLUMNS = 4  # it takes a multiple of 4 rows for 4 columns of activations

Shape = tuple[int, int]  # rows, cols


class OurDot:
    """Our kernels on one layout."""

    number = np.int32

    def __init__(self, layout: str) -> None:
        self._layout = LAYOUTS[layout]
        self._names = kernels()[0].encode(), layout.encode()

    def packed(self, weights: np.ndarray) -> np.ndarray:
        """(rows, cols) int8 of -1, 0, 1 -> the bytes that the kernel reads."""
        return pack(weights, self._layout)

    def run(self, matrix: int, shape: Shape, x: int, out: int) -> None:
        """A matrix times activations; `matrix`, `x` and `out` are addresses."""
        groups, quads, _ = self._layout.shape(*shape)
        library().ternary_kernels_dot(*self._names, matrix, groups, quads, x, 1, out, None)

    def sums(self, out: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What `run` left in `out`, as sums of weight * activation."""
        return out


class PeerDot:
    """bitnet.cpp's kernel: its weights are 0, 1, 2, and its callers subtract the sum of the activations."""

    number = np.float32

    def __init__(self, path: Path) -> None:
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self._dot = ctypes.CDLL(str(path)).ggml_vec_dot_i2_i8_s
        self._dot.restype = None
        self._dot.argtypes = [ctypes.c_int, pointer, size, pointer, size, pointer, size, ctypes.c_int]

    def packed(self, weights: np.ndarray) -> np.ndarray:
        """See OurDot.packed."""
        codes = (weights + 1).astype(np.uint8).reshape(len(weights), -1, len(SHIFTS), BLOCK // len(SHIFTS))
        return np.bitwise_or.reduce(codes << SHIFTS, axis=2)

    def run(self, matrix: int, shape: Shape, x: int, out: int) -> None:
        """See OurDot.run."""
        rows, cols = shape
        first = rows - 1 if rows % PEER_COLUMNS == 0 else rows
        self._dot(cols, out, 0, matrix, cols, x, 0, first)
        if first < rows:
            self._dot(cols, out + 4 * first, 0, matrix + first * cols // 4, cols, x, 0, 1)

    def sums(self, out: np.ndarray, x: np.ndarray) -> np.ndarray:
        """See OurDot.sums."""
        return out.astype(np.int64) - x.sum(dtype=np.int64)


class Stack:
    """Random matrices, those of one shape all the same, packed one after the other in large pages."""

    def __init__(self, dot: OurDot | PeerDot, shapes: list[Shape]) -> None:
        draw = np.random.default_rng(0)
        weights = {shape: draw.integers(-1, 2, shape, dtype=np.int8) for shape in dict.fromkeys(shapes)}
        packed = {shape: dot.packed(matrix) for shape, matrix in weights.items()}
        # numpy asks for large pages where Linux has them.
        payload = np.empty(sum(packed[shape].nbytes for shape in shapes) + LINE_BYTES, np.uint8)
        at = -payload.ctypes.data % LINE_BYTES
        self._dot, self._payload = dot, payload
        self._x = draw.integers(-127, 128, max(cols for _, cols in shapes)).astype(np.int8)
        self._out = np.empty(max(rows for rows, _ in shapes) + LAYOUTS["trit5"].group_rows, dot.number)
        self._addresses = self._x.ctypes.data, self._out.ctypes.data
        self._matrices: list[tuple[int, Shape]] = []  # address, shape
        for shape in shapes:
            payload[at : at + packed[shape].nbytes] = packed[shape].reshape(-1)
            self._matrices.append((payload.ctypes.data + at, shape))
            at += packed[shape].nbytes
        self._check(weights)

    def run(self) -> None:
        """All matrices, once."""
        for matrix, shape in self._matrices:
            self._dot.run(matrix, shape, *self._addresses)

    def rate(self) -> float:
        """Billions of weights a second."""
        passes, start = 0, time.thread_time()
        while (seconds := time.thread_time() - start) < ROUND_SECONDS:
            self.run()
            passes += 1
        return passes * sum(rows * cols for _, (rows, cols) in self._matrices) / seconds / 1e9

    def _check(self, weights: dict[Shape, np.ndarray]) -> None:
        for matrix, shape in self._matrices:
            rows, cols = shape
            x = self._x[:cols].astype(np.int64)
            self._dot.run(matrix, shape, *self._addresses)
            if not np.array_equal(self._dot.sums(self._out[:rows], x), weights[shape].astype(np.int64) @ x):
                raise SystemExit(
                    f"{type(self._dot).__name__}: the sums of a matrix {rows} x {cols} are wrong"
                )


def measure(
    path: Path, rounds: int, prefix: str
) -> Iterator[tuple[str, str, list[float], str, list[float], str]]:
    """(case, layout, our rounds, the peer's name, its rounds, unit) of the cases that begin with `prefix`.

    Raises:
        SystemExit: sums are wrong.
    """
    dots = {"trit2": OurDot("trit2"), "trit5": OurDot("trit5"), PEER_NAME: PeerDot(path)}
    layer = list(SHAPES["2b4t"].matrices().values())
    shapes_of: dict[str, list[Shape]] = {"dot-1t": layer * LAYERS, "dot-cached-1t": [CACHED]}
    for case, shapes in shapes_of.items():
        if not case.startswith(prefix):
            continue
        stacks = {name: Stack(dot, shapes) for name, dot in dots.items()}
        found: dict[str, list[float]] = {name: [] for name in stacks}
        for _ in range(rounds):
            for name, stack in stacks.items():
                found[name].append(stack.rate())
        peer = found.pop(PEER_NAME)
        for layout, ours in found.items():
            yield case, layout, ours, PEER_NAME, peer, "Gweights/s"
