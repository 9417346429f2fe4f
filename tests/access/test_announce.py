"""NAME.local on the network, by multicast DNS; what is in the way is told, and nothing else happens."""

import asyncio
import contextlib
import socket

import pytest

from cordee.access.announce import SERVICE, announced

zeroconf_asyncio = pytest.importorskip("zeroconf.asyncio")


def test_a_name_is_found_while_it_is_announced_and_another_of_that_name_is_told() -> None:
    told: list[str] = []

    async def look(service: str) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            looking = zeroconf_asyncio.AsyncZeroconf(interfaces=["127.0.0.1"])
            stack.push_async_callback(looking.async_close)
            found = await looking.async_get_service_info(SERVICE, service, 3000)
            return [] if found is None else [f"{found.server} {found.parsed_addresses()} {found.port}"]

    async def main() -> None:
        name = f"test-{socket.gethostname()}"[:20]
        service = f"Cordée {name}.{SERVICE}"
        async with announced(name, "127.0.0.1", 8322, is_plain=False, warn=told.append):
            assert told == []
            assert await look(service) == [f"{name}.local. ['127.0.0.1'] 8322"]
            async with announced(name, "127.0.0.1", 8323, is_plain=False, warn=told.append):
                assert len(told) == 1 and f"{name}.local already" in told[0]

    asyncio.run(main())
