"""`cordee status`, `deploy`, `undeploy`: what the cluster serves."""

import time
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import live, options, output

if TYPE_CHECKING:
    from cordee.agent import control

POLL_SECONDS = 0.5
CHANGES_SHOWN = 8  # of the newest; --json has all that the node keeps


@click.command()
@options.as_json
@live.watch
def status(as_json: bool, watch: bool) -> None:
    """Tell which models the cluster serves, who holds which layers, how fast, and what changed lately."""
    from cordee.agent import control

    live.show(lambda: control.ask("GET", "/status"), _lines, as_json=as_json, watch=watch)


@click.command()
@click.argument("model")
@options.context
@options.sequences
@click.option(
    "--replicas",
    metavar="N",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Run it so many times, on different nodes.",
)
def deploy(model: str, context: int | None, sequences: int, replicas: int) -> None:
    """Have the cluster serve MODEL from now on.

    MODEL is one that a node has (`cordee pull`); what is asked for at the API is served without
    this; deploy it to have it ready, or to say how.

    Or it is one of the hub (owner/name, owner/name:QUANTIZATION or owner/name/file.gguf) that no machine has
    the disk for: this node reads it there once, to know its parts, and then each node fetches only the layers
    that it runs. Ctrl-C leaves the node reading; `cordee undeploy` stops it. Where one machine has the disk
    for all of it, `cordee pull` there takes half the traffic.
    """
    from cordee.agent import control

    asked = control.Deploy(model, context, sequences, replicas)
    deployed = control.ask("POST", "/deploy", asked, control.Deployed)
    if deployed.reading is not None:
        deployed = _follow(model, deployed.reading.source)
    output.note(f"The cluster serves {deployed.name} from now on: `cordee status` shows where.")


@click.command()
@click.argument("model")
def undeploy(model: str) -> None:
    """Have the cluster serve MODEL no more, until somebody asks for it."""
    from cordee.agent import control

    control.ask("POST", "/undeploy", control.Undeploy(model))


def _follow(model: str, source: str) -> "control.Deployed":
    """Show how far a node is with reading a model from the hub, until it is deployed."""
    from cordee.agent import control

    with output.progress(f"Reading {source} from the hub") as progress:
        while True:
            time.sleep(POLL_SECONDS)
            asked = control.Deploy(model, follow=True)
            deployed = control.ask("POST", "/deploy", asked, control.Deployed)
            if deployed.reading is None:
                return deployed
            progress(deployed.reading.done_bytes, deployed.reading.total_bytes)


def state_of(model: dict[str, Any]) -> str:
    """In one line, how far a deployed model is."""
    if model["state"] == "unplaced":
        return f"{model['name']} runs nowhere. {model['why']}"
    stages = [stage for placement in model["placements"] for stage in placement["stages"]]
    where = ", ".join(f"{stage['name']}: {stage['state']}" for stage in stages)
    return f"{model['name']} is {model['state']} ({where})"


def _lines(found: dict[str, Any]) -> list[str]:
    if not found["models"] and not found["reading"]:
        return ["No node has a model yet. Try: cordee pull starter"]
    lines = [line for model in found["models"] for line in (*_model(model), "")]
    for each in found["fetching"]:
        first, last = each["layers"]
        what = f"layers {first}-{last - 1}" if last else "the embedding"
        done, total = each["done_bytes"], each["total_bytes"]
        lines.append(
            f"{each['node']} fetches {what} of {each['model']}: {output.size(done)} of {output.size(total)}"
        )
    for each in found["reading"]:
        where = "from the hub" if each["source"] else "from its disk"
        done, total = output.size(each["done_bytes"]), output.size(each["total_bytes"])
        lines.append(f"{each['node']} reads {each['name']} once, {where}: {done} of {total}")
    if found["watts"] is not None:
        lines.append(f"All nodes that tell take {found['watts']:.0f} W.")
    for change in found["changes"][-CHANGES_SHOWN:]:
        when = time.strftime("%H:%M:%S", time.localtime(change["clock"]))
        lines.append(f"{when}  {change['model']}: {change['text']}")
    return lines


def _model(model: dict[str, Any]) -> list[str]:
    holders = ", ".join(model["offered_by"]) or "nobody"
    size = output.size(model["weights_bytes"])
    head = f"{model['name']}: {model['layers']} layers, {size}, whole on {holders}"
    if not model["deployed"]:
        return [f"{head}; not served yet: a request or `cordee deploy` starts it"]
    lines = [f"{head}; {model['sequences']} answers of {model['context']} tokens"]
    if model["state"] == "unplaced":
        lines.append(f"  runs nowhere. {model['why']}")
    for placement in model["placements"]:
        lines += _placement(placement)
    return lines


def _placement(placement: dict[str, Any]) -> list[str]:
    head = f"  {placement['state']}"
    if placement["wiring"]:
        head += (
            f" ({placement['wiring']}): {placement['tokens_per_second'] or 0:.1f} tokens/s now, "
            f"{placement['active']} answers under way, {placement['waiting']} waiting; "
            f"about {placement['predicted_tokens_per_second'] or 0:.3g} tokens/s expected for one"
        )
    rows = [
        (
            f"{stage['layers'][0]}-{stage['layers'][1] - 1}",
            stage["name"] + (" (host)" if index == 0 else ""),
            stage["device"],
            stage["state"] + (f": {stage['detail']}" if stage["detail"] else ""),
        )
        for index, stage in enumerate(placement["stages"])
    ]
    lines = [head, *(f"  {line}" for line in output.table(("LAYERS", "NODE", "DEVICE", "STATE"), rows))]
    if placement["batch_invariant"] is not None:
        held = "holds token for token" if placement["batch_invariant"] else "goes on, maybe in other words"
        lines.append(f"  if a machine falls, an answer {held}")
    if placement["successor"]:
        parts = [f"{s['layers'][0]}-{s['layers'][1] - 1} on {s['name']}" for s in placement["successor"]]
        lines.append(f"  moves to {', '.join(parts)}")
    return lines
