"""`cordee nodes`: who is in the cluster."""

from typing import Any

import click

from cordee.cli import options, output


@click.command()
@options.as_json
def nodes(as_json: bool) -> None:
    """List the nodes of the cluster: who is there, what each can take, how far it is."""
    from cordee.node import control

    found = control.ask("GET", "/nodes")
    if as_json:
        output.print_json(found)
    else:
        output.print_table(HEADER, [_row(node) for node in found["nodes"]])


HEADER = ("NAME", "ID", "STATE", "MEMORY", "DEVICES", "RTT", "API")


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    state = "draining" if node["draining"] and node["state"] == "alive" else node["state"]
    rtt = node["rtt_seconds"]
    return (
        f"{node['name']} (this)" if node["self"] else node["name"],
        node["id"],
        state,
        output.size(sum(device["memory_bytes"] for device in node["devices"])),
        ", ".join(device["name"] for device in node["devices"]),
        "-" if rtt is None else f"{1000 * rtt:.1f} ms",
        node["api"],
    )
