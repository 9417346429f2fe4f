"""Matrices as sums of ternary planes: codes -1, 0, 1 and scales of spans (neighbouring inputs).

A plane is scale * code; a matrix is the sum of its planes (one, two or three), so that a weight has one of
3 ** planes values. Scales are rounded to float16, as the file keeps them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from cordee.compress.rotation import Basis

# Rounds of fitting scales to codes and codes to scales. Both steps only lower the error, and it settles soon.
FIT_ROUNDS = 20
SCALE_MIN = np.float32(2.0**-14)  # the smallest normal float16
SCALE_MAX = np.float32(65504)
KEPT_LARGEST = 127  # of a matrix at 8 bits
# Weights of the plane in front of this share of the mean magnitude begin as 0.
FIRST_THRESHOLD = np.float32(0.75)

# (weights (rows, cols), planes) -> (planes, rows) scales
ScalesOf = Callable[[np.ndarray, int], np.ndarray] | None


@dataclass
class TernaryMatrix:
    """`codes` (planes, rows, cols) int8; `scales` (planes, rows, spans) float32, each for `span` columns.

    With a `basis` it is a matrix for inputs in that basis. A matrix left at 8 bits has one plane, whose codes
    go to 127.
    """

    codes: np.ndarray
    scales: np.ndarray
    span: int
    basis: Basis | None = None

    def dense(self) -> np.ndarray:
        """(rows, cols) float32, for inputs as they come."""
        total = np.zeros(self.codes.shape[1:], dtype=np.float32)
        for codes, scales in zip(self.codes, self.scales, strict=True):
            total += codes * np.repeat(scales, self.span, axis=1)[:, : codes.shape[1]]
        return total if self.basis is None else self.basis.out_of(total)


def combinations(planes: int) -> np.ndarray:
    """(3 ** planes, planes) float32: all codes that a weight may have."""
    return np.array(list(product((-1, 0, 1), repeat=planes)), dtype=np.float32)


def nearest(weights: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest sums of planes: (planes, rows, ...) int8 codes and (rows, ...) float32 values.

    `weights` is (rows,) or (rows, cols), `scales` (planes, rows).
    """
    if len(scales) == 1:
        scale = scales[0] if weights.ndim == 1 else scales[0][:, None]
        codes = np.clip(np.rint(weights / scale), -1, 1)
        return codes[None].astype(np.int8), codes * scale
    found = combinations(len(scales))
    levels = found @ scales  # (3 ** planes, rows)
    order = np.argsort(levels, axis=0)
    ascending = np.take_along_axis(levels, order, axis=0)
    place = np.zeros(weights.shape, dtype=np.intp)
    for middle in (ascending[1:] + ascending[:-1]) / 2:
        place += weights > (middle if weights.ndim == 1 else middle[:, None])
    rows = np.arange(len(weights)) if weights.ndim == 1 else np.arange(len(weights))[:, None]
    return np.moveaxis(found[order[place, rows]].astype(np.int8), -1, 0), ascending[place, rows]


def rounded_scales(scales: np.ndarray) -> np.ndarray:
    """As the file keeps them: positive float16 values, as float32."""
    return np.clip(np.abs(scales), SCALE_MIN, SCALE_MAX).astype(np.float16).astype(np.float32)


def first_scales(weights: np.ndarray, planes: int) -> np.ndarray:
    """(planes, rows) scales to begin with: each plane takes the larger part of what the one before left."""
    rest, scales = weights, list[np.ndarray]()
    for _ in range(planes):
        magnitude = np.abs(rest)
        kept = magnitude > FIRST_THRESHOLD * magnitude.mean(axis=1, keepdims=True)
        scale = (magnitude * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
        scale = rounded_scales(scale)
        scales.append(scale)
        rest = rest - np.sign(rest) * kept * scale[:, None]
    return np.stack(scales)


def fitted_scales(weights: np.ndarray, planes: int, importance: np.ndarray | None = None) -> np.ndarray:
    """(planes, rows) scales with the least square error, of which column j counts `importance[j]` times.

    Iterative ternary fitting: codes that are nearest to the weights, then scales by least squares, and again.
    """
    scales = first_scales(weights, planes)
    counted = np.ones(weights.shape[1], dtype=np.float32) if importance is None else importance
    for _ in range(FIT_ROUNDS):
        codes, _ = nearest(weights, scales)
        refitted = rounded_scales(least_squares(codes.astype(np.float32), weights, counted, scales))
        if np.array_equal(refitted, scales):
            break
        scales = refitted
    return scales


def mean_magnitudes(weights: np.ndarray, planes: int) -> np.ndarray:
    """(planes, rows) scales as in b1.58 models: the mean magnitude, for the next plane of what is left."""
    rest, scales = weights, list[np.ndarray]()
    for _ in range(planes):
        scale = rounded_scales(np.abs(rest).mean(axis=1))
        scales.append(scale)
        rest = rest - nearest(rest, scale[None])[1]
    return np.stack(scales)


def fitted(weights: np.ndarray, planes: int, span: int, scales_of: ScalesOf = None) -> TernaryMatrix:
    """A matrix for itself, without regard to its inputs; by `fitted_scales` if not told otherwise."""
    rows, cols = weights.shape
    codes = np.zeros((planes, rows, cols), dtype=np.int8)
    scales = np.zeros((planes, rows, -(-cols // span)), dtype=np.float32)
    for number, first in enumerate(range(0, cols, span)):
        part = slice(first, first + span)
        scales[:, :, number] = (scales_of or fitted_scales)(weights[:, part], planes)
        codes[:, :, part], _ = nearest(weights[:, part], scales[:, :, number])
    return TernaryMatrix(codes, scales, span)


def kept(weights: np.ndarray, span: int) -> TernaryMatrix:
    """A matrix at 8 bits, each span scaled by its largest weight."""
    rows, cols = weights.shape
    codes = np.zeros((1, rows, cols), dtype=np.int8)
    scales = np.zeros((1, rows, -(-cols // span)), dtype=np.float32)
    for number, first in enumerate(range(0, cols, span)):
        part = weights[:, first : first + span]
        scale = rounded_scales(np.abs(part).max(axis=1) / KEPT_LARGEST)
        codes[0, :, first : first + span] = np.clip(
            np.rint(part / scale[:, None]), -KEPT_LARGEST, KEPT_LARGEST
        )
        scales[0, :, number] = scale
    return TernaryMatrix(codes, scales, span)


def least_squares(
    codes: np.ndarray, weights: np.ndarray, importance: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """(planes, rows) scales for (planes, rows, cols) codes; where codes do not decide, those `before`."""
    weighted = codes * importance
    if len(codes) == 1:
        below: np.ndarray = (weighted[0] * codes[0]).sum(axis=1)
        above: np.ndarray = (weighted[0] * weights).sum(axis=1)
        return np.where(below > 0, above / np.where(below > 0, below, 1), before[0])[None]
    products = np.einsum("prc,qrc->rpq", weighted, codes)
    sums = np.einsum("prc,rc->rp", weighted, weights)
    return solved(products, sums - np.einsum("rpq,qr->rp", products, before)) + before


def solved(products: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """(planes, rows) solutions of (rows, planes, planes) symmetric systems, 0 where they are singular."""
    planes = products.shape[1]
    ridge: np.ndarray = 1e-4 * np.maximum(np.einsum("rpp->r", products), 1e-12)
    system: np.ndarray = products.astype(np.float64) + ridge[:, None, None] * np.eye(planes)
    found = np.linalg.solve(system, sums.astype(np.float64)[..., None])
    return found[..., 0].T.astype(np.float32)
