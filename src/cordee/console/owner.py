"""Whether a connection on this machine comes from the account that runs this program, or from root.

Without a key the API answers every account of this machine. What changes the cluster is for its owner alone,
so the system is asked whose the other end of the connection is: it lists the sockets with their owners
(proc(5), /proc/net/tcp). Where there is no such list, nobody is taken for the owner.
"""

import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ROOT = 0

Address = tuple[str, int]


def is_owner(client: Address | None, server: Address | None, tables: tuple[Path, ...] = TABLES) -> bool:
    """Whether all ends of that kind are the owner's: `client` and `server` are host and port, as they are
    seen from the server. It reads the whole table, which takes a millisecond or so."""
    if client is None or server is None:
        return False
    try:
        ends = {(here, there) for here in _forms(client) for there in _forms(server)}
    except ValueError:
        return False
    owners = [uid for here, there, uid in _sockets(tables) if (here, there) in ends]
    return bool(owners) and set(owners) <= {os.getuid(), ROOT}


def _forms(address: Address) -> Iterator[str]:
    """How the tables write an address: words of the machine's own byte order, in hexadecimal."""
    host, port = ipaddress.ip_address(address[0]), address[1]
    hosts: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [host]
    if isinstance(host, ipaddress.IPv4Address):
        hosts.append(ipaddress.IPv6Address(f"::ffff:{host}"))
    elif host.ipv4_mapped is not None:
        hosts.append(host.ipv4_mapped)
    for each in hosts:
        words = struct.unpack(f"={len(each.packed) // 4}I", each.packed)
        yield f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def _sockets(tables: tuple[Path, ...]) -> Iterator[tuple[str, str, int]]:
    """Of each socket: its own address, that of the other end, its owner."""
    for table in tables:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 7 and fields[7].isdecimal():
                yield fields[1], fields[2], int(fields[7])
