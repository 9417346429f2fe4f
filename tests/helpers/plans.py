"""Made-up models and machines for tests of the planner."""

from cordee.cluster.facts import Device, Facts, ModelShape, SliceHeld

GB = 10**9
GBIT = 125_000_000


def made_shape(layers: int = 12, size: int = GB, **given: object) -> ModelShape:
    """A model of equal layers, with a head and an embedding of half a layer."""
    fields = {
        "digest": "m",
        "architecture": "llama",
        "n_embd": 1024,
        "n_vocab": 1000,
        "layer_bytes": (size,) * layers,
        "active_bytes": (size,) * layers,
        "cell_bytes": (4096,) * layers,
        "row_floats": (10_000,) * layers,
        "windowed": (False,) * layers,
        "embedding_bytes": size // 2,
        "extra_bytes": 1000,
        "last_extra_bytes": size // 2,
        "whole_extra_bytes": size,
        "active_head_bytes": size // 2,
    }
    return ModelShape(**(fields | given))


def device(memory: float, speed: float, kind: str = "gpu", name: str = "") -> Device:
    """A device with `memory` GB that reads `speed` GB a second."""
    return Device(name or kind.upper(), kind, int(memory * GB), speed * GB)


def machine(node: str, *devices: Device, **given: object) -> Facts:
    """A node with room on its disk and no measured links, so that the planner's defaults hold."""
    fields = {
        "name": node,
        "build": "b1",
        "disk_free_bytes": 10_000 * GB,
        "api": "",
        "rtts": {},
        "bytes_per_second": {},
        "slices": (),
        "stages": (),
    }
    return Facts(node=node, devices=devices, **(fields | given))


def named(*machines: Facts) -> dict[str, Facts]:
    return {one.node: one for one in machines}


def slices(*ranges: tuple[int, int]) -> tuple[SliceHeld, ...]:
    return tuple(SliceHeld("m", first, last) for first, last in ranges)
