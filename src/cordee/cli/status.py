"""`cordee status`, `deploy`, `undeploy`: what the cluster serves."""

import time
from typing import Any

import click

from cordee.cli import live, options
from cordee.cli.known import put_if_here
from cordee.errors import ModelNotFound
from cordee.terminal import output

POLL_SECONDS = 0.5
CHANGES_SHOWN = 8  # the newest; --json has all that the node keeps
# What people read for the states that the agent has other words for.
STATE_WORDS = {"wired": "ready", "wiring": "connecting", "unheard": "not reported"}


@click.command()
@options.as_json
@live.watch
def status(as_json: bool, watch: bool) -> None:
    """Show which models the cluster serves, where, how fast, and what changed lately.

    The layers of a model lie on one node or on several. Their STATE is fetching (they come from another node
    or from the hub), loading, loaded, ready (connected to the nodes with the other layers) or failed;
    "not reported" means that the node has not said anything about them yet. The host is
    the node that schedules the answers.
    """
    from cordee.agent import control

    live.show(
        lambda: control.ask("GET", "/status", kind=dict[str, Any]), _lines, as_json=as_json, watch=watch
    )


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
    help="Run it N times, on different nodes.",
)
@click.option(
    "--only",
    metavar="NODE[,NODE...]",
    default="",
    help="Keep it on these nodes (names or ids), until it is undeployed: no other runs it or keeps a copy.",
)
def deploy(model: str, context: int | None, sequences: int | None, replicas: int, only: str) -> None:
    """Have the cluster serve MODEL from now on.

    MODEL is one that a node has (`cordee pull`), or `starter`, which comes with Cordée. A request at the API
    starts such a model, too; deploy it to have it ready, or to choose how it is served. Where memory is
    short, it gets fewer answers at a time or less context than usual, unless --sequences or --context say how
    many; deploying it anew chooses anew.

    Or MODEL is one of the Hugging Face Hub (owner/name, owner/name:QUANTIZATION or owner/name/file.gguf) that
    is too large for the disk of any machine: this node reads it from the hub once, to learn its layout, and
    then each node downloads only the layers that it runs. After Ctrl-C the node goes on reading; `cordee
    undeploy` stops it. If one machine has room on its disk for the whole model, `cordee pull` there takes
    half the traffic.
    """
    from cordee.agent import control

    nodes = tuple(each.strip() for each in only.split(",") if each.strip())
    asked = control.Deploy(model, context, sequences, replicas, only=nodes)
    try:
        deployed = control.ask("POST", "/deploy", asked, control.Deployed)
    except ModelNotFound:
        if not put_if_here(model):
            raise
        deployed = control.ask("POST", "/deploy", asked, control.Deployed)
    if deployed.reading is not None:
        _follow(model, deployed.reading.source)
    if deployed.why:
        output.note(f"{deployed.name} is deployed, but cannot run for now. {deployed.why}")
        return
    output.note(f"The cluster serves {deployed.name} from now on; `cordee status` shows where.")
    if deployed.demand is not None:
        output.note(f"It gives {output.asked(deployed.demand.sequences, deployed.demand.context)}.")
    output.note_shortened(deployed.name, deployed.lacks)


@click.command()
@click.argument("model")
def undeploy(model: str) -> None:
    """Have the cluster stop serving MODEL, until a request asks for it again."""
    from cordee.agent import control

    control.ask("POST", "/undeploy", control.Undeploy(model), dict[str, Any])


def _follow(model: str, source: str) -> None:
    """Show how much of a model the node has read from the hub, until it is deployed."""
    from cordee.agent import control

    with output.progress(f"Reading {source} from the hub") as progress:
        while True:
            time.sleep(POLL_SECONDS)
            asked = control.Deploy(model, follow=True)
            deployed = control.ask("POST", "/deploy", asked, control.Deployed)
            if deployed.reading is None:
                return
            progress(deployed.reading.done_bytes, deployed.reading.total_bytes)


def state_of(model: dict[str, Any]) -> str:
    """In one line, how far a deployed model is."""
    if model["state"] == "unplaced":
        return f"{model['name']} runs nowhere. {model['why']}"
    stages = [stage for placement in model["placements"] for stage in placement["stages"]]
    where = ", ".join(f"{stage['name']}: {_word(stage['state'])}" for stage in stages)
    return f"{model['name']} is {_word(model['state'])} ({where})"


def _word(state: str) -> str:
    return STATE_WORDS.get(state, state)


def _lines(found: dict[str, Any]) -> list[str]:
    if not found["models"] and not found["reading"]:
        return ["No node has a model yet. Try: cordee deploy starter", *live.warnings(found)]
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
        lines.append(f"{each['node']} reads {each['name']} {where}, to learn its layout: {done} of {total}")
    if found["watts"] is not None:
        lines.append(f"The nodes that can measure it use {found['watts']:.0f} W.")
    for change in found["changes"][-CHANGES_SHOWN:]:
        when = time.strftime("%H:%M:%S", time.localtime(change["clock"]))
        lines.append(f"{when}  {change['model']}: {change['text']}")
    return [*lines, *live.warnings(found)]


def _model(model: dict[str, Any]) -> list[str]:
    holders = ", ".join(model["offered_by"]) or "no node"
    size = output.size(model["weights_bytes"])
    head = f"{model['name']}: {model['layers']} layers, {size}, whole file on {holders}"
    if not model["deployed"]:
        return [f"{head}; not served yet: a request or `cordee deploy` starts it"]
    lines = [f"{head}; {model['sequences']} answers at a time of {model['context']} tokens each"]
    if model["only"]:
        lines.append(f"  kept on {', '.join(model['only'])}")
    if model["state"] == "unplaced":
        lines.append(f"  runs nowhere. {model['why']}")
    for placement in model["placements"]:
        lines += _placement(placement)
    return lines + [f"  {reason}" for reason in model["reasons"]]


def _placement(placement: dict[str, Any]) -> list[str]:
    head = f"  {_word(placement['state'])}"
    if placement["wiring"]:
        head += (
            f": {placement['tokens_per_second'] or 0:.1f} tokens/s now, "
            f"{placement['active']} answers under way, {placement['waiting']} waiting; "
            f"about {placement['predicted_tokens_per_second'] or 0:.3g} tokens/s expected for one answer"
        )
    rows = [
        (
            f"{stage['layers'][0]}-{stage['layers'][1] - 1}",
            stage["name"] + (" (host)" if index == 0 else ""),
            stage["device"],
            _word(stage["state"]) + (f": {stage['detail']}" if stage["detail"] else ""),
        )
        for index, stage in enumerate(placement["stages"])
    ]
    lines = [head, *(f"  {line}" for line in output.table(("LAYERS", "NODE", "DEVICE", "STATE"), rows))]
    if placement["batch_invariant"] is not None:
        how = "with exactly the same tokens" if placement["batch_invariant"] else "perhaps in other words"
        lines.append(f"  if a machine fails, an answer goes on {how}")
    if placement["successor"]:
        stages = [f"{s['layers'][0]}-{s['layers'][1] - 1} on {s['name']}" for s in placement["successor"]]
        lines.append(f"  moving to {', '.join(stages)}")
    return lines
