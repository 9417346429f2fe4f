"""The API's names on the local network, by multicast DNS (RFC 6762): NAME.local, without a name server."""

import contextlib
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

from cordee.access import lan
from cordee.net import address

SERVICE = "_https._tcp.local."
PLAIN_SERVICE = "_http._tcp.local."


@contextlib.asynccontextmanager
async def announced(
    name: str, host: str, port: int, *, is_plain: bool, warn: Callable[[str], None]
) -> AsyncGenerator[None]:
    """Meanwhile `name`.local is this machine, and services are listed at `port`.

    What is in the way (no multicast here, or another machine of that name) is told to `warn`: addresses work
    all the same.
    """
    try:
        from zeroconf import Error, InterfaceChoice, NonUniqueNameException
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf
    except ImportError:
        warn("names by multicast need the package zeroconf, which is not installed: use an address")
        yield
        return
    service, own = PLAIN_SERVICE if is_plain else SERVICE, lan.label(name)
    packed = [_packed(each) for each in lan.addresses(host)]
    async with contextlib.AsyncExitStack() as stack:
        try:
            zeroconf = AsyncZeroconf(interfaces=[host] if host else InterfaceChoice.All)
            stack.push_async_callback(zeroconf.async_close)
            info = AsyncServiceInfo(
                service,
                f"Cordée {own}.{service}",
                addresses=packed,
                port=port,
                properties={"path": "/v1"},
                server=f"{own}.local.",
            )
            await (await cast("Any", zeroconf).async_register_service(info))  # its type says too little
            stack.push_async_callback(zeroconf.async_unregister_all_services)
        except NonUniqueNameException:
            warn(
                f"another machine of this network is {own}.local already: `cordee up --name` chooses another"
            )
        except (Error, OSError, ValueError) as error:
            warn(f"{own}.local is not announced ({error}): use an address")
        yield


def _packed(text: str) -> bytes:
    found = address.number(text)
    assert found is not None, "addresses are numbers"
    return socket.inet_pton(socket.AF_INET if found.version == 4 else socket.AF_INET6, str(found))
