"""Mixtures of experts, windows and partly rotated heads (`maple`), as the files of others state them.

The keys of GGUF are those of llama.cpp (src/models/maple.cpp), those of config.json the ones that its
conversion/maple.py reads. What is not known here is refused by its name: a mixture that is computed in
another way still gives fluent text.
"""

from collections.abc import Mapping
from dataclasses import replace

from cordee.convert.safetensors import is_array, is_object
from cordee.convert.ternary_file import TernaryModel
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.fit import size_of
from cordee.models.gguf import UPDATE, Header
from cordee.models.metadata import CONVERT_AGAIN, FETCH_AGAIN, Array

EXPERTS_LIMIT = 1024  # native/src/base/limits.h
# What a mixture may be beside softmax over all experts, shared out among the best: as keys of GGUF, with what
# they must be if they are there.
PLAIN: Mapping[str, tuple[object, ...]] = {
    ".expert_gating_func": (0, 1),
    ".expert_weights_norm": (True,),
    ".expert_weights_scale": (0.0, 1.0),
    ".expert_shared_count": (0,),
    ".expert_group_count": (0, 1),
    ".leading_dense_block_count": (0,),
    ".interleave_moe_layer_step": (0, 1),
}
# The same of config.json.
PLAIN_ON_HUB: Mapping[str, tuple[object, ...]] = {
    "norm_topk_prob": (True,),
    "num_shared_experts": (0, None),
    "moe_router_enable_expert_bias": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "use_qk_norm": (True,),
}
# Maple's gate has this limit in the model's own code; config.json does not say so.
GATE_LIMIT = 7.0


def with_mixture(model: TernaryModel, header: Header) -> TernaryModel:
    """The model with what its header says of experts, windows and the rotation of heads.

    Raises:
        UnsupportedModel: it is a mixture of a kind that the engine does not have.
        BadModelFile: a key is missing or impossible.
    """
    for key, allowed in PLAIN.items():
        if header.get(key, allowed[0]) not in allowed:
            raise UnsupportedModel(
                f"{header.name}: {header.key(key)} is {header.get(key)!r}, which the ternary engine does not "
                f"know: {UPDATE}."
            )
    base = header.number(".rope.freq_base_swa", model.rope_base)
    model = replace(model, rope_layers="windowed", rope_base=base)
    dims = size_of(header, ".rope.dimension_count_swa", default=size_of(header, ".rope.dimension_count"))
    window = header.count(".attention.sliding_window")
    pattern = header.metadata.get(header.key(".attention.sliding_window_pattern"))
    if not window or not isinstance(pattern, Array) or len(pattern) != header.layers:
        raise BadModelFile(f"{header.name} does not say which layers have a window: {CONVERT_AGAIN}.")
    return _checked(
        replace(
            model,
            experts=header.count(".expert_count"),
            experts_used=header.count(".expert_used_count"),
            n_ff=int(_same_in_all(header, ".expert_feed_forward_length")),
            window=window,
            windowed=tuple(bool(item) for item in pattern.values()),
            rope_dims=dims,
            gate_limit=_same_in_all(header, ".swiglu_clamp_exp"),
        ),
        header.name,
        CONVERT_AGAIN,
    )


def with_mixture_of_config(model: TernaryModel, config: Mapping[str, object], title: str) -> TernaryModel:
    """The same from a config.json of the hub. Raises as `with_mixture`."""
    for key, allowed in PLAIN_ON_HUB.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UnsupportedModel(
                f"{title}: config.json has {key} {config[key]!r}, which the ternary engine does not know: "
                f"{UPDATE}."
            )
    parameters = config.get("rope_parameters")
    given = parameters if is_object(parameters) else config
    factor = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    known = {"sliding_attention", "full_attention"}
    fits = is_array(kinds) and len(kinds) == model.layers and set(map(str, kinds)) <= known
    if not fits or not is_array(kinds) or type(window) is not int or not isinstance(factor, int | float):
        raise BadModelFile(
            f"{title}: config.json does not say which layers have a window, or how long: {FETCH_AGAIN}."
        )
    rotated_everywhere = config.get("nope_on_global_attention", True) is False
    sizes = {
        "experts": config.get("num_experts"),
        "experts_used": config.get("num_experts_per_tok"),
        "n_ff": config.get("moe_intermediate_size"),
    }
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size < 1 << 24:
            raise BadModelFile(f"{title}: config.json has no size for {name}: {FETCH_AGAIN}.")
    return _checked(
        replace(
            model,
            **sizes,
            window=window,
            windowed=tuple(kind == "sliding_attention" for kind in kinds),
            rope_dims=int(model.head_dim * factor),
            rope_layers="all" if rotated_everywhere else "windowed",
            gate_limit=GATE_LIMIT,
        ),
        title,
        FETCH_AGAIN,
    )


def _checked(model: TernaryModel, title: str, remedy: str) -> TernaryModel:
    """Refuse sizes that the engine would refuse."""
    experts_fit = 0 < model.experts_used <= model.experts <= EXPERTS_LIMIT
    dims_fit = 0 < model.rope_dims <= model.head_dim and model.rope_dims % 2 == 0
    if not (experts_fit and dims_fit and model.window > 0 and 0 <= model.gate_limit < 1e6):
        raise BadModelFile(f"{title} has experts, a window or a rotation that no model has: {remedy}.")
    return model


def _same_in_all(header: Header, key: str) -> float:
    """A number that a file may give for each layer, where all layers have the same; 0 if it is not there."""
    value = header.metadata.get(header.key(key))
    if not isinstance(value, Array):
        return header.number(key, 0.0)
    found = set(value.values())
    if len(found) != 1 or not isinstance(one := found.pop(), int | float):
        raise UnsupportedModel(
            f"{header.name}: {header.key(key)} differs from layer to layer, which the ternary engine does "
            f"not know: {UPDATE}."
        )
    return float(one)
