"""`cordee doctor`: what this machine has, what is wrong with it, and the command that fixes it."""

from typing import Any

import click
import msgspec

from cordee.cli import options
from cordee.terminal import output


@click.command()
@options.as_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine and its node: show what there is, what is wrong, and how to fix it.

    If a node runs here (`cordee up`), it looks at its cluster, too, and asks other nodes whether they can
    connect to it. Exits 0 if all is well, and 1 if something must be fixed first.
    """
    from cordee.doctor import examine

    facts = examine.facts()
    findings = examine.findings(facts)
    if as_json:
        output.print_json(facts | {"findings": msgspec.to_builtins(findings)})
    else:
        output.print_facts(_lines(facts))
        for finding in findings:
            click.echo(f"\n{'PROBLEM' if finding.problem else 'Advice'}: {finding.what}\n  {finding.remedy}")
        if not any(finding.problem for finding in findings):
            click.echo("\nAll is well." if not findings else "\nNothing has to be fixed.")
    if any(finding.problem for finding in findings):
        ctx.exit(1)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts for people."""
    processor, memory, disk, library = (facts[key] for key in ("processor", "memory", "disk", "libllama"))
    lines = [
        ("Cordée", f"{facts['version']} on Python {facts['python']}, {facts['system']}"),
        ("Processor", f"{processor['name']}, {processor['cores']} cores"),
        ("Instructions", " ".join(processor["instruction_sets"])),
        ("AMX", _amx(processor["instruction_sets"], library["extra_buffers"])),
        ("Memory", f"{output.size(memory['available_bytes'])} free of {output.size(memory['total_bytes'])}"),
        ("Disk", f"{output.size(disk['free_bytes'])} free in {disk['folder']}"),
        ("Node", _node(facts["node"])),
    ]
    lines += [("GPU", f"{g['vendor']} {g['name']}, driver {g['driver'] or 'none'}") for g in facts["gpus"]]
    lines += [("Vulkan", name) for name in facts["vulkan_devices"]]
    lines.append(("libllama", library["build"] or "does not load"))
    if library["build"]:
        lines.append(("CPU variant", _variant(library)))
    for device in library["devices"]:
        room = f"{output.size(device['free_bytes'])} free of {output.size(device['total_bytes'])}"
        lines.append(("Device", f"{device['name']} ({device['description']}), {room}"))
    return lines


def _variant(library: dict[str, Any]) -> str:
    if not library["prebuilt"]:
        return f"{library['cpu_variant']} (compiled on this machine)"
    others = [variant for variant in library["cpu_variants"] if variant != library["cpu_variant"]]
    also = f" (this machine can also run {', '.join(others)})" if others else ""
    return library["cpu_variant"] + also


def _node(node: dict[str, Any] | None) -> str:
    if node is None:
        return "none runs here (`cordee up` starts one)"
    return node["fault"] or f"{node['name']}; {node['alive']} of {node['known']} known nodes are alive"


def _amx(instruction_sets: list[str], extra_buffers: bool) -> str:
    if "amx_int8" not in instruction_sets:
        return "not on this processor"
    return "usable" if extra_buffers else "advertised, but fails when used; not used"
