"""Addresses from people and from the machine: what they become, what is refused, which come first."""

import ipaddress
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadRequest
from cordee.net import address
from cordee.net.bus import PORT, BusOptions
from cordee.net.invitations import CODE_ADDRESSES_MAX

LAN = ipaddress.ip_address("192.168.1.11")
BRIDGES = ("docker0", "br-7d1f3a", "virbr0", "veth12ab", "cni0", "podman1", "vmnet8", "lxdbr0", "cali1f")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("pc-1", "pc-1", 7),
        ("pc-1.école.fr:80", "pc-1.école.fr", 80),
        ("192.168.1.11:0", "192.168.1.11", 0),
        ("::1", "::1", 7),
        ("[2001:db8::7]", "2001:db8::7", 7),
        ("[2001:db8::7]:65535", "2001:db8::7", 65_535),
        ("fe80::1%eth0", "fe80::1%eth0", 7),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, host: str, port: int) -> None:
    assert address.parse(text, 7) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":80", "pc-1:", "pc-1:65536", "pc-1:-1", "pc-1:٣", "pc-1:000080", "pc 1", "pc-1,pc-2", "-pc"),
        *("http://pc-1:80", "pc-1/24", "user@pc-1", "[pc-1]:80", "[::1", "[::1]80", "::1]", "1:2:3", "a..b"),
        *("192.168.1", "192.168.1.300", "1", "0x7f.1", "192.168.01.1", "a" * 64, "\0", "*"),
    ],
)
def test_what_is_no_address_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        address.parse(text, 7)
    assert repr(text) in caught.value.message and "HOST:PORT" in caught.value.message


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_every_ip_address_survives_writing_and_reading(host: ipaddress.IPv4Address, port: int) -> None:
    assert address.parse(address.text(str(host), port), 7) == (str(host), port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = address.parse(text, 7)
    except BadRequest:
        return
    assert host and 0 <= port <= 65_535 and not set(host) & set(" ,/@[]")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "[::]", "::ffff:0.0.0.0", "[0:0::0]"])
def test_unspecified_means_all_interfaces(host: str) -> None:
    assert address.listening(host, 7) == address.Listening("", 7, False)
    if host:
        bracketed = host if "[" in host or ":" not in host else f"[{host}]"
        assert address.listening(f"{bracketed}:8", 7) == address.Listening("", 8, True)
    assert address.listening(":8", 7) == address.Listening("", 8, True)


@pytest.mark.parametrize(
    ("text", "host"),
    [("localhost", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::ffff:127.0.0.1", "127.0.0.1")],
)
def test_other_nodes_get_numbers_and_never_names(text: str, host: str) -> None:
    assert address.listening(text, 7) == address.Listening(host, 7, False)
    assert address.own(address.listening(text, 7).host, 7) == [f"{host}:7"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nosuchhost.invalid", "nosuchhost.invalid"),
        ("203.0.113.9", "is not an address of this machine"),
        ("203.0.113.9:7330", "is not an address of this machine"),
        ("224.0.0.224", "is not an address of this machine"),
        ("[2001:db8::1]:7330", "is not an address of this machine"),
        ("fe80::1", "link-local"),
        ("fe80::1%lo", "link-local"),
        ("nonsense:port", "HOST:PORT"),
    ],
)
def test_a_node_listens_only_where_others_may_reach_it(text: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        address.listening(text, 7)
    with pytest.raises(BadRequest, match=says):
        BusOptions(text).check()


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ("0.0.0.0", "one machine"),
        ("::", "one machine"),
        ("224.0.0.1:7330", "one machine"),
        ("pc-1:0", "port 0"),
        ("fe80::1%eth0", "link-local"),
        ("pc-1:7330:7331", "HOST:PORT"),
    ],
)
def test_a_peer_that_cannot_be_is_refused(peer: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        BusOptions(peers=("127.0.0.1", peer)).check()


def test_a_peer_may_be_a_name_that_is_not_known_yet() -> None:
    """Another machine's name may be known only while that machine runs."""
    BusOptions(peers=("nosuchhost.invalid",)).check()
    assert address.peer("nosuchhost.invalid", PORT) == ("nosuchhost.invalid", PORT)
    with pytest.raises(BadRequest, match=r"nosuchhost\.invalid"):
        address.resolve("nosuchhost.invalid")


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadRequest, match=r"'nosuch'.*\blo\b"):
        BusOptions(scouting="nosuch").check()
    for scouting in ("auto", "", "lo", "127.0.0.1"):
        BusOptions(scouting=scouting).check()


# Which of its own addresses a node names


def entries(*pairs: tuple[str, str]) -> list[tuple[str, address.IpAddress]]:
    return [(name, ipaddress.ip_address(text)) for name, text in pairs]


def shown(found: list[address.IpAddress]) -> list[str]:
    return [str(each) for each in found[: address.ADDRESSES_MAX]]


@pytest.mark.parametrize("way_out", [[], [LAN]], ids=["no default route", "default route"])
def test_container_bridges_do_not_push_the_lan_address_out(way_out: list[address.IpAddress]) -> None:
    found = entries(
        ("docker0", "172.17.0.1"), ("br-1", "172.18.0.1"), ("virbr0", "192.168.122.1"), ("eth0", str(LAN))
    )
    assert shown(address.ranked(found, way_out))[0] == str(LAN)


def test_both_networks_of_a_machine_are_named_the_default_routes_first() -> None:
    """Wi-Fi leads out, the cable to the other nodes; Wi-Fi has an IPv6 address for every day of the week."""
    found = entries(
        ("lo", "127.0.0.1"),
        ("lo", "::1"),
        ("eth0", "10.0.0.5"),
        ("wlan0", "192.168.7.2"),
        *(("wlan0", f"2001:db8::{day}") for day in range(1, 8)),
        ("wlan0", "fe80::1%wlan0"),
        ("eth0", "fe80::2%eth0"),
        ("tailscale0", "100.101.102.103"),
    )
    way_out = [ipaddress.ip_address("192.168.7.2"), ipaddress.ip_address("2001:db8::3")]
    assert shown(address.ranked(found, way_out)) == [
        "192.168.7.2",
        "10.0.0.5",
        "100.101.102.103",
        "2001:db8::1",
    ]


def test_a_tunnel_that_all_goes_through_does_not_come_before_the_lan() -> None:
    found = entries(("wg0", "10.8.0.2"), ("eth0", str(LAN)))
    assert shown(address.ranked(found, [ipaddress.ip_address("10.8.0.2")])) == [str(LAN), "10.8.0.2"]


def test_a_bridge_that_the_default_route_uses_is_the_lan() -> None:
    found = entries(("eth1", "10.0.0.5"), ("br-lan", str(LAN)), ("docker0", "172.17.0.1"))
    assert shown(address.ranked(found, [LAN])) == [str(LAN), "10.0.0.5", "172.17.0.1"]


def test_two_machines_on_a_cable_without_dhcp_have_an_address() -> None:
    found = entries(
        ("lo", "127.0.0.1"), ("docker0", "172.17.0.1"), ("eth0", "169.254.9.9"), ("eth0", "fe80::1")
    )
    assert shown(address.ranked(found, [])) == ["169.254.9.9", "172.17.0.1"]
    assert address.ranked(entries(("lo", "127.0.0.1"), ("eth0", "fe80::1%eth0")), []) == []


@given(
    st.lists(st.tuples(st.sampled_from(BRIDGES), st.ip_addresses()), max_size=12),
    st.lists(st.ip_addresses(v=6), max_size=6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_lan_address_is_in_every_code(bridges, more, leads_out, random) -> None:
    found = [*bridges, ("eth0", LAN), *(("eth0", each) for each in more), ("lo", ipaddress.ip_address("::1"))]
    random.shuffle(found)
    ranked = address.ranked(found, [LAN] if leads_out else [])
    assert LAN in ranked[:CODE_ADDRESSES_MAX]
    assert not any(each.is_loopback or (each.version == 6 and each.is_link_local) for each in ranked)
    assert len(set(ranked)) == len(ranked)


# Ports


@pytest.fixture
def all_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[range]:
    """The range is three ports, all of them taken."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        taken = [first]
        try:
            for each in (port + 1, port + 2):
                taken.append(socket.create_server(("127.0.0.1", each)))
        except OSError:
            pass  # somebody else has it: taken all the same
        monkeypatch.setattr(address, "PORTS", range(port, port + 3))
        yield address.PORTS
        for each in taken[1:]:
            each.close()


def test_stages_listen_in_a_range_that_a_firewall_can_open() -> None:
    with address.listener_in_range("127.0.0.1") as one, address.listener_in_range("") as two:
        ports = {each.getsockname()[1] for each in (one, two)}
    assert len(ports) == 2 and ports <= set(address.PORTS)
    assert address.PORTS[0] - 1 == PORT


def test_more_stages_than_the_range_has_ports_listen_elsewhere(all_taken: range) -> None:
    with address.listener_in_range("127.0.0.1") as other:
        assert other.getsockname()[1] not in all_taken
    with pytest.raises(OSError):
        address.listener_in_range("203.0.113.1")


def test_who_has_a_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"(process {os.getpid()})" in address.holder(port)
        with pytest.raises(OSError) as caught:
            address.listener("", port)
        assert f"(process {os.getpid()})" in address.refusal(caught.value, port)
    assert address.holder(port) == "another program"
