"""Cutting a model: a contiguous range of layers as a GGUF file of its own that libllama loads as it is.

A slice is not just fewer layers. libllama counts layers from 0 in every file it loads, so everything that
depends on a layer's position is rewritten: tensor names, arrays by layer, the sliding-window pattern, the
number of leading dense layers. Every slice but the last takes rows and gives rows: it needs no tokenizer and
no vocabulary, but the loader requires an embedding, so it gets one of a few zero rows. The last slice has the
head; where the head's weights are not those of the embedding, the embedding (which nobody reads) becomes
zeros of the cheapest type.
What the loader requires: llama.cpp, src/llama-model.cpp and src/models/*.cpp.
"""

import hashlib
import re
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import lcm, prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.files import atomic_file, write_all
from cordee.models.architectures import Architecture, architecture
from cordee.models.gguf import BLOCK, LAYERS_LIMIT, MAGIC, Header, Tensor, TensorType, engine_of
from cordee.models.metadata import SCALARS, Array, Scalar, Value
from cordee.system.disk import pread

# Copying reads this much at a time: large enough for full disk speed, small beside any model.
COPY_BYTES = 4 << 20
# Rows of the placeholder embedding in slices without a head; any number that is not zero would do.
STAND_IN_ROWS = 32
# Types for an embedding of zeros that the loader wants at full size, from the cheapest to the most general.
ZERO_TYPES = (GGMLQuantizationType.Q1_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16)

# Arrays with one item per layer, after the architecture's prefix (llama_model_loader::get_key_or_arr).
PER_LAYER = frozenset(
    f".{name}"
    for name in (
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
    )
)
# The same for keys without a prefix: the activation of Apertus.
PER_LAYER_UNPREFIXED = frozenset({"xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"})
# Arrays that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = frozenset({".rope.dimension_sections"})
# Tensors outside the layers that every slice needs: small, and read by the graph of each layer.
SHARED = frozenset(
    {
        "output_norm.weight",
        "output_norm.bias",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }
)
EMBEDDING = "token_embd.weight"
HEAD = frozenset({"output.weight", "output.bias", "output.scale"})
EMBEDDING_SCALE = "token_embd.scale"  # of an embedding in the ternary engine's codes, as the next ones
EMBEDDING_SIGNS = "rotation_embedding.signs"
ROTATION = re.compile(r"rotation_\w+\.signs")

_WINDOW_PATTERN = ".attention.sliding_window_pattern"

# A metadata field to be written: a scalar, an array still in its file, or items with their type.
Items = tuple[GGUFValueType, Sequence[Scalar]]
Fields = dict[str, tuple[GGUFValueType, Value | Items]]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SliceFile:
    """A slice on disk: layers `first` to `last` (exclusive)."""

    path: Path
    first: int
    last: int
    digest: str  # 'sha256:' and 64 hex digits: of the file, or of the chunks' digests if it was assembled
    nbytes: int


@dataclass(frozen=True)
class SliceTensor:
    """A tensor of a slice under its new name: copied from `source`, or zeros where that is None."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    nbytes: int
    source: Tensor | None


@dataclass(frozen=True)
class SlicePlan:
    """All of a slice but its weights: the bytes of its header (padded), then the tensors in order."""

    header: bytes
    pieces: tuple[SliceTensor, ...]
    alignment: int

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(_padded(piece.nbytes, self.alignment) for piece in self.pieces)

    def places(self) -> Iterator[tuple[SliceTensor, int, int]]:
        """(tensor, where it begins in the file, where the next one begins): zeros fill the gap."""
        at = len(self.header)
        for piece in self.pieces:
            end = at + _padded(piece.nbytes, self.alignment)
            yield piece, at, end
            at = end


def cut(
    header: Header,
    first: int,
    last: int,
    path: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> SliceFile:
    """Write layers `first` to `last` (exclusive) of a model to `path`; all of them, to merge a sharded set.

    Streams, so memory does not depend on the model. `progress(done_bytes, total_bytes)` is called every few
    MiB. The same model and range give the same bytes.

    Raises:
        UnsupportedModel: the architecture is not certified for cutting (`force` overrides that), or this
            model cannot be cut there at all.
        BadRequest: no such layers.
        BadModelFile: the model changed while it was read.
        StorageFailed: no room on disk; nothing is left there.
    """
    plan = plan_slice(header, first, last, force=force)
    digest, done = hashlib.sha256(), 0
    with atomic_file(path) as file:
        for chunk in _chunks(plan):
            write_all(file, chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, plan.nbytes)
    return SliceFile(Path(path), first, last, f"sha256:{digest.hexdigest()}", done)


def even_cuts(header: Header, stages: int) -> list[int]:
    """Where to cut a model into stages of about equal bytes: boundaries [0, ..., layers].

    The head's bytes count for the last stage, because they are read for every token as a layer's are.

    Raises:
        BadRequest: the model has not enough places to cut.
    """
    if stages == 1:
        return [0, header.layers]
    if not 1 < stages <= header.layers:
        raise _too_many(header, stages)
    rules = architecture(header.architecture) or Architecture(header.architecture)
    step = cut_step(header, rules)
    places = [*range(0, header.layers, step), header.layers]
    layer_bytes = [0] * (header.layers + header.extra_layers)
    for tensor in header.tensors:
        if block := BLOCK.fullmatch(tensor.name):
            layer_bytes[int(block[1])] += tensor.nbytes
    costs = [sum(layer_bytes[a:b]) for a, b in pairwise(places)]
    head = header.tensor(EMBEDDING if header.tied else "output.weight")
    costs[-1] += head.nbytes if head else 0
    pattern = window_pattern(header, rules)
    best = _balanced(
        costs, stages, lambda a, b: not _range_fault(header, rules, pattern, places[a], places[b])
    )
    if best is None:
        raise _too_many(header, stages)
    return [places[index] for index in best]


def _too_many(header: Header, stages: int) -> BadRequest:
    return BadRequest(
        f"{header.name} with its {header.layers} layers cannot be cut into {stages} stages: ask for fewer.",
        "stages",
    )


def plan_slice(header: Header, first: int, last: int, *, force: bool = False) -> SlicePlan:
    """What a slice will be; reads no weights. Raises as `cut` does."""
    if not 0 <= first < last <= header.layers:
        raise BadRequest(f"{header.name} has the layers 0 to {header.layers}, not {first} to {last}.")
    whole = (first, last) == (0, header.layers)
    if whole:
        fields, pieces = _whole_fields(header), _whole_pieces(header)
    else:
        rules = architecture(header.architecture) or Architecture(header.architecture)
        _check_model(header, rules, force)
        pattern = window_pattern(header, rules)
        if fault := _range_fault(header, rules, pattern, first, last):
            raise UnsupportedModel(f"{header.name} cannot be cut from {first} to {last}: {fault}.")
        window = pattern[first:last] if pattern else None
        fields = _slice_fields(header, rules, window, first, last)
        unread = rules.dense_tensors if window and all(window) else ()
        pieces = _slice_pieces(header, unread, first, last)
    return SlicePlan(_header_bytes(fields, pieces, header.alignment), pieces, header.alignment)


def plan_embedding(header: Header) -> SlicePlan:
    """A slice without layers in which tokens can be looked up: the embedding, and what its codes need.

    Raises:
        BadModelFile: the model has no embedding.
    """
    beside = (EMBEDDING_SCALE, EMBEDDING_SIGNS)
    return plan_outside(header, {EMBEDDING, *(name for name in beside if header.tensor(name))})


def plan_outside(header: Header, names: Collection[str]) -> SlicePlan:
    """A slice without layers: the metadata as it is, and the tensors of these names.

    Raises:
        BadModelFile: the model has no such tensor.
    """
    if missing := sorted(set(names) - {tensor.name for tensor in header.tensors}):
        raise BadModelFile(f"{header.name} has no {missing[0]}.")
    pieces = tuple(piece for piece in _whole_pieces(header) if piece.name in names)
    return SlicePlan(_header_bytes(_whole_fields(header), pieces, header.alignment), pieces, header.alignment)


def _check_model(header: Header, rules: Architecture, force: bool) -> None:
    """Raise UnsupportedModel if slices of this model would be wrong, or have not been checked."""
    if fault := _model_fault(header, rules):
        raise UnsupportedModel(f"{header.name} cannot be cut: {fault}. Run it in one stage.")
    if not rules.certified and not force:
        raise UnsupportedModel(
            f"{header.name} has the architecture {rules.name!r}, whose cuts nobody has checked: "
            "run it in one stage, or override the check."
        )


def _model_fault(header: Header, rules: Architecture) -> str | None:
    if obstacle := rules.obstacle(header.layers):
        return obstacle
    for key in rules.must_be_set:
        if not header.number(key, 0):
            return f"its file lacks {rules.name}{key}, which libllama then computes from the number of layers"
    for key in rules.must_be_zero:
        if header.number(key, 0):
            return f"its {rules.name}{key} ties layers to the tokens or to each other"
    sections = header.metadata.get(header.key(".rope.dimension_sections"), 0)
    if any(sections.values()) if isinstance(sections, Array) else sections:
        return "it gives each row several positions (M-RoPE)"
    heads_by_layer = isinstance(header.metadata.get(f"{rules.name}.attention.head_count"), Array)
    if heads_by_layer and not header.count(".attention.key_length", 0):
        return "its head size follows from its first layer"
    if header.metadata.get("cordee.ternary.layout") == "pentium2":
        return "it is laid out for machines that compute alone"
    if "general.tensor_extra.name" in header.metadata:
        return "it has settings by tensor name"
    return None


def _range_fault(
    header: Header, rules: Architecture, pattern: list[bool] | None, first: int, last: int
) -> str | None:
    """Why these layers cannot be a slice of a model that can be cut elsewhere."""
    # The last boundary needs no step: no layer is counted after it.
    step = cut_step(header, rules)
    if first % step or (last % step and last != header.layers):
        return f"this model can only be cut at multiples of {step} layers"
    if last - first < rules.minimum_layers:
        return f"a slice of this model needs at least {rules.minimum_layers} layers"
    if last - first in rules.whole_layer_counts:
        return f"libllama takes {last - first} layers for another model"
    if pattern and not any(pattern[first:last]) and engine_of(header) == "llama":
        return "a slice of this model needs a layer with a sliding window"
    return None


def cut_step(header: Header, rules: Architecture) -> int:
    """Boundaries must be multiples of this: layers without RoPE, or with experts, come at such intervals."""
    return lcm(rules.cut_step, header.count(".interleave_moe_layer_step", 0, limit=LAYERS_LIMIT) or 1)


def _whole_fields(header: Header) -> Fields:
    """The metadata as it is, without what describes a set of shards."""
    return {
        key: (header.types[key], value)
        for key, value in header.metadata.items()
        if not key.startswith("split.")
    }


def _slice_fields(
    header: Header, rules: Architecture, window: list[bool] | None, first: int, last: int
) -> Fields:
    """The metadata of a slice. Layers for multi-token prediction are left out: no engine here runs them."""
    is_last = last == header.layers
    fields: Fields = {}
    for key, (kind, value) in _whole_fields(header).items():
        if key.startswith("tokenizer.") and not is_last:
            continue
        if isinstance(value, Array) and _goes_by_layer(header, key, value):
            fields[key] = (kind, (value.type, value.values()[first:last]))
        else:
            fields[key] = (kind, value)
    number = GGUFValueType.UINT32
    own: Fields = {".block_count": (number, last - first)}
    if not is_last:
        fields["tokenizer.ggml.model"] = (GGUFValueType.STRING, "none")
        own[".vocab_size"] = (number, STAND_IN_ROWS)
    if header.extra_layers:
        own[".nextn_predict_layers"] = (number, 0)
    if leading := header.count(".leading_dense_block_count", 0, limit=LAYERS_LIMIT):
        own[".leading_dense_block_count"] = (number, min(max(0, leading - first), last - first))
    if window:
        own[_WINDOW_PATTERN] = (GGUFValueType.ARRAY, (GGUFValueType.BOOL, window))
    if rules.embedding_scale == "metadata":
        own[".embedding_scale"] = (GGUFValueType.FLOAT32, 0.0)
    for name, layer in (("first", first), ("last", last), ("layers", header.layers)):
        fields[f"cordee.slice.{name}"] = (number, layer)
    return fields | {header.architecture + key: field for key, field in own.items()}


def _goes_by_layer(header: Header, key: str, value: Array) -> bool:
    """Whether an array of the metadata has one item per layer. If that is unclear, the model is not cut."""
    if key.startswith(("tokenizer.", "general.")) or value.type is GGUFValueType.STRING:
        return False
    short = key.removeprefix(header.architecture)
    by_layer = short in PER_LAYER or key in PER_LAYER_UNPREFIXED
    fits = value.count in (header.layers, header.layers + header.extra_layers)
    if by_layer and not fits:
        raise BadModelFile(f"{header.name}: {key} has {value.count} items for {header.layers} layers.")
    if fits and not by_layer and short not in NOT_PER_LAYER:
        raise UnsupportedModel(f"{header.name} cannot be cut: {key} may or may not be by layer.")
    return by_layer


def window_pattern(header: Header, rules: Architecture) -> list[bool] | None:
    """Which layers use the sliding window, one item per layer; None if the model has no window.

    The file may give the whole pattern, or its period; otherwise libllama's built-in period applies
    (llama_hparams::set_swa_pattern). libllama would abort on a slice that has a window but no such layer.
    """
    given = header.metadata.get(header.key(_WINDOW_PATTERN))
    if isinstance(given, Array):
        return _given_pattern(header, given)
    if not rules.sliding_window_period or not header.count(".attention.sliding_window", 0):
        return None
    period = header.count(_WINDOW_PATTERN, rules.sliding_window_period, limit=LAYERS_LIMIT)
    dense = 0 if rules.dense_first else period - 1
    return [period == 0 or layer % period != dense for layer in range(header.layers)]


def _given_pattern(header: Header, given: Array) -> list[bool]:
    if given.type is GGUFValueType.STRING or given.count not in (
        header.layers,
        header.layers + header.extra_layers,
    ):
        header.refuse(_WINDOW_PATTERN, given, f"a list of {header.layers} flags")
    return [bool(item) for item in given.values()][: header.layers]


def _whole_pieces(header: Header) -> tuple[SliceTensor, ...]:
    return tuple(SliceTensor(t.name, t.shape, t.type, t.nbytes, t) for t in header.tensors)


def _slice_pieces(header: Header, unread: Sequence[str], first: int, last: int) -> tuple[SliceTensor, ...]:
    """The tensors of a slice, in the order of the model, without those that the loader would not read."""
    is_last = last == header.layers
    pieces: list[SliceTensor] = []
    for tensor in header.tensors:
        block = BLOCK.fullmatch(tensor.name)
        if block:
            layer = int(block[1])
            if first <= layer < last:
                name = f"blk.{layer - first}.{block[2]}"
                pieces.append(SliceTensor(name, tensor.shape, tensor.type, tensor.nbytes, tensor))
        elif tensor.name == EMBEDDING or tensor.name in HEAD:
            keep = is_last and (tensor.name in HEAD or header.tied)
            pieces.append(
                SliceTensor(tensor.name, tensor.shape, tensor.type, tensor.nbytes, tensor)
                if keep
                else _stand_in(tensor, full_size=is_last)
            )
        elif tensor.name in unread or (tensor.name == EMBEDDING_SCALE and not (is_last and header.tied)):
            continue
        elif tensor.name in (*SHARED, EMBEDDING_SCALE) or ROTATION.fullmatch(tensor.name):
            pieces.append(SliceTensor(tensor.name, tensor.shape, tensor.type, tensor.nbytes, tensor))
        else:
            raise UnsupportedModel(f"{header.name} cannot be cut: where {tensor.name} belongs is unknown.")
    return tuple(pieces)


def _stand_in(tensor: Tensor, full_size: bool) -> SliceTensor:
    """Zeros in place of a tensor that the loader requires and nobody reads."""
    if tensor.type is GGMLQuantizationType.I8:  # codes: the ternary engine wants no embedding
        shape, kind = (1, STAND_IN_ROWS), GGMLQuantizationType.F32
    elif not full_size:
        shape, kind = (*tensor.shape[:-1], STAND_IN_ROWS), GGMLQuantizationType.F32
    else:
        shape = tensor.shape
        kind = next(kind for kind in ZERO_TYPES if shape[0] % GGML_QUANT_SIZES[kind][0] == 0)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return SliceTensor(tensor.name, shape, kind, prod(shape) // block * block_bytes, None)


def _header_bytes(fields: Fields, pieces: Sequence[SliceTensor], alignment: int) -> bytes:
    """Magic, metadata and tensor list in GGUF version 3, padded to where the tensors start."""
    out = [MAGIC, struct.pack("<IQQ", 3, len(pieces), len(fields))]
    for key, (kind, value) in fields.items():
        out += [_string(key), struct.pack("<I", kind), _packed(kind, value)]
    offset = 0
    for piece in pieces:
        shape = struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape)
        out += [_string(piece.name), shape, struct.pack("<IQ", piece.type, offset)]
        offset += _padded(piece.nbytes, alignment)
    header = b"".join(out)
    return header.ljust(_padded(len(header), alignment), b"\0")


def _packed(kind: GGUFValueType, value: Value | Items) -> bytes:
    if isinstance(value, Array):
        return struct.pack("<IQ", value.type, value.count) + value.raw()
    if isinstance(value, tuple):
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(map(SCALARS[item_kind].pack, items))
    return _string(value) if isinstance(value, str) else SCALARS[kind].pack(value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _chunks(plan: SlicePlan) -> Iterator[bytes]:
    """The bytes of a slice in order, at most COPY_BYTES at a time (the header apart)."""
    yield plan.header
    for piece in plan.pieces:
        yield from _zeros(piece.nbytes) if piece.source is None else _tensor_bytes(piece.source)
        yield bytes(_padded(piece.nbytes, plan.alignment) - piece.nbytes)


def _zeros(nbytes: int) -> Iterator[bytes]:
    for start in range(0, nbytes, COPY_BYTES):
        yield bytes(min(COPY_BYTES, nbytes - start))


def _tensor_bytes(tensor: Tensor) -> Iterator[bytes]:
    try:
        with tensor.path.open("rb", buffering=0) as file:
            for start in range(0, tensor.nbytes, COPY_BYTES):
                wanted = min(COPY_BYTES, tensor.nbytes - start)
                chunk = pread(file.fileno(), wanted, tensor.offset + start)
                if len(chunk) != wanted:
                    raise BadModelFile(f"{tensor.path} became shorter while it was cut: fetch it again.")
                yield chunk
    except OSError as error:
        raise BadModelFile(f"{tensor.path} cannot be read ({error.strerror}).") from error


def _balanced(costs: Sequence[int], runs: int, allowed: Callable[[int, int], bool]) -> list[int] | None:
    """Boundaries that cut `costs` into `runs` allowed runs with the smallest possible largest sum."""
    total = [0, *accumulate(costs)]
    # best[end] is (largest sum, boundaries) of the first `end` costs, in the runs made so far.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(runs):
        best = {
            end: min(options)
            for end in range(1, len(total))
            if (
                options := [
                    (max(largest, total[end] - total[start]), [*boundaries, end])
                    for start, (largest, boundaries) in best.items()
                    if start < end and allowed(start, end)
                ]
            )
        }
    return best[len(costs)][1] if len(costs) in best else None
