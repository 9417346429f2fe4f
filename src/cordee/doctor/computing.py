"""Whether this machine can compute: libllama, memory, GPUs and their drivers."""

import importlib.metadata
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cordee import __version__
from cordee.errors import BadRequest, SetupNeeded
from cordee.findings import Finding
from cordee.machine import hardware

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


def computing_facts() -> dict[str, Any]:
    """Program, system, processor, memory, GPUs, and what libllama is and can use."""
    from cordee.engine.llama.libllama import usable_cores
    from cordee.machine.memory import memory

    return {
        "version": __version__,
        "system": hardware.distribution(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "processor": asdict(hardware.processor(hardware.cpuinfo())) | {"cores": usable_cores()},
        "memory": asdict(memory()),
        "gpus": [asdict(gpu) for gpu in hardware.gpus()],
        "vulkan_devices": hardware.vulkan_devices(),
        "libllama": _library(),
    }


def _library() -> dict[str, Any]:
    from cordee.engine.llama import backends, libllama

    facts: dict[str, Any] = {"build": None, "fault": "", "devices": [], "extra_buffers": False}
    facts |= {"prebuilt": backends.prebuilt() is not None, "cpu_variant": "", "cpu_variants": []}
    try:
        devices = libllama.devices()
        facts["build"] = libllama.build()
        used = libllama.in_use()
    except (BadRequest, SetupNeeded) as error:
        return facts | {"fault": error.message}
    facts |= {"cpu_variant": used.cpu_variant, "cpu_variants": list(used.cpu_variants)}
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
    return facts


def library(facts: dict[str, Any]) -> Sequence[Finding]:
    """Does libllama load, and do its bindings fit it?"""
    fault = facts["libllama"]["fault"]
    return [Finding(fault, build_line(None), True)] if fault else []


def memory(facts: dict[str, Any]) -> Sequence[Finding]:
    """Is there memory for the smallest model?"""
    available = facts["memory"]["available_bytes"]
    if available >= FREE_MEMORY_BYTES:
        return []
    what = (
        f"Only {available / 1e6:.0f} MB of memory is free; the starter model needs "
        f"{FREE_MEMORY_BYTES / 1e6:.0f} MB."
    )
    return [Finding(what, "Close other programs.", True)]


def gpus(facts: dict[str, Any]) -> Sequence[Finding]:
    """Is each GPU used?"""
    backends = {device["backend"] for device in facts["libllama"]["devices"]}
    return [
        finding
        for gpu in facts["gpus"]
        for finding in gpu_advice(hardware.Gpu(**gpu), backends, facts["system"])
    ]


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
