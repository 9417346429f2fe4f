"""What `cordee doctor` sees on a network: a closed firewall, a wrong clock, bridges of containers."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from cordee.net.enrolment import read_code
from netcluster import CORDEE, Cluster, Node, until
from netfaults import fake_clock
from netlab import NETWORK, ip, run

CLOSED = """table inet office {
    chain input {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        iif lo accept
        meta l4proto { icmp, ipv6-icmp } accept
        PORTS
    }
}"""


def found(node: Node) -> list[dict[str, Any]]:
    """What doctor finds on a node's host."""
    done = node.host.popen((*CORDEE, "doctor", "--json"), stdout=subprocess.PIPE)
    printed, _ = done.communicate(timeout=60)
    return json.loads(printed)["findings"]


def about(node: Node, word: str) -> list[str]:
    """The findings that have a word in them."""
    return [each["what"] for each in found(node) if word in each["what"]]


def rules(node: Node, ports: str) -> None:
    """Close a host's firewall, except for these rules; without any it is open."""
    inside = ["ip", "netns", "exec", node.host.namespace, "nft"]
    subprocess.run([*inside, "flush", "ruleset"], check=True)
    if ports:
        text = CLOSED.replace("PORTS", ports)
        subprocess.run([*inside, "-f", "-"], input=text.encode(), check=True)


@pytest.fixture
def closed(cluster: Cluster) -> Iterator[Node]:
    """A node of the cluster whose firewall is closed, as on a fresh Ubuntu with ufw; its links stay."""
    if not shutil.which("nft"):
        pytest.skip("needs `nft` (Debian: nftables)")
    node = cluster.nodes[1]
    try:
        rules(node, "tcp dport 22 accept")
        yield node
    finally:
        rules(node, "")


def test_a_closed_firewall_is_seen_from_other_nodes(cluster: Cluster, closed: Node) -> None:
    [finding] = [each for each in found(closed) if "firewall" in each["what"]]
    others = [node.host.name for node in cluster.nodes if node is not closed]
    assert finding["problem"]
    assert finding["what"].startswith(
        f"{', '.join(others[:-1])} and {others[-1]} cannot connect to this machine"
    )
    assert "7330" in finding["what"]
    assert f"sudo ufw allow proto tcp from {NETWORK}.0/24 to any port 7330:7360" in finding["remedy"]
    name = closed.host.name
    [seen] = about(cluster.first, "firewall")
    assert seen.startswith(f"This machine cannot connect to {name} on TCP ports 7330, ")


@pytest.mark.slow
def test_a_firewall_that_is_open_for_the_bus_alone_is_seen_too(cluster: Cluster, closed: Node) -> None:
    """Then the nodes see each other, and models that are cut never get further than "connecting"."""
    rules(closed, "tcp dport { 22, 7330 } accept")
    [what] = about(closed, "firewall")
    assert "7330" not in what and " on TCP port 73" in what


def test_a_firewall_that_is_open_as_the_guide_says_is_well(cluster: Cluster, closed: Node) -> None:
    rules(closed, f"ip saddr {NETWORK}.0/24 tcp dport 7330-7360 accept")
    assert about(closed, "firewall") == about(cluster.first, "firewall") == []


@pytest.mark.slow
def test_a_clock_that_is_off_is_named_on_both_sides(cluster: Cluster) -> None:
    if not fake_clock("+1d"):
        pytest.skip("needs libfaketime (Debian: libfaketime)")
    node, name = cluster.nodes[2], cluster.nodes[2].host.name
    assert not about(node, "clock")
    node.host.kill()
    node.host.machine.environment.update(fake_clock("+3h"))
    try:
        node.up()
        until(lambda: node.id in _alive(cluster.first), f"{name} is back")
        until(lambda: len(_alive(node)) == len(cluster.nodes), f"{name} sees the others")
        assert about(node, "clock") == ["This machine's clock is 3 hours ahead of those of the other nodes."]
        assert about(cluster.first, "clock") == [
            f"The clock of {name} is 3 hours ahead of those of the other nodes."
        ]
    finally:
        for key in fake_clock("+3h"):
            del node.host.machine.environment[key]
        node.host.kill()
        node.up()
        cluster.settle()


@pytest.mark.long
def test_a_machine_that_is_off_is_named(cluster: Cluster) -> None:
    node = cluster.nodes[3]
    assert not about(cluster.first, "Not heard from")
    node.host.kill()
    try:
        until(lambda: node.id not in _alive(cluster.first), f"{node.host.name} is missed")
        where = f"{node.host.name} ({node.host.address}:7330)"
        assert about(cluster.first, "Not heard from") == [f"Not heard from: {where}."]
    finally:
        node.up()
        cluster.settle()


def _alive(node: Node) -> list[str]:
    return [each for each, state in node.states().items() if state == "alive"]


def test_bridges_of_containers_do_not_push_the_lan_address_out_of_a_code(stranger: Node) -> None:
    """There is no default route here, and the bridges were there before the network: it is listed last."""
    namespace, switch = stranger.host.namespace, stranger.host.lab.switch
    bridges = ("docker0", "br-0a1b2c3d4e5f", "br-1a1b2c3d4e5f", "virbr0")
    ip("-n", namespace, "link", "set", "eth0", "netns", switch)  # there it gets a higher number
    try:
        for number, name in enumerate(bridges):
            ip("-n", namespace, "link", "add", name, "type", "bridge")
            ip("-n", namespace, "address", "add", f"172.{17 + number}.0.1/16", "dev", name)
            ip("-n", namespace, "link", "set", name, "up")
        ip("-n", switch, "link", "set", "eth0", "netns", namespace)
        ip("-n", namespace, "address", "add", f"{stranger.host.address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        listed = run("ip", "-n", namespace, "-4", "-brief", "address").splitlines()
        assert [line.split()[0].partition("@")[0] for line in listed] == ["lo", *bridges, "eth0"]
        stranger.up()
        addresses = read_code(stranger.verb("invite").strip()).addresses
        assert addresses[0].startswith(f"{stranger.host.address}:")
    finally:
        for name in bridges:
            ip("-n", namespace, "link", "del", name)


@pytest.mark.long
def test_a_machine_without_a_network_says_so_and_notices_one(stranger: Node) -> None:
    namespace, address = stranger.host.namespace, f"{stranger.host.address}/24"
    ip("-n", namespace, "address", "del", address, "dev", "eth0")
    try:
        stranger.up()
        assert about(stranger, "no network address")
    finally:
        ip("-n", namespace, "address", "add", address, "dev", "eth0")
    until(lambda: not about(stranger, "no network address"), "it has noticed its address")
    addresses = read_code(stranger.verb("invite").strip()).addresses
    assert addresses[0].startswith(f"{stranger.host.address}:")
