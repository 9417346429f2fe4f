"""The model that is compressed: a checkpoint of the hub or a GGUF file, read matrix by matrix and checked.

Reading, names and tokenizer are those of `cordee convert` (convert/checkpoint.py, convert/gguf_source.py),
which refuse what the ternary engine would not use.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from cordee.convert.checkpoint import Checkpoint
from cordee.convert.gguf_source import GgufSource
from cordee.convert.ternary_file import DIVISORS, EMBEDDING, HEAD, OUTPUT_NORM, TernaryModel, strips
from cordee.errors import BadModelFile
from cordee.models.gguf import Header, read_header
from cordee.models.metadata import FETCH_AGAIN

# 7-bit digits of an activation: what was not trained for ternary weights was not for 8-bit rows either.
ACTIVATION_PLANES = 2
Q8_BLOCK = 32  # weights that share a scale in GGUF's Q8_0

Progress = Callable[[int, int], None]


class Source:
    """An open model. `name` is what messages call it; `head` is the layout of its head in our file.

    Raises:
        BadModelFile: it lacks something, or is damaged.
        UnsupportedModel: the ternary engine does not run such models.
    """

    def __init__(self, path: Path, name: str, head: str, pre: str | None = None) -> None:
        is_checkpoint = path.is_dir() or path.suffix == ".safetensors"
        self.path, self.name = path, name
        self.header: Header | None = None if is_checkpoint else read_header(path, name=name)
        opened = Checkpoint(path, pre) if self.header is None else GgufSource(self.header)
        self._opened: Checkpoint | GgufSource = opened
        model = opened.model("trit5", head)
        is_even = model.n_embd % Q8_BLOCK == 0
        self.model: TernaryModel = replace(
            model,
            planes=ACTIVATION_PLANES,
            embedding=GGMLQuantizationType.Q8_0 if is_even else GGMLQuantizationType.F16,
        )
        self._check_shapes()

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, cols) of all matrices of layers, by their whole names."""
        return {
            f"blk.{layer}.{name}.weight": shape
            for layer in range(self.model.layers)
            for name, shape in self.model.matrices().items()
        }

    @property
    def weights(self) -> int:
        """The number of the model's weights, a head that is the embedding counted once."""
        model = self.model
        tables = 1 if self._opened.is_tied else 2
        in_layers = sum(rows * cols for rows, cols in model.matrices().values()) + sum(model.norms().values())
        return model.layers * in_layers + model.n_embd * (tables * model.n_vocab + 1)

    def matrix(self, layer: int, name: str) -> np.ndarray:
        """A whole matrix of a layer, float32.

        Raises:
            BadModelFile: a weight is not a number.
        """
        full, (rows, _) = f"blk.{layer}.{name}.weight", self.model.matrices()[name]
        return self._finite(full, 0, rows)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of the embedding or the head, float32."""
        return self._finite(name, first, last)

    def embedded(self, windows: np.ndarray) -> Iterator[np.ndarray]:
        """(length, width) float32 rows in front of the first layer, for each window of tokens."""
        for window in windows:
            yield np.stack([self.rows(EMBEDDING, token, token + 1)[0] for token in window.tolist()])

    def vector(self, name: str) -> np.ndarray:
        """A norm, float32."""
        return self._opened.vector(name)

    def vectors(self, layer: int) -> dict[str, np.ndarray]:
        """A layer's norms, by name."""
        return {name: self.vector(f"blk.{layer}.{name}.weight") for name in self.model.norms()}

    def divisors(self) -> np.ndarray | None:
        """(head_dim / 2,) divisors of the rotary frequencies; None if the model has none."""
        return self.vector(DIVISORS) if self.model.divisors else None

    def describe(self, writer: GGUFWriter) -> None:
        """Add the tokenizer and the model's name."""
        self._opened.describe(writer)

    def check_numbers(self, progress: Progress | None = None) -> None:
        """Read everything once, so that hours of work do not end at the last layer.

        Raises:
            BadModelFile: a weight is not a number; names the tensor.
        """
        shapes = self.matrices | dict.fromkeys((EMBEDDING, HEAD), (self.model.n_vocab, self.model.n_embd))
        done, total = 0, sum(rows * cols for rows, cols in shapes.values())
        for name, (rows, cols) in shapes.items():
            for first, last in strips(rows):
                self._finite(name, first, last)
                done += (last - first) * cols
            if progress:
                progress(done, total)

    def identity(self) -> str:
        """A digest of what tells this model from others: its files' names, sizes and times."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        told = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _check_shapes(self) -> None:
        for name, (rows, cols) in self.matrices.items():
            self._require(name, (rows, cols))
        vectors = {OUTPUT_NORM: self.model.n_embd}
        divisors = self.divisors()
        if divisors is not None and not (len(divisors) == self.model.head_dim // 2 and (divisors > 0).all()):
            raise BadModelFile(
                f"{self.name}: {DIVISORS} are no divisors of its heads' angles: {FETCH_AGAIN}."
            )
        for layer in range(self.model.layers):
            vectors |= {f"blk.{layer}.{name}.weight": n for name, n in self.model.norms().items()}
        for name, length in vectors.items():
            self._require(name, (length,))
            if not np.isfinite(self.vector(name)).all():
                raise self._not_a_number(name)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        called, found = self._opened.place(name)
        if found != shape:
            wanted, has = (" x ".join(map(str, each)) for each in (shape, found))
            raise BadModelFile(f"{self.name}: {called} is {has}, not {wanted}: {FETCH_AGAIN}.")

    def _finite(self, name: str, first: int, last: int) -> np.ndarray:
        values = self._opened.floats(name, first, last)
        if not np.isfinite(values).all():
            raise self._not_a_number(name)
        return values

    def _not_a_number(self, name: str) -> BadModelFile:
        called, _ = self._opened.place(name)
        return BadModelFile(f"{self.name}: {called} holds a value that is not a number: {FETCH_AGAIN}.")
