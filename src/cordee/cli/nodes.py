"""`cordee nodes`: the members of the cluster."""

import time
from typing import Any

import click

from cordee.cli import live, options
from cordee.terminal import output

HEADER = ("NAME", "ID", "STATE", "VERSION", "CPU", "MEMORY", "IN USE", "DEVICES", "ROUND TRIP", "API")


@click.command()
@options.as_json
@live.watch
def nodes(as_json: bool, watch: bool) -> None:
    """List the nodes of the cluster: state, version, memory, devices, network delay.

    STATE is alive, suspect (not heard from for a few seconds) or gone; members that are off are listed as
    gone, with the time when they were heard last. VERSION is that of Cordée, CPU the variant of libllama for
    its processor: between equal ones answers move without changing. MEMORY is what models may use on a node,
    IN USE what they use. ROUND TRIP is the time for a message from this node to that one and back. Below are
    warnings, if there are any: certificates that run out within ten days, copied disks, versions that do not
    understand each other.
    """
    from cordee.agent import control

    live.show(lambda: control.ask("GET", "/nodes", kind=dict[str, Any]), _lines, as_json=as_json, watch=watch)


def _lines(found: dict[str, Any]) -> list[str]:
    rows = [_row(node) for node in found["nodes"]]
    if any(node["watts"] is not None for node in found["nodes"]):
        power = ["-" if node["watts"] is None else f"{node['watts']:.0f} W" for node in found["nodes"]]
        rows = [(*row, watts) for row, watts in zip(rows, power, strict=True)]
        return [*output.table((*HEADER, "POWER"), rows), *live.warnings(found)]
    return [*output.table(HEADER, rows), *live.warnings(found)]


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    rtt = node["rtt_seconds"]
    kind = [word for word in ("admin", "draining", "cloned") if node[word]]
    return (
        f"{node['name']} (this)" if node["self"] else node["name"],
        node["id"],
        ", ".join([_state(node), *kind]),
        node["version"] or "-",
        node["cpu_variant"] or "-",
        output.size(sum(device["memory_bytes"] for device in node["devices"])) if node["devices"] else "-",
        output.size(sum(stage["bytes"] or 0 for stage in node["stages"])) if node["devices"] else "-",
        ", ".join(device["name"] for device in node["devices"]) or "-",
        "-" if rtt is None else f"{1000 * rtt:.1f} ms",
        node["api"] if node["self"] else "-",
    )


def _state(node: dict[str, Any]) -> str:
    heard = node["last_heard"]
    if node["state"] != "gone" or heard is None:
        return node["state"]
    return f"gone since {time.strftime('%Y-%m-%d %H:%M', time.localtime(heard))}"
