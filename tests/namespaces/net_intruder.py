"""People who are no members, on a host of the lab: `net_intruder.py AUTHORITY CLUSTER FOLDER,... DOOR...`

Each FOLDER holds somebody's node.pem and node.key, AUTHORITY is the certificate that signs the cluster's, a
DOOR is HOST:PORT. They listen on the bus of every node, speak on it, and knock at every door; so does
somebody without any papers. Prints, by the folder's name (or "none"), what each of them learned:
{"heard": keys, "replies": count, "said": what was said to him by door}.
"""

import contextlib
import json
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zenoh

from intruders import intruder

BUS_PORT = "7330"
LISTEN_SECONDS = 2.5  # two heartbeats of every node
KNOCK_SECONDS = 0.5
BYTES_MAX = 4096
HANDS = 16  # doors that are knocked at, at once


def main() -> None:
    authority, cluster, folders, *doors = sys.argv[1:]
    buses = [listener for listener in doors if listener.endswith(f":{BUS_PORT}")]
    forged = f"cordee/{cluster}/heartbeat/forged"
    people = {_name(folder): folder for folder in map(Path, folders.split(","))}
    with contextlib.ExitStack() as stack:
        heard: dict[str, list[str]] = {}
        sessions = {}
        for name, folder in people.items():
            sessions[name] = intruder(folder, Path(authority), buses, 0)
            stack.callback(sessions[name].close)
            heard[name] = listen(sessions[name])
        said = {name: knock_at_all(doors, folder) for name, folder in {**people, "none": None}.items()}
        for _ in range(10):
            time.sleep(LISTEN_SECONDS / 10)
            for session in sessions.values():
                session.put(forged, b"forged")
        replies = {
            # An error is the session's own: that the time was up.
            name: sum(reply.ok is not None for reply in session.get("cordee/**", timeout=KNOCK_SECONDS))
            for name, session in sessions.items()
        }
    learned = {
        name: {
            "heard": [key for key in heard.get(name, []) if key != forged],
            "replies": replies.get(name, 0),
            "said": said[name],
        }
        for name in said
    }
    print(json.dumps(learned))


def _name(folder: Path) -> str:
    return folder.parent.name if folder.name == "cluster" else folder.name


def listen(session: zenoh.Session) -> list[str]:
    """The keys of all that is heard from now on."""
    keys: list[str] = []

    def note(sample: zenoh.Sample) -> None:
        keys.append(str(sample.key_expr))

    session.declare_subscriber("cordee/**", note)
    session.liveliness().declare_subscriber("cordee/**", note, history=True)
    return keys


def knock_at_all(doors: list[str], folder: Path | None) -> dict[str, str]:
    """`knock` at all of them at once."""
    with ThreadPoolExecutor(HANDS) as hands:
        return dict(zip(doors, hands.map(lambda listener: knock(folder, listener), doors), strict=True))


def knock(folder: Path | None, listener: str) -> str:
    """What is said inside of TLS at a door to who shows these papers, in hexadecimal."""
    host, _, port = listener.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if folder is not None:
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
    return said.hex()


main()
