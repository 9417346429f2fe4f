"""The devices of this machine as the planner wants them: what stages may take, and how fast they read."""

import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from cordee.cluster.facts import Device
from cordee.engine.llama import libllama
from cordee.machine.memory import memory
from cordee.models.fit import USABLE

# What one core unpacks of 4-bit weights in a second, however fast the memory is (measured: the starter model
# on two cores of a Zen 4, 98 MB a token in 8.4 ms).
CORE_BYTES_PER_SECOND = 6e9
# A GPU does not tell how fast it reads its memory, and to find out takes a kernel; cards of 2019 and later
# read 200 to 1,000 GB/s.
GPU_BYTES_PER_SECOND = 300e9
# Larger than caches are; less where little memory is free.
MEASURED_BYTES = 128 << 20
MEASURED_PART = 1 / 8
MEASURE_SECONDS = 0.2


def own_devices(lent_bytes: int | None = None) -> tuple[Device, ...]:
    """The processor and every GPU that libllama can use; of each at most `lent_bytes` are promised.

    The processor is left out beside a GPU that shares its memory: the memory would be promised twice.

    Raises:
        SetupNeeded: libllama cannot be loaded.
    """
    room, cores = memory().available_bytes, libllama.usable_cores()
    speed = memory_speed(int(min(MEASURED_BYTES, room * MEASURED_PART)), cores)
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
    """Bytes that so many threads read in a second, measured on so much memory for MEASURE_SECONDS."""
    numbers = np.ones(max(nbytes // 8, cores))
    parts = np.array_split(numbers, cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as threads:
        ends = time.monotonic() + MEASURE_SECONDS
        while True:
            began = time.perf_counter()
            list(threads.map(np.max, parts))
            best = max(best, numbers.nbytes / max(time.perf_counter() - began, 1e-9))
            if time.monotonic() >= ends:
                return best
