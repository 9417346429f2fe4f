"""What passes a lab's switch: frames, and what TCP says in them."""

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator

from netlab import Lab, inside

ALL_PROTOCOLS = 3  # ETH_P_ALL
FRAME_BYTES_MAX = 1 << 16
BUFFER_BYTES = 64 << 20  # of the tap: what passes while Python is busy
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
PROTOCOLS = {socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6, socket.IPPROTO_IGMP}
SYN = 2
TLS_HANDSHAKE, TLS_APPLICATION = 22, 23  # types of TLS records
TLS_TYPES = range(20, 25)


@contextlib.contextmanager
def captured(lab: Lab) -> Iterator[list[bytes]]:
    """Every frame that passes the bridge meanwhile, once."""
    frames: list[bytes] = []
    ended = threading.Event()
    with inside(lab.switch):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    tap.setsockopt(socket.SOL_SOCKET, 33, BUFFER_BYTES)  # SO_RCVBUFFORCE
    tap.setblocking(False)

    def read() -> None:
        while not ended.is_set() or select.select([tap], [], [], 0)[0]:
            if select.select([tap], [], [], 0.1)[0]:
                frames.append(tap.recv(FRAME_BYTES_MAX))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield frames
    finally:
        ended.set()
        reader.join()
        dropped = struct.unpack("II", tap.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        tap.close()
    assert not dropped, f"the tap missed {dropped} frames"


class Conversation:
    """One direction of a TCP connection that began during the capture: what was said, in order."""

    def __init__(self, sequence: int) -> None:
        self._next = sequence
        self._early: dict[int, bytes] = {}
        self.said = b""

    def hear(self, sequence: int, payload: bytes) -> None:
        """A segment, perhaps heard before, perhaps too early."""
        self._early[sequence] = max(payload, self._early.get(sequence, b""), key=len)
        while (payload := self._early.pop(self._next, b"")) != b"":
            self.said += payload
            self._next = (self._next + len(payload)) % (1 << 32)


def conversations(frames: list[bytes]) -> list[bytes]:
    """What each side of each TCP connection said, of those that began meanwhile."""
    found: dict[tuple, Conversation] = {}
    for frame in frames:
        segment = _segment(frame)
        if segment is None:
            continue
        flow, sequence, flags, payload = segment
        if flags & SYN:
            found.setdefault((flow, sequence), Conversation((sequence + 1) % (1 << 32)))
            found[flow] = found[flow, sequence]
        elif payload and flow in found:
            found[flow].hear(sequence, payload)
    unique = {id(each): each.said for each in found.values()}
    return [said for said in unique.values() if said]


def datagrams(frames: list[bytes]) -> list[tuple[set[int], bytes]]:
    """(ports of both sides, payload) of each frame that is UDP."""
    found = []
    for frame in frames:
        packet = _packet(frame, socket.IPPROTO_UDP)
        if packet is not None:
            _, datagram = packet
            ports = {int.from_bytes(datagram[0:2]), int.from_bytes(datagram[2:4])}
            found.append((ports, datagram[8 : int.from_bytes(datagram[4:6])]))
    return found


def is_known(frame: bytes) -> bool:
    """Whether a frame is TCP, UDP, or what finds and keeps neighbours (ARP, ICMPv6, IGMP)."""
    kind = int.from_bytes(frame[12:14])
    protocol = frame[23] if kind == IPV4 else frame[20] if kind == IPV6 else None
    if protocol == socket.IPPROTO_HOPOPTS:  # before ICMPv6 that tells which groups are listened to
        protocol = frame[54]
    return kind == ARP or protocol in PROTOCOLS


def is_tls(said: bytes) -> bool:
    """Whether a side of a connection said nothing but TLS records, the first of them a handshake's."""
    if said[0] != TLS_HANDSHAKE:
        return False
    at = 0
    while at + 5 <= len(said):
        if said[at] not in TLS_TYPES or said[at + 1] != 3:
            return False
        at += 5 + int.from_bytes(said[at + 3 : at + 5])
    return True


def _segment(frame: bytes) -> tuple[bytes, int, int, bytes] | None:
    """(flow, sequence number, flags, payload) of a frame that is TCP."""
    packet = _packet(frame, socket.IPPROTO_TCP)
    if packet is None:
        return None
    hosts, segment = packet
    return (
        hosts + segment[:4],
        int.from_bytes(segment[4:8]),
        segment[13],
        segment[(segment[12] >> 4) * 4 :],
    )


def _packet(frame: bytes, protocol: int) -> tuple[bytes, bytes] | None:
    """(both hosts, what is in it) of a frame of this protocol."""
    kind = int.from_bytes(frame[12:14])
    if kind == IPV4 and frame[23] == protocol:
        return frame[26:34], frame[14 + (frame[14] & 15) * 4 : 14 + int.from_bytes(frame[16:18])]
    if kind == IPV6 and frame[20] == protocol:
        return frame[22:54], frame[54 : 54 + int.from_bytes(frame[18:20])]
    return None
