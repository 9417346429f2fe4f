"""This machine's processor, GPUs and system; from /proc, /sys and a few programs."""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Instruction sets for which ggml has kernels, as Linux spells them (x86-64, then ARM).
INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "bmi2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)
# PCI vendors that make GPUs libllama can compute on; others are displays of servers and virtual machines.
GPU_VENDORS = {0x10DE: "NVIDIA", 0x1002: "AMD", 0x8086: "Intel"}
DISPLAY_CLASS = 0x03  # PCI base class of display controllers
TOOL_SECONDS = 10  # nvidia-smi wakes sleeping GPUs, which takes a few seconds


@dataclass(frozen=True)
class Processor:
    """A CPU; `instruction_sets` are those of INSTRUCTION_SETS that it has."""

    name: str
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """A graphics processor and the kernel driver that owns it, if any does."""

    vendor: str
    name: str
    driver: str | None


def cpuinfo() -> str:
    """What /proc/cpuinfo says; empty where there is none."""
    return _read(Path("/proc/cpuinfo"))


def processor(cpuinfo: str) -> Processor:
    """The processor that the text of /proc/cpuinfo describes; without one, the system's name for it."""
    name = re.search(r"^(?:model name|Model|Hardware)\s*: (.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", cpuinfo, re.MULTILINE)
    has = set(flags[1].split()) if flags else set[str]()
    return Processor(
        name[1] if name else platform.processor() or "unknown", tuple(s for s in INSTRUCTION_SETS if s in has)
    )


def gpus(sys_folder: Path = Path("/sys")) -> list[Gpu]:
    """The GPUs of vendors for which libllama has a backend."""
    found = list(_pci_gpus(sys_folder))
    if not any(gpu.vendor == "NVIDIA" for gpu in found):  # WSL shows no PCI device
        found += [Gpu("NVIDIA", name, "nvidia") for name in _nvidia_smi_names()]
    return found


def _pci_gpus(sys_folder: Path) -> Iterator[Gpu]:
    for device in sorted((sys_folder / "bus/pci/devices").glob("*")):
        kind, vendor = (int(_read(device / name) or "0", 16) for name in ("class", "vendor"))
        if kind >> 16 != DISPLAY_CLASS or vendor not in GPU_VENDORS:
            continue
        driver = (device / "driver").resolve().name if (device / "driver").exists() else None
        product = f"PCI device {vendor:04x}:{int(_read(device / 'device') or '0', 16):04x}"
        yield Gpu(GPU_VENDORS[vendor], _lspci_name(device.name) or product, driver)


def _lspci_name(slot: str) -> str:
    """The name of the device in a PCI slot, such as 'GA104 [GeForce RTX 3070]'."""
    fields = re.findall(r'"([^"]*)"', _output("lspci", "-mm", "-s", slot))
    return fields[2] if len(fields) > 2 else ""


def _nvidia_smi_names() -> list[str]:
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def vulkan_devices() -> list[str]:
    """Names of the devices that vulkaninfo reports, including software ones; empty without vulkaninfo."""
    return re.findall(r"^\s*deviceName\s*= (.+)$", _output("vulkaninfo", "--summary"), re.MULTILINE)


def distribution() -> str:
    """The system's name, such as 'Debian GNU/Linux 12 (bookworm)'."""
    if sys.platform == "win32":
        return platform.platform()
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(Path("/etc/os-release")), re.MULTILINE)
    return match[1] if match else "unknown"


def missing_packages(packages: tuple[str, ...]) -> list[str]:
    """Those of the Debian packages that are not installed; all of them where there is no dpkg."""
    ok = "install ok installed"
    return [name for name in packages if ok not in _output("dpkg-query", "-W", "-f", "${Status}", name)]


def _output(program: str, *arguments: str) -> str:
    """What a program prints; empty if it is not there, fails or hangs."""
    if shutil.which(program) is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    """The text of a small system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
