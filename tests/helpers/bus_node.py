"""A node on the bus as a process of its own, for tests: `python bus_node.py HOME OPTIONS`, OPTIONS as JSON.

Prints one JSON object a line: {"up": addresses}, {"alive": id, "is": bool}, {"heard": text}. Each line of
standard input is published; at its end the node ends.
"""

import asyncio
import json
import os
import sys

from cordee.net import identity
from cordee.net.bus import BusOptions
from cordee.net.zenoh_bus import ZenohBus


def report(**event: object) -> None:
    print(json.dumps(event), flush=True)


async def main() -> None:
    os.environ["CORDEE_HOME"] = sys.argv[1]
    options = json.loads(sys.argv[2])
    member = identity.load()
    bus = await ZenohBus.open(
        member, BusOptions(options["listen"], tuple(options["peers"]), options["scouting"])
    )
    bus.watch("alive/*", lambda key, alive: report(alive=key.removeprefix("alive/"), **{"is": alive}))
    bus.subscribe("heartbeat/*", lambda key, payload: report(heard=payload.decode()))
    bus.announce(f"alive/{member.node}")
    report(up=bus.addresses)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := (await reader.readline()).decode().strip():
        bus.publish(f"heartbeat/{member.node}", line.encode())
    await bus.close()


asyncio.run(main())
