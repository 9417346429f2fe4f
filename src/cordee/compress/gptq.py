"""GPTQ with ternary fitting: codes and scales that change a matrix's products least, for inputs seen.

For inputs X of N rows and H = X'X / N, the error of a matrix row w that becomes q is (w - q) H (w - q)'.
GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds column by column and lets the columns to come make good
what was lost, by the Cholesky factor of H's inverse. Scales of a span of columns are fitted when its first is
reached. Then follow rounds of coordinate descent on the same error: each span's scales, then each code, at
its best given all others.
"""

import numpy as np

from cordee.compress.trits import TernaryMatrix, fitted_scales, nearest, rounded_scales, solved

# Part of the mean of H's diagonal that is added to it: inputs that were not seen.
DAMPING = 0.01
# Rounds of coordinate descent; the error falls by less than a hundredth in those after.
DESCENT_ROUNDS = 3
# Columns that are rounded before what they lost reaches the columns after them, where spans are longer.
BLOCK_COLUMNS = 128
# Rows that are rounded together: enough to keep numpy busy.
STRIP_ROWS = 2048
# Wider than this, H is factorised in float32: in float64 that alone would take gigabytes.
WIDE_COLUMNS = 6144


def damp(hessian: np.ndarray) -> None:
    """Give H a larger diagonal, in place, which makes it positive definite."""
    diagonal = np.einsum("ii->i", hessian)
    mean = float(diagonal.mean())
    diagonal += DAMPING * (mean if mean > 0 else 1.0)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular U with U' U = inverse(H), float32.

    With P the reversal of order and L L' = P H P, it is P inverse(L) P.
    """
    kind = np.float64 if len(hessian) <= WIDE_COLUMNS else np.float32
    lower = np.linalg.cholesky(hessian[::-1, ::-1].astype(kind))
    return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1], dtype=np.float32)


def compressed(weights: np.ndarray, hessian: np.ndarray, planes: int, span: int) -> TernaryMatrix:
    """(rows, cols) weights as planes with a scale for each `span` columns, best for a damped H.

    Rows are independent of one another, and are done some at a time, so that memory depends on H.
    """
    upper = inverse_factor(hessian)
    parts = list[TernaryMatrix]()
    for first in range(0, len(weights), STRIP_ROWS):
        strip = weights[first : first + STRIP_ROWS]
        parts.append(_rounded(strip, upper, planes, span))
        _descend(parts[-1], strip, hessian)
    codes, scales = (
        np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("codes", "scales")
    )
    return TernaryMatrix(codes, scales, span)


def _rounded(weights: np.ndarray, upper: np.ndarray, planes: int, span: int) -> TernaryMatrix:
    """GPTQ's pass over the columns."""
    rows, cols = weights.shape
    rest = weights.astype(np.float32)
    codes = np.zeros((planes, rows, cols), dtype=np.int8)
    scales = np.zeros((planes, rows, -(-cols // span)), dtype=np.float32)
    importance = 1 / np.square(np.diag(upper))
    importance /= importance.mean()
    step = min(span, BLOCK_COLUMNS)
    for first in range(0, cols, step):
        last = min(first + step, cols)
        number = first // span
        if first % span == 0:
            end = min(first + span, cols)
            scales[:, :, number] = fitted_scales(rest[:, first:end], planes, importance[first:end])
        block = np.ascontiguousarray(rest[:, first:last].T)
        errors = np.empty_like(block)
        for column in range(last - first):
            at = first + column
            codes[:, :, at], values = nearest(block[column], scales[:, :, number])
            errors[column] = (block[column] - values) / upper[at, at]
            block[column + 1 :] -= np.outer(upper[at, at + 1 : last], errors[column])
        rest[:, last:] -= errors.T @ upper[first:last, last:]
    return TernaryMatrix(codes, scales, span)


def _descend(matrix: TernaryMatrix, weights: np.ndarray, hessian: np.ndarray) -> None:
    """Coordinate descent on the error, span by span."""
    cols = weights.shape[1]
    dense = matrix.dense()
    gradient = (weights - dense) @ hessian  # (rows, cols): where it is 0, nothing can be gained
    for _ in range(DESCENT_ROUNDS):
        for first in range(0, cols, matrix.span):
            part = slice(first, min(first + matrix.span, cols))
            change = _descend_span(matrix, dense, gradient[:, part], hessian[part, part], part)
            gradient -= change @ hessian[part]


def _descend_span(
    matrix: TernaryMatrix, dense: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, part: slice
) -> np.ndarray:
    """Change a span's scales and codes; gives the change of its values. `gradient` is not changed."""
    number = part.start // matrix.span
    before = dense[:, part].copy()
    codes = matrix.codes[:, :, part].astype(np.float32)
    through = codes @ hessian
    products = np.einsum("prc,qrc->rpq", through, codes)
    step = solved(products, np.einsum("rc,prc->rp", gradient, codes))
    scales = rounded_scales(matrix.scales[:, :, number] + step)
    matrix.scales[:, :, number] = scales
    values = np.einsum("prc,pr->rc", codes, scales)
    local = np.ascontiguousarray((gradient - (values - before) @ hessian).T)
    values = np.ascontiguousarray(values.T)
    for column in range(len(values)):
        wanted = values[column] + local[column] / hessian[column, column]
        matrix.codes[:, :, part.start + column], found = nearest(wanted, scales)
        moved = found - values[column]
        if moved.any():
            local -= np.outer(hessian[column], moved)
            values[column] = found
    dense[:, part] = values.T
    return dense[:, part] - before
