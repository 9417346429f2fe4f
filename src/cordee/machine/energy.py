"""Power that this machine's processors draw, in watts: from RAPL on Linux, and NVML for NVIDIA's cards."""

import importlib
import time
from pathlib import Path
from types import ModuleType

RAPL = Path("/sys/class/powercap")


class Meter:
    """To be asked periodically: RAPL counts energy, so power is computed from the last time on."""

    def __init__(self, rapl: Path = RAPL) -> None:
        self._domains = _readable_domains(rapl)
        self._nvml = _nvml()
        self._counted = self._count()
        self.joules: float | None = None  # since the start, as far as `watts` was asked; None: not measured

    def watts(self) -> float | None:
        """Mean power since the last call; None where nothing reports it."""
        before, self._counted = self._counted, self._count()
        (then, old), (now, new) = before, self._counted
        found: list[float] = []
        for domain, microjoules in new.items():
            spent = microjoules - old.get(domain, microjoules)
            if spent < 0:  # the counter wrapped around
                spent += _number(domain / "max_energy_range_uj") or 0
            if now > then:
                found.append(spent / 1e6 / (now - then))
        found += self._cards()
        if not found:
            return None
        self.joules = (self.joules or 0.0) + sum(found) * (now - then)
        return sum(found)

    def _count(self) -> tuple[float, dict[Path, int]]:
        counted = {domain: _number(domain / "energy_uj") for domain in self._domains}
        return time.monotonic(), {domain: value for domain, value in counted.items() if value is not None}

    def _cards(self) -> list[float]:
        if self._nvml is None:
            return []
        try:
            handles = map(self._nvml.nvmlDeviceGetHandleByIndex, range(self._nvml.nvmlDeviceGetCount()))
            return [self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000 for handle in handles]
        except self._nvml.NVMLError:
            return []


def _readable_domains(rapl: Path) -> list[Path]:
    """The processors' packages, without their subdomains; many systems let only root read them."""
    packages = sorted(rapl.glob("*-rapl:*"))
    return [
        each for each in packages if each.name.count(":") == 1 and _number(each / "energy_uj") is not None
    ]


def _nvml() -> ModuleType | None:
    """NVIDIA's module, if it is installed and finds a driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
