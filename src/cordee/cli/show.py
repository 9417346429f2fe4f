"""`cordee show`: what a model is, and whether it fits this machine; from its header or its card."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import known, options
from cordee.errors import BadRequest, ModelNotFound
from cordee.terminal import output

if TYPE_CHECKING:
    from pathlib import Path

    from cordee.cluster.demand import SizeRequest
    from cordee.cluster.facts import ModelShape
    from cordee.cluster.memory import StageShape
    from cordee.models.cards import Card
    from cordee.models.gguf import Header


# What runs a file, and why.
ENGINES = {
    "ternary": "the ternary engine, for which the file is laid out",
    "llama": "libllama; only converted models of -1, 0 and 1 run on the ternary engine",
}


@click.command()
@click.argument("model")
@options.stages
@options.context
@options.sequences
@options.as_json
def show(model: str, stages: int, context: int | None, sequences: int | None, as_json: bool) -> None:
    """Show what a model is, and whether it fits this machine when served with these options.

    MODEL is a model in the store or of the cluster, or one that `cordee models` lists; nothing is downloaded
    for it.
    """
    from cordee.models.store import Store

    store = Store()
    try:
        stored = store.get(model)
    except ModelNotFound:
        facts = _without_a_file(model, stages, context, sequences)
        facts = facts or _of_bundled(model, stages, context, sequences)
        if facts is None:
            raise known.unknown(store, model) from None
    else:
        facts = known.facts_of_file(stored) | _of_file(stored.path, stored.name, stages, context, sequences)
        facts["batch_invariance"] = store.notes(stored.digest)
    if as_json:
        output.print_json(facts)
    else:
        output.print_facts(_lines(facts))
        click.echo()
        _print_stages(facts["fit"]["stages"])


def _of_file(
    path: "Path", name: str, stages: int, context: int | None, sequences: int | None
) -> dict[str, Any]:
    """What a model's file says, and how it fits."""
    from cordee.machine.sizing import size_request
    from cordee.models.cards import cards
    from cordee.models.fit import own_context, stage_shapes
    from cordee.models.gguf import read_header
    from cordee.models.slices import even_cuts

    header = read_header(path, name=name)
    requested = size_request(own_context(header), context, sequences, name)
    fit = _fit(name, stage_shapes(header, stages), even_cuts(header, stages), requested)
    return _facts_of_header(header, cards().get(name)) | {"fit": fit}


def _of_bundled(model: str, stages: int, context: int | None, sequences: int | None) -> dict[str, Any] | None:
    """A model that comes with the program and is not in the store yet; None if this is no such model."""
    from cordee.models.cards import cards

    card = cards().get(model)
    if card is None or card.path is None:
        return None
    about = _afar(model, "it comes with Cordée and enters the store when it is used")
    facts = about | _of_file(card.path, model, stages, context, sequences)
    return facts | {"bytes": card.path.stat().st_size}


def _without_a_file(
    model: str, stages: int, context: int | None, sequences: int | None
) -> dict[str, Any] | None:
    """A model that is not here, as the cluster knows it or from its card; None if neither does."""
    from cordee.cluster.memory import stage_of
    from cordee.machine.sizing import size_request
    from cordee.models.cards import cards
    from cordee.models.shape import card_shape

    card, found = cards().get(model), (known.cluster_models() or {}).get(model)
    if found is not None:
        shape, source = _shape_in_cluster(model), known.where(found)
    elif card is not None and card.path is None:
        shape, source = card_shape(card), f"`cordee pull {model}` fetches it from the hub"
    else:
        return None
    if shape is None:
        return None
    if stages > 1:
        raise BadRequest(
            f"{model} is not on this machine: `cordee plan {model}` says how a cluster would cut it.",
            "stages",
        )
    requested = size_request(card.context if card else None, context, sequences, model)
    facts = _afar(model, source) | _facts_of_shape(shape, card)
    fit = _fit(model, [stage_of(shape, 0, shape.layers)], [0, shape.layers], requested)
    return facts | {"bytes": facts["weights_bytes"], "fit": fit}


def _afar(model: str, source: str) -> dict[str, Any]:
    """The facts of a model that is not in the store."""
    absent = dict.fromkeys(("digest", "path", "added"))
    return {"name": model, **absent, "source": source, "batch_invariance": {}}


def _shape_in_cluster(model: str) -> "ModelShape":
    from cordee.agent import control
    from cordee.cluster.demand import SizeRequest

    return control.ask(
        "POST", "/plan", control.PlanRequest(model, None, SizeRequest(None, None, 0)), control.Planned
    ).shape


def _facts_of_header(header: "Header", card: "Card | None") -> dict[str, Any]:
    """What the file says of the model: shape, size, bytes by quantisation; the card has the licence."""
    from cordee.models.fit import keeps_positions, own_context, parameter_count
    from cordee.models.gguf import engine_of

    kinds: Counter[str] = Counter()
    for tensor in header.tensors:
        kinds[tensor.type.name] += tensor.nbytes
    return {
        "engine": engine_of(header),
        "title": card.title if card else header.text("general.name", "") or None,
        "license": card.license if card else header.text("general.license", "") or None,
        "notes": card.notes if card else None,
        "architecture": header.architecture,
        "layers": header.layers,
        "parameters": parameter_count(header),
        "context": own_context(header),
        "weights_bytes": header.size_bytes,
        "quantization_bytes": dict(kinds.most_common()),
        "cuts": _cuts(header.architecture, header.layers),
        "speculation": keeps_positions(header),
    }


def _facts_of_shape(shape: "ModelShape", card: "Card | None") -> dict[str, Any]:
    """The same of a model whose file is not here."""
    return {
        "engine": None,
        "title": card.title if card else None,
        "license": card.license if card else None,
        "notes": card.notes if card else None,
        "architecture": shape.architecture,
        "layers": shape.layers,
        "parameters": card.parameters if card else None,
        "context": card.context if card else None,
        "weights_bytes": sum(shape.layer_bytes) + shape.whole_extra_bytes,
        "quantization_bytes": {},
        "cuts": _cuts(shape.architecture, shape.layers),
        "speculation": None,
    }


def _cuts(name: str, layers: int) -> dict[str, Any]:
    """Whether a model of this architecture may be cut into stages, and why not."""
    from cordee.models.architectures import architecture

    rules = architecture(name)
    if rules is None or not rules.certified:
        reason = f"no test has certified cuts of {name}"
    else:
        reason = rules.obstacle(layers)
    return {"allowed": reason is None, "reason": reason}


def _fit(
    model: str, shapes: "list[StageShape]", cuts: Sequence[int], requested: "SizeRequest"
) -> dict[str, Any]:
    """What the stages would take of this machine's free memory, and whether that is enough."""
    from cordee.machine import sizing
    from cordee.models.fit import verdict

    room = sizing.usable_memory(sizing.chosen_devices(()))
    found = verdict(shapes, requested, room, f"cordee serve {model}")
    return {
        "fits": found.fits,
        "advice": found.advice,
        "need_bytes": found.need_bytes,
        "have_bytes": found.have_bytes,
        **found.demand._asdict(),
        "stages": [
            {"layers": layers} | asdict(fit) | {"total_bytes": fit.total_bytes}
            for layers, fit in zip(pairwise(cuts), found.stages, strict=True)
        ],
    }


def _print_stages(stages: list[dict[str, Any]]) -> None:
    kinds = ("weights", "kv", "scratch", "runtime", "total")
    rows = [
        (
            f"{stage['layers'][0]}-{stage['layers'][1] - 1}",
            *(output.size(stage[f"{kind}_bytes"]) for kind in kinds),
        )
        for stage in stages
    ]
    output.print_table(("LAYERS", "WEIGHTS", "KV CACHE", "SCRATCH", "RUNTIME", "TOTAL"), rows)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts for people; batch invariance as tried with the installed build of libllama."""
    from cordee.engine.llama.libllama import build

    weights, kinds = facts["weights_bytes"], facts["quantization_bytes"].items()
    mix = ", ".join(f"{name} {100 * nbytes / weights:.0f} %" for name, nbytes in kinds)
    lines = [
        ("Model", f"{facts['name']} ({facts['title'] or 'no title'})"),
        ("Licence", facts["license"] or "not stated in the file"),
    ]
    if facts["path"]:
        lines.append(("Source", f"{facts['source']}, added {facts['added'][:10]}"))
        lines.append(("Digest", facts["digest"]))
    else:
        lines.append(("Source", f"not in the store; {facts['source']}"))
    lines.append(("Architecture", f"{facts['architecture']}, {facts['layers']} layers"))
    if facts["engine"]:
        lines.append(("Engine", ENGINES[facts["engine"]]))
    if facts["parameters"]:
        lines.append(("Parameters", output.count(facts["parameters"])))
    lines += [
        ("Weights", output.size(weights) + (f": {mix}" if mix else "")),
        ("Context", f"{facts['context']} tokens" if facts["context"] else "not stated in the file"),
        ("Stages", "can be cut" if facts["cuts"]["allowed"] else f"cannot be cut: {facts['cuts']['reason']}"),
    ]
    for key, same in facts["batch_invariance"].items():
        if build() in key:
            lines.append(
                ("Batch-invariant", f"{key.replace(build(), 'this build')}: {'yes' if same else 'no'}")
            )
    if facts["speculation"] is False:
        lines.append(("Speculation", "off: what this model remembers of a text cannot be cut off at a token"))
    fit = facts["fit"]
    lines.append(("Fit", f"{output.asked(fit['sequences'], fit['context'])}. {fit['advice']}"))
    if facts["notes"]:
        lines.append(("Notes", facts["notes"]))
    return lines
