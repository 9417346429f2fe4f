"""Checkpoints as MLX packs them, and experts that are stored one by one: seen as tensors of plain floats.

MLX packs weights in words of 32 bits, the lowest bits first. Of a matrix that is ternary a word has 16 codes,
and a weight is row_alpha (code - 1), with one `row_alpha` for each row. Other matrices are "affine": a weight
is scale code + bias, with a `scales` and a `biases` for each group of neighbouring columns (the format of
mlx.core.quantize). Experts lie one behind the other in a tensor of three dimensions; where a checkpoint has
them one by one, they are put together here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from cordee.convert.safetensors import StoredTensor, is_object
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.metadata import FETCH_AGAIN

WORD_BITS = 32
TERNARY_BITS = 2
BITS_USUAL = 4  # of an affine matrix, where config.json says nothing
# A head that some runtimes guess with; it is not the model's.
UNUSED = "lm_head_flash."
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+\.weight)")


# From first and last row (exclusive) to (rows, cols) float32.
Make = Callable[[int, int], np.ndarray]


def plain_tensors(
    stored: Mapping[str, StoredTensor], config: Mapping[str, object]
) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, those packed by MLX as floats and experts put together.

    Raises:
        UnsupportedModel: weights are packed in another way.
        BadModelFile: what belongs to packed weights is missing or does not fit.
    """
    used = {name: tensor for name, tensor in stored.items() if not name.startswith(UNUSED)}
    packed = {name for name, tensor in used.items() if tensor.dtype == "U32"}
    found = dict(used)
    for name in packed:
        base = name.removesuffix(".weight")
        if f"{base}.row_alpha" in used:
            found[name] = _ternary(used[name], found.pop(f"{base}.row_alpha"))
        elif f"{base}.scales" in used and f"{base}.biases" in used:
            beside = found.pop(f"{base}.scales"), found.pop(f"{base}.biases")
            found[name] = _affine(used[name], *beside, _bits_of(config, base))
        else:
            raise UnsupportedModel(
                f"{name} is packed in words of 32 bits without scales that are known here."
            )
    return _together(found)


def _bits_of(config: Mapping[str, object], base: str) -> int:
    """How many bits a code of an affine matrix has: MLX states it for all, or for one by its name."""
    settings = config.get("quantization")
    if not is_object(settings):
        return BITS_USUAL
    own = settings.get(base)
    bits = (own if is_object(own) else settings).get("bits")
    return bits if bits in (4, 8) else BITS_USUAL


def _flat(tensor: StoredTensor) -> StoredTensor:
    """With all dimensions but the last as rows."""
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    return replace(tensor, shape=(rows, tensor.shape[-1])) if len(tensor.shape) != 2 else tensor


def _codes(words: StoredTensor, bits: int) -> Make:
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    return lambda first, last: (
        words.rows(first, last)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    ).reshape(last - first, -1)


def _ternary(words: StoredTensor, alpha: StoredTensor) -> StoredTensor:
    flat = _flat(words)
    rows, cols = flat.shape[0], flat.shape[1] * WORD_BITS // TERNARY_BITS
    if alpha.shape != words.shape[:-1]:
        raise BadModelFile(f"{alpha.name} is {alpha.shape}, not {words.shape[:-1]}: {FETCH_AGAIN}.")
    scales, codes = alpha.all().astype(np.float32), _codes(flat, TERNARY_BITS)

    def make(first: int, last: int) -> np.ndarray:
        return (codes(first, last).astype(np.float32) - 1) * scales[first:last, None]

    return replace(words, dtype="F32", shape=(rows, cols), computed=make)


def _affine(words: StoredTensor, scales: StoredTensor, biases: StoredTensor, bits: int) -> StoredTensor:
    flat, factors, offsets = _flat(words), _flat(scales), _flat(biases)
    rows, cols = flat.shape[0], flat.shape[1] * WORD_BITS // bits
    groups = factors.shape[1]
    if not (factors.shape == offsets.shape and factors.shape[0] == rows and groups and cols % groups == 0):
        raise BadModelFile(f"{scales.name} and its biases do not fit {words.name}: {FETCH_AGAIN}.")
    codes = _codes(flat, bits)

    def make(first: int, last: int) -> np.ndarray:
        grouped = codes(first, last).astype(np.float32).reshape(last - first, groups, -1)
        one, other = factors.rows(first, last)[..., None], offsets.rows(first, last)[..., None]
        return (grouped * one + other).reshape(last - first, cols)

    return replace(words, dtype="F32", shape=(rows, cols), computed=make)


def _together(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts that are stored one by one as one matrix, whose rows are theirs one after the other."""
    single: dict[str, dict[int, StoredTensor]] = {}
    for name in list(tensors):
        if match := _EXPERT.fullmatch(name):
            single.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensors.pop(name)
    for name, experts in single.items():
        parts = [experts[number] for number in sorted(experts)]
        shape = parts[0].shape
        if (
            sorted(experts) != list(range(len(parts)))
            or len(shape) != 2
            or {p.shape for p in parts} != {shape}
        ):
            raise BadModelFile(f"{name}: an expert is missing or has another size: {FETCH_AGAIN}.")
        tensors[name] = _stacked(name, parts, shape)
    return tensors


def _stacked(name: str, parts: list[StoredTensor], each: tuple[int, ...]) -> StoredTensor:
    def make(first: int, last: int) -> np.ndarray:
        strips: list[np.ndarray] = []
        while first < last:
            number, at = divmod(first, each[0])
            end = min(each[0], at + last - first)
            strips.append(parts[number].rows(at, end))
            first += end - at
        return np.concatenate(strips)

    nbytes = sum(part.nbytes for part in parts)
    shape = (len(parts) * each[0], each[1])
    return replace(parts[0], name=name, dtype="F32", shape=shape, nbytes=nbytes, computed=make)
