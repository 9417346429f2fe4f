"""Which matrices stay at 8 bits, so that a file of a given size is as good as it can be.

How much each one matters is measured: windows of the calibration text pass the original decoder layer by
layer, once as it is and once for each of its matrices with that one ternary. The square of what changes in
the rows behind the layer, relative to theirs, is what the matrix loses. Those that lose most for the bytes
that 8 bits take more are kept, as long as there is room.
"""

from collections.abc import Mapping

import numpy as np

from cordee.compress.decoder import Decoder, DecoderLayer
from cordee.compress.fitter import Fitter
from cordee.compress.source import Source
from cordee.convert.ternary_file import LAYOUTS, TernaryModel
from cordee.errors import DoesNotFit

# More tell the same: each matrix is measured by a few thousand rows.
WINDOWS = 4


def measured_losses(source: Source, fitter: Fitter, windows: np.ndarray) -> dict[str, float]:
    """What each matrix of layers loses when it becomes ternary, by names like blk.0.attn_q.

    `windows` is (windows, length) tokens, of which WINDOWS are read.
    """
    model, read = source.model, windows[:WINDOWS]
    hidden = np.stack(list(source.embedded(read)))
    decoder = Decoder(model, windows.shape[1], source.divisors())
    found: dict[str, float] = {}
    for layer in range(model.layers):
        matrices = {name: source.matrix(layer, name) for name in model.matrices()}
        vectors = source.vectors(layer)
        following = _through(decoder, DecoderLayer(matrices, vectors), hidden)
        power = np.square(following).sum(axis=-1)
        for name, weights in matrices.items():
            ternary = fitter.by_itself(layer, name, weights).dense()
            changed = _through(decoder, DecoderLayer(matrices | {name: ternary}, vectors), hidden)
            changed -= following
            found[f"blk.{layer}.{name}"] = float((np.square(changed).sum(axis=-1) / power).mean())
        hidden = following
    return found


def chosen(losses: Mapping[str, float], model: TernaryModel, room_bytes: int) -> tuple[str, ...]:
    """The matrices that are kept if 8 bits may take so much more than ternary codes."""
    costs = {name: _extra_bytes(model, name) for name in losses}
    kept: list[str] = []
    for name in sorted(losses, key=lambda name: (-losses[name] / costs[name], name)):
        if costs[name] <= room_bytes:
            room_bytes -= costs[name]
            kept.append(name)
    return tuple(sorted(kept))


def memory_bytes(model: TernaryModel, window_bytes: int) -> int:
    """What measuring takes: a layer, one of its matrices while it is fitted, and the windows."""
    sizes = [rows * cols for rows, cols in model.matrices().values()]
    return 4 * sum(sizes) + 24 * max(sizes) + WINDOWS * window_bytes


def room_in(size_bytes: int, least_bytes: int, name: str) -> int:
    """What a file of that size leaves for matrices at 8 bits.

    Raises:
        DoesNotFit: not even the ternary model fits.
    """
    if least_bytes > size_bytes:
        raise DoesNotFit(
            f"{name} takes {least_bytes / 1e9:.3f} GB with all matrices ternary, and --size allows "
            f"{size_bytes / 1e9:.3f} GB: allow more, or take fewer planes, larger groups or a smaller --head."
        )
    return size_bytes - least_bytes


def _extra_bytes(model: TernaryModel, name: str) -> int:
    """What a matrix takes more at 8 bits than as ternary codes, of which planes have scales of their own."""
    rows, cols = model.matrices()[name.rpartition(".")[2]]
    spans = -(-cols // model.scale_columns)

    def nbytes(layout: str, planes: int) -> int:
        kind = LAYOUTS[layout]
        groups, quads, quad_bytes = kind.shape(rows, cols)
        return planes * groups * (quads * quad_bytes + 2 * spans * kind.group_rows)

    return max(nbytes("int8", 1) - nbytes(model.layout, model.weight_planes), 1)


def _through(decoder: Decoder, layer: DecoderLayer, hidden: np.ndarray) -> np.ndarray:
    """The rows behind a layer, window by window."""
    return np.concatenate([_window(decoder, layer, window[None]) for window in hidden])


def _window(decoder: Decoder, layer: DecoderLayer, hidden: np.ndarray) -> np.ndarray:
    inner = decoder.output_input(layer, decoder.attention_input(layer, hidden))
    hidden = hidden + inner @ layer.matrices["attn_output"].T
    wide = decoder.down_input(layer, decoder.feed_forward_input(layer, hidden))
    return hidden + wide @ layer.matrices["ffn_down"].T
