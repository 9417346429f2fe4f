"""From token ids to the rows that enter layer 0, looked up in the model file itself.

A pipeline feeds every stage with rows, so no slice needs the embedding. The rows are bit-equal to those that
libllama computes when it is fed tokens.
"""

import mmap
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import cast

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.models.architectures import architecture
from cordee.models.blocks import decoded
from cordee.models.codes import CodedRows, has_codes
from cordee.models.gguf import BlockType, Header, TensorType
from cordee.models.metadata import CONVERT_AGAIN
from cordee.models.slices import EMBEDDING

# Decoding a single row, which each token of an answer needs, takes 150 µs, nearly all of it the library's own
# set-up; most text uses few distinct tokens. This many rows of the widest models take 64 MiB.
CACHED_ROWS = 1024


class Embedding:
    """The embedding of a model. The file is memory-mapped, so memory holds only what was looked up."""

    def __init__(self, header: Header) -> None:
        """Raises UnsupportedModel or BadModelFile if the model has no embedding this program can read."""
        if has_codes(header):
            coded = CodedRows(header, partial(_mapped, header))
            self.n_embd, self.n_vocab = coded.n_embd, coded.n_vocab
            self._decoded = partial(_coded, coded, _scale(header, coded.n_embd))
            self._row = lru_cache(CACHED_ROWS)(self._decoded)
            return
        tensor = header.tensor(EMBEDDING)
        if tensor is None or len(tensor.shape) != 2:
            raise BadModelFile(f"{header.name} has no {EMBEDDING}: it cannot turn tokens into rows.")
        self.n_embd, self.n_vocab = tensor.shape
        table = _mapped(header, EMBEDDING).reshape(self.n_vocab, -1)
        self._decoded = partial(_decoded, table, tensor.type, _scale(header, self.n_embd))
        self._row = lru_cache(CACHED_ROWS)(self._decoded)
        try:
            self.rows([0])
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{header.name} stores its embedding as {tensor.type.name}, which cannot be decoded: "
                "choose another quantization."
            ) from error

    def rows(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) token ids -> (n, n_embd) float32 rows, scaled where the architecture scales them.

        The array may be shared with later callers: do not write to it.

        Raises:
            BadRequest: a token id is outside the vocabulary.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_vocab:
            raise BadRequest(f"Token ids must be 0 to {self.n_vocab - 1}.", "tokens")
        return self._row(int(ids[0])) if ids.size == 1 else self._decoded(ids)


def _mapped(header: Header, name: str) -> np.ndarray:
    """A tensor's bytes, in the mapped file.

    Raises:
        BadModelFile: there is no such tensor, or the file cannot be mapped.
    """
    tensor = header.tensor(name)
    if tensor is None:
        raise BadModelFile(f"{header.name} has no {name}: {CONVERT_AGAIN}.")
    start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with tensor.path.open("rb") as file:
            length = tensor.offset + tensor.nbytes - start
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    except (OSError, ValueError) as error:
        raise BadModelFile(f"{tensor.path} cannot be read: {error}.") from error
    return np.frombuffer(mapped, np.uint8, tensor.nbytes, tensor.offset - start)


def _coded(coded: CodedRows, scale: np.float32 | None, ids: int | np.ndarray) -> np.ndarray:
    rows = coded.rows(np.atleast_1d(np.asarray(ids, dtype=np.int64)))
    return rows if scale is None else rows * scale


def _decoded(
    table: np.ndarray, kind: TensorType, scale: np.float32 | None, ids: int | np.ndarray
) -> np.ndarray:
    if isinstance(kind, BlockType):
        return decoded(np.atleast_2d(table[ids]), kind)
    known = cast(GGMLQuantizationType, kind)  # for any other the library raises NotImplementedError
    with np.errstate(invalid="ignore", over="ignore"):  # broken weights give NaN, as in libllama
        rows = dequantize(np.atleast_2d(table[ids]), known).astype(np.float32, copy=False)
    return rows if scale is None else rows * scale


def _scale(header: Header, n_embd: int) -> np.float32 | None:
    """The factor by which libllama multiplies token rows; float32 as there, so that products are equal."""
    rules = architecture(header.architecture)
    if rules is None or rules.embedding_scale == "none":
        return None
    if rules.embedding_scale == "sqrt_n_embd":
        return np.sqrt(np.float32(n_embd))
    scale = header.number(".embedding_scale", 0.0)
    return np.float32(scale) if scale else None
