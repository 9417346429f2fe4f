"""`cordee ps`: the services that run on this machine."""

import click

from cordee.cli import options, output


@click.command()
@options.as_json
def ps(as_json: bool) -> None:
    """List the models that run on this machine, and their stages."""
    from cordee.node.registry import running

    services = running()
    if as_json:
        output.print_json(services)
    elif services:
        for service in services:
            _print(service)
    else:
        output.note("Nothing is running. Try: cordee serve")


def _print(service: dict) -> None:
    where = f"port {service['port']}" if service.get("port") else "no port"
    up = output.duration(service["uptime"])
    click.echo(f"{service['model']}: process {service['pid']}, {where}, up {up}")
    rows = [
        (
            str(stage["index"]),
            f"{stage['layers'][0]}-{stage['layers'][1] - 1}",
            str(stage["pid"] or "-"),
            stage["state"],
            "-" if stage["rss_bytes"] is None else output.size(stage["rss_bytes"]),
            str(stage["restarts"]),
        )
        for stage in service["stages"]
    ]
    output.print_table(("STAGE", "LAYERS", "PID", "STATE", "MEMORY", "RESTARTS"), rows)
