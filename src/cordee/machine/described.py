"""Machines described in a TOML file, for `cordee plan --nodes`. An error names the place in the file."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from cordee.cluster.facts import Device, Facts
from cordee.errors import BadRequest
from cordee.models.fit import USABLE

FILE_BYTES_MAX = 1 << 20  # thousands of machines
MACHINES_MAX = 256  # the planner's search is not made for more
# What the operating system and its programs need of the memory.
SYSTEM_BYTES = 2e9

SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SPEEDS = {f"{unit}/s": factor for unit, factor in SIZES.items()} | {"Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8}
TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}

Count = Annotated[int, msgspec.Meta(ge=1, le=MACHINES_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class GpuEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A graphics card, or `count` of them."""

    vram: str
    name: Name = "GPU"
    speed: str = "300 GB/s"
    count: Count = 1


class MachineEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A machine, or `count` equal ones. `network` and `rtt` are those of its link to the others."""

    name: Name
    ram: str
    ram_speed: str = "40 GB/s"
    disk: str = "1 TB"
    network: str = "1 Gbit/s"
    rtt: str = "0.5 ms"
    count: Count = 1
    gpu: list[GpuEntry] = []


class NodesFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    machine: list[MachineEntry]


def read_nodes(path: Path) -> dict[str, Facts]:
    """The machines that a file describes, by name.

    Raises:
        BadRequest: the file cannot be read or makes no sense; the message names the place.
    """
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX).decode()
        entries = msgspec.convert(tomllib.loads(text), NodesFile).machine
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.", "nodes") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise BadRequest(f"{path}: {error}; `cordee plan --help` shows the format.", "nodes") from error
    try:
        named = _named(entries)
        return {name: _facts(name, entry, named) for name, entry in named.items()}
    except ValueError as error:
        raise BadRequest(f"{path}: {error}.", "nodes") from None


def _named(entries: list[MachineEntry]) -> dict[str, MachineEntry]:
    """Each machine under a name of its own; raises ValueError."""
    named: dict[str, MachineEntry] = {}
    for entry in entries:
        for number in range(1, entry.count + 1):
            name = entry.name if entry.count == 1 else f"{entry.name}-{number}"
            if name in named:
                raise ValueError(f"two machines are called {name}")
            named[name] = entry
    if not 0 < len(named) <= MACHINES_MAX:
        raise ValueError(f"it describes {len(named)} machines; 1 to {MACHINES_MAX} can be planned")
    return named


def _facts(name: str, entry: MachineEntry, named: Mapping[str, MachineEntry]) -> Facts:
    """The facts the machine would publish. A link is as good as the worse of its two ends."""
    others = {other: end for other, end in named.items() if other != name}
    own_rtt, own_network = _rtt(entry), _network(entry)
    return Facts(
        node=name,
        name=name,
        build="",
        devices=tuple(_devices(entry)),
        disk_free_bytes=int(_amount(entry.name, "disk", entry.disk, SIZES)),
        api="",
        rtts={other: max(own_rtt, _rtt(end)) for other, end in others.items()},
        bytes_per_second={other: min(own_network, _network(end)) for other, end in others.items()},
        slices=(),
        stages=(),
    )


def _devices(entry: MachineEntry) -> list[Device]:
    """The graphics cards, then the processor; of each memory the part that stages may use."""
    devices: list[Device] = []
    for gpu in entry.gpu:
        vram = _amount(entry.name, "vram", gpu.vram, SIZES)
        speed = _amount(entry.name, "speed", gpu.speed, SPEEDS)
        for _ in range(gpu.count):
            taken = sum(device.name.partition(" #")[0] == gpu.name for device in devices)
            title = f"{gpu.name} #{taken + 1}" if taken else gpu.name
            devices.append(Device(title, "gpu", int(vram * USABLE), speed))
    ram = _amount(entry.name, "ram", entry.ram, SIZES)
    speed = _amount(entry.name, "ram_speed", entry.ram_speed, SPEEDS)
    return [*devices, Device("CPU", "cpu", int(max(0, ram - SYSTEM_BYTES) * USABLE), speed)]


def _rtt(entry: MachineEntry) -> float:
    return _amount(entry.name, "rtt", entry.rtt, TIMES)


def _network(entry: MachineEntry) -> float:
    return _amount(entry.name, "network", entry.network, SPEEDS)


def _amount(machine: str, key: str, text: str, units: Mapping[str, float]) -> float:
    """A number with a unit; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\S+)", text.strip())
    if not match or match[2] not in units:
        example = f"24 {next(unit for unit in units if unit[0] in 'Gm')}"
        raise ValueError(f'{key} of {machine} is "{text}", not an amount like "{example}"')
    return float(match[1]) * units[match[2]]
