"""`cordee plan`: where a model would run, how it fits, how fast it would be, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cordee.cli import options
from cordee.errors import DoesNotFit, ModelNotFound, NotRunning
from cordee.files import printable
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.agent.control import Planned
    from cordee.cluster.demand import SizeRequest
    from cordee.cluster.facts import Facts, ModelShape
    from cordee.cluster.planner import Plan
    from cordee.models.planned import PlannedModel

# People read about five tokens a second; one that comes every other second is of no use to anybody.
TOO_SLOW_TOKENS_PER_SECOND = 1.0
PAGE_TOKENS = 600


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
def plan(model: str, file: Path | None, context: int | None, sequences: int | None, as_json: bool) -> None:
    """Show where MODEL would run, how it fits, how fast it would be, and why.

    MODEL is a model in the store or of the cluster, a GGUF file or just its header (the file's first
    megabytes, cut off anywhere after the list of tensors), or one that `cordee models` lists; nothing is
    downloaded for it. Without --nodes the plan is for the cluster whose node runs here, beside what it runs
    already; or, if no node runs here, for this machine alone. Exits 6 if the model does not fit.

    An answer is as fast as the machines read their memory. Without --nodes that is measured (graphics cards
    do not tell: 300 GB/s); in FILE say what was measured (`cordee bench`, roof), or about 70 % of the data
    sheet. Prompts are read faster than answers are written, on a graphics card many times faster.

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
    found = answer or _by_ourselves(model, file, context, sequences)
    if as_json:
        output.print_json(_facts(model, found))
    else:
        _print(model, found, file)
    if found.plan.placement is None:
        raise DoesNotFit(f"{model} does not fit. {found.plan.why}")


def _by_agent(model: str, context: int | None, sequences: int | None) -> "Planned | None":
    """Planned by the agent that runs here, for the cluster as it is; None if none runs."""
    from cordee.agent import control
    from cordee.cluster.demand import SizeRequest

    def ask(shape: "ModelShape | None", requested: SizeRequest) -> "Planned":
        asked = control.PlanRequest(printable(model), shape, requested)
        return control.ask("POST", "/plan", asked, control.Planned)

    try:
        if not Path(model).is_file():
            return ask(None, SizeRequest(context, sequences, 0))
    except NotRunning:
        return None
    except ModelNotFound:  # no node of the cluster has it: a card, or a model under another name
        pass
    wanted = _wanted(model)
    try:
        return ask(wanted.shape, _size_request(model, wanted, context, sequences))
    except NotRunning:
        return None


def _by_ourselves(model: str, file: Path | None, context: int | None, sequences: int | None) -> "Planned":
    from cordee.agent.control import Planned
    from cordee.cluster.planner import copies, largest, plan

    wanted = _wanted(model)
    nodes = _described(file) if file else _this_machine(wanted)
    command = f"cordee {'deploy' if file else 'serve'} {model}"
    requested = _size_request(model, wanted, context, sequences)
    demand = largest(wanted.shape, nodes, requested) or requested.least
    found = plan(wanted.shape, nodes, demand, command=command)
    lacks = requested.shortened(demand)
    return Planned(wanted.shape, demand, lacks, found, copies(wanted.shape, nodes, demand))


def _wanted(model: str) -> "PlannedModel":
    """A file, a model in the store, or a card."""
    from cordee.cli.known import unknown
    from cordee.models import planned
    from cordee.models.store import Store

    if Path(model).is_file():
        return planned.of_file(Path(model), printable(model))
    store = Store()
    found = planned.of_name(store, model)
    if found is None:
        raise unknown(store, model)
    return found


def _size_request(
    model: str, wanted: "PlannedModel", context: int | None, sequences: int | None
) -> "SizeRequest":
    from cordee.machine.sizing import size_request

    return size_request(wanted.context, context, sequences, model)


def _described(file: Path) -> dict[str, "Facts"]:
    from cordee.machine.described import read_nodes

    return read_nodes(file)


def _this_machine(wanted: "PlannedModel") -> dict[str, "Facts"]:
    from cordee.machine.alone import this_machine

    return this_machine(wanted)


def _facts(model: str, planned: "Planned") -> dict[str, Any]:
    from msgspec import to_builtins

    shape, found = planned.shape, planned.plan
    asked = {"model": model, "architecture": shape.architecture, "layers": shape.layers}
    about = {
        "weights_bytes": _weights(shape),
        "lacks": planned.lacks,
        "copies": planned.copies,
        "too_slow": _is_too_slow(found),
    }
    return asked | planned.demand._asdict() | about | to_builtins(found)


def _weights(shape: "ModelShape") -> int:
    return sum(shape.layer_bytes) + shape.whole_extra_bytes


def _is_too_slow(found: "Plan") -> bool:
    return found.placement is not None and found.tokens_per_second < TOO_SLOW_TOKENS_PER_SECOND


def _print(model: str, planned: "Planned", file: Path | None) -> None:
    """For people: the question, the stages, the machines. Why a model does not fit is the error's message."""
    found, demand = planned.plan, planned.demand
    asked = output.asked(demand.sequences, demand.context)
    if planned.lacks:
        asked += f" (memory is short: {planned.lacks})"
    lines = [
        ("Model", f"{model}: {planned.shape.layers} layers, {output.size(_weights(planned.shape))}"),
        ("Asked", asked),
    ]
    if found.placement:
        lines.append(("Fit", found.why))
        lines += _speeds(model, planned, file)
    output.print_facts(lines)
    if found.stages:
        click.echo()
        _print_stages(found)
    click.echo()
    rows = [(one.name, "in" if one.used else "out", one.why) for one in found.machines]
    output.print_table(("MACHINE", "", "WHY"), rows)


def _speeds(model: str, planned: "Planned", file: Path | None) -> list[tuple[str, str]]:
    found = planned.plan
    if file:
        source = f"if memory is read as fast as {file.name} says"
    elif any(stage.kind == "gpu" for stage in found.stages):
        source = "with memory speed as measured, 300 GB/s for a graphics card"
    else:
        source = "with memory speed as measured"
    prompts = found.prompt_tokens_per_second
    lines = [
        ("Speed", f"about {found.tokens_per_second:.3g} tokens/s for one answer, {source}"),
        ("Reads", f"prompts at {prompts:.3g} tokens/s or faster: a page in {_page_seconds(prompts)} or less"),
    ]
    if _is_too_slow(found):
        lines.append(
            (
                "Note",
                "That is too slow to use: people read 5 tokens/s. Take a smaller model, or faster machines: "
                "`cordee models --fits` lists what fits here.",
            )
        )
    elif planned.copies > 1:
        lines.append(
            (
                "More",
                f"the machines hold {planned.copies} copies: `cordee deploy {model} --replicas "
                f"{planned.copies}` answers {planned.copies} times as many at a time.",
            )
        )
    return lines


def _page_seconds(tokens_per_second: float) -> str:
    seconds = PAGE_TOKENS / max(tokens_per_second, 1e-6)
    return output.duration(seconds) if seconds >= 1 else "a second"


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
