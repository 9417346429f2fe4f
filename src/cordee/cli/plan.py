"""`cordee plan`: where a model would run, how it fits, how fast it would be, and why."""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options, output
from cordee.errors import BadRequest, DoesNotFit, ModelNotFound, NotRunning

if TYPE_CHECKING:
    from cordee.cluster.facts import Facts, ModelShape
    from cordee.cluster.memory import Demand
    from cordee.cluster.planner import Plan


@click.command()
@click.argument("model")
@click.option(
    "--nodes",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Plan for the machines that FILE describes.",
)
@options.context
@options.sequences
@options.as_json
def plan(model: str, file: Path | None, context: int | None, sequences: int, as_json: bool) -> None:
    """Show where MODEL would run, how it fits, how fast it would be, and why.

    MODEL is a model in the store, a GGUF file or just its header (the file's first megabytes, cut off
    anywhere after the list of tensors), or one of the cards gpt-oss-20b, gpt-oss-120b, apertus-8b and
    apertus-70b. Without --nodes the plan is for the cluster whose node runs here, beside what it runs
    already; or, if no node runs here, for this machine alone. Exits 6 if the model does not fit.

    FILE is TOML, one table for each machine; all but name, ram and vram may be left out:

    \b
      [[machine]]
      name = "office"           # with a count they are office-1, office-2 ...
      count = 4
      ram = "32 GB"
      ram_speed = "40 GB/s"     # how fast the processor reads memory
      disk = "1 TB"             # free
      network = "1 Gbit/s"      # between two machines the slower one counts
      rtt = "0.5 ms"            # round-trip time; between two the longer one counts
      [[machine.gpu]]
      name = "RTX 4090"
      vram = "24 GB"
      speed = "300 GB/s"
      count = 1
    """
    answer = _by_agent(model, context, sequences) if file is None else None
    shape, load, found = answer or _by_ourselves(model, file, context, sequences)
    if as_json:
        output.print_json(_facts(model, shape, load, found))
    else:
        _print(model, shape, load, found)
    if found.placement is None:
        raise DoesNotFit(f"{model} does not fit. {found.why}")


def _by_agent(model: str, context: int | None, sequences: int) -> "tuple[ModelShape, Demand, Plan] | None":
    """Planned by the agent that runs here, for the cluster as it is; None if none runs."""
    from cordee.agent import control
    from cordee.cluster.memory import Demand

    def ask(shape: "ModelShape | None", context: int | None) -> "tuple[ModelShape, Demand, Plan]":
        asked = control.PlanRequest(model, shape, context, sequences)
        found = control.ask("POST", "/plan", asked, control.Planned)
        return found.shape, Demand(found.context, found.sequences), found.plan

    try:
        if not Path(model).is_file():
            return ask(None, context)
    except NotRunning:
        return None
    except ModelNotFound:  # no node of the cluster has it: a card, or a model under another name
        pass
    wanted = _wanted(model)
    try:
        return ask(wanted.shape, _context(model, context, wanted.context, sequences))
    except NotRunning:
        return None


def _by_ourselves(
    model: str, file: Path | None, context: int | None, sequences: int
) -> "tuple[ModelShape, Demand, Plan]":
    from cordee.cluster.memory import Demand
    from cordee.cluster.planner import plan

    wanted = _wanted(model)
    nodes = _described(file) if file else _this_machine(wanted)
    load = Demand(_context(model, context, wanted.context, sequences), sequences)
    return wanted.shape, load, plan(wanted.shape, nodes, load)


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for; `context` is the longest it was made for, `stored` whether this machine has it."""

    shape: "ModelShape"
    context: int | None
    stored: bool = False


def _wanted(model: str) -> PlannedModel:
    """A file, a model in the store, or a card."""
    from cordee.cli.models import find
    from cordee.models.cards import cards
    from cordee.models.fit import own_context
    from cordee.models.gguf import read_header
    from cordee.models.shape import card_shape, model_shape
    from cordee.models.store import Store

    if Path(model).is_file():
        header = read_header(Path(model), weights=False)
        return PlannedModel(model_shape(header, model), own_context(header))
    try:
        stored = find(Store(), model)
    except ModelNotFound:
        card = cards().get(model)
        shape = card_shape(card) if card else None
        if card is None or shape is None:
            raise
        return PlannedModel(shape, card.context)
    header = read_header(stored.path, name=model)
    return PlannedModel(model_shape(header, stored.digest), own_context(header), stored=True)


def _context(model: str, asked: int | None, own: int | None, sequences: int) -> int:
    """The context asked for, else what a service has by default."""
    from cordee.machine.sizing import CELLS_DEFAULT

    if asked is not None and own is not None and asked > own:
        raise BadRequest(f"{model} was made for at most {own} tokens, not {asked}", "context")
    return asked or min(max(1, CELLS_DEFAULT // sequences), own or CELLS_DEFAULT)


def _described(file: Path) -> dict[str, "Facts"]:
    from cordee.cli.described import read_nodes

    return read_nodes(file)


def _this_machine(wanted: PlannedModel) -> dict[str, "Facts"]:
    """This machine alone, without any cluster."""
    from cordee.cluster.facts import Facts, SliceHeld
    from cordee.files import home
    from cordee.machine.devices import own_devices

    name = platform.node() or "localhost"
    layers = wanted.shape.layers
    facts = Facts(
        node=name,
        name=name,
        build="",
        devices=own_devices(),
        disk_free_bytes=shutil.disk_usage(home()).free,
        api="",
        rtts={},
        bytes_per_second={},
        slices=(SliceHeld(wanted.shape.digest, 0, layers, whole=True),) if wanted.stored else (),
        stages=(),
    )
    return {name: facts}


def _facts(model: str, shape: "ModelShape", load: "Demand", found: "Plan") -> dict[str, Any]:
    from msgspec import to_builtins

    asked = {"model": model, "architecture": shape.architecture, "layers": shape.layers} | load._asdict()
    return asked | {"weights_bytes": _weights(shape)} | to_builtins(found)


def _weights(shape: "ModelShape") -> int:
    return sum(shape.layer_bytes) + shape.whole_extra_bytes


def _print(model: str, shape: "ModelShape", load: "Demand", found: "Plan") -> None:
    """For people: the question, the stages, the machines. Why a model does not fit is the error's message."""
    lines = [
        ("Model", f"{model}: {shape.layers} layers, {output.size(_weights(shape))}"),
        ("Asked", f"{load.sequences} answers at a time, of {load.context} tokens each"),
    ]
    if found.placement:
        lines.append(("Fit", found.why))
        lines.append(("Speed", f"about {found.tokens_per_second:.3g} tokens/s for one answer"))
    output.print_facts(lines)
    if found.stages:
        click.echo()
        _print_stages(found)
    click.echo()
    rows = [(one.name, "in" if one.used else "out", one.why) for one in found.machines]
    output.print_table(("MACHINE", "", "WHY"), rows)


def _print_stages(found: "Plan") -> None:
    rows = [
        (
            f"{stage.first}-{stage.last - 1}",
            stage.name,
            stage.device,
            output.size(stage.fit.weights_bytes),
            output.size(stage.fit.kv_bytes),
            output.size(stage.needed_bytes),
            output.size(stage.available_bytes),
            output.size(stage.fetch_bytes),
            f"{1000 * stage.read_seconds:.1f} ms",
            f"{1000 * stage.hop_seconds:.2f} ms",
        )
        for stage in found.stages
    ]
    header = (
        *("LAYERS", "MACHINE", "DEVICE", "WEIGHTS", "KV CACHE", "NEEDS", "MAY TAKE", "TO FETCH"),
        *("PER TOKEN", "HOP"),
    )
    output.print_table(header, rows)
