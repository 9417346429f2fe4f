"""The verbs of the model store: `pull`, `ls`, `show`, `rm`."""

import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import known, options
from cordee.errors import BadRequest, ModelNotFound
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.models.store import StoredModel

STARTER = "starter"


@click.command()
@click.argument("source")
@click.option("--name", help="Name for the model; default: that of its file or repository.")
@options.pre
def pull(source: str, name: str | None, pre: str | None) -> None:
    """Put a model into this machine's store.

    SOURCE is a GGUF file, the folder of a ternary checkpoint (config.json, safetensors, tokenizer), a
    repository of the Hugging Face Hub (owner/name, owner/name:QUANTIZATION, or the address of its page or of
    a file in it), or the name of a model card.
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
    """List the models in the store and in the cluster.

    ON says which nodes have the whole model, if a node runs here (`cordee up`). `cordee models` lists what
    there is to fetch.
    """
    from cordee.models.store import Store

    cluster = known.cluster_models()
    here = [known.facts_of_file(model) for model in Store().list()]
    elsewhere = [_facts_elsewhere(model) for model in (cluster or {}).values() if not model["offered_here"]]
    names = {model["name"] for model in here}
    listed = [*here, *(model for model in elsewhere if model["name"] not in names)]
    for model in listed:
        model["nodes"] = (cluster or {}).get(model["name"], {}).get("offered_by", [])
    if as_json:
        output.print_json(listed)
    elif listed:
        header, rows = ("NAME", "SIZE", "ADDED", "SOURCE"), [_row(model) for model in listed]
        if cluster is not None:
            header = (*header, "ON")
            rows = [(*row, ", ".join(model["nodes"]) or "-") for row, model in zip(rows, listed, strict=True)]
        output.print_table(header, rows)
    else:
        output.note("No models yet. Try: cordee run starter. `cordee models` lists what there is.")


@click.command()
@click.argument("model")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(model: str, yes: bool) -> None:
    """Remove a model and its slices from the store.

    If no other node of the cluster has the whole model, it asks first; without a terminal it wants --yes.
    """
    from cordee.models.store import Store

    store = Store()
    try:
        stored = store.get(model)
    except ModelNotFound:
        others = known.cluster_models() or {}
        if model in others:
            raise ModelNotFound(
                f"The model {model!r} is not on this machine, but {known.where(others[model])}: `cordee rm` "
                f"there removes it, `cordee undeploy {model}` ends its serving."
            ) from None
        raise
    if not yes:
        _confirm_last(stored, store.list(lambda _: None))
    store.remove(model)


def _confirm_last(model: "StoredModel", stored: "list[StoredModel]") -> None:
    """Ask before the cluster's last whole copy of a model is removed.

    Raises:
        BadRequest: there is nobody to ask.
    """
    from cordee.console.copies import is_elsewhere
    from cordee.net import identity

    if not identity.exists() or any(m.digest == model.digest and m.name != model.name for m in stored):
        return
    cluster = known.cluster_models()
    if cluster is None:
        what = f"No node runs here, so it is not known whether another has {model.name}"
    elif is_elsewhere(model.name, cluster):
        return
    else:
        what = f"This is the cluster's last whole copy of {model.name} ({output.size(model.nbytes)})"
        if cluster.get(model.name, {}).get("deployed"):
            what += ", which it serves"
    if not sys.stdin.isatty():
        raise BadRequest(f"{what}: confirm with `cordee rm {shlex.quote(model.name)} --yes`.")
    click.confirm(f"{what}. Remove it?", abort=True, err=True)


def _facts_elsewhere(model: dict[str, Any]) -> dict[str, Any]:
    """A model of the cluster that is not in this store."""
    absent = dict.fromkeys(("path", "source", "added"))
    return {"name": model["name"], "digest": model["digest"], "bytes": model["weights_bytes"]} | absent


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    added = model["added"][:10] if model["added"] else "-"
    return model["name"], output.size(model["bytes"]), added, model["source"] or "the cluster"
