"""From a ternary model in llama.cpp's formats to the ternary engine's own file, without loss.

A source is ternary when each row of a layer's matrix holds nothing but -s, 0 and s: stored as TQ1_0, TQ2_0,
or in any type that keeps such values apart (F32, F16, BF16, Q8_0, ...). The conversion finds s, or refuses
and names the tensor. Norms are copied. The embedding is kept in half precision at least; the head, which is
multiplied, is rounded to the layout asked for: the one thing that is not exact, and no ternary weight.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.gguf import BLOCK, Array, Header, Tensor
from cordee.models.slices import EMBEDDING
from cordee.models.ternary import STRIP_ROWS, TernaryModel, write

HEAD, OUTPUT_NORM = "output.weight", "output_norm.weight"
# Architectures by their names in GGUF, and how their heads are rotated.
ROPES: dict[str, Literal["neox", "interleaved"]] = {
    "bitnet": "neox",
    "bitnet-b1.58": "neox",
    "llama": "interleaved",
}
# BitNet b1.58 2B 4T, alone among the models of that architecture, has squared ReLU, and this vocabulary.
RELU2_VOCABULARY = 128_256
# Values of one magnitude may differ by the last bit of f16, in which sources keep their scales.
SCALE_TOLERANCE = 2.0**-10

Progress = Callable[[int, int], None]


def convert(
    header: Header,
    path: Path,
    *,
    layout: Literal["trit2", "trit5"] = "trit2",
    head: str = "int8",
    progress: Progress | None = None,
) -> TernaryModel:
    """Write the model of `header` to `path` in our layout. `progress(bytes_checked, bytes)`
    tells how far the check of the matrices is, which takes most of the time.

    Memory depends on the widest matrix's rows, not on the model.

    Raises:
        UnsupportedModel: the architecture is unknown here, a tensor is not ternary, or the engine would not
            use one.
        BadModelFile: the source lacks something.
        StorageFailed: no room on disk.
    """
    source = GgufSource(header)
    model = _model(header, source, layout, head)
    _refuse_unknown(header, model)
    names = [f"blk.{layer}.{name}.weight" for layer in range(model.layers) for name in model.matrices()]
    done, total = 0, sum(source.tensor(name).nbytes for name in names)
    for name in names:
        rows, cols = model.matrices()[name.split(".")[2]]
        if source.tensor(name).shape != (cols, rows):
            raise BadModelFile(f"{header.path}: {name} is not {rows} x {cols}: convert the model again.")
        source.scales(name)
        done += source.tensor(name).nbytes
        if progress:
            progress(done, total)
    write(path, model, source, describe=lambda writer: _copy_keys(header, writer))
    return model


class GgufSource:
    """A `cordee.models.ternary.Source` on a GGUF file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._scales: dict[str, np.ndarray] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; a tied head is the embedding.

        Raises:
            BadModelFile: there is none.
        """
        found = self.header.tensor(EMBEDDING if name == HEAD and self.header.tied else name)
        if found is None:
            raise BadModelFile(f"{self.header.path} has no tensor {name}: convert the model again.")
        return found

    def floats(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` as float32."""
        tensor = self.tensor(name)
        table = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        rows = table.reshape(tensor.shape[1] if len(tensor.shape) == 2 else 1, -1)[first:last]
        try:
            return dequantize(np.ascontiguousarray(rows), tensor.type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{name} is stored as {tensor.type.name}, which cannot be read here: "
                "give a file whose head and embedding are F16, BF16, Q8_0 or K-quants."
            ) from error

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `Source.rows`."""
        floats = self.floats(name, first, last)
        return floats if name in (EMBEDDING, HEAD) else np.sign(floats).astype(np.int8)

    def scales(self, name: str) -> np.ndarray:
        """See `Source.scales`.

        Raises:
            UnsupportedModel: the tensor is not ternary.
        """
        if name not in self._scales:
            self._scales[name] = self._find_scales(name)
        return self._scales[name]

    def vector(self, name: str) -> np.ndarray:
        """See `Source.vector`."""
        return self.floats(name, 0, 1)[0]

    def _find_scales(self, name: str) -> np.ndarray:
        """One scale if all rows agree, else one a row. Rows of zeros agree with any."""
        rows = self.tensor(name).shape[1]
        strips = ((first, min(first + STRIP_ROWS, rows)) for first in range(0, rows, STRIP_ROWS))
        found = np.concatenate([_row_scales(self, name, first, last) for first, last in strips])
        used = found[found > 0]
        if not len(used):
            return np.ones(1, dtype=np.float32)
        if used.max() - used.min() <= used.max() * SCALE_TOLERANCE:
            return np.array([np.median(used)], dtype=np.float32)
        return np.where(found > 0, found, 1).astype(np.float32)


def _row_scales(source: GgufSource, name: str, first: int, last: int) -> np.ndarray:
    magnitudes = np.abs(source.floats(name, first, last))
    scales = magnitudes.max(axis=1)
    between = (magnitudes > 0) & (magnitudes < scales[:, None] * (1 - SCALE_TOLERANCE))
    if between.any() or not np.isfinite(scales).all():
        row = first + int(np.argmax(between.any(axis=1)))
        raise UnsupportedModel(
            f"{name} is not ternary: row {row} holds more than one magnitude. This model needs training or "
            "compression to become ternary, not conversion."
        )
    return scales


def _model(header: Header, source: GgufSource, layout: Literal["trit2", "trit5"], head: str) -> TernaryModel:
    rope = ROPES.get(header.architecture)
    if rope is None:
        raise UnsupportedModel(
            f"{header.path.name} is of architecture {header.architecture}; "
            f"the ternary engine runs {', '.join(ROPES)}."
        )

    def number(key: str, default: float | None = None) -> float:
        value = header.get(key, default)
        if not isinstance(value, int | float):
            raise BadModelFile(f"{header.path} has no number {header.architecture}{key}: convert it again.")
        return value

    n_embd, n_vocab = source.tensor(EMBEDDING).shape
    heads = int(number(".attention.head_count"))
    name = str(header.get("general.name", "")).lower()
    bitnet = rope == "neox"
    return TernaryModel(
        architecture=header.architecture,
        layers=header.layers,
        n_embd=n_embd,
        n_ff=int(number(".feed_forward_length")),
        n_vocab=n_vocab,
        heads=heads,
        kv_heads=int(number(".attention.head_count_kv", heads)),
        head_dim=int(number(".attention.key_length", n_embd // heads)),
        context=int(number(".context_length", 2048)),
        rope_base=number(".rope.freq_base", 10_000.0),
        epsilon=number(".attention.layer_norm_rms_epsilon"),
        activation="relu2" if bitnet and n_vocab == RELU2_VOCABULARY else "silu",
        rope=rope,
        sub_norms=header.tensor("blk.0.attn_sub_norm.weight") is not None,
        layout=layout,
        planes=3 if "trilm" in name else 1,  # TriLM does not quantise its activations
        head=head,
        embedding=_embedding_type(source.tensor(EMBEDDING)),
    )


def _embedding_type(tensor: Tensor) -> GGMLQuantizationType:
    """F32 where half precision would lose something."""
    exact = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
    return GGMLQuantizationType.F32 if tensor.type in exact else GGMLQuantizationType.F16


def _refuse_unknown(header: Header, model: TernaryModel) -> None:
    """A tensor that the engine does not use would be missed."""
    of_layers = {f"{name}.weight" for name in (*model.matrices(), *model.norms())}
    # bitnet's files may state scales beside the matrices: TQ formats hold them in their blocks already.
    for tensor in header.tensors:
        block = BLOCK.fullmatch(tensor.name)
        known = block[2] in of_layers if block else tensor.name in (EMBEDDING, HEAD, OUTPUT_NORM)
        if not known:
            raise UnsupportedModel(
                f"{header.path.name} has {tensor.name}, which the ternary engine does not use."
            )


def _copy_keys(header: Header, writer: GGUFWriter) -> None:
    """The tokenizer and what the model is called."""
    own = {"general.architecture", "general.alignment", "general.file_type", "general.quantization_version"}
    for key, value in header.metadata.items():
        if not key.startswith(("tokenizer.", "general.")) or key in own:
            continue
        if isinstance(value, Array):
            writer.add_key_value(key, value.values(), GGUFValueType.ARRAY, sub_type=value.type)
        else:
            writer.add_key_value(key, value, header.types[key])
