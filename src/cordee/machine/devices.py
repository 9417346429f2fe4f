"""The devices of this machine as the planner needs them: memory for stages, and read speed."""

import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from cordee.cluster.facts import Device
from cordee.engine.llama import libllama
from cordee.machine.memory import memory_for_stages
from cordee.models.fit import USABLE

# Bytes of 4-bit weights that one core unpacks in a second, however fast the memory is (measured: the starter
# model on two cores of a Zen 4, 98 MB a token in 8.4 ms).
CORE_BYTES_PER_SECOND = 6e9
# A GPU does not report how fast it reads its memory, and measuring it takes a kernel; cards since 2019 read
# 200 to 1,000 GB/s.
GPU_BYTES_PER_SECOND = 300e9
# Memory for the measurement: larger than caches are; less where little memory is free.
MEASURED_BYTES = 128 << 20
MEASURED_SHARE = 1 / 8
MEASURE_SECONDS = 0.2


def own_devices(lent_bytes: int | None = None) -> tuple[Device, ...]:
    """The processor and every GPU that libllama can use; at most `lent_bytes` of each are promised.

    The processor is left out beside a GPU that shares its memory: the memory would be promised twice.

    Raises:
        SetupNeeded: libllama cannot be loaded.
    """
    room, cores = memory_for_stages(), libllama.usable_cores()
    speed = memory_speed(int(min(MEASURED_BYTES, room * MEASURED_SHARE)), cores)
    found = [
        Device(
            device.name,
            "gpu",
            int(device.free_bytes * USABLE),
            GPU_BYTES_PER_SECOND if device.kind == "GPU" else speed,
        )
        for device in libllama.devices()
        if device.kind in ("GPU", "IGPU")
    ]
    if not any(device.kind == "IGPU" for device in libllama.devices()):
        found.append(Device("CPU", "cpu", int(room * USABLE), min(speed, cores * CORE_BYTES_PER_SECOND)))
    if lent_bytes is not None:
        found = [
            msgspec.structs.replace(device, memory_bytes=min(device.memory_bytes, lent_bytes))
            for device in found
        ]
    return tuple(found)


def memory_speed(nbytes: int, cores: int) -> float:
    """Bytes that `cores` threads read in a second, measured on `nbytes` of memory for MEASURE_SECONDS."""
    numbers = np.ones(max(nbytes // 8, cores))
    shares = np.array_split(numbers, cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as threads:
        ends = time.monotonic() + MEASURE_SECONDS
        while True:
            began = time.perf_counter()
            list(threads.map(np.max, shares))
            best = max(best, numbers.nbytes / max(time.perf_counter() - began, 1e-9))
            if time.monotonic() >= ends:
                return best
