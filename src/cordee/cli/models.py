"""The verbs of the model store: `pull`, `ls`, `show`, `rm`."""

from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options, output
from cordee.errors import ModelNotFound

if TYPE_CHECKING:
    from cordee.models.cards import Card
    from cordee.models.gguf import Header
    from cordee.models.store import Store, StoredModel

STARTER = "starter"


def find(store: "Store", name: str) -> "StoredModel":
    """The model of that name. One that comes with the program is put into the store at its first use.

    Raises:
        ModelNotFound: no such model; the message says what to do.
    """
    try:
        return store.get(name)
    except ModelNotFound:
        from cordee.distribution.pull import pull as fetch
        from cordee.models.cards import cards

        card = cards().get(name)
        if card is None or card.path is None:
            raise
        with output.progress(f"putting {name} into the store") as progress:
            return fetch(name, store=store, progress=progress)


@click.command()
@click.argument("source")
@click.option("--name", help="Name for the model; default: that of its file or repository.")
@options.pre
def pull(source: str, name: str | None, pre: str | None) -> None:
    """Put a model into this machine's store.

    SOURCE is a GGUF file, the folder of a ternary checkpoint (config.json, safetensors, tokenizer), a
    repository of the Hugging Face Hub (owner/name, or owner/name:QUANTIZATION), or the name of a model card.
    Ternary models become files for the ternary engine on the way (see `cordee convert`). An interrupted
    download resumes where it stopped. Only this verb, and `cordee deploy` of a model from the hub, use the
    internet.
    """
    from cordee.distribution.pull import pull as fetch
    from cordee.models.store import Store

    with output.progress(source) as progress:
        model = fetch(source, name, Store(), progress, report=output.note, pre=pre)
    click.echo(f"{model.name}  {output.size(model.nbytes)}  {model.digest}")


@click.command()
@options.as_json
def ls(as_json: bool) -> None:
    """List the models in the store."""
    from cordee.models.store import Store

    models = Store().list()
    if as_json:
        output.print_json([_facts_of_file(model) for model in models])
    elif models:
        rows = [(m.name, output.size(m.nbytes), m.added[:10], m.source) for m in models]
        output.print_table(("NAME", "SIZE", "ADDED", "SOURCE"), rows)
    else:
        output.note("No models yet. Try: cordee run starter")


@click.command()
@click.argument("model")
@options.stages
@options.context
@options.sequences
@options.as_json
def show(model: str, stages: int, context: int | None, sequences: int, as_json: bool) -> None:
    """Show what a model is, and whether it fits this machine when served with these options."""
    from cordee.models.cards import cards
    from cordee.models.gguf import read_header
    from cordee.models.store import Store

    store = Store()
    stored = find(store, model)
    header = read_header(stored.path, name=stored.name)
    facts = _facts_of_file(stored) | _facts_of_header(header, cards().get(stored.name))
    facts["batch_invariance"] = store.notes(stored.digest)
    facts["fit"] = _fit(header, stages, context, sequences)
    if as_json:
        output.print_json(facts)
    else:
        output.print_facts(_lines(facts))
        click.echo()
        _print_stages(facts["fit"]["stages"])


@click.command()
@click.argument("model")
def rm(model: str) -> None:
    """Remove a model and its slices from the store."""
    from cordee.models.store import Store

    Store().remove(model)


def _facts_of_file(model: "StoredModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "digest": model.digest,
        "path": str(model.path),
        "bytes": model.nbytes,
        "source": model.source,
        "added": model.added,
    }


def _facts_of_header(header: "Header", card: "Card | None") -> dict[str, Any]:
    """What the file says of the model: shape, size, bytes by quantisation; the card has the licence."""
    from cordee.models.fit import own_context, parameter_count

    kinds: Counter[str] = Counter()
    for tensor in header.tensors:
        kinds[tensor.type.name] += tensor.nbytes
    return {
        "title": card.title if card else header.text("general.name", "") or None,
        "license": card.license if card else header.text("general.license", "") or None,
        "notes": card.notes if card else None,
        "architecture": header.architecture,
        "layers": header.layers,
        "parameters": parameter_count(header),
        "context": own_context(header),
        "weights_bytes": header.size_bytes,
        "quantization_bytes": dict(kinds.most_common()),
        "cuts": _cuts(header),
    }


def _cuts(header: "Header") -> dict[str, Any]:
    """Whether the model may be cut into stages, and why not."""
    from cordee.models.architectures import architecture

    known = architecture(header.architecture)
    if known is None or not known.certified:
        reason = f"no test has certified cuts of {header.architecture}"
    else:
        reason = known.obstacle(header.layers)
    return {"allowed": reason is None, "reason": reason}


def _fit(header: "Header", stages: int, context: int | None, sequences: int) -> dict[str, Any]:
    """What the stages would take of this machine's free memory, and whether that is enough."""
    from cordee.engine.stage import StageConfig
    from cordee.machine import sizing
    from cordee.models.fit import own_context, verdict
    from cordee.models.slices import even_cuts

    limit = max(1, sizing.CELLS_DEFAULT // sequences)
    context = context or min(limit, own_context(header) or limit)
    config = StageConfig(context=context, sequences=sequences, batch_rows=sizing.BATCH_ROWS)
    found = verdict(header, config, sizing.usable_memory(sizing.chosen_devices(())), stages)
    return {
        "fits": found.fits,
        "advice": found.advice,
        "need_bytes": found.need_bytes,
        "have_bytes": found.have_bytes,
        "context": context,
        "sequences": sequences,
        "longest_context": found.longest_context,
        "stages": [
            {"layers": layers} | asdict(fit) | {"total_bytes": fit.total_bytes}
            for layers, fit in zip(pairwise(even_cuts(header, stages)), found.stages, strict=True)
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

    weights = facts["weights_bytes"]
    mix = (f"{name} {100 * nbytes / weights:.0f} %" for name, nbytes in facts["quantization_bytes"].items())
    lines = [
        ("Model", f"{facts['name']} ({facts['title'] or 'no title'})"),
        ("Licence", facts["license"] or "not stated in the file"),
        ("Source", f"{facts['source']}, added {facts['added'][:10]}"),
        ("Digest", facts["digest"]),
        ("Architecture", f"{facts['architecture']}, {facts['layers']} layers"),
        ("Parameters", output.count(facts["parameters"])),
        ("Weights", f"{output.size(weights)}: {', '.join(mix)}"),
        ("Context", f"{facts['context']} tokens" if facts["context"] else "not stated in the file"),
        ("Stages", "can be cut" if facts["cuts"]["allowed"] else f"cannot be cut: {facts['cuts']['reason']}"),
    ]
    for key, same in facts["batch_invariance"].items():
        if build() in key:
            lines.append(
                ("Batch-invariant", f"{key.replace(build(), 'this build')}: {'yes' if same else 'no'}")
            )
    fit = facts["fit"]
    lines.append(
        ("Fit", f"{fit['sequences']} answers at a time, of {fit['context']} tokens each. {fit['advice']}")
    )
    if facts["notes"]:
        lines.append(("Notes", facts["notes"]))
    return lines
