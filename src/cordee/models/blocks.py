"""Decoders of ggml's types of one and two bits with a scale for each block, which the `gguf` package lacks.

Sources: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c, for Q1_0 and Q2_0; files and threads of the
makers of Ternary-Bonsai for the others. d is a float16; a weight is (code - 1) d, or ±d of Q1_0.

- Q2_0: 64 weights in 18 bytes: d, then weight j in bits 2 (j mod 4) of byte j / 4. PQ2_0, and the makers'
  older files that call it Q2_0: the same with 128 weights in 34 bytes. Code 3 stands for 2 d.
- PTQ1_0: 128 weights in 28 bytes, as TQ1_0 has 256. 16 bytes hold weights m + 16 n, the next 8 hold
  80 + m + 8 n (m the byte, n = 0 to 4 the digit of base 3, most significant first), the last 2 of the codes
  hold 120 + m + 2 n with 4 digits; then d.
- Q1_0: 128 weights in 18 bytes: d, then weight j in bit j mod 8 of byte j / 8; 1 is +d, 0 is -d.
"""

import numpy as np

from cordee.models.gguf import BlockType

# Carriers of PTQ1_0: bytes, and digits of each.
_CARRIERS = ((16, 5), (8, 5), (2, 4))


def decoded(stored: np.ndarray, kind: BlockType) -> np.ndarray:
    """(n, bytes of a row) uint8 -> (n, cols) float32."""
    blocks = stored.reshape(-1, kind.block_bytes)
    if kind is BlockType.PTQ1_0:
        scales, codes = blocks[:, 26:], _digits(blocks[:, :26])
    elif kind is BlockType.Q1_0:
        scales = blocks[:, :2]
        codes = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") * np.uint8(2)
    else:
        scales, shifts = blocks[:, :2], np.arange(0, 8, 2, dtype=np.uint8)
        codes = (blocks[:, 2:, None] >> shifts & 3).reshape(len(blocks), -1)
    values = np.ascontiguousarray(scales).view("<f2").astype(np.float32)
    return ((codes.astype(np.float32) - 1) * values).reshape(len(stored), -1)


def _digits(carriers: np.ndarray) -> np.ndarray:
    """(n, 26) bytes of PTQ1_0 -> (n, 128) codes in the order of weights."""
    parts: list[np.ndarray] = []
    first = 0
    for count, digits in _CARRIERS:
        rest = carriers[:, first : first + count]
        for _ in range(digits):  # times 3 lifts one digit after the other over the byte's top
            parts.append((rest.astype(np.uint16) * 3 >> 8).astype(np.uint8))
            rest = rest * np.uint8(3)
        first += count
    return np.concatenate(parts, axis=1)
