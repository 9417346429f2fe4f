"""Whether a model has a scale for each group of neighbouring columns, as its first rows show."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from cordee.convert.ternary_file import EMBEDDING, HEAD, TernaryModel

# Columns that may share a scale, as the engine has them; the largest that fits is the smallest file.
SPANS = (256, 128, 64)


def with_scales_of_spans(
    model: TernaryModel, first_rows: Callable[[str], np.ndarray], *, tied: bool
) -> TernaryModel:
    """The model with scales of columns if it has such; then a ternary embedding and head are codes.

    `first_rows(name)` gives some rows of a matrix as float32. Activations get scales of columns, too, so one
    plane is enough for them (native/FORMAT.md has what it costs).
    """
    columns = columns_that_share(first_rows(f"blk.0.{name}.weight") for name in model.matrices())
    if not columns:
        return model
    model = replace(model, scale_columns=columns, planes=1)
    if not all(shares(first_rows(name), columns) for name in (EMBEDDING, HEAD)):
        return model
    return replace(model, embedding="codes", head=model.layout, head_planes=1, tied=tied)


def shares(values: np.ndarray, columns: int) -> bool:
    """Whether so many neighbouring columns of each row of (n, cols) values hold one magnitude beside 0."""
    magnitudes = np.abs(values)
    parts = np.split(magnitudes, range(columns, values.shape[1], columns), axis=1)
    most = (part.max(axis=1, keepdims=True) for part in parts)
    return all(((part == 0) | (part == m)).all() for part, m in zip(parts, most, strict=True))


def columns_that_share(matrices: Iterable[np.ndarray]) -> int:
    """How many neighbouring columns share a scale in all of these values; 0: all of a row, or too few."""
    found = 0
    for values in matrices:
        own = next((columns for columns in SPANS if shares(values, columns)), 0)
        if not own or shares(values, values.shape[1]):
            return 0
        found = min(own, found or own)
    return found
