"""This machine alone, without any cluster, as the planner sees it."""

import platform
import shutil

from cordee.cluster.facts import Facts, SliceHeld
from cordee.files import home
from cordee.machine.devices import own_devices
from cordee.models.planned import PlannedModel


def this_machine(wanted: PlannedModel) -> dict[str, Facts]:
    """Its facts by its name, where `wanted` is to be planned; measuring its memory takes a moment.

    Raises:
        SetupNeeded: libllama cannot be loaded.
    """
    name = platform.node() or "localhost"
    facts = Facts(
        node=name,
        name=name,
        build="",
        devices=own_devices(),
        disk_free_bytes=shutil.disk_usage(home()).free,
        api="",
        rtts={},
        bytes_per_second={},
        slices=(SliceHeld(wanted.shape.digest, 0, wanted.shape.layers, whole=True),) if wanted.stored else (),
        stages=(),
    )
    return {name: facts}
