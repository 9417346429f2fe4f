"""Where nodes of a cluster are now, by multicast: for a node that cannot enter the bus."""

import asyncio
import contextlib
import json

import zenoh
from zenoh.handlers import Callback  # pyright: ignore[reportMissingModuleSource] - in the native module

from cordee.errors import BadRequest
from cordee.net import address
from cordee.net.zenoh_config import scouting_config

HOSTS_MAX = 64  # whoever answers: anybody can


async def hosts(cluster: str, interface: str, seconds: float) -> list[str]:
    """The hosts in this machine's networks that answer as nodes of a cluster within `seconds`.

    `interface` is as in BusOptions.scouting.
    """
    if not interface:
        return []
    found: dict[str, None] = {}

    def note(hello: zenoh.Hello) -> None:
        for locator in hello.locators:
            with contextlib.suppress(BadRequest):
                host, _ = address.parse(locator.removeprefix("tls/"), 0)
                if len(found) < HOSTS_MAX and address.is_near(host):
                    found[host] = None

    settings = {"mode": "peer", "scouting": scouting_config(cluster, interface)}
    config = zenoh.Config.from_json5(json.dumps(settings))
    try:
        scout = zenoh.scout(Callback(note, indirect=False), what="peer", config=config)
    except zenoh.ZError:  # no network, or no such interface
        return []
    await asyncio.sleep(seconds)
    scout.stop()  # pyright: ignore[reportUnknownMemberType] - zenoh declares no return type
    return list(found)
