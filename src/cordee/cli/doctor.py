"""`cordee doctor`: what this machine has, what is wrong with it, and the command that fixes it."""

import importlib.metadata
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from cordee import __version__
from cordee.cli import doctor_identity, options, output
from cordee.errors import SetupNeeded, StorageFailed
from cordee.machine import hardware

FREE_DISK_BYTES = 1_000_000_000  # a small model and its slices
FREE_MEMORY_BYTES = 400_000_000  # the starter model in one stage, with its context


@dataclass(frozen=True)
class Backend:
    """A GPU backend of libllama: how its devices' names begin, llama.cpp's option, Debian's packages."""

    name: str
    option: str
    packages: tuple[str, ...]


CUDA = Backend("CUDA", "-DGGML_CUDA=on", ("nvidia-cuda-toolkit",))
VULKAN = Backend(
    "Vulkan", "-DGGML_VULKAN=on", ("glslc", "libvulkan-dev", "mesa-vulkan-drivers", "spirv-headers")
)
BACKENDS = {"NVIDIA": CUDA, "AMD": VULKAN, "Intel": VULKAN}
# Debian's packages that the kernel needs to drive the GPU; they are in its non-free components.
DRIVERS = {"NVIDIA": "nvidia-driver", "AMD": "firmware-amd-graphics", "Intel": "firmware-misc-nonfree"}


@dataclass(frozen=True)
class Finding:
    """Something to know. A problem must be fixed before a model can run; anything else is advice."""

    what: str
    remedy: str
    problem: bool


@click.command()
@options.as_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: show what it has, what is wrong, and how to fix it.

    Exits 0 if models can run and 1 if something must be fixed first.
    """
    facts, findings = examine()
    if as_json:
        output.print_json(facts | {"findings": [asdict(finding) for finding in findings]})
    else:
        output.print_facts(_lines(facts))
        for finding in findings:
            click.echo(f"\n{'PROBLEM' if finding.problem else 'Advice'}: {finding.what}\n  {finding.remedy}")
        if not any(finding.problem for finding in findings):
            click.echo("\nAll is well.")
    if any(finding.problem for finding in findings):
        ctx.exit(1)


def examine() -> tuple[dict[str, Any], list[Finding]]:
    """The facts of this machine (JSON-able) and what follows from them."""
    from cordee.engine.llama.libllama import usable_cores
    from cordee.machine.memory import memory

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    room = memory()
    gpus = hardware.gpus()
    library, findings = _library()
    disk, disk_findings = _disk()
    system = hardware.distribution()
    facts: dict[str, Any] = {
        "version": __version__,
        "system": system,
        "python": ".".join(map(str, sys.version_info[:3])),
        "processor": asdict(hardware.processor(cpuinfo)) | {"cores": usable_cores()},
        "memory": asdict(room),
        "disk": disk,
        "gpus": [asdict(gpu) for gpu in gpus],
        "vulkan_devices": hardware.vulkan_devices(),
        "libllama": library,
    }
    findings += disk_findings
    findings += [Finding(*found) for found in doctor_identity.findings(time.time())]
    if room.available_bytes < FREE_MEMORY_BYTES:
        wanted = output.size(FREE_MEMORY_BYTES)
        what = (
            f"Only {output.size(room.available_bytes)} of memory is free; the starter model needs {wanted}."
        )
        findings.append(Finding(what, "Close other programs.", True))
    backends = {device["backend"] for device in library["devices"]}
    for gpu in gpus:
        findings += gpu_advice(gpu, backends, system)
    return facts, findings


def _library() -> tuple[dict[str, Any], list[Finding]]:
    """What libllama is and can use, and whether its bindings fit it."""
    from cordee.engine.llama import libllama

    facts: dict[str, Any] = {"build": None, "devices": [], "extra_buffers": False}
    try:
        devices = libllama.devices()
        facts["build"] = libllama.build()
    except SetupNeeded as error:
        return facts, [Finding(error.message, build_line(None), True)]
    facts["devices"] = [
        {
            "name": device.name,
            "backend": device.name.rstrip("0123456789"),
            "description": device.description,
            "kind": device.kind,
            "free_bytes": device.free_bytes,
            "total_bytes": device.total_bytes,
        }
        for device in devices
    ]
    facts["extra_buffers"] = libllama.survives_extra_buffers()
    return facts, []


def _disk() -> tuple[dict[str, Any], list[Finding]]:
    from cordee.files import home

    try:
        folder = home()
    except StorageFailed as error:
        return {"folder": None, "free_bytes": 0}, [Finding(error.message, "export CORDEE_HOME=FOLDER", True)]
    free = shutil.disk_usage(folder).free
    findings: list[Finding] = []
    if not os.access(folder, os.W_OK | os.X_OK):
        findings.append(Finding(f"{folder} cannot be written.", f"sudo chown -R $USER {folder}", True))
    if free < FREE_DISK_BYTES:
        what = f"Only {output.size(free)} of disk space is free in {folder}, where models are kept."
        findings.append(
            Finding(what, "Free some space, or set CORDEE_HOME to a folder on another disk.", True)
        )
    return {"folder": str(folder), "free_bytes": free}, findings


def gpu_advice(gpu: hardware.Gpu, backends: set[str], system: str) -> list[Finding]:
    """How to let models use this GPU; nothing if this build of libllama has a backend for it."""
    backend = BACKENDS[gpu.vendor]
    if backend.name in backends:
        return []
    name = f"{gpu.vendor} {gpu.name}"
    if gpu.driver is None or gpu.driver == "nouveau":
        what = f"{name} has no driver that can compute."
        return [Finding(what, f"sudo apt-get install -y {DRIVERS[gpu.vendor]}", False)]
    steps: list[str] = []
    if missing := hardware.missing_packages(backend.packages):
        steps.append(f"sudo apt-get install -y {' '.join(missing)}")
    steps.append(build_line(backend))
    remedy = "\n  ".join(steps)
    if backend is VULKAN and "Debian GNU/Linux 12" in system:
        remedy += (
            "\n  (Debian 12's Vulkan headers are too old for this libllama: use Debian 13 or the Vulkan SDK)"
        )
    return [Finding(f"{name} is not used: this build of libllama has no {backend.name}.", remedy, False)]


def build_line(backend: Backend | None) -> str:
    """The shell command that installs libllama into this environment, with a GPU backend or without."""
    pip = Path(sys.prefix) / "bin" / "pip"
    option = f'CMAKE_ARGS="{backend.option}" ' if backend else ""
    return f"{option}{pip} install --force-reinstall --no-deps --no-cache-dir '{_requirement()}'"


def _requirement() -> str:
    """The Python binding that this version of Cordée needs, as pip writes it."""
    with suppress(importlib.metadata.PackageNotFoundError):  # run from the sources, not installed
        for line in importlib.metadata.requires("cordee") or ():
            if line.startswith("llama-cpp-python"):
                return line
    return "llama-cpp-python"


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
    ]
    lines += [("GPU", f"{g['vendor']} {g['name']}, driver {g['driver'] or 'none'}") for g in facts["gpus"]]
    lines += [("Vulkan", name) for name in facts["vulkan_devices"]]
    lines.append(("libllama", library["build"] or "does not load"))
    for device in library["devices"]:
        room = f"{output.size(device['free_bytes'])} free of {output.size(device['total_bytes'])}"
        lines.append(("Device", f"{device['name']} ({device['description']}), {room}"))
    return lines


def _amx(instruction_sets: list[str], extra_buffers: bool) -> str:
    if "amx_int8" not in instruction_sets:
        return "not on this processor"
    return "usable" if extra_buffers else "advertised, but fails when used; not used"
