"""From a ternary model in another format to the ternary engine's own file, without loss.

Sources are GGUF files (gguf_source.py) and checkpoints of the hub (checkpoint.py). Each gives scales and
weights of its matrices, or refuses and names the tensor. Norms are copied. So is the embedding: in F16, BF16
or F32, the smallest that holds it exactly, or in F16 if it was quantized. The head, which is multiplied, is
rounded to the requested layout: it is not ternary, and the only part that is not exact.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from gguf import GGUFWriter

from cordee.convert.checkpoint import Checkpoint
from cordee.convert.folds import Folded
from cordee.convert.gguf_source import GgufSource
from cordee.convert.pentium2 import write_pentium2
from cordee.convert.ternary_file import (
    DIVISORS,
    EMBEDDING,
    HEAD,
    OUTPUT_NORM,
    TernaryModel,
    WeightSource,
    strips,
    write,
)
from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.models.gguf import read_header
from cordee.models.metadata import FETCH_AGAIN

Progress = Callable[[int, int], None]


class Convertible(WeightSource, Protocol):
    """A model in another format."""

    def model(self, layout: Literal["trit2", "trit5"], head: str) -> TernaryModel:
        """The model it becomes. Raises UnsupportedModel if the engine would not use all of it."""
        ...

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        ...

    def place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """What a tensor is called in its file, and its shape there: (rows, cols) of a matrix."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes of a layer's matrix, as it is stored."""
        ...

    def floats(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of any tensor but a packed one, as they are stored, in float32."""
        ...

    def check(self, name: str, rows: int, cols: int) -> None:
        """Read a layer's matrix once. Raises UnsupportedModel or BadModelFile if it is not ternary."""

    def describe(self, writer: GGUFWriter) -> None:
        """Add the tokenizer and the model's name."""


def convert(
    source: Path,
    path: Path,
    *,
    layout: Literal["trit2", "trit5"] = "trit2",
    head: str = "int8",
    for_pentium2: bool = False,
    pre: str | None = None,
    title: str | None = None,
    progress: Progress | None = None,
) -> TernaryModel:
    """Write the model of `source` to `path` as a file for the ternary engine.

    `source` is a GGUF file, a folder with config.json and safetensors, or a safetensors file in one. For a
    checkpoint, `pre` names the pre-tokenizer where its own is unknown, and `title` names the model.
    `for_pentium2` chooses the layout of pentium2.py, for which embedding and head must be ternary, too.
    `progress(checked_bytes, total_bytes)` follows the check of the matrices, which takes most of the time.

    Memory depends on the widest matrix's rows, not on the model.

    Raises:
        UnsupportedModel: the architecture is unknown here, a tensor is not ternary, or the engine would not
            use a tensor.
        BadModelFile: the source lacks something, or is damaged.
        BadRequest: `path` is the source.
        StorageFailed: no room on disk.
    """
    if path.exists() and path.samefile(source):
        raise BadRequest(f"{path} is the model to be converted: name another file.", "path")
    is_checkpoint = source.is_dir() or source.suffix == ".safetensors"
    opened: Convertible = Checkpoint(source, pre, title) if is_checkpoint else GgufSource(read_header(source))
    model = opened.model(layout, head)
    _require_possible(source, model)
    shapes = {
        f"blk.{layer}.{name}.weight": shape
        for layer in range(model.layers)
        for name, shape in model.matrices().items()
    }
    if model.embedding == "codes":
        shapes |= dict.fromkeys(
            (EMBEDDING,) if model.tied else (EMBEDDING, HEAD), (model.n_vocab, model.n_embd)
        )
    done, total = 0, sum(opened.nbytes(name) for name in shapes)
    folded = Folded(opened, model)
    for name, shape in shapes.items():
        _check(opened, folded, model, name, shape)
        done += opened.nbytes(name)
        if progress:
            progress(done, total)
    _check_floats(opened, model)
    try:
        (write_pentium2 if for_pentium2 else write)(path, model, folded, describe=opened.describe)
    except UnicodeEncodeError as error:
        raise BadModelFile(f"{source}: a text of its tokenizer is not Unicode: {FETCH_AGAIN}.") from error
    return model


def _require_possible(source: Path, model: TernaryModel) -> None:
    """Refuse sizes that the engine would refuse."""
    heads = min(model.heads, model.kv_heads, model.head_dim) > 0 and model.heads % model.kv_heads == 0
    if not (heads and model.head_dim % 2 == 0 and 0 < model.epsilon < 1 and 1 < model.rope_base < 1e12):
        raise BadModelFile(
            f"{source} has heads, an epsilon of its norms or a base of RoPE that no model has: {FETCH_AGAIN}."
        )


def _check(
    opened: Convertible, folded: Folded, model: TernaryModel, name: str, shape: tuple[int, int]
) -> None:
    """Check that a matrix is ternary by rows, or can be made so."""
    try:
        opened.check(name, *shape)
    except UnsupportedModel as error:
        if model.scale_columns:
            raise
        try:
            folded.fold(name, lambda first, last: opened.floats(name, first, last))
        except UnsupportedModel:
            raise error from None


def _check_floats(source: WeightSource, model: TernaryModel) -> None:
    """Check all but the layers' matrices: the right shape, and nothing but finite numbers."""
    routers = model.routers()
    vectors = {
        f"blk.{layer}.{name}.weight": length
        for layer in range(model.layers)
        for name, length in (model.norms() | {n: rows * cols for n, (rows, cols) in routers.items()}).items()
    } | {OUTPUT_NORM: model.n_embd}
    if model.divisors:
        vectors[DIVISORS] = (model.rope_dims or model.head_dim) // 2
    for name, length in vectors.items():
        _require(source.vector(name), (length,), name)
    for name in (EMBEDDING, HEAD):
        for first, last in strips(model.n_vocab):
            _require(source.rows(name, first, last), (last - first, model.n_embd), name)


def _require(values: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    if values.shape != shape:
        raise BadModelFile(f"{name} is {values.shape}, not {shape}: {FETCH_AGAIN}.")
    if not np.isfinite(values).all():
        raise BadModelFile(f"{name} holds a value that is not a number: {FETCH_AGAIN}.")
