"""Somebody who is no member, on a host of the lab: `net_intruder.py FOLDER AUTHORITY CLUSTER HOST:PORT...`

FOLDER holds his node.pem and node.key, AUTHORITY is the certificate that signs the cluster's. He listens on
the bus of every node, speaks on it, and knocks at every port he was told. Prints {"heard": keys, "replies":
count, "said": what was said to him, by port}.
"""

import contextlib
import json
import socket
import ssl
import sys
import time
from pathlib import Path

from intruders import intruder

BUS_PORT = "7330"
LISTEN_SECONDS = 2.5  # two beats of every node
KNOCK_SECONDS = 0.5
BYTES_MAX = 4096


def main() -> None:
    folder, authority, cluster, *doors = sys.argv[1:]
    heard: list[str] = []
    buses = [door for door in doors if door.endswith(f":{BUS_PORT}")]
    session = intruder(Path(folder), Path(authority), buses, 0)
    try:
        session.declare_subscriber("cordee/**", lambda sample: heard.append(str(sample.key_expr)))
        session.liveliness().declare_subscriber(
            "cordee/**", lambda sample: heard.append(str(sample.key_expr)), history=True
        )
        said = {door: knock(Path(folder), door).hex() for door in doors}
        for _ in range(10):
            time.sleep(LISTEN_SECONDS / 10)
            session.put(f"cordee/{cluster}/beat/forged", b"forged")
        replies = len(list(session.get("cordee/**", timeout=KNOCK_SECONDS)))
    finally:
        session.close()
    forged = f"cordee/{cluster}/beat/forged"
    print(json.dumps({"heard": [key for key in heard if key != forged], "replies": replies, "said": said}))


def knock(folder: Path, door: str) -> bytes:
    """What is said inside of TLS at a door to who shows these papers."""
    host, _, port = door.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(folder / "node.pem", folder / "node.key")
    said = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), KNOCK_SECONDS) as plain,
        context.wrap_socket(plain) as link,
    ):
        link.settimeout(KNOCK_SECONDS)
        while part := link.recv(BYTES_MAX):
            said += part
    return said


main()
