"""Addresses as people and nodes write them: `host`, `host:port`, `[v6]:port`; several joined by commas.

What a person wrote (`listening`, `peer`) is checked before it is used or kept: other nodes get numbers that
they can reach, never names, and never "all interfaces". Which of its own addresses a node tells the others,
and in which order, is `own`.
"""

import contextlib
import errno
import ipaddress
import random
import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import psutil

from cordee.errors import BadRequest

PORT_MAX = 65_535
# Where everything but the bus listens: stages, their tokens, invitations. A small range, so that a firewall
# can be opened for it; a node takes one for each stage and two more, and a machine may run several nodes.
PORTS = range(7331, 7361)
# A cable and Wi-Fi, each with IPv4 and IPv6. Every node would try more of them again and again.
ADDRESSES_MAX = 4
NAME = re.compile(r"(?!-)[\w-]{1,63}(?:\.[\w-]{1,63})*\.?")
# No name, but perhaps no IPv4 address either, such as 192.168.1: systems read that in odd ways.
NUMBER = re.compile(r"(?:.*\.)?(?:\d+|0[xX][0-9a-fA-F]*)\.?")
PORT_DIGITS = re.compile(r"[0-9]{1,5}")

# By the beginnings of their names, as /sys would tell but not in every network namespace. Bridges and their
# ports lead to containers and virtual machines of this machine, and to nobody else; tunnels are slow.
CONTAINERS = (
    *("br-", "docker", "podman", "cni", "flannel", "cali", "cilium", "vxlan", "kube", "weave", "nerdctl"),
    *("veth", "vnet", "virbr", "vmnet", "vboxnet", "lxc", "lxd", "incus", "mpqemu", "waydroid", "dummy"),
)
TUNNELS = ("tun", "tap", "wg", "tailscale", "zt", "ppp", "utun", "nebula", "ipsec", "vpn", "gre", "sit")

# Of networks that belong to somebody: RFC 1918, RFC 4193, and RFC 6598, which VPNs such as Tailscale use.
PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Listening:
    """Where to listen: an IP address of this machine, or (empty `host`) all interfaces.

    `is_chosen`: somebody named the port, so that no other will do.
    """

    host: str
    port: int
    is_chosen: bool


def parse(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of an address; a host alone gets `default_port`.

    Raises:
        BadRequest: it is neither `host` nor `host:port`, or the port is out of range.
    """
    host, port = _split(text)
    if not host:
        raise _malformed(text)
    return host, default_port if port is None else port


def _split(text: str) -> tuple[str, int | None]:
    host, port = text, None
    if text.startswith("["):
        host, closing, rest = text[1:].partition("]")
        if not closing or ":" not in host or (rest and not rest.startswith(":")):
            raise _malformed(text)
        port = rest[1:] if rest else None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port is not None and not (PORT_DIGITS.fullmatch(port) and int(port) <= PORT_MAX):
        raise _malformed(text)
    if host and number(host) is None and (NUMBER.fullmatch(host) or not NAME.fullmatch(host)):
        raise _malformed(text)
    return host, None if port is None else int(port)


def _malformed(text: str) -> BadRequest:
    return BadRequest(f"{text!r} is not an address: write HOST or HOST:PORT, and [HOST]:PORT for IPv6.")


def number(host: str) -> IpAddress | None:
    """The IP address that a host is written as; None for a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found


def hosts(endpoint: str) -> list[str]:
    """The hosts of addresses that are joined by commas; what is no address is left out."""
    found: list[str] = []
    for each in endpoint.split(",")[:ADDRESSES_MAX]:
        with contextlib.suppress(BadRequest):
            found.append(parse(each, 0)[0])
    return found


def text(host: str, port: int) -> str:
    """An address in one string."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(host: str) -> list[IpAddress]:
    """The IP addresses of a host, which may be written as one; asking for a name may take some seconds.

    Raises:
        BadRequest: no host of that name is known here.
    """
    found = number(host)
    if found is not None:
        return [found]
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(f"No host called {host!r} is known on this machine ({reason}).") from error
    return list(dict.fromkeys(ipaddress.ip_address(str(sockaddr[0])) for *_, sockaddr in answers))


def listening(wanted: str, default_port: int) -> Listening:
    """Where `wanted` says to listen: HOST, HOST:PORT, :PORT, or nothing for all interfaces.

    An unspecified host (0.0.0.0, ::) means all interfaces, too.

    Raises:
        BadRequest: it is no address, or none of this machine at which others reach it.
    """
    host, port = _split(wanted)
    if host:
        host = _of_this_machine(host)
    return Listening(host, default_port if port is None else port, port is not None)


def _of_this_machine(host: str) -> str:
    """The IP address of this machine that `host` stands for; empty for all of them."""
    found = resolve(host)
    if any(each.is_unspecified for each in found):
        return ""
    if any("%" in str(each) for each in found) or any(_is_link_local_v6(each) for each in found):
        raise BadRequest(
            f"{host} is a link-local address, which other machines cannot use without the name of their own "
            f"interface: listen on another one. {_this_machine_has()}"
        )
    ours = {address for _, address in interfaces()}
    usable = [each for each in found if each in ours or each.is_loopback]
    if not usable:
        raise BadRequest(
            f"{host} is not an address of this machine. {_this_machine_has()} Without --listen, a node "
            "listens on all of them."
        )
    return str(min(usable, key=lambda each: each.is_loopback))


def _is_link_local_v6(each: IpAddress) -> bool:
    return each.version == 6 and each.is_link_local


def _this_machine_has() -> str:
    usable = [pair for pair in interfaces() if not (pair[1].is_loopback or _is_link_local_v6(pair[1]))]
    found = ", ".join(f"{each} ({name})" for name, each in usable)
    return f"It has {found}." if found else "It has none at the moment."


def peer(wanted: str, default_port: int) -> tuple[str, int]:
    """Host and port of another node, as a person wrote them; the host may be a name.

    Raises:
        BadRequest: no node can be reached at such an address.
    """
    host, port = parse(wanted, default_port)
    found = number(host)
    if not port:
        raise BadRequest(f"No node can be at {wanted}: port 0 is none.")
    if found is not None and (found.is_unspecified or found.is_multicast):
        raise BadRequest(f"No node can be at {wanted}: write the address of one machine.")
    if found is not None and _is_link_local_v6(found):
        raise BadRequest(f"{host} is a link-local address, which the bus cannot use: write another one.")
    return (host if found is None else str(found)), port


def check_interface(name: str) -> None:
    """Refuse what is no network interface of this machine, neither by name nor by address.

    Raises:
        BadRequest: there is no such interface.
    """
    names = [each for _, each in socket.if_nameindex()]
    if name not in names and number(name) not in {each for _, each in interfaces()}:
        raise BadRequest(f"There is no network interface {name!r} here; there are {', '.join(names)}.")


def interfaces() -> list[tuple[str, IpAddress]]:
    """The addresses of this machine, each with its interface."""
    return [
        (name, ipaddress.ip_address(entry.address))
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def own(host: str, port: int) -> list[str]:
    """The addresses at which other nodes reach what listens on `host` and `port`, at most ADDRESSES_MAX.

    An empty host means all interfaces. Loopback is named only where the machine has nothing else.
    """
    if host:
        return [text(host, port)]
    usable = ranked(interfaces(), _way_out())
    return [text(str(each), port) for each in usable[:ADDRESSES_MAX]] or [text("127.0.0.1", port)]


def ranked(found: Iterable[tuple[str, IpAddress]], way_out: Collection[IpAddress]) -> list[IpAddress]:
    """The addresses of `found` that other machines may reach, the likeliest first.

    The interface of the default route comes first (`way_out` are addresses of it), then others, tunnels, and
    bridges of containers. Each interface's first IPv4 address comes before its second, so that one with many
    does not push the others out; a network without DHCP comes after those with it.
    """
    entries = [(name, each) for name, each in found if not (each.is_loopback or _is_link_local_v6(each))]
    main = {name for name, each in entries if each in way_out and not name.startswith(TUNNELS)}
    counts: dict[tuple[str, int], int] = {}
    keyed: list[tuple[tuple[int, ...], IpAddress]] = []
    for name, each in entries:
        nth = counts[name, each.version] = counts.get((name, each.version), 0) + 1
        kind = 3 if name.startswith(CONTAINERS) else 2 if name.startswith(TUNNELS) else 1
        kind = 0 if name in main else kind
        keyed.append(((kind == 3, each.is_link_local, nth, each.version, kind), each))
    keyed.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(each for _, each in keyed))


def _way_out() -> list[IpAddress]:
    """The addresses from which this machine would reach the internet; nothing is sent for this."""
    found: list[IpAddress] = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found.append(ipaddress.ip_address(probe.getsockname()[0]))
        except OSError:  # there is no such route
            continue
    return found


def is_loopback(endpoint: str) -> bool:
    """Whether an address, `host:port`, can be reached from its own machine only."""
    try:
        found = number(parse(endpoint, 0)[0])
    except BadRequest:
        return False
    return found is not None and found.is_loopback


def is_near(host: str) -> bool:
    """Whether a host that another node named is in one of this machine's own networks, and may be dialled.

    It must be a number, so that nobody has this machine ask for names. Private, link-local and loopback
    addresses always are: a VPN or a routed network has more of them than the interfaces show. Of public ones
    those are that share a network with an interface. Where machines with public addresses sit behind routers,
    each has to be given with --peer.
    """
    found = number(host)
    if found is None or found.is_multicast or found.is_unspecified:
        return False
    if found.is_loopback or found.is_link_local or any(found in network for network in PRIVATE):
        return True
    return any(found in network for network in _networks())


def _networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Those that this machine's interfaces are in."""
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if not entry.netmask or entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            bits = int(ipaddress.ip_address(entry.netmask)).bit_count()
            if bits:  # a tunnel may say that everything is at its other end
                own_host = entry.address.partition("%")[0]
                found.append(ipaddress.ip_network(f"{own_host}/{bits}", strict=False))
    return found


def network_of(endpoint: str) -> str:
    """The network of an address of this machine, `host:port`, as firewalls write it: 192.168.1.0/24."""
    host = parse(endpoint, 0)[0]
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.address == host and entry.netmask and entry.family == socket.AF_INET:
                return str(ipaddress.ip_network(f"{host}/{entry.netmask}", strict=False))
    return host


def renewed(endpoint: str, host: str) -> str:
    """An endpoint of this machine (addresses joined by commas) with the addresses that it has now.

    `host` is where it listens: empty means all interfaces.
    """
    _, port = parse(endpoint.partition(",")[0], 0)
    return ",".join(own(host, port))


def from_here(endpoint: str) -> str:
    """An endpoint of this machine for its own processes: by loopback first.

    A link by an address that the machine loses in the meantime hangs without an error; loopback stays.
    """
    _, port = parse(endpoint.partition(",")[0], 0)
    return f"{text('127.0.0.1', port)},{endpoint}"


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


def listener_in_range(host: str) -> socket.socket:
    """`listener` on a port of PORTS, or on any if all are taken.

    It begins anywhere in the range: a port that was just closed is not soon somebody else's, whom an old
    message could reach.

    Raises:
        OSError: the address is not this machine's.
    """
    for port in random.sample(PORTS, len(PORTS)):
        try:
            return listener(host, port)
        except OSError:
            continue
    return listener(host, 0)


def refusal(error: OSError, port: int) -> str:
    """Why `listener` raised, for people: who has the port, where it is taken."""
    if error.errno == errno.EADDRINUSE:
        return f"it is taken by {holder(port)}"
    return error.strerror or str(error)


def holder(port: int) -> str:
    """What listens on a TCP port of this machine, for people: `cordee (process 4711)`."""
    try:
        found = [each.pid for each in psutil.net_connections("tcp") if _listens_on(each, port)]
    except psutil.Error:  # some systems tell only root
        found = []
    for pid in found:
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                return f"{psutil.Process(pid).name()} (process {pid})"
    if found:
        return f"a program of another user; `sudo ss -ltnp sport = :{port}` names it"
    return "another program"


def _listens_on(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
