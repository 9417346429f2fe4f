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
IPV4, IPV6 = 0x0800, 0x86DD
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
    kind = int.from_bytes(frame[12:14])
    if kind == IPV4 and frame[23] == socket.IPPROTO_TCP:
        start, end = 14 + (frame[14] & 15) * 4, 14 + int.from_bytes(frame[16:18])
        hosts = frame[26:34]
    elif kind == IPV6 and frame[20] == socket.IPPROTO_TCP:
        start, end = 54, 54 + int.from_bytes(frame[18:20])
        hosts = frame[22:54]
    else:
        return None
    payload = frame[start + (frame[start + 12] >> 4) * 4 : end]
    return (
        hosts + frame[start : start + 4],
        int.from_bytes(frame[start + 4 : start + 8]),
        frame[start + 13],
        payload,
    )
