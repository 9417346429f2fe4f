"""A machine: what it has, what its disk holds, and what is wrong with it. It outlives its agents."""

from dataclasses import dataclass, field

from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Device, SliceHeld

DISK_BYTES = 100 << 30


@dataclass(eq=False)
class Machine:
    """`clock_error`: by how much its clock is wrong; `since`: what its steady clock showed at the start."""

    name: str
    devices: tuple[Device, ...]
    clock_error: float = 0.0
    since: float = 0.0
    found_at: float = 0.0  # when other machines have found it after its agent's start
    stopped_until: float = 0.0  # a pause: nothing runs, messages wait
    slow: float = 1.0  # how many times longer its disk takes
    disk_bytes: int = DISK_BYTES
    draining: bool = False
    breaks_loading: bool = False  # workers fail to load
    never_loads: bool = False  # workers load for ever
    creeps: bool = False  # nothing comes over its data links for CREEP_SECONDS
    # On disk:
    slices: set[SliceHeld] = field(default_factory=set[SliceHeld])
    deployments: tuple[Deployment, ...] = ()
    revocations: dict[str, bytes] = field(default_factory=dict[str, bytes])
    remembered: set[str] = field(default_factory=set[str])  # nodes that were heard
    boots: int = 0
