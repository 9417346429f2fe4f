"""Addresses as people and nodes write them: `host`, `host:port`, `[v6]:port`; several joined by commas."""

import ipaddress
import socket

import psutil

from cordee.errors import BadRequest

PORT_MAX = 65_535
# A cable and Wi-Fi, each with IPv4 and IPv6. Every node would try more of them again and again.
ADDRESSES_MAX = 4


def parse(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of an address; a host alone gets `default_port`.

    Raises:
        BadRequest: it is neither `host` nor `host:port`, or the port is out of range.
    """
    host, port = text, str(default_port)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise BadRequest(f"{text!r} is not an address: write HOST or HOST:PORT, and [HOST]:PORT for IPv6.")
    return host, int(port)


def text(host: str, port: int) -> str:
    """An address in one string."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own(host: str, port: int) -> list[str]:
    """The addresses at which other nodes reach what listens on `host` and `port`, at most ADDRESSES_MAX.

    An empty host means all interfaces. Loopback is named only where the machine has nothing else.
    """
    if host:
        return [text(host, port)]
    found = [
        ipaddress.ip_address(entry.address)
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address
    ]
    usable = [each for each in found if not (each.is_loopback or each.is_link_local)]
    usable.sort(key=lambda each: (each.version, not each.is_private))
    return [text(str(each), port) for each in usable[:ADDRESSES_MAX]] or [text("127.0.0.1", port)]


def renewed(endpoint: str, host: str) -> str:
    """An endpoint of this machine (addresses joined by commas) with the addresses that it has now.

    `host` is where it listens: empty means all interfaces.
    """
    _, port = parse(endpoint.partition(",")[0], 0)
    return ",".join(own(host, port))


def listener(host: str, port: int) -> socket.socket:
    """A TCP socket that listens; an empty host means all interfaces, port 0 any free one.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
