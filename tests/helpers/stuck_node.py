"""`cordee` of a node that is stuck, and says that it is ten times as fast as it is.

The environment variable CORDEE_TEST_STUCK says how: it "loads" for ever, or "trickles" what it sends.
"""

import asyncio
import os
import sys

from msgspec.structs import replace

from cordee.agent import agent
from cordee.cli.main import main
from cordee.cluster.facts import Device
from cordee.machine.devices import own_devices
from cordee.worker import process
from cordee.worker.messages import LoadStage


def fast_devices(lent_bytes: int | None) -> tuple[Device, ...]:
    found = own_devices(lent_bytes)
    return tuple(replace(each, read_bytes_per_second=10 * each.read_bytes_per_second) for each in found)


async def load_for_ever(_: process.WorkerProcess, __: LoadStage) -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    agent.own_devices = fast_devices
    if os.environ["CORDEE_TEST_STUCK"] == "loads":
        process.WorkerProcess.load = load_for_ever
    else:
        process.COMMAND = (sys.executable, "-m", "stuck_worker")
    main()
