"""The power that processors draw, read from folders like those of Linux and a module like NVIDIA's."""

import sys
import types
from pathlib import Path

import pytest

from cordee.machine import energy
from cordee.machine.energy import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock that the meter reads."""
    now = [100.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return now


def domain(folder: Path, name: str, microjoules: int, wraps_at: int = 1_000_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return path / "energy_uj"


def test_packages_are_added_up_and_their_subdomains_are_not(tmp_path: Path, clock: list[float]) -> None:
    first = domain(tmp_path, "intel-rapl:0", 5_000_000)
    core = domain(tmp_path, "intel-rapl:0:0", 5_000_000)
    second = domain(tmp_path, "intel-rapl:1", 0)
    meter = Meter(tmp_path)
    clock[0] += 2.0
    first.write_text("65000000")
    core.write_text("65000000")
    second.write_text("20000000")
    assert meter.joules is None, "nothing was measured yet"
    assert meter.watts() == pytest.approx(30 + 10)
    assert meter.joules == pytest.approx(60 + 20)
    clock[0] += 1.0
    assert meter.watts() == pytest.approx(0)
    assert meter.joules == pytest.approx(60 + 20)


def test_a_counter_that_wraps_around(tmp_path: Path, clock: list[float]) -> None:
    counter = domain(tmp_path, "intel-rapl:0", 990_000_000)
    meter = Meter(tmp_path)
    clock[0] += 1.0
    counter.write_text("15000000")
    assert meter.watts() == pytest.approx(25)


def test_a_machine_that_reports_nothing(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # a counter that only root may read
    meter = Meter(tmp_path)
    clock[0] += 1.0
    assert meter.watts() is None and meter.joules is None


def test_cards_are_read_where_their_module_is_installed(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NVMLError(Exception):
        pass

    broken: list[int] = []

    def usage(card: int) -> int:
        if card in broken:
            raise NVMLError
        return 70_500 if card == 0 else 9_500

    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPowerUsage=usage,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    meter = Meter(tmp_path)
    assert meter.watts() == pytest.approx(80)
    broken.append(1)
    assert meter.watts() is None
