"""From a GGUF header to what the cluster must know about the model: sizes by layer, where it may be cut."""

from collections.abc import Mapping
from itertools import pairwise

from cordee.cluster.facts import ModelShape
from cordee.errors import BadModelFile, BadRequest, UnsupportedModel
from cordee.models.architectures import Architecture, architecture
from cordee.models.cards import Card
from cordee.models.fit import cell_bytes, row_floats, size_of, vocabulary_size, windowed_layers
from cordee.models.gguf import BLOCK, Header, Tensor
from cordee.models.metadata import CONVERT_AGAIN
from cordee.models.slices import (
    EMBEDDING,
    EMBEDDING_SCALE,
    HEAD,
    SlicePlan,
    cut_step,
    even_cuts,
    plan_slice,
)

# In the names of tensors that hold all experts of a layer; the last dimension counts the experts.
EXPERTS = "_exps."
# Heartbeats and answers carry what follows from a shape in 64 bits, where contexts and streams multiply it. A
# layer of the largest models has a few GB, a token takes some 100 kB of KV cache there.
LAYER_BYTES_LIMIT = 1 << 44
TOKEN_LIMIT = 1 << 24


def model_shape(header: Header, digest: str) -> ModelShape:
    """The shape of a model, whose weights need not be there; `digest` is its name in the cluster.

    From this shape cluster/memory.py computes the same memory for a stage as models/fit.py from the header.

    Raises:
        BadModelFile: the metadata lacks a size, or sizes are absurd.
        UnsupportedModel: no engine runs it.
    """
    rules = architecture(header.architecture) or Architecture(header.architecture)
    layers = _layers(header)
    windowed = windowed_layers(header)
    embedding_bytes = sum(t.nbytes for t in header.tensors if t.name in (EMBEDDING, EMBEDDING_SCALE))
    head_bytes = sum(t.nbytes for t in header.tensors if t.name in HEAD)
    extras = _extras_of_cuts(header)
    shape = ModelShape(
        digest=digest,
        architecture=header.architecture,
        n_embd=size_of(header, ".embedding_length"),
        n_vocab=vocabulary_size(header),
        layer_bytes=tuple(sum(t.nbytes for t in tensors.values()) for tensors in layers),
        active_bytes=tuple(_active_bytes(header, i, tensors) for i, tensors in enumerate(layers)),
        cell_bytes=tuple(cell_bytes(header, i, window) for i, window in enumerate(windowed)),
        row_floats=tuple(row_floats(header, tensors) for tensors in layers),
        windowed=tuple(windowed),
        embedding_bytes=embedding_bytes,
        extra_bytes=extras[0] if extras else 0,
        last_extra_bytes=extras[1] if extras else 0,
        whole_extra_bytes=sum(t.nbytes for t in header.tensors if not BLOCK.fullmatch(t.name)),
        active_head_bytes=head_bytes + (embedding_bytes if header.tied else 0),
        cuttable=extras is not None,
        cut_step=cut_step(header, rules),
        minimum_layers=rules.minimum_layers,
        refused_counts=rules.whole_layer_counts,
    )
    large = max(*shape.layer_bytes, shape.whole_extra_bytes, shape.extra_bytes, shape.last_extra_bytes)
    if large > LAYER_BYTES_LIMIT or max(*shape.cell_bytes, *shape.row_floats, shape.n_vocab) > TOKEN_LIMIT:
        raise BadModelFile(f"{header.name} claims sizes that no model has: {CONVERT_AGAIN}.")
    return shape


def card_shape(card: Card) -> ModelShape | None:
    """The shape of a model that is only known by its card; None if the card does not give it."""
    shape = card.shape
    if shape is None:
        return None
    rules = architecture(card.architecture) or Architecture(card.architecture)
    return ModelShape(
        digest=card.name,
        architecture=card.architecture,
        n_embd=shape.n_embd,
        n_vocab=shape.n_vocab,
        layer_bytes=(shape.layer_bytes,) * card.layers,
        active_bytes=(shape.active_bytes,) * card.layers,
        cell_bytes=(shape.cell_bytes,) * card.layers,
        row_floats=(shape.row_floats,) * card.layers,
        windowed=tuple((layer + 1) % shape.window_period != 0 for layer in range(card.layers)),
        embedding_bytes=shape.embedding_bytes,
        extra_bytes=0,
        last_extra_bytes=shape.last_extra_bytes,
        whole_extra_bytes=shape.whole_extra_bytes,
        active_head_bytes=shape.head_bytes,
        cuttable=rules.certified and rules.obstacle(card.layers) is None,
        cut_step=rules.cut_step,
        minimum_layers=rules.minimum_layers,
        refused_counts=rules.whole_layer_counts,
    )


def _layers(header: Header) -> list[dict[str, Tensor]]:
    """The tensors of each layer that a token passes, by their names within the layer, without `.weight`."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(header.layers)]
    for tensor in header.tensors:
        block = BLOCK.fullmatch(tensor.name)
        if block and int(block[1]) < header.layers:
            layers[int(block[1])][block[2].removesuffix(".weight")] = tensor
    return layers


def _active_bytes(header: Header, layer: int, tensors: Mapping[str, Tensor]) -> int:
    """The bytes of a layer that are read for one token: of its experts, those that the router chooses."""
    active = 0
    for tensor in tensors.values():
        if EXPERTS in tensor.name:
            experts = size_of(header, ".expert_count", default=tensor.shape[-1]) or 1
            chosen = min(size_of(header, ".expert_used_count", layer), experts)
            active += tensor.nbytes * chosen // experts
        else:
            active += tensor.nbytes
    return active


def _extras_of_cuts(header: Header) -> tuple[int, int] | None:
    """Bytes beside the layers in a stage without the head, and in one with it; None if no cut is allowed."""
    try:
        cuts = even_cuts(header, 2)
        first, last = (plan_slice(header, *bounds) for bounds in pairwise(cuts))
    except (BadRequest, UnsupportedModel):
        return None
    return _bytes_outside(first), _bytes_outside(last)


def _bytes_outside(plan: SlicePlan) -> int:
    return sum(piece.nbytes for piece in plan.pieces if not BLOCK.fullmatch(piece.name))
