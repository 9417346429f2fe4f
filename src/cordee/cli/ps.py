"""`cordee ps`: the models and stages that run on this machine."""

from typing import Any

import click

from cordee.cli import live, options
from cordee.errors import NotRunning
from cordee.terminal import output


@click.command()
@options.as_json
@live.watch
def ps(as_json: bool, watch: bool) -> None:
    """List the models that run on this machine, and their stages.

    These are the models of `cordee serve`, and those of the cluster that this node runs (`cordee up`).
    """
    if watch or as_json or _running():
        live.show(_running, _lines, as_json=as_json, watch=watch)
    else:
        output.note("Nothing is running. Try: cordee serve")


def _running() -> list[dict[str, Any]]:
    from cordee.agent.control import ask
    from cordee.serving.registry import running

    try:
        return running() + ask("GET", "/services", kind=list[dict[str, Any]])
    except NotRunning:
        return running()


def _lines(services: list[dict[str, Any]]) -> list[str]:
    return [line for service in services for line in _service(service)]


def _service(service: dict[str, Any]) -> list[str]:
    where = f"port {service['port']}" if service.get("port") else "no port"
    up = output.duration(service["uptime"])
    node = f"node {service['node']}, " if "node" in service else ""
    rows = [
        (
            str(stage["index"]),
            f"{stage['layers'][0]}-{stage['layers'][1] - 1}",
            str(stage["pid"] or "-"),
            stage["state"],
            "-" if stage["rss_bytes"] is None else output.size(stage["rss_bytes"]),
            "-" if stage["restarts"] is None else str(stage["restarts"]),
        )
        for stage in service["stages"]
    ]
    header = ("STAGE", "LAYERS", "PID", "STATE", "MEMORY", "RESTARTS")
    head = f"{service['model']}: {node}process {service['pid']}, {where}, up {up}"
    return [head, *output.table(header, rows)]
