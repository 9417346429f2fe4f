"""The bus between hosts: two network namespaces and a switch, as root on Linux; skipped elsewhere."""

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cordee.net.identity import Identity
from members import cluster

PATIENCE_SECONDS = 30.0
SYN = 2  # flag in a TCP header
TLS_HANDSHAKE = 22  # type of a TLS record
SWITCH, *HOSTS = NAMESPACES = ("cordee-sw", "cordee-h1", "cordee-h2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """HOSTS with 10.77.0.1 and 10.77.0.2 on the bridge of SWITCH."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and `ip netns`, for network namespaces")
    try:
        ip("netns", "add", SWITCH)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made: {error.stderr.decode().strip()}")
    try:
        inside = ("-n", SWITCH)
        ip(*inside, "link", "add", "bridge", "type", "bridge")
        ip(*inside, "link", "set", "bridge", "up")
        for number, host in enumerate(HOSTS, 1):
            ip("netns", "add", host)
            ip(*inside, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip(*inside, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
        yield
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


CAPTURE = """
import select, socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
tap.bind(("port1", 0))
sys.stdout.write("ready\\n"), sys.stdout.flush()
while sys.stdin not in select.select([tap, sys.stdin], [], [])[0]:
    frame = tap.recv(1 << 16)
    sys.stdout.buffer.write(len(frame).to_bytes(4, "big") + frame)
"""


class Host:
    """A node in a namespace."""

    def __init__(self, namespace: str, member: Identity, peers: list[str], scouting: str) -> None:
        options = {"listen": "", "peers": peers, "scouting": scouting}
        script = Path(__file__).resolve().parents[1] / "helpers" / "bus_node.py"
        command = [sys.executable, script, member.folder.parent, json.dumps(options)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.member = member
        self.addresses: list[str] = []
        self.alive: set[str] = set()
        self.heard: list[str] = []
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def read_events(self) -> None:
        """Note the events that it printed since."""
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if "up" in event:
                    self.addresses = event["up"]
                elif "heard" in event:
                    self.heard.append(event["heard"])
                else:
                    (self.alive.add if event["is"] else self.alive.discard)(event["alive"])

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE_SECONDS) == 0


@contextlib.contextmanager
def hosts(members: list[Identity], peers: list[list[str]], scouting: str) -> Generator[list[Host]]:
    """A node on each of HOSTS; they end well, without being killed."""
    opened = [Host(*each, scouting) for each in zip(HOSTS, members, peers, strict=True)]
    try:
        yield opened
        for each in opened:
            each.close()
    finally:
        for each in opened:
            each.process.kill()


def until(nodes: list[Host], condition: Callable[[], object]) -> float:
    """Wait for it, at most PATIENCE_SECONDS; gives how long it took, in seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE_SECONDS, [each.alive for each in nodes]
        time.sleep(0.01)
        for each in nodes:
            each.read_events()
    return time.monotonic() - start


def together(a: Host, b: Host) -> Callable[[], bool]:
    both = {a.member.node, b.member.node}
    return lambda: a.alive == b.alive == both


def alone(a: Host, b: Host) -> Callable[[], bool]:
    return lambda: a.alive == {a.member.node} and b.alive == {b.member.node}


def test_hosts_meet_by_multicast_notice_a_cut_cable_and_heal(tmp_path: Path, network: None) -> None:
    members = cluster(tmp_path, 2)
    with hosts(members, [[], []], "auto") as (a, b):
        until([a, b], together(a, b))
        ip("-n", SWITCH, "link", "set", "port2", "down")
        print(f"cut noticed after {until([a, b], alone(a, b)):.2f} s")
        ip("-n", SWITCH, "link", "set", "port2", "up")
        print(f"healed after {until([a, b], together(a, b)):.2f} s")


def test_hosts_meet_by_address_alone(tmp_path: Path, network: None) -> None:
    members = cluster(tmp_path, 2)
    with hosts(members, [[], ["10.77.0.1"]], "") as (a, b):
        until([a, b], together(a, b))
        assert a.addresses == ["10.77.0.1:7330"]
        ip("-n", SWITCH, "link", "set", "port1", "down")
        until([a, b], alone(a, b))
        ip("-n", SWITCH, "link", "set", "port1", "up")
        print(f"healed after {until([a, b], together(a, b)):.2f} s")


@pytest.mark.long
def test_a_host_whose_address_changes_is_the_same_node(tmp_path: Path, network: None) -> None:
    members = cluster(tmp_path, 2)
    try:
        with hosts(members, [[], []], "auto") as (a, b):
            until([a, b], together(a, b))
            ip("-n", HOSTS[1], "address", "del", "10.77.0.2/24", "dev", "eth0")
            until([a, b], alone(a, b))
            ip("-n", HOSTS[1], "address", "add", "10.77.0.99/24", "dev", "eth0")
            print(f"together again after {until([a, b], together(a, b)):.2f} s")
            until([a, b], lambda: "10.77.0.99:7330" in (a.member.folder / "peers").read_text())
    finally:
        subprocess.run(["ip", "-n", HOSTS[1], "address", "flush", "dev", "eth0"], check=True)
        ip("-n", HOSTS[1], "address", "add", "10.77.0.2/24", "dev", "eth0")


def test_a_capture_of_the_switch_holds_nothing_that_was_sent(tmp_path: Path, network: None) -> None:
    """All TCP on the wire is TLS; what is not TCP is multicast scouting, and holds no id of a node."""
    members = cluster(tmp_path, 2)
    with captured() as frames, hosts(members, [[], []], "auto") as (a, b):
        until([a, b], together(a, b))
        a.say("the-marked-words")
        until([a, b], lambda: b.heard == ["the-marked-words"])
    openings = first_of_each_flow(frames)
    assert len(openings) >= 2 and {payload[0] for payload in openings} == {TLS_HANDSHAKE}
    wire = b"".join(frames)
    for secret in ("the-marked-words", *(member.node for member in members), members[0].cluster):
        assert secret.encode() not in wire


@contextlib.contextmanager
def captured() -> Generator[list[bytes]]:
    """The frames that pass the switch meanwhile; they are in the list after the block."""
    frames: list[bytes] = []
    command = ["ip", "netns", "exec", SWITCH, sys.executable, "-c", CAPTURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tap:
        assert tap.stdout is not None
        assert tap.stdout.readline() == b"ready\n"
        yield frames
        written, _ = tap.communicate(timeout=PATIENCE_SECONDS)
    while written:
        length = int.from_bytes(written[:4])
        frames.append(written[4 : 4 + length])
        written = written[4 + length :]


def first_of_each_flow(frames: list[bytes]) -> list[bytes]:
    """The first payload of each direction of each TCP connection over IPv4 that began meanwhile."""
    firsts: dict[bytes, bytes] = {}
    for frame in frames:
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            continue
        tcp = 14 + (frame[14] & 15) * 4
        flow = frame[26:34] + frame[tcp : tcp + 4]
        payload = frame[tcp + (frame[tcp + 12] >> 4) * 4 : 14 + int.from_bytes(frame[16:18])]
        if frame[tcp + 13] & SYN:
            firsts[flow] = b""
        elif firsts.get(flow) == b"":
            firsts[flow] = payload
    return [payload for payload in firsts.values() if payload]
